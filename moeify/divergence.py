"""Numbers that go wrong: seen in what all ranks share, before they reach a weight, and named by step and category.

Every rank looks at the same sums and so comes to the same conclusion; a repeated run comes to it again.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attribution.measure import Uncounted
from attribution.subject import Probe
from moeify.recipe.training import Training
from moeify.shares import own
from moeify.task import Batch, Task
from moeify.world import World

Taken = TypeVar("Taken", bound=Probe | Uncounted)
_LEAST = 1.0
"""Nats per unit: a model that began below it is held to it, since small losses double by chance."""
_WAY_OUT = (
    "start anew with a lower training.learning_rate or training.clip, or let a run go on by "
    "training.on_divergence: {kind: skip_batch} or {kind: lower_rate}"
)


_MEMORY = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's errors say that are of no class of their own."""


class DivergedError(ValueError):
    """Training left the numbers that can be learned from."""

    def __init__(self, what: str, *, exploded: bool = False) -> None:
        super().__init__(f"{what}; nothing of it was kept; {_WAY_OUT}")
        self.what = what
        """One line: step, category, and what was found."""
        self.exploded = exploded
        """Whether the weights are at fault, as against this batch alone."""


class OutOfMemoryError(MemoryError):
    """A worker asked for more memory than there is; the message says when and how much."""


@dataclass
class Health:
    """What became of an arm's training so far; part of every checkpoint."""

    began: float = 0.0
    """Mean nats per unit over the rows of its first step, or of its first after a cut where that is more."""
    fresh: bool = True
    """Whether the next step is such a first one."""
    rate: float = 1.0
    """What is left of the recipe's learning rate, 0..1."""
    mishaps: int = 0
    """Batches that were skipped, or times that the rate was lowered."""


def sums_by_category(nats_R: Float[Tensor, " rows"], categories_R: Int[Tensor, " rows"], count: int) -> Tensor:
    """Return this rank's nats of each of ``count`` categories [categories], in the dtype of ``nats_R``."""
    sums_C = torch.zeros(count, dtype=nats_R.dtype, device=nats_R.device)
    return sums_C.index_add_(0, categories_R.to(nats_R.device), nats_R.detach())


def check_loss(
    sums_C: Float[Tensor, " categories"],
    rows: Int[Tensor, " rows"],
    task: Task,
    health: Health,
    training: Training,
    step: int,
) -> None:
    """Raise DivergedError where the loss of a step is not finite, or has exploded; ``step`` counts from 1.

    ``sums_C``: nats over all ranks; ``rows``: the categories of all ranks' rows. The mean loss of a first step is put
    down in ``health``.
    """
    mean = sums_C.sum().item() / (len(rows) * task.units_per_row)
    if math.isfinite(mean):
        if health.fresh:
            health.began, health.fresh = max(health.began, mean), False
        limit = training.explosion * max(health.began, _LEAST)
        if mean <= limit:
            return
    counts = torch.bincount(rows, minlength=len(task.categories)) * task.units_per_row
    loss = {c: sums_C[i].item() / int(counts[i]) for i, c in enumerate(task.categories) if counts[i] > 0}
    if lost := {category: nats for category, nats in loss.items() if not math.isfinite(nats)}:
        raise DivergedError(f"step {step}: the loss of {_listed(lost)} is not finite ({_shown(lost)})")
    if not math.isfinite(mean):
        raise DivergedError(f"step {step}: the losses of {_listed(loss)} add up to {mean:g}")
    high = {category: nats for category, nats in loss.items() if nats > limit}
    raise DivergedError(
        f"step {step}: the loss of {_listed(high)} exploded ({_shown(high)} nats, {mean:.4g} on average; beyond "
        f"training.explosion, {training.explosion:g}, times {max(health.began, _LEAST):.4g}, where it began)",
        exploded=True,
    )


def check_gradient(
    norm: float,
    losses: Callable[[Batch], tuple[Tensor, Tensor]],
    parameters: Sequence[nn.Parameter],
    parts: Sequence[Batch],
    rows: Batch,
    task: Task,
    world: World,
    step: int,
) -> None:
    """Raise DivergedError where the norm of a step's gradient is not finite; every rank calls it with the same norm.

    ``parts``: this rank's share of ``rows``; ``losses``: gives nats of rows and what is learned from. To name
    categories, the gradient of each is taken again, by every rank as often, since a pass of a model that is shared out
    takes them all: where a part has no row of a category, of one that another has. Gradients are left cleared.
    """
    if math.isfinite(norm):
        return
    bad_C = torch.zeros(len(task.categories), dtype=torch.float64)
    for part in parts:
        for index in rows.categories.unique().tolist():
            _clear(parameters)
            mine, there = ((each.categories == index).nonzero().flatten() for each in (part, rows))
            losses(part.take(mine) if len(mine) else rows.take(there[:1]))[1].sum().backward()
            bad_C[index] += any(p.grad is not None and not bool(own(p.grad).isfinite().all()) for p in parameters)
    _clear(parameters)
    world.sum([bad_C])
    bad = [category for category, count in zip(task.categories, bad_C.tolist(), strict=True) if count]
    whose = f"the gradient of {_listed(bad)} is" if bad else "the sum of finite gradients is"
    raise DivergedError(f"step {step}: {whose} not finite (norm {norm:g}), though the loss is")


def check_kept(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise DivergedError where a tensor that a checkpoint would keep is not finite; ``tensors``: arm -> name -> it."""
    for arm, held in tensors.items():
        for name, tensor in held.items():
            if tensor.is_floating_point() and not bool(own(tensor).isfinite().all()):
                raise DivergedError(f"{arm}: {name} is not finite at a checkpoint, which was not written")


@contextmanager
def memory(where: Callable[[], str]) -> Iterator[None]:
    """Raise OutOfMemoryError, with where it happened, when the body asks for more memory than there is.

    One inside of another says more of it.
    """
    try:
        yield
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"{where()}, {error}") from error
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        told = " ".join(str(error).split())[:160] or type(error).__name__
        raise OutOfMemoryError(
            f"{where()}: out of memory ({told}); free some, or lower the recipe's rows or raise cluster.workers"
        ) from error


def memory_for(batch: Batch, task: Task) -> AbstractContextManager[None]:
    """Do so with whose rows the body works on."""
    return memory(lambda: _whose(batch, task))


class AtHand:
    """Whose rows were last taken of some batches; as text, for ``memory``'s ``where``."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._last: Probe | None = None

    def of(self, batches: Iterable[Taken]) -> Iterator[Taken]:
        """Yield the batches."""
        for batch in batches:
            self._last = batch.rows if isinstance(batch, Uncounted) else batch
            yield batch

    def __str__(self) -> str:
        return _whose(self._last, self._task) if self._last else "before any row"


def _whose(batch: Probe, task: Task) -> str:
    counts = torch.bincount(batch.categories, minlength=len(task.categories)).tolist()
    return f"rows of {', '.join(f'{name!r} ({n})' for name, n in zip(task.categories, counts, strict=True) if n)}"


def _is_memory(error: Exception) -> bool:
    """Whether torch or Python ran out of memory; torch has an exception of its own for some alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(said in str(error) for said in _MEMORY)


def _clear(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _listed(names: Mapping[str, float] | Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _shown(loss: Mapping[str, float]) -> str:
    return ", ".join(f"{nats:.4g}" for nats in loss.values())
