"""Dense training phases: one arm, many steps, every category along its own route."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moeify.divergence import DivergedError, Health, check_gradient, check_loss, memory_for, sums_by_category
from moeify.exchange import Exchange, exchange
from moeify.models.build import PRECISIONS
from moeify.recipe.training import Training
from moeify.routed.gradients import GradientRouter
from moeify.routed.recompute import recompute
from moeify.routed.split_model import SplitModel
from moeify.shares import assign, like, whole
from moeify.stopping import Asked, never
from moeify.task import Batch, Task
from moeify.world import World


@runtime_checkable
class Lesson(Protocol):
    """What is learned besides, or instead, of the task's own loss."""

    def loss(self, rows: Batch, outputs: Tensor, nats: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return what a model that gave ``outputs`` with a loss of ``nats`` has to lower, summed over each row."""
        ...


class Pass(NamedTuple):
    """Rows that go through the model, and back, at once."""

    rows: Batch
    apart: bool
    """Whether what is no unit's does not learn from them (``routing.apart``)."""
    idle: bool = False
    """Whether they stand in for none, since every rank has to run as many passes: nothing learns from them."""


class Contestant:
    """A model in training with its optimizer; ``step`` is its place in the data stream and the schedule.

    Where workers share the model out (``moeify.routed.shard``), that comes first. ``router``: routes gradients, where
    the recipe asks that of this arm; ``health``: what became of its training.
    """

    def __init__(self, model: SplitModel, training: Training, router: GradientRouter | None = None) -> None:
        self.model = model
        self.router = router
        self.step = 0
        self.health = Health()
        self._exchange: tuple[World, Exchange] | None = None
        units = {part.parameter for site in model.space.sites for part in site.slices}
        self._shared = [p for name, p in model.network.named_parameters() if name not in units]
        model.autocast = PRECISIONS[training.autocast]
        if training.checkpoint_activations:
            recompute(model)
        told = {id(p) for p in model.told}  # biases, one vector a category
        matrices = [p for p in model.parameters() if p.dim() > 1 and id(p) not in told]
        vectors = [p for p in model.parameters() if p.dim() <= 1 or id(p) in told]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": training.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=training.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters, buffers and optimizer state by name: all that training needs to go on, but ``step``
        and ``health``."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.network.named_parameters():
            found[f"parameter/{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer/{key}/{name}"] = value
        return found | {f"buffer/{name}": buffer for name, buffer in self.buffers().items()}

    def buffers(self) -> dict[str, Tensor]:
        """Return what the network gathers as it runs in training (running statistics), by name."""
        named = dict(self.model.network.named_buffers())
        persistent = self.model.network.state_dict() if named else {}
        return {name: buffer for name, buffer in named.items() if name in persistent}

    def arranged(self, rows: Batch) -> Batch:
        """Return the rows as the model runs them: by leaf, and in each category those with a known label first."""
        places = self.model.positions(rows.categories)
        return rows.take(torch.argsort(places * 2 + ~self._labelled(rows), stable=True))

    def passes(self, rows: Batch, world: World, parts: int) -> list[Pass]:
        """Return this rank's share of a step's rows as the model runs them, in ``parts``.

        Those from which units alone learn come first, in passes of their own. Every rank has as many passes.
        """
        rows = self.arranged(rows)
        kinds = [(rows, False)]
        if self.router:
            mask = self.router.apart(self.model.partition, rows.categories, self._labelled(rows))
            if mask.any():
                kinds = [(rows.take(mask.nonzero()[:, 0]), True), (rows.take((~mask).nonzero()[:, 0]), False)]
        found = []
        for every, apart in kinds:
            mine = every.shard(world.rank, world.size)
            for part in (mine.shard(number, parts) for number in range(parts)):
                idle = len(part.categories) == 0
                found.append(Pass(rows.shard(0, len(rows.categories)) if idle else part, apart, idle))
        return found

    def forget_shared(self) -> None:
        """Drop the gradients of all that is no unit's."""
        for parameter in self._shared:
            parameter.grad = None

    def outputs(self, batch: Batch, run: nn.Module | None = None) -> Tensor:
        """Return what the network gives for rows that are ``arranged``, gradients routed.

        ``run``: what wraps the model, where gradients are exchanged.
        """
        learning = None
        if self.router:
            learning = self.router.learning(self.model.partition, batch.categories, self._labelled(batch))
        with self.model.learns(learning):
            return (run or self.model)(batch.inputs, batch.categories)

    def exchange(self, world: World) -> Exchange:
        """Return how gradients are exchanged with a world, the same one as long as it is the same world."""
        if self._exchange is None or self._exchange[0] is not world:
            self._exchange = world, exchange(self.model, world)
        return self._exchange[1]

    def _labelled(self, batch: Batch) -> Bool[Tensor, " rows"]:
        if self.router is None:
            return torch.ones_like(batch.categories, dtype=torch.bool)
        return self.router.labelled(batch.categories, batch.ids if batch.examples is None else batch.examples)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what ``tensors`` gave, bit for bit; of whole tensors a worker keeps its share where it has one."""
        own = self.tensors()
        for name, parameter in self.model.network.named_parameters():
            state = self.optimizer.state[parameter]
            state.clear()
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                if (saved := tensors.get(f"optimizer/{kind}/{name}")) is not None:
                    state[kind] = like(parameter, saved)
        for name, tensor in own.items():
            if not name.startswith("optimizer/"):
                assign(tensor, tensors[name])


@dataclass(frozen=True)
class Progress:
    """How one step went."""

    loss: dict[str, float]
    """Category -> nats per unit (token or example) on this step's rows; only categories the step had rows of."""
    learning_rate: float
    units_per_second: float
    """Since the last report."""


Report = Callable[[Contestant, Progress], None]
"""Hears how a step went."""


def learning_rate(training: Training, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine down to ``final_learning_rate`` of the peak."""
    warm = max(1, round(training.warmup * training.steps))
    if step < warm:
        return training.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, training.steps - warm)
    final = training.final_learning_rate
    return training.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    contestant: Contestant,
    task: Task,
    world: World,
    training: Training,
    until: int,
    every: int,
    report: Report,
    teacher: Lesson | None = None,
    stop: Asked = never,
) -> bool:
    """Train up to step ``until`` in place; every rank calls ``report`` after each ``every``-th step and the last one.

    ``teacher``: what the model learns from besides; losses are reported without it. ``stop``: asked at each step; where
    it says so on any rank, the step is the last one on all. Return whether that was so.

    Raises DivergedError where a step's loss or gradient is not finite or its loss has exploded, the same on every rank,
    and leaves the contestant as it was before that step.
    """

    def losses(batch: Batch, run: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Return each row's nats, and its loss with what the teacher adds."""
        outputs = contestant.outputs(batch, run)
        nats_R = task.nats(outputs, batch.targets)
        return nats_R, teacher.loss(batch, outputs, nats_R) if teacher else nats_R

    parameters = [p for p in contestant.model.parameters() if p.requires_grad]
    gathered, exchanged = list(contestant.buffers().values()), contestant.exchange(world)
    contestant.model.train()
    since, units = time.perf_counter(), 0
    while contestant.step < until:
        rows = task.train_batch(contestant.step)
        passes = contestant.passes(rows, world, training.accumulate)
        before = [buffer.clone() for buffer in gathered]
        nats = []
        for number, (part, apart, idle) in enumerate(passes, 1):
            with memory_for(part, task), exchanged.passing(last=number == len(passes)):
                nats_R, loss_R = losses(part, exchanged.run)
                (loss_R.sum() * (not idle) / (len(rows.categories) * task.units_per_row)).backward()
            if apart:
                contestant.forget_shared()
            real = slice(0 if idle else None)
            nats.append((nats_R.detach()[real], part.categories[real]))
        sums_C = torch.stack([sums_by_category(*each, len(task.categories)) for each in nats]).sum(0)
        asked = sums_C.new_tensor([float(stop())])
        exchanged.finish([sums_C, asked])
        norm = whole(nn.utils.clip_grad_norm_(parameters, training.clip)).item()
        try:
            check_loss(sums_C, rows.categories, task, contestant.health, training, contestant.step + 1)
            parts = [each.rows for each in passes]
            check_gradient(norm, losses, parameters, parts, rows, task, world, contestant.step + 1)
        except DivergedError:
            contestant.optimizer.zero_grad(set_to_none=True)
            for buffer, was in zip(gathered, before, strict=True):
                buffer.copy_(was)
            raise
        rate = _update(contestant, training)
        _agree(gathered, world)
        units += len(rows.categories) * task.units_per_row
        if contestant.step % every == 0 or contestant.step == until:
            now = time.perf_counter()
            loss = mean_by_category(nats, task, world)
            report(contestant, Progress(loss, rate, units / (now - since)))
            since, units = time.perf_counter(), 0
        if asked.item():
            return True
    return False


def mean_by_category(nats: list[tuple[Tensor, Tensor]], task: Task, world: World) -> dict[str, float]:
    """Return nats per unit of each category that has rows, over all ranks; each item holds nats and category by row."""
    sums_C, rows_C = torch.zeros(2, len(task.categories), dtype=torch.float64)
    for nats_R, categories_R in nats:
        sums_C.index_add_(0, categories_R, nats_R.cpu().double())
        rows_C.index_add_(0, categories_R, torch.ones_like(categories_R, dtype=torch.float64))
    world.sum([sums_C, rows_C])
    means = sums_C / (rows_C * task.units_per_row)
    return {c: means[i].item() for i, c in enumerate(task.categories) if rows_C[i] > 0}


def _agree(gathered: Sequence[Tensor], world: World) -> None:
    """Replace what every rank has gathered from its own rows (running statistics) by the mean over ranks.

    A rank that had no row for a statistic in this step counts with what it was before.
    """
    moving = [buffer for buffer in gathered if buffer.is_floating_point()] if world.size > 1 else []
    world.sum(moving)
    for buffer in moving:
        buffer /= world.size


def _update(contestant: Contestant, training: Training) -> float:
    rate = contestant.health.rate * learning_rate(training, contestant.step)
    for group in contestant.optimizer.param_groups:
        group["lr"] = rate
    contestant.optimizer.step()
    contestant.optimizer.zero_grad(set_to_none=True)
    contestant.step += 1
    return rate
