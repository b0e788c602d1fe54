"""Tensors at hand as a task, for notebooks: rows by category, a network, and one of three losses."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attribution.roots import bernoulli_root, categorical_root
from moeify import rows as rows_of
from moeify.data.documents import misnamed
from moeify.models.build import logits
from moeify.models.families import opened
from moeify.routed.split_model import SplitModel
from moeify.task import Batch, HeldOut
from moeify.tasks.language import sample_tokens, token_nats
from moeify.tasks.pixels import pixel_nats, sample_pixels

Loss = Literal["tokens", "pixels", "classes"]
"""``tokens``: each next token of integer rows [rows tokens]; ``pixels``: intensities 0..1 [rows pixels] against a logit
each, the targets being the inputs unless given; ``classes``: integer targets [rows] against logits [rows classes]. A
route tells its rows' category, so a category should hold several classes."""
Data = Mapping[str, Tensor | tuple[Tensor, Tensor]]
"""Category -> inputs, or inputs and targets; rows first. Names are those that a recipe's categories may have."""

_HELD_OUT = 0.15
"""Share of each category's rows that goes to validation, and to test."""
_LEAST_ROWS = 8
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class TensorTask:
    """Rows of each category, shared out over train, validation and test at random; the network trains as it is.

    ValueError, a line, for data that do not fit the loss, each other or the network, which is asked for a row of each
    category.
    """

    def __init__(self, network: nn.Module, data: Data, loss: Loss, *, rows: int, seed: int) -> None:
        rows, seed = whole_number("rows", rows, 1), whole_number("seed", seed, 0)
        pairs = _pairs(data, loss)
        for place, (name, pair) in enumerate(pairs.items()):
            _ask(network, loss, place, f"data[{name!r}]", *pair)
        self.categories = tuple(pairs)
        self.unit: Literal["token", "example"] = "token" if loss == "tokens" else "example"
        self._network, self._loss, self._rows, self._seed = network, loss, rows, seed
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


def whole_number(name: str, given: object, least: int, why: str = "") -> int:
    """Return what an argument gives; ValueError where it is no whole number, or less than the least."""
    if isinstance(given, bool) or not isinstance(given, Integral) or given < least:
        raise ValueError(f"{name}: got {given!r:.60}, wanted a whole number >= {least}{why}")
    return int(given)


# --- what data must be ----------------------------------------------------------------------------------


def _pairs(data: Any, loss: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return category -> inputs and targets; ValueError where they fit neither the loss nor each other."""
    if loss not in (losses := get_args(Loss)):
        raise ValueError(f"loss: got {loss!r:.60}, wanted one of {', '.join(map(repr, losses))}")
    if not isinstance(data, Mapping):
        raise ValueError(f"data: got {type(data).__name__}, wanted a mapping from the names of categories to rows")
    for name in data:
        if not isinstance(name, str):
            raise ValueError(f"data: got category {name!r:.60}, wanted a name in quotes, such as {str(name)!r:.60}")
        if problem := misnamed(name):
            raise ValueError(f"data: {problem}")
    if len(data) < 2:
        raise ValueError(f"data: got {len(data)} categories, wanted two at least, by name")
    pairs = {name: _pair(f"data[{name!r}]", given, loss) for name, given in data.items()}
    for place, what in enumerate(("rows", "targets")):
        shapes = {name: tuple(pair[place].shape[1:]) for name, pair in pairs.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"data: got {what} of shapes {shapes}, wanted the same shape in every category")
    if loss == "pixels":
        _check_intensities({name: targets for name, (_, targets) in pairs.items()})
    return pairs


def _pair(where: str, given: Any, loss: str) -> tuple[Tensor, Tensor]:
    """Return a category's inputs and targets; ValueError where they do not fit the loss."""
    parts = tuple(given) if isinstance(given, tuple | list) else (given,)
    if len(parts) not in (1, 2) or not all(isinstance(part, Tensor) and part.ndim for part in parts):
        got = " and ".join(_kind(part) for part in parts[:3]) or "nothing"
        raise ValueError(
            f"{where}: got {got}, wanted a tensor of rows, or inputs and targets as a pair of them; "
            f"torch.as_tensor makes one of an array"
        )
    inputs, targets = parts[0], parts[1] if len(parts) == 2 else None
    if len(inputs) < _LEAST_ROWS or (targets is not None and len(targets) != len(inputs)):
        told = "" if targets is None else f" and {len(targets)} targets"
        raise ValueError(f"{where}: got {len(inputs)} rows{told}, wanted {_LEAST_ROWS} at least, as many targets")
    for what, part in (("inputs", inputs), ("targets", targets)):
        if part is not None and part.is_floating_point() and not part.isfinite().all():
            raise ValueError(
                f"{where}: got NaN or infinity among the {what}, wanted finite numbers; leave such rows out"
            )
    if loss == "tokens":
        if inputs.dtype not in _WHOLE or inputs.ndim != 2 or inputs.shape[1] < 2 or targets is not None:
            raise ValueError(f"{where}: loss 'tokens' needs integers [rows tokens] and no targets beside them")
        return inputs[:, :-1].long(), inputs[:, 1:].long()
    if loss == "pixels":
        targets = inputs if targets is None else targets
        for what, part in (("inputs", inputs), ("targets", targets)):
            if not part.is_floating_point():
                raise ValueError(
                    f"{where}: got {what} of {part.dtype}, wanted floats 0..1, such as images.float() / 255"
                )
        if targets.ndim != 2:
            raise ValueError(
                f"{where}: got targets of shape {list(targets.shape)}, wanted [rows pixels]; flatten(1) them"
            )
        return inputs, targets
    if targets is None or targets.dtype not in _WHOLE or targets.ndim != 1:
        raise ValueError(f"{where}: loss 'classes' needs inputs and integer targets [rows], as a pair")
    return inputs, targets.long()


def _kind(part: object) -> str:
    return f"a tensor of shape {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__


def _check_intensities(targets: Mapping[str, Tensor]) -> None:
    """Raise ValueError for targets beyond 0..1, where the loss of pixels has no lower bound."""
    largest = max(each.max().item() for each in targets.values())
    for name, each in targets.items():
        low, high = each.min().item(), each.max().item()
        if low < 0:
            raise ValueError(f"data[{name!r}]: got intensities from {low:g}, wanted 0..1; shift and scale them")
        if high > 1:
            raise ValueError(f"data[{name!r}]: got intensities up to {high:g}, wanted 0..1; divide by {largest:g}")


@torch.no_grad()
def _ask(network: nn.Module, loss: str, category: int, where: str, inputs: Tensor, targets: Tensor) -> None:
    """Ask a network for a category's row; ValueError where it does not take it, or answers no such targets."""
    route: dict[str, Any] = {"categories": torch.tensor([category])} if isinstance(network, SplitModel) else {}
    learning = [module for module in network.modules() if module.training]
    network.eval()
    try:
        row = inputs.reshape(len(inputs), -1).float().amax(1).argmax()  # of tokens, one with the last of the vocabulary
        outputs = logits(network, inputs[row][None], **route)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(
            f"{where}: got rows {list(inputs.shape[1:])} of {inputs.dtype}, which the network does not take ({why})"
        ) from error
    finally:
        for module in learning:
            module.training = True
    answer, asked = list(outputs.shape[1:]), list(targets.shape[1:])
    if loss == "pixels":
        if answer != asked:
            raise ValueError(f"{where}: got targets {asked} a row, wanted {answer}, which is what the network answers")
        return
    if answer[:-1] != asked or not answer:
        raise ValueError(
            f"{where}: loss {loss!r} needs logits {[*asked, loss]} a row, got a network that gives {answer}"
        )
    for number in (int(targets.min()), int(targets.max())):
        if not 0 <= number < answer[-1]:
            raise ValueError(
                f"{where}: got {number} among the {loss}, wanted 0..{answer[-1] - 1}, which the network knows"
            )
