"""Clean modules: whether an expert holds what its categories need, and nothing that others need.

An expert is removed with all below it, as a user would remove it. That must hurt the categories it serves, by its
interval; hurt others at most a third as much; and leak less to others, for what it hurts its own, than the removal of
as many units of each site that are drawn at random from all that its categories run. Those may hurt more, since the
core is among it, but they hurt everyone. Where rows are routed by their labels, no expert below the core can leak.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from moeify import rows as rows_of
from moeify.evaluation import RowLosses, row_losses
from moeify.recipe.config import RunConfig
from moeify.result import ModuleTest
from moeify.routed.split_model import SplitModel
from moeify.shares import assign, whole
from moeify.splitting.partition import Partition
from moeify.task import Task
from moeify.world import World

_RESAMPLES = 1_000
_INTERVAL = (2.5, 97.5)


def module_tests(
    model: SplitModel,
    task: Task,
    world: World,
    config: RunConfig,
    intact: RowLosses,
    removed: Mapping[str, RowLosses],
) -> tuple[ModuleTest, ...]:
    """Test every expert below the core on test data; ``removed``: expert -> the rows' losses without it.

    Reads the test split ``evaluation.null_draws`` times an expert.
    """
    return tuple(_tested(model, task, world, config, intact, expert, rows) for expert, rows in removed.items())


def _tested(
    model: SplitModel,
    task: Task,
    world: World,
    config: RunConfig,
    intact: RowLosses,
    expert: str,
    removed: RowLosses,
) -> ModuleTest:
    tree = model.partition.tree
    node = tree.index(expert)
    served = {task.categories.index(category) for category in tree.nodes[node].categories}

    def rises(rows: RowLosses) -> tuple[list[Tensor], list[Tensor]]:
        rise_R = (rows.nats_R - intact.nats_R) / task.units_per_row
        each = [rise_R[intact.categories_R == category] for category in range(len(task.categories))]
        return [each[c] for c in served], [each[c] for c in range(len(each)) if c not in served]

    own, other = rises(removed)
    low, high = interval(own, rows_of.generator(config.seed, "resample", node))
    drawn_own, drawn_other = [], []
    for draw in range(config.evaluation.null_draws):
        units = drawn_units(model.partition, node, rows_of.generator(config.seed, "null", node, draw))
        with without_units(model, units):
            mine, others = rises(row_losses(model, task, world, config.evaluation, "test"))
        drawn_own.append(_mean(mine))
        drawn_other.append(_mean(others))
    return ModuleTest(
        expert=expert,
        own=_mean(own),
        own_low=low,
        own_high=high,
        other=_mean(other),
        drawn_own=tuple(drawn_own),
        drawn_other=tuple(drawn_other),
    )


def _mean(rises: list[Tensor]) -> float:
    return torch.stack([rise_R.mean() for rise_R in rises]).mean().item()


def interval(
    rises: list[Float64[Tensor, " rows"]], random: np.random.Generator, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """Return the ends of the 95 % bootstrap interval of the mean over categories; rows are drawn within their own."""
    means = np.zeros(resamples)
    for rise_R in rises:
        values = rise_R.numpy()
        means += values[random.integers(len(values), size=(resamples, len(values)))].mean(1) / len(rises)
    low, high = np.percentile(means, _INTERVAL)
    return float(low), float(high)


def drawn_units(partition: Partition, node: int, random: np.random.Generator) -> dict[str, Int[Tensor, " some"]]:
    """Return as many units of each site as a node and all below it own, drawn from all that its categories run."""
    below = range(node, partition.tree.end(node))
    drawn = {}
    for site, widths in partition.widths.items():
        active = torch.stack([partition.active(site, category) for category in partition.tree.nodes[node].categories])
        units = torch.nonzero(active.any(0))[:, 0]
        count = sum(widths[each] for each in below)
        drawn[site] = units[torch.from_numpy(np.sort(random.choice(len(units), count, replace=False)))]
    return drawn


@contextmanager
def without_units(model: SplitModel, units: Mapping[str, Int[Tensor, " some"]]) -> Iterator[None]:
    """Zero what these units of each site write while the context lasts."""
    kept = []
    with torch.no_grad():
        for name, some in units.items():
            site = model.space[name]
            (part,) = (part for part in site.slices if part.parameter == site.output)
            weight = model.network.get_parameter(site.output)
            kept.append((weight, weight.clone()))
            assign(weight, whole(weight).index_fill(part.axis, part.entries(some).to(weight.device), 0.0))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                assign(weight, before)
