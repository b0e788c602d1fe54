"""A task small enough for a whole run in a second: four categories of ten intensities each, an autoencoder."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.roots import bernoulli_root, categorical_root
from moeify.models.build import build_autoencoder, build_llama
from moeify.recipe.config import RunConfig
from moeify.recipe.model import AutoencoderModel, LlamaModel
from moeify.task import Batch, HeldOut

CONFIG = {
    "name": "toy",
    "data": {"kind": "digits"},
    "model": {"kind": "autoencoder", "hidden": 32, "code": 4},
    "training": {"steps": 60, "rows": 16, "learning_rate": 0.01},
    "attribution": {"rows": 32, "rows_at_once": 16},
    "partition": {"multiple": 2, "min_units": 2},
    "rounds": [{"train": 15, "recover": 10, "separation": 0.3}, {"train": 5, "recover": 10, "separation": 0.45}],
    "evaluation": {"validation_rows": 16, "test_rows": 32, "rows_at_once": 16},
    "checkpoints": {"every": 8, "keep": 2},
    "tracking": {"every": 5},
}


def toy_config(**changes: object) -> RunConfig:
    return RunConfig.model_validate({**CONFIG, **changes})


class ToyTask:
    """Each category draws its rows from a pattern of its own, plus noise."""

    categories = ("a", "b", "c", "d")
    unit = "example"
    units_per_row = 1

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def build(self) -> nn.Module:
        assert isinstance(self.config.model, AutoencoderModel)
        return build_autoencoder(self.config.model, inputs=10, seed=self.config.seed)

    def train_batch(self, step: int) -> Batch:
        return self._rows([1, step], self.config.training.rows)

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        yield from self._all([2, round_], rows, rows_at_once)

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        yield from self._all([3 if split == "validation" else 4], rows, rows_at_once)

    def nats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1)

    def sample(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        draws = [torch.rand(10, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return (torch.stack(draws) < torch.sigmoid(outputs)).to(outputs.dtype)

    def root(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        return bernoulli_root(outputs, seeds)

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return None

    def bits_per_byte(self, loss: dict[str, float], split: HeldOut) -> dict[str, float] | None:
        return None

    def assets(self) -> dict[str, bytes]:
        return {}

    def _all(self, purpose: list[int], rows: int, rows_at_once: int) -> Iterator[Batch]:
        for start in range(0, rows * 4, rows_at_once):
            yield self._rows([*purpose, start], min(rows_at_once, rows * 4 - start), start)

    def _rows(self, purpose: list[int], rows: int, first_id: int = 0) -> Batch:
        generator = np.random.default_rng([self.config.seed, *purpose])
        categories = np.sort(np.arange(rows) % 4)
        phase = categories[:, None] * 2 + generator.uniform(0, 0.5, (rows, 1))
        x = 0.5 + 0.4 * np.sin(phase + np.arange(10) * (1 + categories[:, None]) / 2)
        x = torch.from_numpy(x.clip(0, 1)).float()
        return Batch(x, x, torch.from_numpy(categories), torch.arange(first_id, first_id + rows))


TEXT_CONFIG = {
    **CONFIG,
    "name": "toy-text",
    "data": {"kind": "text", "source": {"kind": "jsonl", "path": "none.jsonl"}, "vocabulary": 300, "length": 12},
    "model": {"kind": "llama", "hidden": 16, "layers": 2, "heads": 2, "ffn": 32},
}


class ToyTextTask(ToyTask):
    """Each category counts upwards in steps of its own, and now and then jumps."""

    unit = "token"
    units_per_row = 12

    def build(self) -> nn.Module:
        assert isinstance(self.config.model, LlamaModel)
        return build_llama(self.config.model, vocabulary=300, length=12, end=0, seed=self.config.seed)

    def nats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").sum(1)

    def sample(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        draws = []
        for row, seed in zip(torch.softmax(outputs, -1), seeds, strict=True):
            draws.append(torch.multinomial(row, 1, generator=torch.Generator().manual_seed(seed))[:, 0])
        return torch.stack(draws)

    def root(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        return categorical_root(outputs, seeds)

    def bits_per_byte(self, loss: dict[str, float], split: HeldOut) -> dict[str, float] | None:
        return {category: nats / 0.7 for category, nats in loss.items()}

    def assets(self) -> dict[str, bytes]:
        return {"tokenizer_config.json": b"{}"}

    def _rows(self, purpose: list[int], rows: int, first_id: int = 0) -> Batch:
        generator = np.random.default_rng([self.config.seed, *purpose])
        categories = np.sort(np.arange(rows) % 4)
        start = generator.integers(300, size=(rows, 1))
        jumps = generator.integers(5, size=(rows, 13)).cumsum(1) * (generator.random((rows, 13)) < 0.2)
        tokens = torch.from_numpy((start + np.arange(13) * (categories[:, None] + 1) + jumps) % 300)
        return Batch(
            tokens[:, :-1], tokens[:, 1:], torch.from_numpy(categories), torch.arange(first_id, first_id + rows)
        )
