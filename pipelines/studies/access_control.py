"""Access control: of N categories any set may be permitted. One split model serves all 2^N sets by removing experts.

A filtered twin, the dense network trained on the permitted categories alone, is what access control should come up to:
as good on what is permitted, and as ignorant of the rest. Twins of a sample of sets are trained, with as many rows of
each category as the one run has. Removal takes every expert that serves no permitted category.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from statistics import fmean

from moeify.recipe.config import RunConfig
from moeify.recipe.variants import variant
from moeify.routed.split_model import SplitModel
from pipelines.studies.recipes import CATEGORIES, text_recipe
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study, changed
from pipelines.studies.training import mean_of, run_loop, test_losses, trained, without_rows

SAMPLE: tuple[tuple[str, ...], ...] = (
    *combinations(CATEGORIES, 3),
    ("python", "prose"),
    ("c", "web"),
    ("python",),
    ("web",),
)
"""The permitted sets that have a filtered twin."""


def arms(size: Size) -> tuple[Arm, ...]:
    """Return the filtered twins, the dense twin that permits everything, and split models of several depths."""
    loop = text_recipe(size)
    first = variant(loop, "init", len(CATEGORIES))
    return (
        Arm("filtered twins", loop, filtered),
        Arm("dense twin", loop, unfiltered),
        Arm("loop", loop, removed),
        Arm("split at init", first, removed),
        Arm("split at init, small core", _deeper(first, 0.66, 0.1), removed),
        Arm("split at init, no core", _deeper(first, 0.75, 0.0), removed),
    )


def _deeper(config: RunConfig, separation: float, core: float) -> RunConfig:
    rounds = [{**config.rounds[0].model_dump(), "separation": separation}]
    return changed(config, rounds=rounds, partition={"min_core": core})


def filtered(bench: Bench) -> Measures:
    """Train a twin for each set of the sample."""
    losses = {}
    for permitted in SAMPLE:
        twin = trained(bench.config, without_rows(bench.task, permitted))
        losses[permitted] = test_losses(twin, bench)
    return _measures(losses, trainings=sum(map(len, SAMPLE)) / len(CATEGORIES))


def unfiltered(bench: Bench) -> Measures:
    """Train the dense network on everything; nothing can be removed from it."""
    loss = test_losses(trained(bench.config, bench.task), bench)
    return _measures(dict.fromkeys(_sets(), loss), trainings=1.0)


def removed(bench: Bench) -> Measures:
    """Run the recipe once, and remove what serves no permitted category, for every set."""
    _, model = run_loop(bench)
    losses = {}
    for permitted in _sets():
        with model.ablated(*superfluous(model, permitted)):
            losses[permitted] = test_losses(model, bench)
    active = 1.0 - model.partition.separation
    return _measures(losses, trainings=1.0) | {"active": active}


def superfluous(model: SplitModel, permitted: Collection[str]) -> list[str]:
    """Return the experts that serve no permitted category; what is below one is removed with it."""
    return [node.name for node in model.partition.tree.nodes[1:] if not set(node.categories) & set(permitted)]


def _sets() -> list[tuple[str, ...]]:
    """Return every set of categories that permits something."""
    return [each for size in range(1, len(CATEGORIES) + 1) for each in combinations(CATEGORIES, size)]


def _measures(losses: Mapping[tuple[str, ...], Mapping[str, float]], trainings: float) -> Measures:
    """Put an arm's figures together: means over the sample's sets, and the loss of every set and category."""
    measures = {
        "permitted": _mean(losses, SAMPLE, permitted=True),
        "others": _mean(losses, SAMPLE, permitted=False),
        "trainings": trainings,
    }
    for permitted, loss in losses.items():
        measures |= {f"loss/{'+'.join(permitted)}/{category}": value for category, value in loss.items()}
    return measures


def _mean(
    losses: Mapping[tuple[str, ...], Mapping[str, float]], sets: Sequence[tuple[str, ...]], *, permitted: bool
) -> float:
    asked = {each: [c for c in CATEGORIES if (c in each) == permitted] for each in sets}
    return fmean(mean_of(dict(losses[each]), categories) for each, categories in asked.items())


STUDY = Study(
    arms,
    columns=(
        Column("permitted", "permitted, nats"),
        Column("others", "others, nats"),
        Column("active", "FFN active", against=False),
        Column("trainings", "trainings", against=False),
    ),
    reference="filtered twins",
    note=(
        "permitted, others: mean test loss of the categories that a set permits, and of those it does not, over "
        f"{len(SAMPLE)} of the 15 sets; above the filtered twins: what permitted categories cost, and, below 0, what "
        "is still known of the others. trainings: rows trained on, over those of one dense run; twins of all 15 sets "
        "take 8."
    ),
)
