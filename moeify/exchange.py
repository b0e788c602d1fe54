"""How the workers' gradients of a step become one, as the recipe's ``cluster.parallel`` says.

Gradients are sums over all workers' rows, never means: what is learned from is divided by the rows of the whole step.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, assert_never, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moeify.recipe.parallel import Ddp, Fsdp, Replicate
from moeify.world import World


@runtime_checkable
class Exchange(Protocol):
    """One model's gradients and the other workers. Every rank calls everything in the same order."""

    run: nn.Module
    """What forward passes go through whose gradients are exchanged."""

    @contextmanager
    def passing(self, *, last: bool) -> Iterator[None]:
        """Have a forward and a backward pass in the context, the ``last`` of a step or one before."""
        ...

    def finish(self, sums: Sequence[Tensor]) -> None:
        """Make gradients those of all workers, and replace each of ``sums``, in place, by its sum over ranks."""
        ...


def exchange(model: nn.Module, world: World) -> Exchange:
    """Return the exchange that the world asks for; alone, there is none to speak of."""
    if world.size == 1:
        return Flat(model, world)
    match world.parallel:
        case Replicate():
            return Flat(model, world)
        case Ddp(bucket=megabytes):
            return Overlapped(model, world, megabytes)
        case Fsdp():
            return Reduced(model, world)
        case _ as never:
            assert_never(never)


class Flat:
    """One message when all is computed."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.run = model
        self._world = world

    @contextmanager
    def passing(self, *, last: bool) -> Iterator[None]:
        """Let gradients add up on this worker."""
        yield

    def finish(self, sums: Sequence[Tensor]) -> None:
        """Send gradients and ``sums`` in one message."""
        grads = [p.grad for p in self.run.parameters() if p.requires_grad and p.grad is not None]
        self._world.sum([*grads, *sums])


class Overlapped:
    """Messages on the way while the backward pass goes on.

    Which gradients travel together must not depend on when they were ready: a sum of three workers or more rounds by
    it, and a resumed run has to give the same bits. Torch leaves its buckets as they are where it looks for parameters
    that a pass did not use; that there are none, it says once on stderr.
    """

    def __init__(self, model: nn.Module, world: World, megabytes: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.13 on
            wrapped = DistributedDataParallel(
                model, bucket_cap_mb=megabytes, broadcast_buffers=False, find_unused_parameters=True
            )
        wrapped.register_comm_hook(None, lambda _, bucket: _added_up(bucket.buffer()))
        self.run: nn.Module = wrapped
        self._wrapped = wrapped
        self._world = world

    @contextmanager
    def passing(self, *, last: bool) -> Iterator[None]:
        """Exchange in the last pass what has added up since the first."""
        with nullcontext() if last else self._wrapped.no_sync():
            yield

    def finish(self, sums: Sequence[Tensor]) -> None:
        """Send ``sums`` alone: gradients have arrived."""
        self._world.sum(sums)


class Reduced:
    """Every pass of a model that is shared out (``moeify.routed.shard``) leaves on each worker the sum of its share of
    the gradients, layer by layer."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.run = model
        self._world = world

    @contextmanager
    def passing(self, *, last: bool) -> Iterator[None]:
        """Have each pass exchange its own gradients: whole ones, to be added up first, would take the memory."""
        yield

    def finish(self, sums: Sequence[Tensor]) -> None:
        """Send ``sums`` alone: gradients have arrived."""
        self._world.sum(sums)


def _added_up(bucket: Tensor) -> torch.futures.Future[Tensor]:
    """Add up over ranks, where torch's own way divides by their number."""
    work = dist.all_reduce(bucket, async_op=True)
    assert work is not None
    future: torch.futures.Future[Any] = work.get_future()
    return future.then(lambda arrived: arrived.value()[0])
