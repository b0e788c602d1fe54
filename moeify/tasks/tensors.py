"""Tensors at hand as a task, for notebooks: rows by category, a network, and one of three losses."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attribution.roots import bernoulli_root, categorical_root
from moeify import rows as rows_of
from moeify.models.families import opened
from moeify.task import Batch, HeldOut
from moeify.tasks.language import sample_tokens, token_nats
from moeify.tasks.pixels import pixel_nats, sample_pixels

Loss = Literal["tokens", "pixels", "classes"]
"""``tokens``: each next token of integer rows [rows tokens]; ``pixels``: intensities 0..1 against a logit each, the
targets being the inputs unless given; ``classes``: integer targets [rows] against logits [rows classes]. A route tells
its rows' category, so a category should hold several classes."""
Data = Mapping[str, Tensor | tuple[Tensor, Tensor]]
"""Category -> inputs, or inputs and targets; rows first."""

_HELD_OUT = 0.15
"""Share of each category's rows that goes to validation, and to test."""
_LEAST_ROWS = 8


class TensorTask:
    """Rows of each category, shared out over train, validation and test at random; the network trains as it is."""

    def __init__(self, network: nn.Module, data: Data, loss: Loss, *, rows: int, seed: int) -> None:
        self.categories = tuple(data)
        self.unit: Literal["token", "example"] = "token" if loss == "tokens" else "example"
        self._network, self._loss, self._rows, self._seed = network, loss, rows, seed
        if len(self.categories) < 2:
            raise ValueError(f"data: got {len(self.categories)} categories, wanted two at least, by name")
        pairs = {name: _pair(name, given, loss) for name, given in data.items()}
        shapes = {name: tuple(inputs.shape[1:]) for name, (inputs, _) in pairs.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"data: got rows of shapes {shapes}, wanted the same shape in every category")
        self.units_per_row = next(iter(pairs.values()))[0].shape[1] if loss == "tokens" else 1
        self._splits: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "validation": [], "test": []}
        random = rows_of.generator(seed, "split")
        for inputs, targets in pairs.values():
            order, held = random.permutation(len(inputs)), max(1, round(_HELD_OUT * len(inputs)))
            for split, part in zip(("test", "validation", "train"), np.split(order, [held, 2 * held]), strict=True):
                some = torch.from_numpy(part)
                self._splits[split].append((inputs[some], targets[some]))

    def build(self) -> nn.Module:
        """Return a copy of the network as it was given."""
        return opened(copy.deepcopy(self._network))

    def train_batch(self, step: int) -> Batch:
        """Return the rows of one optimizer step, categories in equal shares, drawn with replacement."""
        random = rows_of.generator(self._seed, "train", step)
        counts = rows_of.shares(self._rows, len(self.categories), random)
        parts = self._splits["train"]
        drawn = [random.integers(len(parts[place][0]), size=count) for place, count in enumerate(counts)]
        return self._batch(
            "train", [(place, int(row)) for place, rows in enumerate(drawn) for row in rows], step * self._rows
        )

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield train rows of each category, a random sample without replacement, for attribution."""
        random = rows_of.generator(self._seed, "probe", round_)
        orders = [random.permutation(len(inputs))[:rows] for inputs, _ in self._splits["train"]]
        yield from self._batches("train", orders, rows_at_once)

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield up to ``rows`` rows of each category, always the same ones."""
        orders = [np.arange(min(rows, len(inputs))) for inputs, _ in self._splits[split]]
        yield from self._batches(split, orders, rows_at_once)

    def nats(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " rows"]:
        """Return each row's summed loss in nats."""
        if self._loss == "tokens":
            return token_nats(outputs, targets)
        if self._loss == "classes":
            return F.cross_entropy(outputs, targets, reduction="none")
        return pixel_nats(outputs, targets)

    def sample(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        """Draw targets from the model's own predictive distribution, one seed a row."""
        if self._loss == "tokens":
            return sample_tokens(outputs, seeds)
        if self._loss == "classes":
            return sample_tokens(outputs.unsqueeze(1), seeds).squeeze(1)
        return sample_pixels(outputs, seeds)

    def root(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return random roots of the Fisher information of the outputs."""
        return (bernoulli_root if self._loss == "pixels" else categorical_root)(outputs, seeds)

    def right(self, outputs: Tensor, targets: Tensor) -> Bool[Tensor, " rows"] | None:
        """Say whose class is the likeliest one; None where there are no classes."""
        return outputs.argmax(1) == targets if self._loss == "classes" else None

    def bits_per_byte(self, loss: dict[str, float], split: HeldOut) -> dict[str, float] | None:
        """Return None: nothing is known of bytes."""
        return None

    def assets(self) -> dict[str, bytes]:
        """Return nothing."""
        return {}

    def sizes(self) -> dict[str, dict[str, int]]:
        """Return split -> category -> tokens or examples."""
        each = {
            split: [len(inputs) * self.units_per_row for inputs, _ in parts] for split, parts in self._splits.items()
        }
        return {split: dict(zip(self.categories, counts, strict=True)) for split, counts in each.items()}

    def _batches(self, split: str, orders: Sequence[Int[np.ndarray, " rows"]], rows_at_once: int) -> Iterator[Batch]:
        first = 0
        for picks in rows_of.interleaved(np.array([len(order) for order in orders]), rows_at_once):
            yield self._batch(split, [(place, int(orders[place][row])) for place, row in picks], first)
            first += len(picks)

    def _batch(self, split: str, picks: Sequence[tuple[int, int]], first: int) -> Batch:
        parts = self._splits[split]
        inputs = torch.stack([parts[place][0][row] for place, row in picks])
        targets = torch.stack([parts[place][1][row] for place, row in picks])
        categories = torch.tensor([place for place, _ in picks])
        return Batch(inputs, targets, categories, torch.arange(first, first + len(picks)))


def _pair(name: str, given: Tensor | tuple[Tensor, Tensor], loss: Loss) -> tuple[Tensor, Tensor]:
    """Return a category's inputs and targets; ValueError where they do not fit the loss."""
    inputs, targets = (given, None) if isinstance(given, Tensor) else given
    if len(inputs) < _LEAST_ROWS or (targets is not None and len(targets) != len(inputs)):
        told = "" if targets is None else f" and {len(targets)} targets"
        raise ValueError(
            f"data[{name!r}]: got {len(inputs)} rows{told}, wanted {_LEAST_ROWS} at least, as many targets"
        )
    if loss == "tokens":
        if inputs.is_floating_point() or inputs.ndim != 2 or targets is not None:
            raise ValueError(f"data[{name!r}]: loss 'tokens' needs integers [rows tokens] and no targets beside them")
        return inputs[:, :-1].long(), inputs[:, 1:].long()
    if loss == "pixels":
        return inputs, inputs if targets is None else targets
    if targets is None or targets.is_floating_point() or targets.ndim != 1:
        raise ValueError(f"data[{name!r}]: loss 'classes' needs inputs and integer targets [rows], as a pair")
    return inputs, targets.long()
