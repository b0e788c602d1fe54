"""Losses on held-out data, and what every expert's removal costs every category."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from moeify.divergence import memory_for
from moeify.events import RoundEnded, Stop
from moeify.recipe.arms import Arm
from moeify.recipe.config import Evaluation
from moeify.result import MEAN, ModuleTest, Result
from moeify.routed.split_model import SplitModel
from moeify.task import Batch, HeldOut, Task, tokens_read
from moeify.training import mean_by_category
from moeify.world import Solo, World, shares_models


@dataclass(frozen=True)
class RowLosses:
    """The loss of every row of a held-out split; the same on every rank."""

    nats_R: Float64[Tensor, " rows"]
    """Nats of the whole row, in the order that the task yields rows."""
    categories_R: Int[Tensor, " rows"]
    right_R: Float64[Tensor, " rows"] | None = None
    """1 where the model gets the row right, else 0; None where a row is not right or wrong."""

    def by_category(self, task: Task) -> dict[str, float]:
        """Return category -> nats per unit (token or example)."""
        return mean_by_category([(self.nats_R, self.categories_R)], task, Solo())

    def accuracy(self, task: Task) -> dict[str, float] | None:
        """Return category -> share of its rows that the model gets right, 0..1, and the ``mean``; None as above."""
        if (right_R := self.right_R) is None:
            return None
        shares = {name: right_R[self.categories_R == i].mean().item() for i, name in enumerate(task.categories)}
        return {**shares, MEAN: sum(shares.values()) / len(shares)}


@torch.no_grad()
def row_losses(model: SplitModel, task: Task, world: World, evaluation: Evaluation, split: HeldOut) -> RowLosses:
    """Return the loss of every row of a held-out split, each row along its category's route."""
    model.eval()
    rows = evaluation.validation_rows if split == "validation" else evaluation.test_rows
    nats, right, categories, judged = [], [], [], torch.zeros(1)
    for batch in task.held_out_batches(split, rows, evaluation.rows_at_once):
        part = batch.shard(world.rank, world.size)
        nats_R, right_R = torch.zeros(2, len(batch.categories), dtype=torch.float64)
        if not len(part.categories) and shares_models(world):
            model(*_one_of(batch))  # a pass takes every worker
        if len(part.categories):
            with memory_for(part, task):
                outputs = model(part.inputs, part.categories)
                nats_R[world.rank :: world.size] = task.nats(outputs, part.targets).cpu().double()
                found = task.right(outputs, part.targets)
            if found is not None:
                right_R[world.rank :: world.size] = found.cpu().double()
                judged += 1
        nats.append(nats_R)
        right.append(right_R)
        categories.append(batch.categories)
    whole = RowLosses(torch.cat(nats), torch.cat(categories), torch.cat(right))
    assert whole.right_R is not None
    world.sum([whole.nats_R, whole.right_R, judged])
    return whole if judged else replace(whole, right_R=None)


def _one_of(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.inputs[:1], batch.categories[:1]


def position_nats(task: Task, outputs: Tensor, targets: Tensor) -> Float64[Tensor, "rows positions"]:
    """Return the nats of every position; of a whole row, as one position, where it is one example."""
    if task.unit == "example":
        return task.nats(outputs, targets).double().unsqueeze(1)
    each = task.nats(outputs.flatten(0, 1).unsqueeze(1), targets.flatten().unsqueeze(1))
    return each.double().view(targets.shape)


def held_out_loss(
    model: SplitModel, task: Task, world: World, evaluation: Evaluation, split: HeldOut
) -> dict[str, float]:
    """Return category -> nats per unit on a held-out split, each row along its category's route."""
    return row_losses(model, task, world, evaluation, split).by_category(task)


def tax_errors(mine: RowLosses, twin: RowLosses, task: Task) -> dict[str, float]:
    """Return category -> standard error of its tax, nats per unit, from the rows' differences: both read the same rows.

    Rows count as independent draws of their category. Left out is what is not known: of one row, or infinite losses.
    """
    rise_R = (mine.nats_R - twin.nats_R) / task.units_per_row
    each = {c: rise_R[mine.categories_R == i] for i, c in enumerate(task.categories)}
    errors = {c: (rises.var() / len(rises)).sqrt().item() for c, rises in each.items() if len(rises) > 1}
    return {category: error for category, error in errors.items() if math.isfinite(error)}


def tax_error(mine: RowLosses, twin: RowLosses, task: Task) -> float | None:
    """Return the standard error of the mean tax, nats per unit; None where that of a category is not known."""
    return mean_error(tax_errors(mine, twin, task), task.categories)


def mean_error(errors: Mapping[str, float], categories: Collection[str]) -> float | None:
    """Return the standard error of a mean over categories from theirs; None where one of them is not known."""
    return math.hypot(*errors.values()) / len(errors) if errors.keys() >= {*categories} else None


def losses_without(model: SplitModel, task: Task, world: World, evaluation: Evaluation) -> dict[str, RowLosses]:
    """Return expert -> the test rows' losses when it and all below it are removed, for every expert below the core."""
    removed = {}
    for expert in [node.name for node in model.partition.tree.nodes[1:]]:
        with model.ablated(expert):
            removed[expert] = row_losses(model, task, world, evaluation, "test")
    return removed


def own_other(removed: Mapping[str, RowLosses], intact: RowLosses, task: Task) -> dict[str, dict[str, float]]:
    """Return category -> {expert: rise of its loss, in nats per unit, without that expert}."""
    before, after = intact.by_category(task), {expert: rows.by_category(task) for expert, rows in removed.items()}
    return {
        category: {expert: loss[category] - before[category] for expert, loss in after.items()}
        for category in task.categories
    }


def own_other_errors(removed: Mapping[str, RowLosses], intact: RowLosses, task: Task) -> dict[str, dict[str, float]]:
    """Return category -> {expert: standard error of the rise of ``own_other``}, as ``tax_errors`` has it."""
    each = {expert: tax_errors(rows, intact, task) for expert, rows in removed.items()}
    return {
        category: {expert: errors[category] for expert, errors in each.items() if category in errors}
        for category in task.categories
    }


def tax(loss: Mapping[str, float], twin: Mapping[str, float]) -> dict[str, float]:
    """Return category -> nats above a twin, and their ``mean``."""
    rises = {category: loss[category] - twin[category] for category in twin}
    return {**rises, MEAN: sum(rises.values()) / len(rises)}


def summarize(
    task: Task,
    split: SplitModel,
    rounds: Sequence[RoundEnded],
    tested: Mapping[Arm, RowLosses],
    removed: Mapping[str, RowLosses],
    modules: tuple[ModuleTest, ...],
    stopped: Stop,
    steps: int,
    seconds: float,
) -> Result:
    """Put a run's test figures together; ``tested`` and ``removed`` (``losses_without``) are on the test split."""
    partition, flops = split.partition, split.active_flops(tokens_read(task))
    losses = {arm: rows.by_category(task) for arm, rows in tested.items()}
    bits = {arm: task.bits_per_byte(loss, "test") for arm, loss in losses.items()}
    accuracies = {arm: rows.accuracy(task) for arm, rows in tested.items()}
    return Result(
        categories=task.categories,
        unit=task.unit,
        tree=partition.nested(),
        active_fraction={**partition.active_fraction, MEAN: 1.0 - partition.separation},
        active_flops={**flops, MEAN: sum(flops.values()) / len(flops)},
        rounds=tuple(rounds),
        stopped=stopped,
        test_loss=losses,
        bits_per_byte={arm: each for arm, each in bits.items() if each is not None} or None,
        accuracy={arm: each for arm, each in accuracies.items() if each is not None} or None,
        own_other=own_other(removed, tested["split"], task),
        own_other_error=own_other_errors(removed, tested["split"], task),
        modules=modules,
        tax=tax(losses["split"], losses["dense"]),
        tax_error=tax_error(tested["split"], tested["dense"], task),
        tax_error_by_category=tax_errors(tested["split"], tested["dense"], task),
        tax_random=tax(losses["random"], losses["dense"]) if "random" in losses else None,
        tax_told=tax(losses["split"], losses["told"]) if "told" in losses else None,
        error_over=_errors_over_controls(task, tested),
        steps=steps,
        seconds=seconds,
    )


def _errors_over_controls(task: Task, tested: Mapping[Arm, RowLosses]) -> dict[Arm, float]:
    controls = (arm for arm in tested if arm not in ("split", "dense"))
    errors = {arm: tax_error(tested["split"], tested[arm], task) for arm in controls}
    return {arm: error for arm, error in errors.items() if error is not None}
