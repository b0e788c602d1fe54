"""Where a worker's networks and rows lie: on the CPU, or on a GPU of its own."""

import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from moeify.task import Batch, Counted, HeldOut, Partial, Task
from moeify.world import CPU, World, built_on

_WAY_OUT = "install torch for this GPU, or set cluster.gpus: 0"


def take_device(gpus: int) -> torch.device:
    """Return where networks and rows of this process lie: on torch's current GPU, where it is to have one.

    Torch is then set, for all of the process, to compute in one order and in float32 where float32 is asked for. An
    operation of which it has no such kernel raises RuntimeError. ValueError where no GPU is there that torch can use.
    """
    if not gpus:
        return CPU
    if not torch.cuda.is_available():
        raise ValueError(f"cluster.gpus is 1, and torch {torch.__version__} finds no GPU here; {_WAY_OUT}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS wants it for sums in one order
    torch.use_deterministic_algorithms(True)  # only to warn would leave attention's backward pass as it is
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.allow_tf32 = False
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        torch.ones(2, device=device).sum().item()  # a build of torch may lack this GPU's kernels
    except RuntimeError as error:
        said = " ".join(str(error).split())[:160]
        raise ValueError(f"cluster.gpus is 1, and torch cannot use this GPU ({said}); {_WAY_OUT}") from error
    return device


def finish(device: torch.device) -> None:
    """Return once the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OnDevice:
    """A task whose networks and rows lie where a world computes; all else is as it was.

    Inputs and targets move. Categories, ids and examples stay on the CPU, where rows are put in order by them.
    """

    def __init__(self, task: Task, world: World) -> None:
        self.categories, self.unit, self.units_per_row = task.categories, task.unit, task.units_per_row
        self.nats, self.right, self.sample, self.root = task.nats, task.right, task.sample, task.root
        self.bits_per_byte, self.assets = task.bits_per_byte, task.assets
        if isinstance(task, Partial):
            self.length = task.length
        if isinstance(task, Counted):
            self.sizes = task.sizes
        self._task, self._device, self._built_on = task, world.device, built_on(world)

    @classmethod
    def of(cls, task: Task, world: World) -> Task:
        """Return the task where a world computes; on the CPU it is itself."""
        return task if world.device == CPU else cls(task, world)

    def build(self) -> nn.Module:
        """Return a freshly initialised dense network, the bits that it has on the CPU."""
        return self._task.build().to(self._built_on)

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
