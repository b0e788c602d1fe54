"""Language modelling as a task: predict each next token of windows of text, the text's category known."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from attribution.roots import categorical_root
from moeify import rows as rows_of
from moeify.data import given_tokenizer
from moeify.data.documents import Split
from moeify.data.prepared import Tokens
from moeify.data.tokens import prepare
from moeify.models.build import build_llama
from moeify.models.pretrained import Checkpoint, look
from moeify.recipe.config import RunConfig
from moeify.recipe.data import TextData
from moeify.recipe.model import LlamaModel, PretrainedModel
from moeify.task import Batch, HeldOut
from moeify.world import World


class LanguageTask:
    """A row is a window of a category's text: ``length`` tokens and, as targets, the token after each.

    Windows of the train split start anywhere in the category's stream of documents, so they may span the end of
    one. Those of the held-out splits lie side by side: no token is a target twice.
    """

    unit: Literal["token", "example"] = "token"

    def __init__(self, config: RunConfig, tokens: Tokens, checkpoint: Checkpoint | None = None) -> None:
        if not isinstance(config.data, TextData) or not isinstance(config.model, LlamaModel | PretrainedModel):
            raise ValueError(f"text needs data.kind 'text' and a language model, got model.kind {config.model.kind!r}")
        self.config = config
        self.checkpoint = checkpoint
        """Of a pretrained model."""
        self._tokens = tokens
        self.categories = tokens.categories
        self.units_per_row = config.data.length
        for split, streams in tokens.streams.items():
            for category, stream in zip(tokens.categories, streams, strict=True):
                if len(stream) <= self.units_per_row:
                    raise ValueError(
                        f"data: the {split} split of category {category!r} has {len(stream)} tokens, wanted more than "
                        f"data.length, {self.units_per_row}; give it more text, or lower data.length"
                    )

    @classmethod
    def prepare(
        cls, config: RunConfig, cache: Path, base: Path, *, world: World | None = None, shelf: str | None = None
    ) -> "LanguageTask":
        """Read, split and tokenize the recipe's text, or take from ``cache`` what an earlier call prepared.

        ``base`` is the folder that the recipe's relative paths start at; ``world`` and ``shelf``: see ``data.tokens``.
        """
        if not isinstance(config.data, TextData):
            raise ValueError(f"a language task needs data.kind 'text', got {config.data.kind!r}")
        ready = partial(prepare, config.data, cache, base, world=world, shelf=shelf)
        if not isinstance(config.model, PretrainedModel):
            return cls(config, ready())
        checkpoint, length = look(base / config.model.path).text(), config.data.length
        if length > (most := checkpoint.positions()):
            raise ValueError(
                f"data.length: got {length}, wanted at most {most}, the positions of {checkpoint.folder}; lower it"
            )
        return cls(config, ready(given_tokenizer.of_checkpoint(checkpoint)), checkpoint)

    def build(self) -> nn.Module:
        """Return a freshly initialised Llama, or the pretrained model, the same bits each time."""
        if self.checkpoint is not None:
            return self.checkpoint.network()
        assert isinstance(self.config.model, LlamaModel), self.config.model
        return build_llama(
            self.config.model,
            vocabulary=self._tokens.vocabulary,
            length=self.units_per_row,
            end=self._tokens.end,
            seed=self.config.seed,
        )

    def train_batch(self, step: int) -> Batch:
        """Return the windows of one optimizer step, categories in equal shares, drawn with replacement."""
        rows = self.config.training.rows
        random = rows_of.generator(self.config.seed, "train", step)
        counts = rows_of.shares(rows, len(self.categories), random)
        starts = [self._random_starts(category, count, random) for category, count in enumerate(counts)]
        picks = [(category, int(start)) for category, each in enumerate(starts) for start in each]
        return self._batch("train", picks, step * rows)

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield random windows of each category's train split, others each round, for attribution."""
        random = rows_of.generator(self.config.seed, "probe", round_)
        starts = [self._random_starts(category, rows, random) for category in range(len(self.categories))]
        yield from self._batches("train", starts, rows_at_once)

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield up to ``rows`` windows of each category, spread evenly over the split, always the same ones."""
        starts = []
        for stream in self._tokens.streams[split]:
            available = (len(stream) - 1) // self.units_per_row
            count = min(rows, available)
            starts.append(np.arange(count) * available // count * self.units_per_row)
        yield from self._batches(split, starts, rows_at_once)

    def nats(
        self, outputs: Float[Tensor, "rows length vocabulary"], targets: Int[Tensor, "rows length"]
    ) -> Float[Tensor, " rows"]:
        """Return each window's summed cross-entropy in nats."""
        return token_nats(outputs, targets)

    def sample(
        self, outputs: Float[Tensor, "rows length vocabulary"], seeds: Sequence[int]
    ) -> Int[Tensor, "rows length"]:
        """Draw each next token as the model predicts it, one seed a window."""
        return sample_tokens(outputs, seeds)

    def root(
        self, outputs: Float[Tensor, "rows length vocabulary"], seeds: Sequence[int]
    ) -> Float[Tensor, "rows length vocabulary"]:
        """Return random roots of the Fisher information of each next token."""
        return categorical_root(outputs, seeds)

    def right(self, outputs: Tensor, targets: Tensor) -> None:
        """Return None: a window of text is not right or wrong."""

    def bits_per_byte(self, loss: dict[str, float], split: HeldOut) -> dict[str, float] | None:
        """Return the losses as bits per byte of the split's text; the ends of documents are paid for, not counted."""
        return {
            category: loss[category] * len(stream) / size / math.log(2)
            for category, stream, size in zip(
                self.categories, self._tokens.streams[split], self._tokens.sizes[split], strict=True
            )
        }

    def sizes(self) -> dict[str, dict[str, int]]:
        """Return split -> category -> tokens."""
        streams = self._tokens.streams
        return {split: dict(zip(self.categories, map(len, each), strict=True)) for split, each in streams.items()}

    def assets(self) -> dict[str, bytes]:
        """Return the tokenizer's files, as ``transformers.AutoTokenizer`` reads them."""
        return dict(self._tokens.assets)

    def _random_starts(self, category: int, count: int, random: np.random.Generator) -> Int[np.ndarray, " count"]:
        return random.integers(len(self._tokens.streams["train"][category]) - self.units_per_row, size=count)

    def _batches(self, split: Split, starts: Sequence[Int[np.ndarray, " rows"]], rows_at_once: int) -> Iterator[Batch]:
        first = 0
        for picks in rows_of.interleaved(np.array([len(each) for each in starts]), rows_at_once):
            yield self._batch(split, [(category, int(starts[category][row])) for category, row in picks], first)
            first += len(picks)

    def _batch(self, split: Split, picks: Sequence[tuple[int, int]], first: int) -> Batch:
        streams, length = self._tokens.streams[split], self.units_per_row
        windows = np.stack([streams[category][start : start + length + 1] for category, start in picks])
        tokens = torch.from_numpy(windows.astype(np.int64))
        categories, starts = torch.tensor(picks).unbind(1)
        ids = torch.arange(first, first + len(picks))
        return Batch(tokens[:, :-1], tokens[:, 1:], categories, ids, examples=starts // length)


def token_nats(
    outputs: Float[Tensor, "rows length vocabulary"], targets: Int[Tensor, "rows length"]
) -> Float[Tensor, " rows"]:
    """Return each row's summed cross-entropy in nats."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).sum(1)


def sample_tokens(outputs: Float[Tensor, "rows length vocabulary"], seeds: Sequence[int]) -> Int[Tensor, "rows length"]:
    """Draw each token from the model's own distribution, one seed a row, by inverting the distribution function."""
    draws = [torch.rand(outputs.shape[1], 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    cumulative = outputs.softmax(-1).cumsum(-1)
    # Scaled to the last value, which rounding keeps from being 1: no draw lies beyond it.
    scaled = torch.stack(draws).to(cumulative) * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, scaled, right=True).squeeze(-1)
    return drawn.clamp_(max=outputs.shape[-1] - 1)
