"""The port between the loop and what is learned: data in categories, a loss in nats, a network to build.

The loop sees nothing else of a task, so it does not know whether it trains a language model or an autoencoder.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moeify.recipe.config import RunConfig

HeldOut = Literal["validation", "test"]


@dataclass(frozen=True)
class Batch:
    """Rows in category order as tasks make them: ``categories`` never falls from one row to the next."""

    inputs: Tensor
    """What the network takes; rows first."""
    targets: Tensor
    """What the loss compares with; rows first."""
    categories: Int[Tensor, " rows"]
    """Index into the task's categories."""
    ids: Int[Tensor, " rows"]
    """The row's number in its stream: the same however rows are shared out over workers."""
    examples: Int[Tensor, " rows"] | None = None
    """Which example of its category a row is, the same whenever it is drawn again; None: an example of its own, that of
    its id. Says whose label is known where only some are (``routing.labelled``)."""

    def shard(self, rank: int, size: int) -> Self:
        """Return every ``size``-th row from ``rank`` on, in the same order."""
        return self._rows(slice(rank, None, size))

    def take(self, rows: Int[Tensor, " some"]) -> Self:
        """Return these rows, in this order."""
        return self._rows(rows)

    def _rows(self, rows: slice | Tensor) -> Self:
        examples = None if self.examples is None else self.examples[rows]
        return type(self)(self.inputs[rows], self.targets[rows], self.categories[rows], self.ids[rows], examples)


@runtime_checkable
class Task(Protocol):
    """Data, network and loss of one kind of problem. Everything is a pure function of the recipe and the arguments."""

    categories: tuple[str, ...]
    """In the recipe's order."""
    unit: Literal["token", "example"]
    """What a loss in nats is counted by."""
    units_per_row: int
    """Tokens (or examples) whose loss one row adds up."""

    def build(self) -> nn.Module:
        """Return a freshly initialised dense network, the same bits each time."""
        ...

    def train_batch(self, step: int) -> Batch:
        """Return the rows of one optimizer step, categories in equal shares; the same for the same ``step``."""
        ...

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield ``rows`` train rows of each category, ``rows_at_once`` at a time, for attribution."""
        ...

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield up to ``rows`` rows of each category of a held-out split, always the same ones.

        Every batch has ``rows_at_once`` rows but the last, which may have fewer.
        """
        ...

    def nats(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " rows"]:
        """Return each row's summed negative log-likelihood in nats."""
        ...

    def sample(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        """Draw targets from the model's own predictive distribution, one seed a row."""
        ...

    def root(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return random vectors whose second moment is the outputs' Fisher information (``attribution.roots``)."""
        ...

    def right(self, outputs: Tensor, targets: Tensor) -> Bool[Tensor, " rows"] | None:
        """Say which rows the model gets right; None where a row is not right or wrong."""
        ...

    def bits_per_byte(self, loss: dict[str, float], split: HeldOut) -> dict[str, float] | None:
        """Turn test losses in nats per token into bits per byte of text; None where bytes mean nothing."""
        ...

    def assets(self) -> dict[str, bytes]:
        """Return what an export needs besides the network (for text: the tokenizer's files), by file name."""
        ...


@runtime_checkable
class Counted(Protocol):
    """A task that knows how much data it has."""

    def sizes(self) -> dict[str, dict[str, int]]:
        """Return split -> category -> tokens or examples."""
        ...


@runtime_checkable
class Partial(Protocol):
    """A task that asks for a part of each row's tokens."""

    length: int
    """Tokens a row, all of which the network reads."""


class Redrawn:
    """A task whose train rows are drawn in another way; all else is as it was."""

    def __init__(self, task: Task, draw: Callable[[int], Batch]) -> None:
        self.categories, self.unit, self.units_per_row = task.categories, task.unit, task.units_per_row
        self.train_batch = draw
        self.build, self.nats, self.right = task.build, task.nats, task.right
        self.sample, self.root = task.sample, task.root
        self.probe_batches, self.held_out_batches = task.probe_batches, task.held_out_batches
        self.bits_per_byte, self.assets = task.bits_per_byte, task.assets


def tokens_read(task: Task) -> int:
    """Return how many tokens (or examples) of a row the network reads."""
    return task.length if isinstance(task, Partial) else task.units_per_row


def data_hash(task: Task, config: RunConfig) -> str:
    """Return SHA-256, in hex, over data of a run: the train rows that its first cut is decided on, and all test rows.

    Runs whose hashes differ read different data.
    """
    probe, test = config.attribution, config.evaluation
    digest = hashlib.sha256("\0".join(task.categories).encode())
    for batch in chain(
        task.probe_batches(1, probe.rows, probe.rows_at_once),
        task.held_out_batches("test", test.test_rows, test.rows_at_once),
    ):
        for tensor in (batch.inputs, batch.targets, batch.categories):
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(content(tensor))
    return digest.hexdigest()


def content(tensor: Tensor) -> bytes:
    """Return a tensor's numbers, row by row, as they lie in memory."""
    flat = tensor.detach().cpu().flatten()
    flat = flat.clone(memory_format=torch.contiguous_format)  # one element may have any stride
    return flat.view(torch.uint8).numpy().tobytes()
