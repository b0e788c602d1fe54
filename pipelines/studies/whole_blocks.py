"""Whole blocks for categories: a mixture of experts by hand, against splits at the same active units.

A network of five layers. By hand: the first FFN is shared, and each of the other four belongs to one category, but for
eight units, which run for all, since a route has units in every site. So a category runs its own block and the shared
one. Rivals run as many units: split before the first step, each layer shared out alike at random, and the loop.
"""

from moeify.recipe.model import LlamaModel
from moeify.recipe.variants import variant
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from pipelines.studies.recipes import CATEGORIES, text_recipe
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study, changed
from pipelines.studies.training import mean_of, run_loop, test_losses, trained

_SHARED = 8
"""Units of a category's block that run for all."""


def arms(size: Size) -> tuple[Arm, ...]:
    """Return the dense twin, blocks by hand, and splits as deep as those."""
    steps = {"quick": 12, "full": 200, "large": 640}[size]
    layers = len(CATEGORIES) + 1
    network = {"layers": layers} | ({"hidden": 32, "ffn": 128} if size == "full" else {})
    dense = text_recipe(size, model=network, training={"steps": steps}, rounds=_rounds(steps, 0.5))
    assert isinstance(dense.model, LlamaModel)
    ffn = dense.model.ffn
    depth = 1.0 - (2 * ffn + (layers - 2) * _SHARED) / (layers * ffn)
    loop = changed(dense, rounds=_rounds(steps, depth))
    return (
        Arm("dense twin", dense, whole),
        Arm("blocks by hand", dense, blocks),
        Arm("split at init", variant(loop, "init", len(CATEGORIES)), split),
        Arm("loop", loop, split),
    )


def _rounds(steps: int, separation: float) -> list[dict[str, float]]:
    return [
        {"train": steps * 15 // 100, "recover": steps * 8 // 100, "separation": 0.7 * separation},
        {"train": steps * 5 // 100, "recover": steps * 12 // 100, "separation": separation},
    ]


def whole(bench: Bench) -> Measures:
    """Train the dense network."""
    return _measures(trained(bench.config, bench.task), bench)


def blocks(bench: Bench) -> Measures:
    """Train with each category's block running for it alone."""
    model = SplitModel(bench.task.build(), CATEGORIES)
    model.repartition(by_hand(model))
    return _measures(trained(bench.config, bench.task, model), bench)


def by_hand(model: SplitModel) -> Partition:
    """Return the partition that gives the first site to all and each of the others to one category."""
    first, *others = model.space.readers
    tree = ExpertTree.undivided(CATEGORIES).split({0: [[category] for category in CATEGORIES]})
    widths = {first.name: (first.units, *(0 for _ in CATEGORIES))}
    for site, owner in zip(others, CATEGORIES, strict=True):
        own = site.units - _SHARED
        widths[site.name] = (_SHARED, *(own if category == owner else 0 for category in CATEGORIES))
    return Partition(tree, widths)


def split(bench: Bench) -> Measures:
    """Run the recipe."""
    return _measures(run_loop(bench)[1], bench)


def _measures(model: SplitModel, bench: Bench) -> Measures:
    intact = test_losses(model, bench)
    rises = []
    for category in CATEGORIES if len(model.partition.tree.nodes) > 1 else ():
        with model.ablated(category):
            rises.append(test_losses(model, bench)[category] - intact[category])
    measures = {"loss": mean_of(intact, CATEGORIES), "active": 1.0 - model.partition.separation}
    return measures | ({"removal": sum(rises) / len(rises)} if rises else {})


STUDY = Study(
    arms,
    columns=(
        Column("loss", "loss, nats"),
        Column("active", "FFN active", against=False),
        Column("removal", "rise on removal"),
    ),
    reference="dense twin",
    note=(
        "loss: mean test loss of four kinds of text, nats per token, each along its route. rise on removal: of a "
        "category's loss without its leaf, mean over categories; what the loop's groups own stays."
    ),
)
