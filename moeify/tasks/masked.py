"""Masked language modelling as a task: tokens of windows of text are hidden, and what they were is predicted.

The windows are those of ``moeify.tasks.language``. Of each row the same number of tokens is hidden, at places drawn
from the row's number, so that a held-out row is always asked the same. Every hidden token becomes the mask token.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from attribution.roots import categorical_root
from attribution.subject import IGNORED
from moeify import rows as rows_of
from moeify.models.pretrained import Checkpoint
from moeify.task import Batch, HeldOut
from moeify.tasks.language import LanguageTask, sample_tokens

_TRAIN, _PROBE = 0, 3
_HELD_OUT: dict[HeldOut, int] = {"validation": 1, "test": 2}
"""Numbers of streams; rounds count on from that of probes."""


class MaskedTask:
    """A row is a window of ``length`` tokens, ``units_per_row`` of them hidden; targets elsewhere are ``IGNORED``."""

    unit: Literal["token", "example"] = "token"

    def __init__(self, windows: LanguageTask, checkpoint: Checkpoint, share: float) -> None:
        self.windows = windows
        self.config = windows.config
        self.categories = windows.categories
        self.length = windows.units_per_row
        self.units_per_row = hidden_tokens(self.length, share)
        self._mask = mask_token(checkpoint, checkpoint.tokenizer())

    def build(self) -> nn.Module:
        """Return the pretrained model, the same bits each time."""
        return self.windows.build()

    def train_batch(self, step: int) -> Batch:
        """Return the windows of one optimizer step, categories in equal shares, drawn with replacement."""
        return self._hide(self.windows.train_batch(step), _TRAIN)

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield random windows of each category's train split, others each round, for attribution."""
        for batch in self.windows.probe_batches(round_, rows, rows_at_once):
            yield self._hide(batch, _PROBE + round_)

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield up to ``rows`` windows of each category, spread evenly over the split, always the same ones."""
        for batch in self.windows.held_out_batches(split, rows, rows_at_once):
            yield self._hide(batch, _HELD_OUT[split])

    def nats(
        self, outputs: Float[Tensor, "rows length vocabulary"], targets: Int[Tensor, "rows length"]
    ) -> Float[Tensor, " rows"]:
        """Return each window's summed cross-entropy over its hidden tokens, in nats."""
        return masked_nats(outputs, targets)

    def sample(
        self, outputs: Float[Tensor, "rows length vocabulary"], seeds: Sequence[int]
    ) -> Int[Tensor, "rows length"]:
        """Draw a token for every place as the model predicts it, one seed a window."""
        return sample_tokens(outputs, seeds)

    def root(
        self, outputs: Float[Tensor, "rows length vocabulary"], seeds: Sequence[int]
    ) -> Float[Tensor, "rows length vocabulary"]:
        """Return random roots of the Fisher information of the token at every place."""
        return categorical_root(outputs, seeds)

    def right(self, outputs: Tensor, targets: Tensor) -> None:
        """Return None: a window of text is not right or wrong."""

    def bits_per_byte(self, loss: dict[str, float], split: HeldOut) -> dict[str, float] | None:
        """Return None: hidden tokens are no code of the text."""
        return None

    def sizes(self) -> dict[str, dict[str, int]]:
        """Return split -> category -> tokens."""
        return self.windows.sizes()

    def assets(self) -> dict[str, bytes]:
        """Return the tokenizer's files, as ``transformers.AutoTokenizer`` reads them."""
        return self.windows.assets()

    def _hide(self, batch: Batch, stream: int) -> Batch:
        inputs, targets = hide(batch.inputs, batch.ids, self._mask, self.units_per_row, self.config.seed, stream)
        return Batch(inputs, targets, batch.categories, batch.ids, batch.examples)


def hide(
    tokens: Int[Tensor, "rows length"], ids: Int[Tensor, " rows"], mask: int, count: int, seed: int, stream: int
) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
    """Return the rows with ``count`` tokens of each hidden, and what they were, ``IGNORED`` elsewhere.

    A row's places are drawn from its id, the seed and the number of the stream that it belongs to.
    """
    draws = (rows_of.generator(seed, "hide", stream, row).permutation(tokens.shape[1]) for row in ids.tolist())
    places = torch.stack([torch.from_numpy(draw[:count]) for draw in draws]) if len(tokens) else tokens[:, :0]
    hidden = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, places, True)
    return tokens.masked_fill(hidden, mask), tokens.masked_fill(~hidden, IGNORED)


def masked_nats(
    outputs: Float[Tensor, "rows length vocabulary"], targets: Int[Tensor, "rows length"]
) -> Float[Tensor, " rows"]:
    """Return each row's summed cross-entropy over its hidden tokens, in nats."""
    flat = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return flat.view(targets.shape).sum(1)


def hidden_tokens(length: int, share: float) -> int:
    """Return how many tokens of a row are hidden, one at least."""
    return max(1, round(share * length))


def mask_token(checkpoint: Checkpoint, tokenizer: Any) -> int:
    """Return the id of the token that stands for hidden ones; ValueError where the tokenizer has none."""
    found = tokenizer.mask_token_id
    if found is None or found >= checkpoint.config().vocab_size:
        raise ValueError(
            f"{checkpoint.folder}: its tokenizer names no mask_token that the network knows, "
            f"which a masked language model needs; put the tokenizer beside it that it was trained with"
        )
    return int(found)
