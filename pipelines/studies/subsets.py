"""A task of some of another task's categories, which a trained network goes on with."""

import copy
from collections.abc import Iterator, Sequence

from torch import full, isin, nn, tensor

from moeify.task import Batch, HeldOut, Task


class Subset:
    """The rows of some categories, numbered anew; ``build`` gives a copy of ``network``.

    ``skipped``: steps of the task whose rows are passed over, so that another order of rows can be asked for.
    """

    def __init__(self, task: Task, kept: Sequence[str], network: nn.Module, skipped: int = 0) -> None:
        self.categories, self.unit, self.units_per_row = tuple(kept), task.unit, task.units_per_row
        self.nats, self.sample, self.root, self.right = task.nats, task.sample, task.root, task.right
        self._task, self._network, self._skipped = task, network, skipped
        places = [task.categories.index(name) for name in kept]
        self._places = tensor(places).sort().values
        self._number = full((len(task.categories),), -1)
        self._number[tensor(places)] = tensor(range(len(places)))

    def build(self) -> nn.Module:
        """Return a copy of the trained network."""
        return copy.deepcopy(self._network)

    def train_batch(self, step: int) -> Batch:
        """Return the step's rows of the categories that are kept: fewer than the task's."""
        return self._kept(self._task.train_batch(step + self._skipped))

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield train rows of each category, for attribution."""
        yield from map(self._kept, self._task.probe_batches(round_, rows, rows_at_once))

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield held-out rows of each category; batches are smaller than ``rows_at_once``."""
        for batch in map(self._kept, self._task.held_out_batches(split, rows, rows_at_once)):
            if len(batch.categories):
                yield batch

    def bits_per_byte(self, loss: dict[str, float], split: HeldOut) -> dict[str, float] | None:
        """Return None: nobody asks."""
        return None

    def assets(self) -> dict[str, bytes]:
        """Return nothing."""
        return {}

    def _kept(self, batch: Batch) -> Batch:
        mine = batch.take(isin(batch.categories, self._places).nonzero()[:, 0])
        numbers = self._number[mine.categories]
        order = numbers.argsort(stable=True)
        return Batch(
            mine.inputs[order],
            mine.targets[order],
            numbers[order],
            mine.ids[order],
            None if mine.examples is None else mine.examples[order],
        )
