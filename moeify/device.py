"""Where a worker's networks and rows lie: on the CPU, or on a GPU of its own."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moeify.recipe.config import Cluster
from moeify.task import Batch, HeldOut, Task

CPU = torch.device("cpu")


def device_of(cluster: Cluster) -> torch.device:
    """Return where this worker's networks and rows lie: if it is to have a GPU, on torch's current one.

    On a GPU this process then runs torch's deterministic kernels, where there are such. ValueError where torch cannot
    use any.
    """
    if not cluster.gpus:
        return CPU
    if not torch.cuda.is_available():
        raise ValueError(
            f"cluster.gpus is 1, and torch {torch.__version__} finds no GPU here that it can use; "
            f"install torch for this GPU, or set cluster.gpus: 0"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS wants it for sums in one order
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.device("cuda", torch.cuda.current_device())


def finish(device: torch.device) -> None:
    """Return once the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OnDevice:
    """A task whose networks and rows lie on an accelerator; all else is as it was.

    Inputs and targets move. Categories, ids and examples stay on the CPU, where rows are put in order by them.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.categories, self.unit, self.units_per_row = task.categories, task.unit, task.units_per_row
        self.nats, self.right, self.sample, self.root = task.nats, task.right, task.sample, task.root
        self.bits_per_byte, self.assets = task.bits_per_byte, task.assets
        self._task, self._device = task, device

    @classmethod
    def of(cls, task: Task, device: torch.device) -> Task:
        """Return the task on a device; on the CPU it is itself."""
        return task if device == CPU else cls(task, device)

    def __getattr__(self, name: str) -> Any:
        """Return what only some tasks have."""
        return getattr(self._task, name)

    def build(self) -> nn.Module:
        """Return a freshly initialised dense network, the bits that it has on the CPU."""
        return self._task.build().to(self._device)

    def train_batch(self, step: int) -> Batch:
        """Return the rows of one optimizer step."""
        return self._moved(self._task.train_batch(step))

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield train rows for attribution."""
        return map(self._moved, self._task.probe_batches(round_, rows, rows_at_once))

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield rows of a held-out split."""
        return map(self._moved, self._task.held_out_batches(split, rows, rows_at_once))

    def _moved(self, batch: Batch) -> Batch:
        return replace(batch, inputs=batch.inputs.to(self._device), targets=batch.targets.to(self._device))
