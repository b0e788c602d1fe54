"""Sums of two workers on one machine, through memory that both see.

Gloo's message over loopback is copied into the kernel and out of it by the processors that should be computing: the
427,000 gradients of the shipped text recipe take 2.9 ms of a step of 55, and .5 ms here, where each worker writes what
it has and reads what the other wrote. Two numbers have one sum, in whatever order: these are the bits of a message, so
that a run may go on with its workers on two machines. Three have several, which is why three workers send messages.
"""

import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

_WORKERS = 2
_PIECE = 2**22
"""Bytes that a worker writes before both look: what a processor's cache holds."""
_SIZE = 2 * _WORKERS * _PIECE
_DTYPES = (torch.float32, torch.float64)


class SharedMemory:
    """What two workers of the default process group write for each other; all is called by both, in the same order.

    Each worker has two places and writes to them in turn. One signal a turn is enough: who has the other's signal of a
    turn knows that the other has read what was written two turns ago.
    """

    def __init__(self, memory: mmap.mmap, rank: int) -> None:
        self._memory = memory
        self._rank = rank
        self._turn = 0
        self._signal, self._answer = torch.zeros(1), torch.zeros(1)

    @classmethod
    def of_group(cls) -> Self | None:
        """Return the memory of the default group's workers; None if they are not two of gloo's in reach of each other.

        The memory has no name in any file system, and goes with the last of the two, however that ends.
        """
        if dist.get_world_size() != _WORKERS or dist.get_backend() != "gloo":
            return None
        rank = dist.get_rank()
        own = _offer() if rank == 0 else None
        where = _where()
        offers: list[tuple[str | None, _Offer | None]] = [(where, own)] * _WORKERS
        dist.all_gather_object(offers, (where, own))
        there, offered = offers[0]
        memory = _mapped(offered) if offered and where and where == there else None
        reached = [memory is not None] * _WORKERS
        dist.all_gather_object(reached, memory is not None)
        if own:
            os.close(own.descriptor)
        return cls(memory, rank) if memory is not None and all(reached) else None

    def takes(self, flat: Tensor) -> bool:
        """Whether such a vector can be summed here."""
        return flat.device.type == "cpu" and flat.dtype in _DTYPES and flat.numel() > 0

    def sum(self, flat: Tensor) -> None:
        """Replace a vector of float32 or float64, in place, by its sum over both workers.

        Raises RuntimeError, as a message would, where the other worker is gone.
        """
        for piece in flat.split(_PIECE // flat.element_size()):
            places = [self._place(worker, piece) for worker in range(_WORKERS)]
            places[self._rank].copy_(piece)
            self._meet()
            torch.add(*places, out=piece)
            self._turn ^= 1

    def _meet(self) -> None:
        """Go on when the other has come here, too: without gloo's own threads, which take longer to wake."""
        sent = dist.isend(self._signal, 1 - self._rank)
        dist.recv(self._answer, 1 - self._rank)
        if sent:
            sent.wait()

    def _place(self, worker: int, like: Tensor) -> Tensor:
        offset = (2 * worker + self._turn) * _PIECE
        return torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=offset)


class _Offer(NamedTuple):
    """Where worker 0's memory is: the number of a process and of a file that it has open."""

    process: int
    descriptor: int


def _where() -> str | None:
    """Return what two processes have in common that can open each other's files; None where that cannot be told."""
    with suppress(OSError):
        booted = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{booted} {Path('/proc/self/ns/pid').stat().st_ino} {os.geteuid()}"
    return None


def _offer() -> _Offer | None:
    """Make room for both workers' places; None where there is none, or no such memory on this system."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        descriptor = os.memfd_create("moeify-sums")
    except OSError:  # containers may forbid it
        return None
    try:  # what memory is missing is missing now: found out on writing, it would kill the process
        os.posix_fallocate(descriptor, 0, _SIZE)
    except OSError:
        os.close(descriptor)
        return None
    return _Offer(os.getpid(), descriptor)


def _mapped(offer: _Offer) -> mmap.mmap | None:
    try:
        descriptor = os.open(f"/proc/{offer.process}/fd/{offer.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return mmap.mmap(descriptor, _SIZE)
    except OSError:
        return None
    finally:
        os.close(descriptor)
