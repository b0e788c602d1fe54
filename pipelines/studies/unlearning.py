"""Unlearning: expand, route, ablate, against other ways to a network without a category, on two pairs of texts.

Of Cloud et al. 2024 (arXiv 2410.04332, section 4.2): stories with a word for trees or woods are to be removed, the
other stories kept. The larger pair: mathematics is removed, fiction kept. Every arm ends as a plain network that runs
all rows (``removal``).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moeify.recipe.config import RunConfig
from moeify.recipe.variants import variant
from pipelines.studies import removal
from pipelines.studies.recipes import text_recipe
from pipelines.studies.removal import Removed, Terms, in_shares
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study, changed

_STORIES = "text-tinystories/tinystories-mini.jsonl.xz"
STORIES: Mapping[str, Any] = {
    "forest": {"kind": "jsonl", "path": _STORIES, "where": {"label": ["forest"]}},
    "other": {"kind": "jsonl", "path": _STORIES, "where": {"label": ["other"]}},
}
_DOMAINS: Mapping[str, Any] = {
    "mathematics": {"kind": "jsonl", "path": "text-stacks-math/stacks.jsonl.xz"},
    "fiction": {"kind": "jsonl", "path": "text-fiction/fiction-6genres.jsonl.xz", "group": "author"},
}
INSTALLED: Mapping[str, Any] = {
    "python": {"kind": "installed", "source": "python"},
    "prose": {"kind": "installed", "source": "prose"},
}
"""Of ``--quick``, which needs no data of its own."""
_SMALL: Mapping[Size, Mapping[str, Any]] = {
    "quick": {"hidden": 16, "layers": 1, "heads": 2, "ffn": 32},
    "full": {"hidden": 32, "layers": 2, "heads": 4, "ffn": 128},
    "large": {},
}
_STEPS: Mapping[Size, int] = {"quick": 12, "full": 160, "large": 2000}
SHARES = (0.2, 0.8)
"""Of the tokens: what is to be removed, and the rest."""
ROWS = 16
"""Of a step."""


_SKIPPED = ("routed", "fixed experts", "fixed, no core")
"""By the second pair."""


def arms(size: Size) -> tuple[Arm, ...]:
    """Return every way to remove, for each pair."""
    if size == "quick":
        return _pair(size, "", INSTALLED)
    return (*_pair(size, "stories: ", STORIES), *_pair(size, "domains: ", _DOMAINS, few=True))


def _pair(size: Size, prefix: str, texts: Mapping[str, Any], *, few: bool = False) -> tuple[Arm, ...]:
    dense = texts_recipe(size, texts)
    fixed = variant(dense, "init", len(texts))
    found = (
        Arm(f"{prefix}dense twin", dense, dense_twin),
        Arm(f"{prefix}filtered twin", dense, filtered),
        Arm(f"{prefix}routed", dense, routed),
        Arm(f"{prefix}routed, hard", dense, routed_hard),
        Arm(f"{prefix}routed, whole", dense, routed_whole),
        Arm(f"{prefix}attribution", dense, attributed),
        Arm(f"{prefix}fixed experts", fixed, split),
        Arm(f"{prefix}fixed, no core", _without_core(fixed), split),
        Arm(f"{prefix}loop", dense, split),
        Arm(f"{prefix}loop, apart", dense, handed_over),
    )
    return tuple(arm for arm in found if not few or arm.name.removeprefix(prefix) not in _SKIPPED)


def _without_core(config: RunConfig) -> RunConfig:
    rounds = [{**config.rounds[0].model_dump(), "separation": 0.5}]
    return changed(config, rounds=rounds, partition={"min_core": 0.0})


def texts_recipe(size: Size, texts: Mapping[str, Any], steps: int | None = None) -> RunConfig:
    """Return the recipe of some texts, the first of which is to be removed; its one cut leaves a fifth shared."""
    steps = _STEPS[size] if steps is None else steps
    small = {"length": 64, "vocabulary": 512} if size != "large" else {}
    few = {"test_rows": 8, "validation_rows": 8} if size == "quick" else {"test_rows": 96, "validation_rows": 48}
    return text_recipe(
        size,
        data={"source": {"kind": "mixed", "categories": dict(texts), "megabytes": 3.0}, **small},
        model=_SMALL[size],
        training={"steps": steps, "rows": ROWS * len(texts)},  # of which a bench takes those of its shares
        partition={"min_core": 0.2},
        rounds=[{"train": steps * 15 // 100, "recover": steps // 4, "branching": 2, "separation": 0.4}],
        evaluation=few,
    )


def terms(bench: Bench) -> Terms:
    """Return the terms of a bench, whose first category is removed: a fifth of the wider network's units go with it."""
    steps = bench.config.training.steps
    units: int = bench.config.model.model_dump()["ffn"]
    attack = (1, 2) if steps < 50 else (5, 20, 50)
    return Terms(bench.task.categories[0], units // 4, max(1, steps // 10), 64, attack)


def dense_twin(bench: Bench) -> Measures:
    """Remove nothing."""
    return _judged(bench, lambda *_: None)


def filtered(bench: Bench) -> Measures:
    """Never learn it."""
    return _judged(bench, lambda mine, asked: removal.never_seen(mine, asked.kept(mine)))


def routed(bench: Bench) -> Measures:
    """Expand, route, ablate; all units run for all rows in training."""
    return _judged(bench, removal.routed)


def routed_hard(bench: Bench) -> Measures:
    """Expand, route, ablate; fresh units run for what is to be removed alone (SGTM, arXiv 2512.05648)."""
    return _judged(bench, lambda mine, asked: removal.routed(mine, asked, hard=True))


def routed_whole(bench: Bench) -> Measures:
    """Expand, route, ablate; what is to be removed teaches fresh units and nothing else in the whole network."""
    return _judged(bench, lambda mine, asked: removal.routed(mine, asked, hard=True, whole=True))


def attributed(bench: Bench) -> Measures:
    """Remove as many units of a network that was trained as ever."""
    return _judged(bench, removal.attributed)


def split(bench: Bench) -> Measures:
    """Run the recipe, which routes rows by their labels from its cut on, and keep one category's part."""
    return _judged(bench, removal.split)


def handed_over(bench: Bench) -> Measures:
    """Run the recipe with a category apart, and keep the other's part."""
    return _judged(bench, removal.handed_over)


def _judged(bench: Bench, way: Callable[[Bench, Terms], Removed | None]) -> Measures:
    mine = replace(bench, task=in_shares(bench.task, SHARES, ROWS))
    return removal.judged(mine, terms(mine), way(mine, terms(mine)))


STUDY = Study(
    arms,
    columns=(
        Column("tax_before", "tax before", against=False),
        Column("tax_after", "tax after", against=False),
        Column("tax", "tax, recovered", against=False),
        Column("gone_after", "gone after", against=False),
        Column("gone", "gone, recovered", against=False),
        Column("relearned", "gone, attacked", against=False),
        Column("equivalent", "equivalent", against=False),
    ),
    note=(
        "Nats per token above the dense twin of the seed, from which nothing is removed and which has the same "
        "recovery and attack. tax: of what is kept, before the removal, right after it, and after a recovery on rows "
        "of what is kept. gone: of what is removed, likewise, and at the best of an attack that trains on 64 of its "
        "rows; what never saw it (filtered twin) says how much there is to go. equivalent: the share of the dense "
        "twin's own steps that reach the same loss of what is kept, at most 1."
    ),
)
