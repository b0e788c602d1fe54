"""Two gloo workers in processes of their own."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Worker = Callable[[int, Path], None]
"""Called with its rank and the folder that all workers share."""


def run_together(worker: Worker, folder: Path, size: int = 2) -> None:
    """Run ``worker`` in ``size`` processes that form the default group; raise what one of them raised.

    ``worker`` must be importable: a function of a test module.
    """
    mp.start_processes(_run, args=(worker, size, folder), nprocs=size, start_method="spawn")


def _run(rank: int, worker: Worker, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    worker(rank, folder)
    dist.barrier()
    # No interpreter to tear down: gloo's threads may still let go of tensors, which then aborts the process, now and
    # then (pytorch/pytorch#179291: "terminate called without an active exception").
    os._exit(0)
