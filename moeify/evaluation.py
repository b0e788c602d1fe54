"""Losses on held-out data, and what every expert's removal costs every category."""

from collections.abc import Mapping

import torch

from moeify.config import Evaluation
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
    """Return category -> nats above the dense twin, and their ``mean``."""
    rises = {category: loss[category] - twin[category] for category in twin}
    return {**rises, "mean": sum(rises.values()) / len(rises)}
