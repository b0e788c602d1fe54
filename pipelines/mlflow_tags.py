"""What runs are filtered by in MLflow: tags of the recipe and of the outcome, and the data as inputs of the run."""

import json
from typing import TYPE_CHECKING

from moeify.events import RoundEnded, Started
from moeify.recipe.config import RunConfig
from pipelines.runs import RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DIGEST = 36
"""Characters that MLflow takes."""
_CONTEXTS = {"train": "training", "validation": "validation", "test": "testing"}
"""Split -> what MLflow calls its use."""


def recipe_tags(config: RunConfig) -> dict[str, str]:
    """Return what a recipe says of method and model."""
    return {
        "moeify.recipe": config.name,
        "moeify.seed": str(config.seed),
        "moeify.data": config.data.kind,
        "moeify.model": config.model.kind,
        "moeify.method": config.partition.owners.kind,
        "moeify.score": config.attribution.score,
        "moeify.controls": ", ".join(config.controls) or "none",
    }


def outcome_tags(folder: RunFolder) -> dict[str, str]:
    """Return how far a run was split and how it stands: ``moeify.verdict`` against the dense twin, and each control.

    A verdict is better, level, worse, or unknown where the run did not record how sure it is. Nothing before a round is
    kept. What cannot be read is left out.
    """
    from pipelines.report.recorded import Recorded
    from pipelines.report.verdict import gaps

    try:
        run = Recorded.read(folder)
        kept = [event for event in run.events if isinstance(event, RoundEnded) and event.outcome == "kept"]
        if not kept:
            return {}
        tags = {"moeify.separation": f"{kept[-1].separation:.2f}", "moeify.rounds_kept": str(len(kept))}
        for gap in gaps(run):
            key = "moeify.verdict" if gap.rival == "dense twin" else f"moeify.verdict_{gap.rival.split()[0]}"
            tags[key] = gap.outcome
        return tags
    except ValueError:  # a damaged file; the report says so
        return {}


def log_data(client: "MlflowClient", run: str, config: RunConfig, started: Started) -> None:
    """Log each split of the data as an input of the run; nothing where the journal does not say what it was."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if not started.data_hash:
        return
    source = json.dumps(config.data.model_dump(mode="json"))[:60_000]
    inputs = []
    for split, context in _CONTEXTS.items():
        sizes = started.data_sizes.get(split, {})
        profile: dict[str, object] = {"unit": started.unit, "sha256": started.data_hash}
        profile["categories"] = list(started.categories)
        profile |= {f"{started.unit}s": sum(sizes.values()), "by_category": sizes} if sizes else {}
        name = f"{config.name}-{split}"
        known = Dataset(name, started.data_hash[:_DIGEST], "moeify", source, None, json.dumps(profile)[:16_000])
        inputs.append(DatasetInput(known, [InputTag("mlflow.data.context", context)]))
    client.log_inputs(run, inputs)
