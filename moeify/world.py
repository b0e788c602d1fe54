"""The port to the other workers: one process alone, or a torch.distributed group."""

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from moeify.recipe.parallel import Fsdp, Parallel, Replicate
from moeify.shared_memory import SharedMemory

T = TypeVar("T")
CPU = torch.device("cpu")


@runtime_checkable
class World(Protocol):
    """What the SPMD loop asks of its group. Every rank calls every collective in the same order."""

    rank: int
    size: int
    parallel: Parallel
    """How training is shared; see ``moeify.exchange``."""
    device: torch.device
    """Where this rank's networks and rows lie."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over ranks."""
        ...

    def share(self, value: T) -> T:
        """Return rank 0's value on every rank, none of which goes on before rank 0 has come here."""
        ...

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in their order, on every rank; a barrier."""
        ...


class Solo:
    """One process: every collective is the identity."""

    rank = 0
    size = 1
    parallel: Parallel = Replicate()

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Leave the tensors as they are."""

    def share(self, value: T) -> T:
        """Return the value."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return the value alone."""
        return [value]


class Group:
    """The default process group of torch.distributed; every rank makes its own at the same time.

    Sums travel as one flat buffer for each dtype and device, in the order given: the result depends on the world size
    and on nothing else, so that a resumed run adds up the same way as an undisturbed one. Two workers of one machine
    need not send what they can both see, where they have no GPUs.
    """

    def __init__(self, parallel: Parallel | None = None, device: torch.device = CPU) -> None:
        self.parallel = parallel or Replicate()
        self.device = device
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._memory = SharedMemory.of_group()

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over ranks."""
        kinds = dict.fromkeys((t.dtype, t.device) for t in tensors)
        alike = [[t for t in tensors if (t.dtype, t.device) == kind] for kind in kinds]
        sent = []
        for same in sorted(alike, key=lambda same: sum(t.numel() for t in same)):  # small ones leave while others pack
            flat = torch.cat([t.reshape(-1) for t in same])
            work = None
            if self._memory and self._memory.takes(flat):
                self._memory.sum(flat)
            else:
                work = dist.all_reduce(flat, async_op=True)
            sent.append((same, flat, work))
        for same, flat, work in sent:
            if work:
                work.wait()
            for tensor, total in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def share(self, value: T) -> T:
        """Return rank 0's value on every rank, none of which goes on before rank 0 has come here."""
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in their order, on every rank; a barrier."""
        boxes = [value] * self.size
        dist.all_gather_object(boxes, value)
        return boxes


def built_on(world: World) -> torch.device:
    """Return where a world's networks come to be: where it computes, but for those that are shared out, which move
    there a layer's share at a time."""
    return CPU if shares_models(world) else world.device


def shares_models(world: World) -> bool:
    """Say whether each worker of a world holds but a share of every model, so that all must take part in its passes."""
    return world.size > 1 and isinstance(world.parallel, Fsdp)
