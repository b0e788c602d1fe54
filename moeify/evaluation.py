"""Losses on held-out data, and what every expert's removal costs every category."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from moeify.arms import Arm
from moeify.config import Evaluation
from moeify.events import RoundEnded
from moeify.partition import Partition
from moeify.result import MEAN, Result
from moeify.split_model import SplitModel
from moeify.task import HeldOut, Task
from moeify.world import World


@dataclass(frozen=True)
class RowLosses:
    """The loss of every row of a held-out split; the same on every rank."""

    nats_R: Float64[Tensor, " rows"]
    """Nats per unit (token or example)."""
    categories_R: Int[Tensor, " rows"]

    def by_category(self, names: Sequence[str]) -> dict[str, float]:
        """Return category -> mean over its rows; only categories that have rows."""
        sums_C, rows_C = torch.zeros(2, len(names), dtype=torch.float64)
        sums_C.index_add_(0, self.categories_R, self.nats_R)
        rows_C.index_add_(0, self.categories_R, torch.ones_like(self.nats_R))
        return {name: (sums_C[i] / rows_C[i]).item() for i, name in enumerate(names) if rows_C[i] > 0}


@torch.no_grad()
def row_losses(model: SplitModel, task: Task, world: World, evaluation: Evaluation, split: HeldOut) -> RowLosses:
    """Return the loss of every row of a held-out split, each row along its category's route."""
    model.eval()
    rows = evaluation.validation_rows if split == "validation" else evaluation.test_rows
    parts = []
    count = torch.zeros(1, dtype=torch.int64)
    for batch in task.held_out_batches(split, rows, evaluation.rows_at_once):
        part = batch.shard(world.rank, world.size)
        if len(part.ids):
            nats_R = task.nats(model(part.inputs, part.categories), part.targets)
            parts.append((part.ids, nats_R.double() / task.units_per_row, part.categories))
            count += len(part.ids)
    world.sum([count])
    nats_R = torch.zeros(int(count), dtype=torch.float64)
    categories_R = torch.zeros(int(count), dtype=torch.int64)
    for ids, nats, categories in parts:
        nats_R[ids], categories_R[ids] = nats, categories
    world.sum([nats_R, categories_R])
    return RowLosses(nats_R, categories_R)


def held_out_loss(
    model: SplitModel, task: Task, world: World, evaluation: Evaluation, split: HeldOut
) -> dict[str, float]:
    """Return category -> nats per unit on a held-out split, each row along its category's route."""
    return row_losses(model, task, world, evaluation, split).by_category(task.categories)


def tax_error(mine: RowLosses, twin: RowLosses) -> float:
    """Return the standard error of the mean tax, nats per unit, from the rows' differences: both read the same rows.

    Rows count as independent draws of their category; NaN where a category has a single row.
    """
    rise_R = mine.nats_R - twin.nats_R
    each = [rise_R[mine.categories_R == category] for category in mine.categories_R.unique()]
    return torch.stack([rises.var() / len(rises) for rises in each]).sum().sqrt().item() / len(each)


def own_other(
    model: SplitModel, task: Task, world: World, evaluation: Evaluation, intact: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Return category -> {expert: rise of its test loss in nats when that expert and all below it are removed}."""
    rises: dict[str, dict[str, float]] = {category: {} for category in task.categories}
    for expert in [node.name for node in model.partition.tree.nodes[1:]]:
        with model.ablated(expert):
            loss = held_out_loss(model, task, world, evaluation, "test")
        for category in task.categories:
            rises[category][expert] = loss[category] - intact[category]
    return rises


def tax(loss: Mapping[str, float], twin: Mapping[str, float]) -> dict[str, float]:
    """Return category -> nats above a twin, and their ``mean``."""
    rises = {category: loss[category] - twin[category] for category in twin}
    return {**rises, MEAN: sum(rises.values()) / len(rises)}


def summarize(
    task: Task,
    partition: Partition,
    rounds: Sequence[RoundEnded],
    tested: Mapping[Arm, RowLosses],
    rises: dict[str, dict[str, float]],
    steps: int,
    seconds: float,
) -> Result:
    """Put a run's test figures together; ``tested`` and ``rises`` (of ``own_other``) are on the test split."""
    losses = {arm: rows.by_category(task.categories) for arm, rows in tested.items()}
    error = tax_error(tested["split"], tested["dense"])
    bits = {arm: task.bits_per_byte(loss, "test") for arm, loss in losses.items()}
    return Result(
        categories=task.categories,
        unit=task.unit,
        tree=partition.nested(),
        active_fraction={**partition.active_fraction, MEAN: 1.0 - partition.separation},
        rounds=tuple(rounds),
        test_loss=losses,
        bits_per_byte={arm: each for arm, each in bits.items() if each is not None} or None,
        own_other=rises,
        tax=tax(losses["split"], losses["dense"]),
        tax_error=error if math.isfinite(error) else None,
        tax_random=tax(losses["random"], losses["dense"]) if "random" in losses else None,
        tax_told=tax(losses["split"], losses["told"]) if "told" in losses else None,
        steps=steps,
        seconds=seconds,
    )
