"""Sums through memory that two workers share: gloo's bits, or gloo where the memory is out of reach."""

import errno
import os
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gloo import run_together
from moeify import shared_memory
from moeify.shared_memory import SharedMemory
from moeify.world import Group

PIECE = shared_memory._PIECE
pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memory without a name")


def numbers(rank: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, generator=generator, dtype=torch.float64).mul(10.0 ** (rank * 3)).to(dtype)


def sums_are_the_bits_of_messages(rank: int, folder: Path) -> None:
    world = Group()
    assert world._memory
    for dtype in (torch.float32, torch.float64):
        whole = PIECE // dtype.itemsize
        for count in (1, 5, whole - 1, whole, whole + 1, 3 * whole + 7):
            sent = numbers(rank, count, dtype)
            summed = sent.clone()
            world.sum([summed])
            dist.all_reduce(sent)
            assert torch.equal(summed, sent)
    odd = [numbers(rank, 12).view(3, 4).T, torch.tensor([[rank]]), numbers(rank, 5, torch.float64), numbers(rank, 0)]
    expected = [numbers(0, 12).view(3, 4).T + numbers(1, 12).view(3, 4).T, torch.tensor([[1]])]
    expected += [numbers(0, 5, torch.float64) + numbers(1, 5, torch.float64), torch.zeros(0)]
    world.sum(odd)
    assert all(torch.equal(*pair) for pair in zip(odd, expected, strict=True))
    nothing = torch.zeros(0)
    world.sum([nothing])
    assert nothing.numel() == 0
    halves = torch.full((1 << 16,), 1.5 + rank, dtype=torch.bfloat16)
    world.sum([halves])  # a message
    assert bool((halves == 4).all())
    (folder / f"{rank}").touch()


def nobody_reads_what_is_being_written(rank: int, folder: Path) -> None:
    world = Group()
    assert world._memory
    waits = random.Random(rank)
    meet = world._memory._meet

    def dawdle() -> None:
        """Read late what the other may be about to write over."""
        time.sleep(waits.choice([0, 0, 0.002]))
        meet()
        time.sleep(waits.choice([0, 0, 0.002]))

    world._memory._meet = dawdle  # type: ignore[method-assign]
    for turn in range(300):
        mine = torch.full((2000,), float(turn + rank))
        world.sum([mine])
        assert bool((mine == 2 * turn + 1).all()), turn
    (folder / f"{rank}").touch()


def a_worker_that_is_gone_is_an_error(rank: int, folder: Path) -> None:
    world = Group()
    assert world._memory
    world.sum([torch.ones(1000)])
    if rank == 0:
        with pytest.raises(RuntimeError, match="gloo"):  # by which pipelines.worker knows it
            world.sum([torch.ones(1000)])
        (folder / "0").touch()
    (folder / "1").touch()
    os._exit(0)  # rank 1 first


@pytest.mark.parametrize(
    "worker", [sums_are_the_bits_of_messages, nobody_reads_what_is_being_written, a_worker_that_is_gone_is_an_error]
)
def test_two_workers(worker: object, tmp_path: Path) -> None:
    assert callable(worker)
    run_together(worker, tmp_path)
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()


def messages_are_sent(rank: int, folder: Path, size: int, trouble: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if trouble == "machines":
            patch.setattr(shared_memory, "_where", lambda: f"machine {rank}")
        elif trouble == "unknown":
            patch.setattr(shared_memory, "_where", lambda: None)
        elif trouble == "room" and rank == 0:
            patch.setattr(os, "posix_fallocate", _full)
        elif trouble == "forbidden" and rank == 0:
            patch.setattr(os, "memfd_create", _forbidden)
        elif trouble == "rights" and rank == 1:
            patch.setattr(shared_memory, "_mapped", lambda _: None)
        elif trouble == "system":
            patch.delattr(os, "memfd_create")
        assert SharedMemory.of_group() is None
        world = Group()
    summed = numbers(rank, 1000)
    world.sum([summed])
    torch.testing.assert_close(summed, torch.stack([numbers(each, 1000) for each in range(size)]).sum(0))
    (folder / f"{rank}").touch()


def _full(*_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _forbidden(*_: str) -> int:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("trouble", ["machines", "unknown", "room", "forbidden", "rights", "system", "three"])
def test_memory_that_not_both_reach_is_used_by_neither(trouble: str, tmp_path: Path) -> None:
    size = 3 if trouble == "three" else 2
    run_together(messages_are_sent, tmp_path, size, told=(size, trouble))
    assert len(list(tmp_path.glob("[0-9]"))) == size
