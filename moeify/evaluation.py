"""Losses on held-out data, and what every expert's removal costs every category."""

from collections.abc import Mapping, Sequence

import torch

from moeify.arms import Arm
from moeify.config import Evaluation
from moeify.events import RoundEnded
from moeify.partition import Partition
from moeify.result import MEAN, Result
from moeify.split_model import SplitModel
from moeify.task import HeldOut, Task
from moeify.training import mean_by_category
from moeify.world import World


@torch.no_grad()
def held_out_loss(
    model: SplitModel, task: Task, world: World, evaluation: Evaluation, split: HeldOut
) -> dict[str, float]:
    """Return category -> nats per unit on a held-out split, each row along its category's route."""
    model.eval()
    rows = evaluation.validation_rows if split == "validation" else evaluation.test_rows
    nats = []
    for batch in task.held_out_batches(split, rows, evaluation.rows_at_once):
        part = batch.shard(world.rank, world.size)
        if len(part.categories):
            nats.append((task.nats(model(part.inputs, part.categories), part.targets), part.categories))
    return mean_by_category(nats, task, world)


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
    losses: Mapping[Arm, dict[str, float]],
    rises: dict[str, dict[str, float]],
    steps: int,
    seconds: float,
) -> Result:
    """Put a run's test figures together; ``losses`` and ``rises`` (of ``own_other``) are on the test split."""
    bits = {arm: task.bits_per_byte(loss, "test") for arm, loss in losses.items()}
    return Result(
        categories=task.categories,
        unit=task.unit,
        tree=partition.nested(),
        active_fraction={**partition.active_fraction, MEAN: 1.0 - partition.separation},
        rounds=tuple(rounds),
        test_loss=dict(losses),
        bits_per_byte={arm: each for arm, each in bits.items() if each is not None} or None,
        own_other=rises,
        tax=tax(losses["split"], losses["dense"]),
        tax_random=tax(losses["random"], losses["dense"]) if "random" in losses else None,
        tax_told=tax(losses["split"], losses["told"]) if "told" in losses else None,
        steps=steps,
        seconds=seconds,
    )
