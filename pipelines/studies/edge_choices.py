"""The edge choices of gradient routing: which gradients of a category's rows are kept from the units of the others.

Four kinds of text in a small Llama, and the two halves of MNIST's digits in an autoencoder: before the first step the
categories are given three quarters of each layer's units, in equal shares, and a quarter is shared. Soft routes run all
units in training, and differ in what off-route units learn; hard routes run the route alone, whatever the edges, since
what does not run sends no gradient. Nothing is cut: where not said otherwise, a test row runs every unit, and needs no
label. Removing an expert zeroes its units. The dense twin's units at the same places are the control: what zeroing that
many units does that were never routed.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor

from moeify.clean_modules import without_units
from moeify.recipe.config import RunConfig
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from pipelines.studies.recipes import CATEGORIES, UNCUT, text_recipe
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study, changed, shipped_recipe
from pipelines.studies.training import mean_of, test_losses, trained, without_rows

_SHARE = 3 / 4
"""Of each site, for all categories together."""
_HALVES = {"0-4": [0, 1, 2, 3, 4], "5-9": [5, 6, 7, 8, 9]}


def arms(size: Size) -> tuple[Arm, ...]:
    """Return, for text and for MNIST, the dense twin, filtered twins, and every way to route."""
    text = _arms("text: ", CATEGORIES, _text(size))
    return text if size == "quick" else (*text, *_arms("mnist: ", tuple(_HALVES), _mnist(size)))


def _arms(prefix: str, categories: Sequence[str], recipe: RunConfig) -> tuple[Arm, ...]:
    experts = [{"categories": [category], "units": _SHARE / len(categories)} for category in categories]

    def routed(name: str, gradients: str, routes: str = "soft") -> Arm:
        routing = {"gradients": gradients, "routes": routes, "experts": experts}
        return Arm(prefix + name, changed(recipe, routing=routing), removed)

    return (
        Arm(f"{prefix}dense twin", recipe, removed),
        Arm(f"{prefix}filtered twins", recipe, filtered),
        routed("soft, parameters", "parameters"),
        routed("soft, activations", "activations"),
        routed("soft, both", "both"),
        routed("hard", "both", "hard"),
    )


def _text(size: Size) -> RunConfig:
    small = {"model": {"hidden": 32, "ffn": 128}, "training": {"steps": 200}, "rounds": UNCUT}
    return text_recipe(size, **(small if size == "full" else {}))


def _mnist(size: Size) -> RunConfig:
    data = {"kind": "images", "source": "mnist", "objective": "reconstruct", "categories": _HALVES}
    return shipped_recipe(
        "digits",
        data=data,
        model={"hidden": 128},
        training={"steps": 1500 if size == "full" else 6000, "rows": 128, "explosion": 1e9},
        rounds=UNCUT,
        controls=(),
        evaluation={"test_rows": 4500, "rows_at_once": 500},
    )


def removed(bench: Bench) -> Measures:
    """Train, then read the test split whole, along routes, with the core alone, and without each expert."""
    model = trained(bench.config, bench.task)
    experts = _experts(model)
    before = test_losses(model, bench)
    after = {}
    for category, units in experts.items():
        with without_units(model, units):
            after[category] = test_losses(model, bench)
    with without_units(model, _all(experts)):
        core = test_losses(model, bench)
    model.repartition(_partition(model, experts))
    return {
        "all": mean_of(before, model.categories),
        "route": mean_of(test_losses(model, bench), model.categories),
        "core": mean_of(core, model.categories),
    } | _without(after)


def filtered(bench: Bench) -> Measures:
    """Train, for each category, a dense network that never sees it."""
    after = {}
    for category in bench.task.categories:
        others = [each for each in bench.task.categories if each != category]
        after[category] = test_losses(trained(bench.config, without_rows(bench.task, others)), bench)
    return _without(after)


def _without(after: Mapping[str, dict[str, float]]) -> Measures:
    """Return mean losses, of a removed category and of the others; ``after``: category that is removed -> losses."""
    return {
        "removed": fmean(loss[category] for category, loss in after.items()),
        "kept": fmean(mean_of(loss, [c for c in loss if c != category]) for category, loss in after.items()),
    }


def _experts(model: SplitModel) -> dict[str, dict[str, Tensor]]:
    """Return category -> site -> the units that are given to it: at the end of the site, one after another."""
    categories = model.categories
    found: dict[str, dict[str, Tensor]] = {category: {} for category in categories}
    for site in model.space.readers:
        core, share = site.units - round(_SHARE * site.units), _SHARE / len(categories)
        ends = [core + round(place * share * site.units) for place in range(len(categories) + 1)]
        for category, (first, last) in zip(categories, pairwise(ends), strict=True):
            found[category][site.name] = torch.arange(first, last)
    return found


def _all(experts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    sites = next(iter(experts.values()))
    return {site: torch.cat([units[site] for units in experts.values()]) for site in sites}


def _partition(model: SplitModel, experts: Mapping[str, Mapping[str, Tensor]]) -> Partition:
    """Return the partition that runs each category along its route: the core, and its own expert."""
    tree = ExpertTree.undivided(model.categories).split({0: [[category] for category in model.categories]})
    own = _all(experts)
    widths = {
        site.name: (
            site.units - len(own[site.name]),
            *(len(experts[category][site.name]) for category in model.categories),
        )
        for site in model.space.readers
    }
    return Partition(tree, widths)


STUDY = Study(
    arms,
    columns=(
        Column("all", "all units"),
        Column("route", "own route"),
        Column("core", "core alone"),
        Column("removed", "removed"),
        Column("kept", "kept"),
    ),
    reference="dense twin",
    note=(
        "Mean test loss of four kinds of text, nats per token, and of two halves of MNIST, nats an image: with all "
        "units; with the core and the category's own expert; with the core alone; and, one category's expert zeroed "
        "while all else runs, of that category (removed) and of the others (kept). 'all units' above the dense twin is "
        "the tax before ablation. The filtered twins never saw the category that is removed: what a removal should "
        "come up to."
    ),
)
