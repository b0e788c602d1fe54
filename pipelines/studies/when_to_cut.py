"""When to cut first, and by what: waiting teaches attribution, and takes steps from the experts.

Every arm splits the recipe's network to the same separation within the same steps; a seed's arms share their twins.
Cuts at one step by attribution, by draw and at equal widths tell apart what the moment, the owners and the widths do.
"""

from typing import Any

from moeify.evaluation import row_losses
from moeify.recipe.config import RunConfig
from moeify.recipe.variants import scaled, variant
from moeify.world import Solo
from pipelines.studies.recipes import CATEGORIES, text_recipe
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study, changed, shipped_recipe
from pipelines.studies.training import mean_of, run_loop

_DEEP = 0.55
"""The separation of every arm: 45 % of the units active."""


def arms(size: Size) -> tuple[Arm, ...]:
    """Return the split that is fixed before the first step, the loop, and cuts at several steps."""
    loop = text_recipe(size) if size == "quick" else shipped_recipe("domains", controls=("told",))
    loop = scaled(loop, _DEEP)
    steps, blind = loop.training.steps, {"owners": {"kind": "random"}}
    first, tenth, third = max(1, steps // 100), steps // 32, steps // 7
    at_once = variant(loop, "init", len(CATEGORIES))
    return (
        Arm("before the first step", at_once, taxed),
        Arm("same, widths by J", changed(_once(loop, 0), partition=blind), taxed),
        Arm("same, owners and widths by J", _once(loop, 0), taxed),
        Arm("after 1 %", _once(loop, first), taxed),
        Arm("after 1 %, owners drawn", changed(_once(loop, first), partition=blind), taxed),
        Arm("after 1 %, equal widths", changed(_once(loop, first), partition={"budget": "equal"}), taxed),
        Arm("after 3 %", _once(loop, tenth), taxed),
        Arm("after 15 %", variant(loop, "oneshot", len(CATEGORIES)), taxed),
        Arm("groups at once, rest after 15 %", _twice(loop, 0, third), taxed),
        Arm("groups after 1 %, rest after 15 %", _twice(loop, first, third), taxed),
        Arm("loop", loop, taxed),
    )


def _once(config: RunConfig, at: int) -> RunConfig:
    """Return the recipe with one cut into all leaves at this step."""
    return changed(config, rounds=[_cut(at, config.training.steps - at, len(CATEGORIES), _DEEP)], tree=None)


def _twice(config: RunConfig, first: int, then: int) -> RunConfig:
    """Return the recipe with a cut into two groups, and one into all leaves."""
    groups = config.rounds[0].separation
    rounds = [
        _cut(first, (then - first) // 2, 2, groups),
        _cut((then - first + 1) // 2, config.training.steps - then, 2, _DEEP),
    ]
    return changed(config, rounds=rounds, tree=None)


def _cut(train: int, recover: int, branching: int, separation: float) -> dict[str, Any]:
    return {"train": train, "recover": recover, "branching": branching, "separation": separation}


def taxed(bench: Bench) -> Measures:
    """Run the recipe; what is chosen is chosen by the loss on validation data."""
    result, model = run_loop(bench)
    seen = row_losses(model, bench.task, Solo(), bench.config.evaluation, "validation").by_category(bench.task)
    measures = {
        "validation": mean_of(seen, bench.task.categories),
        "test": mean_of(result.test_loss["split"], bench.task.categories),
        "tax": result.tax["mean"],
        "active": result.active_fraction["mean"],
    }
    return measures | ({"tax_told": result.tax_told["mean"]} if result.tax_told else {})


STUDY = Study(
    arms,
    columns=(
        Column("active", "FFN active", against=False),
        Column("validation", "validation, nats"),
        Column("test", "test, nats"),
        Column("tax", "tax, nats", against=False),
        Column("tax_told", "tax, told twin", against=False),
    ),
    reference="before the first step",
    note=(
        "Mean loss over categories, and on test data above the dense twin's and above the told twin's. What a recipe "
        "goes by is validation data. Needs the data of the recipe domains (MOEIFY_DATA)."
    ),
)
