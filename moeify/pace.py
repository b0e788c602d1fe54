"""How fast this machine trains a recipe's network, from a few steps on rows that mean nothing.

The operations of a large network are what its steps take. Those of a small one are not: the optimizer, the choice of
rows, what is checked and every call take far longer, and longer yet where rows run along their routes.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.dry_run import Sizes, build, nats_of, rows_of
from moeify.models.build import PRECISIONS, logits
from moeify.recipe.config import RunConfig
from moeify.recipe.data import TextData
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.tasks.tensors import Loss, TensorTask
from moeify.training import Contestant, train
from moeify.world import Solo

_ROWS = 8
"""Of each category."""


@dataclass(frozen=True)
class Pace:
    """What training takes on this machine, one worker's part of it."""

    flops: float
    """Operations a second, of the dense network's forward and backward passes."""
    step: float
    """Seconds that a step takes besides, where a model is whole."""
    routed: float
    """The same where rows run along their routes through as many experts as the last round leaves."""


def pace(config: RunConfig, base: Path, known: Sizes, categories: int, steps: int = 5) -> Pace:
    """Time ``steps`` steps of each kind after one that warms up; medians.

    Gradient routing and a teacher are left out. On one thread its processor time is what counts, as other work on the
    machine would be counted otherwise.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    rows, network = config.training.rows // config.cluster.workers, build(config, base).train()
    inputs, targets = rows_of(config, network, rows)

    def passes() -> None:
        outputs = logits(network, inputs, autocast=PRECISIONS[config.training.autocast])
        nats_of(config, outputs, targets).sum().backward()
        network.zero_grad(set_to_none=True)

    flops = rows * (known.forward + known.backward) / _median(passes, steps, clock)
    names = tuple(f"category-{number}" for number in range(categories))
    task = TensorTask(network, dict.fromkeys(names, _some(config, network)), _loss(config), rows=rows, seed=0)
    model = SplitModel(task.build(), names, kinds=config.partition.units)
    contestant = Contestant(model, config.training)

    def step() -> None:
        train(contestant, task, Solo(), config.training, contestant.step + 1, config.training.steps, lambda *_: None)

    again = rows * (known.forward + known.backward + known.again) / flops
    whole = _median(step, steps, clock) - again
    model.repartition(_finest(config, model))
    active = 1.0 - model.partition.separation * known.split
    return Pace(flops, max(0.0, whole), max(0.0, _median(step, steps, clock) - again * active))


def _median(run: Callable[[], None], times: int, clock: Callable[[], float]) -> float:
    seconds = []
    for _ in range(times + 1):
        began = clock()
        run()
        seconds.append(clock() - began)
    return statistics.median(seconds[1:])


def _some(config: RunConfig, network: nn.Module) -> Tensor | tuple[Tensor, Tensor]:
    """Return rows of one category, as a task of tensors takes them: of text, each token is asked for the next one."""
    inputs, targets = rows_of(config, network, _ROWS)
    return F.pad(inputs, (0, 1)) if isinstance(config.data, TextData) else (inputs, targets)


def _loss(config: RunConfig) -> Loss:
    if isinstance(config.data, TextData):
        return "tokens"
    return "pixels" if config.model.kind == "autoencoder" else "classes"


def _finest(config: RunConfig, model: SplitModel) -> Partition:
    """Return a partition into all experts that the rounds leave, of even widths; the core owns what is left over."""
    tree = ExpertTree.undivided(model.categories)
    for round_ in config.rounds:
        held = {leaf: tree.nodes[leaf].categories for leaf in tree.leaves}
        tree = tree.split({leaf: _parted(names, round_.branching) for leaf, names in held.items() if len(names) > 1})
    experts = len(tree.nodes) - 1
    widths = {}
    for site in model.space.sites:
        each = site.units // (experts + 1)
        widths[site.name] = (site.units - each * experts, *[each] * experts)
    return Partition(tree, widths)


def _parted(names: tuple[str, ...], branching: int) -> list[tuple[str, ...]]:
    count = min(branching, len(names))
    return [names[place::count] for place in range(count)]
