"""Gloo workers in processes of their own, for benchmarks and tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

Worker = Callable[..., None]
"""Called with its rank, the folder that all workers share, and what it is told besides."""


def run_together(worker: Worker, folder: Path, size: int = 2, *, told: tuple[Any, ...] = (), threads: int = 1) -> None:
    """Run ``worker`` in ``size`` processes that form the default group; raise what one of them raised.

    ``worker`` must be importable: a function of a module.
    """
    spawn(_run, args=(worker, size, folder, told, threads), nprocs=size)


def _run(rank: int, worker: Worker, size: int, folder: Path, told: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    worker(rank, folder, *told)
    dist.barrier()
    # No interpreter to tear down: gloo's threads may still let go of tensors, which then aborts the process, now and
    # then (pytorch/pytorch#179291: "terminate called without an active exception").
    os._exit(0)
