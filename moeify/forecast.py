"""What a recipe asks of a machine, known before any of it runs: operations phase by phase, and memory of a worker.

From what the dense network costs (``moeify.dry_run``); what a split spares follows from the separation that each round
asks for.

Not foreseen: what finding the partition takes (assignment, J, compensation), which runs on the CPU between phases, data
preparation, and rounds that a budget cuts short or rolls back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moeify.dry_run import Sizes, units_per_row
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.recipe.parallel import Fsdp

FLOAT = 4
"""Bytes of a number that is trained, of its gradient, and of each of AdamW's two moments."""
Kind = Literal["train", "attribute", "null test", "evaluate", "test"]


@dataclass(frozen=True)
class Work:
    """A part of a run."""

    kind: Kind
    round: int
    """From 1; 0: none in particular."""
    arm: Arm | None
    """None: several."""
    rows: int
    flops: float
    steps: int = 0
    """Of the optimizer."""
    routed: bool = False
    """Whether rows run along their routes."""


@dataclass(frozen=True)
class Memory:
    """What lies on one worker's device at the worst moment; bytes."""

    parameters: int
    """Of every arm, and of the teacher where there is one: all stay on the device. Of arms that workers share out, a
    worker's part, and all of what is gathered at a time."""
    optimizer: int
    gradients: int
    """Of the arm that trains."""
    training: int
    """Kept for the backward pass of a training step."""
    attribution: int
    """The table, and what is kept while it is measured; not at the same time as the two above."""

    @property
    def measuring(self) -> bool:
        """Whether the worst moment is attribution's, and not a training step's."""
        return self.attribution > self.gradients + self.training

    @property
    def peak(self) -> int:
        """Return the bytes at the worst moment."""
        return self.parameters + self.optimizer + max(self.gradients + self.training, self.attribution)


@dataclass(frozen=True)
class Forecast:
    """What a run takes."""

    sizes: Sizes
    work: tuple[Work, ...]
    memory: Memory
    checkpoint: int
    """Bytes of one checkpoint, with every arm in it."""
    units_per_row: int
    """Tokens of a row; 1 where a row is an example."""

    @property
    def flops(self) -> float:
        """Return the operations of the whole run."""
        return sum(each.flops for each in self.work)


def forecast(config: RunConfig, known: Sizes, categories: int, workers: int | None = None) -> Forecast:
    """Return what a run takes whose rounds are all kept and go as deep as they ask.

    ``workers``: that share it, those of the recipe if not given; where ``cluster.parallel`` has them share models out,
    each holds its part, and the whole of one layer while that runs.
    """
    arms = len(config.arms)
    teacher = int(config.distillation is not None)
    shares = (workers or config.cluster.workers) if isinstance(config.cluster.parallel, Fsdp) else 1
    own, layer = -(-known.parameters // shares), known.layer if shares > 1 else 0
    return Forecast(
        sizes=known,
        work=tuple(_work(config, known, categories)),
        memory=Memory(
            parameters=(arms * own + teacher * known.parameters + layer) * FLOAT,
            optimizer=arms * 2 * own * FLOAT,
            gradients=(own + layer) * FLOAT,
            training=known.kept,
            attribution=known.table + known.kept_measuring,
        ),
        checkpoint=arms * 3 * known.parameters * FLOAT,
        units_per_row=units_per_row(config),
    )


def _work(config: RunConfig, known: Sizes, categories: int) -> Iterator[Work]:
    step = known.forward + known.backward + known.again
    taught = known.forward if config.distillation else 0
    active, steps = 1.0, 0
    ends = [*((r.train, r.recover) for r in config.rounds), (config.training.steps - _spent(config), 0)]
    for number, (train, recover) in enumerate(ends, start=1):
        last = number == len(ends)
        for cut, more in ((False, train), (True, recover)):
            if cut and not last:
                yield from _cut(config, known, categories, number, active)
                active = 1.0 - config.rounds[number - 1].separation * known.split
            for arm in config.arms if steps or cut else config.early_arms:
                rows = more * config.training.rows
                share = active if arm in config.cut_arms else 1.0
                if rows:
                    flops, routed = rows * (step * share + taught), arm in config.cut_arms and active < 1.0
                    yield Work("train", min(number, len(config.rounds)), arm, rows, flops, more, routed)
            steps += more
        if not last:
            yield _read(config, known, "evaluate", number, config.evaluation.validation_rows * categories, active)
    experts = sum(_experts(config, categories))
    rows = config.evaluation.test_rows * categories
    passes = experts * (1 + config.evaluation.null_draws)
    yield _read(config, known, "test", 0, rows, active)
    yield Work("test", 0, "split", passes * rows, passes * rows * known.forward * active)


def _cut(config: RunConfig, known: Sizes, categories: int, number: int, active: float) -> Iterator[Work]:
    """Yield what a cut takes: attribution of every arm that is cut, the null test's, and losses before and after."""
    rows, cut = config.attribution.rows * categories, len(config.cut_arms)
    one = rows * (known.forward + known.backward + known.moments)  # two backward passes, no weight's gradient
    yield Work("attribute", number, None, cut * rows, cut * one)
    if config.partition.null_test:
        times = config.partition.null_test.permutations
        yield Work("null test", number, "split", times * rows, times * one)
    held_out = config.evaluation.validation_rows * categories
    yield Work("evaluate", number, None, (1 + 2 * cut) * held_out, held_out * known.forward * (1 + 2 * cut * active))


def _read(config: RunConfig, known: Sizes, kind: Kind, number: int, rows: int, active: float) -> Work:
    """Return what it takes to read held-out rows with every arm."""
    cut = len(config.cut_arms)
    passes = len(config.arms) - cut + cut * active
    return Work(kind, number, None, len(config.arms) * rows, passes * rows * known.forward)


def _spent(config: RunConfig) -> int:
    return sum(r.train + r.recover for r in config.rounds)


def _experts(config: RunConfig, categories: int) -> Iterator[int]:
    """Yield how many experts each round adds below the core, at most."""
    leaves = 1
    for round_ in config.rounds:
        before, leaves = leaves, min(categories, leaves * round_.branching)
        yield leaves if leaves > before else 0
