"""Stopping a run because someone asks for it, on all workers at once, so that it can go on to the same bits.

In training that is the end of a step, with a checkpoint. In the phases between, which begin at a checkpoint, it is the
next time that workers add up what each of them has found; what the phase had found is found again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from moeify.world import World

T = TypeVar("T")
Asked = Callable[[], bool]
"""Whether someone has asked for the run to stop; called often, and on rank 0 alone."""


class StoppedError(Exception):
    """The run has stopped because it was asked to; the store's newest checkpoint is where it goes on."""


def never() -> bool:
    """Return that nobody asks."""
    return False


class Stoppable:
    """A world whose every sum raises ``StoppedError``, on every rank, where someone has asked rank 0 to stop."""

    def __init__(self, world: World, asked: Asked) -> None:
        self.rank, self.size, self.parallel, self.device = world.rank, world.size, world.parallel, world.device
        self._world = world
        self._asked = asked

    def asked(self) -> bool:
        """Return whether someone has asked rank 0; False on the others, which hear of it by a sum."""
        return self.rank == 0 and self._asked()

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over ranks."""
        self._world.sum(tensors)
        self._check()

    def share(self, value: T) -> T:
        """Return rank 0's value on every rank; a barrier. Does not stop."""
        return self._world.share(value)

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, in their order, on every rank. Does not stop."""
        return self._world.gather(value)

    def heeding(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, as many as every rank has; stop between two of them."""
        for batch in batches:
            self._check()
            yield batch

    def _check(self) -> None:
        heard = torch.tensor([int(self.asked())])
        self._world.sum([heard])
        if heard.item():
            raise StoppedError("asked to stop; the run goes on from its newest checkpoint")
