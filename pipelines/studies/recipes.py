"""Shipped recipes in the sizes of studies."""

from collections.abc import Mapping
from typing import Any

from moeify.recipe.config import RunConfig
from pipelines.studies.study import Size, changed, shipped_recipe

CATEGORIES = ("python", "prose", "c", "web")
"""Of the recipe ``text``."""
UNCUT = ({"train": 0, "recover": 0, "separation": 0.5},)
"""The rounds of a recipe whose arm makes no cut, or its own: a recipe has one at least."""
_NETWORKS: Mapping[Size, Mapping[str, Any]] = {
    "quick": {"hidden": 16, "layers": 1, "heads": 2, "ffn": 128},
    "full": {"hidden": 48, "layers": 2, "heads": 4, "ffn": 256},
    "large": {},
}
_STEPS: Mapping[Size, int] = {"quick": 12, "full": 400, "large": 640}


def text_recipe(size: Size, **changes: Any) -> RunConfig:
    """Return the recipe ``text`` in the size of a study, without controls, changed as ``shipped_recipe`` does."""
    steps = _STEPS[size]
    rounds = [
        {"train": steps * 15 // 100, "recover": steps * 8 // 100, "branching": 2, "separation": 0.35},
        {"train": steps * 5 // 100, "recover": steps * 12 // 100, "branching": 2, "separation": 0.5},
    ]
    config = shipped_recipe(
        "text",
        model=_NETWORKS[size],
        data={} if size == "large" else {"length": 64},
        training={"steps": steps},
        rounds=rounds,
        controls=(),
        evaluation={"test_rows": 8, "validation_rows": 8} if size == "quick" else {},
    )
    return changed(config, **changes)
