"""What gradient routing costs: a whole training step with gradients routed over one without, of the same dense network.

A Llama trained on random tokens of four categories, all in each batch; three of them have an expert of an eighth of
every layer's FFN, soft routes. A step is the training loop's own: batch, forward, backward, clip, AdamW. Times are CPU
seconds of this process on one thread, which other processes disturb least; ratios are of alternating steps, medians.
For comparison, a split model of four experts, with soft routes and hard ones.

The full benchmark takes about three minutes; --quick a smaller network.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.report import Cell, Figure, arguments, report
from moeify.models.build import build_llama
from moeify.recipe.model import LlamaModel
from moeify.recipe.routing import Routing
from moeify.recipe.training import Training
from moeify.routed.gradients import GradientRouter
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.task import Batch, HeldOut
from moeify.tasks.language import token_nats
from moeify.training import Contestant, train
from moeify.world import Solo

VOCABULARY, LENGTH, ROWS = 1024, 128, 16
BASE = "dense"


class RandomTokens:
    """A task without anything to learn; the rows of a step are drawn once."""

    categories: tuple[str, ...] = ("a", "b", "c", "d")
    unit: Literal["token", "example"] = "token"
    units_per_row = LENGTH

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        categories, ids = torch.arange(ROWS) * len(self.categories) // ROWS, torch.arange(ROWS)
        self._batch = Batch(tokens[:, :-1], tokens[:, 1:], categories, ids)

    def build(self) -> nn.Module:
        """Return the network."""
        return build_llama(self._model, vocabulary=VOCABULARY, length=LENGTH, end=0, seed=0)

    def train_batch(self, step: int) -> Batch:
        """Return the same rows each time."""
        return self._batch

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield the same rows."""
        yield self._batch

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield the same rows."""
        yield self._batch

    def nats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each row's cross-entropy."""
        return token_nats(outputs, targets)

    def sample(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return the likeliest tokens; nothing here asks for more."""
        return outputs.argmax(-1)

    def root(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return zeros; nothing here asks for more."""
        return torch.zeros_like(outputs)

    def right(self, outputs: Tensor, targets: Tensor) -> None:
        """Return None: nothing here is right or wrong."""

    def bits_per_byte(self, loss: dict[str, float], split: HeldOut) -> None:
        """Return None: there are no bytes."""

    def assets(self) -> dict[str, bytes]:
        """Return nothing."""
        return {}


def main() -> None:
    """Time steps with and without routed gradients in turn."""
    asked = arguments(__doc__)
    torch.set_num_threads(1)
    hidden, layers, ffn, repeats = (64, 2, 256, 3) if asked.quick else (256, 6, 1024, 15)
    task = RandomTokens(LlamaModel(kind="llama", hidden=hidden, layers=layers, heads=4, ffn=ffn))
    training = Training(steps=10**6, rows=ROWS)
    experts = [{"categories": [name], "units": 0.125} for name in task.categories[:3]]

    def contestant(partition: Partition | None = None, **routing: Any) -> Contestant:
        model = SplitModel(task.build(), task.categories, partition)
        asked = Routing.model_validate(routing)
        router = GradientRouter(asked, task.categories, model.space.readers, 0) if routing else None
        return Contestant(model, training, router)

    tree = ExpertTree.undivided(task.categories).split({0: [(name,) for name in task.categories]})
    widths = (ffn - 4 * (3 * ffn // 16), *[3 * ffn // 16] * 4)
    split = Partition(tree, dict.fromkeys(contestant().model.partition.widths, widths))
    ways = {
        BASE: contestant(),
        "parameters": contestant(gradients="parameters", experts=experts),
        "activations": contestant(gradients="activations", experts=experts),
        "both": contestant(gradients="both", experts=experts),
        "both, half of the rows labelled": contestant(gradients="both", experts=experts, labelled=0.5),
        "both, core frozen": contestant(gradients="both", experts=experts, core="frozen"),
        "both, one category apart": contestant(gradients="both", experts=experts, apart=task.categories[:1]),
        "split into four, both": contestant(split, gradients="both", routes_after_cut="soft"),
        "split into four, hard routes": contestant(split, gradients="both"),
        "split into four, as ever": contestant(split),
    }
    ratios = time_ratios(ways, task, training, repeats)
    rows: list[dict[str, Cell]] = [
        {"way": way, "time / dense": statistics.median(each), "lowest": min(each), "highest": max(each)}
        for way, each in ratios.items()
    ]
    ever, hard = ratios["split into four, as ever"], ratios["split into four, hard routes"]
    soft = [statistics.median(each) for each in ratios.values() if each not in (ratios[BASE], ever, hard)]
    figures = [
        Figure("overhead", max(soft), "<= 1.1: the costliest of all ways with soft routes, over dense"),
        Figure("overhead_hard", statistics.median(a / b for a, b in zip(hard, ever, strict=True)), "<= 1.1"),
    ]
    report("gradient_routing", rows, figures, asked.json, quick=asked.quick)


def time_ratios(
    ways: dict[str, Contestant], task: RandomTokens, training: Training, repeats: int
) -> dict[str, list[float]]:
    """Take a step of every way in turn, ``repeats`` times; return each one's time over the dense one's of that turn."""
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        seconds = {}
        for way, contestant in ways.items():
            began = time.process_time()
            train(contestant, task, Solo(), training, turn + 1, 10**6, lambda *_: None)
            seconds[way] = time.process_time() - began
        for way, taken in seconds.items():
            if turn:  # the first warms up
                ratios[way].append(taken / seconds[BASE])
    return ratios


if __name__ == "__main__":
    main()
