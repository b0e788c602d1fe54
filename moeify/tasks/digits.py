"""scikit-learn's handwritten digits as a task: reconstruct the image; the ten digits are the categories."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.datasets import load_digits
from torch import Tensor, nn

from attribution.roots import bernoulli_root
from moeify import rows as rows_of
from moeify.models.build import build_autoencoder
from moeify.recipe.config import RunConfig
from moeify.recipe.data import DigitsData
from moeify.recipe.model import AutoencoderModel
from moeify.task import Batch, HeldOut
from moeify.tasks.pixels import pixel_nats, sample_pixels

PIXELS = 64
_BRIGHTEST = 16
"""scikit-learn gives intensities 0..16."""


class DigitsTask:
    """1,797 images of 8x8 pixels, intensities 0..1; the loss is the cross-entropy of every pixel, summed.

    Each image lies in one split; every digit gives the same share of its images to each split.
    """

    unit: Literal["token", "example"] = "example"
    units_per_row = 1

    def __init__(self, config: RunConfig) -> None:
        if not isinstance(config.data, DigitsData) or not isinstance(config.model, AutoencoderModel):
            raise ValueError(f"digits need an autoencoder, got model.kind {config.model.kind!r}")
        self.config = config
        self._model = config.model
        self.categories = tuple(str(digit) for digit in range(10))
        digits = load_digits()
        images = torch.from_numpy(digits.data / _BRIGHTEST).float()
        random = rows_of.generator(config.seed, "split")
        self._images: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
        for digit in range(10):
            order = random.permutation(np.flatnonzero(digits.target == digit))
            validation, test = (round(len(order) * share) for share in (config.data.validation, config.data.test))
            parts = np.split(order, [test, test + validation])
            if min(len(part) for part in parts) == 0:
                raise ValueError(
                    f"data.validation {config.data.validation} and data.test {config.data.test} leave a split of digit "
                    f"{digit} without images ({len(order)} in all); choose other fractions"
                )
            for split, part in zip(("test", "validation", "train"), parts, strict=True):
                self._images[split].append(images[torch.from_numpy(part)])

    def build(self) -> nn.Module:
        """Return a freshly initialised autoencoder, the same bits each time."""
        return build_autoencoder(self._model, inputs=PIXELS, seed=self.config.seed)

    def train_batch(self, step: int) -> Batch:
        """Return the images of one optimizer step, digits in equal shares, drawn with replacement."""
        random = rows_of.generator(self.config.seed, "train", step)
        counts = rows_of.shares(self.config.training.rows, 10, random)
        picks = [
            (digit, int(row))
            for digit, count in enumerate(counts)
            for row in random.integers(len(self._images["train"][digit]), size=count)
        ]
        return self._batch("train", picks, step * self.config.training.rows)

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield train images of each digit, a random sample without replacement, for attribution."""
        random = rows_of.generator(self.config.seed, "probe", round_)
        orders = [random.permutation(len(images))[:rows] for images in self._images["train"]]
        yield from self._batches("train", orders, rows_at_once)

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield up to ``rows`` images of each digit, always the same ones."""
        orders = [np.arange(min(rows, len(images))) for images in self._images[split]]
        yield from self._batches(split, orders, rows_at_once)

    def nats(self, outputs: Float[Tensor, "rows pixels"], targets: Float[Tensor, "rows pixels"]) -> Tensor:
        """Return each image's summed cross-entropy against its intensities, in nats."""
        return pixel_nats(outputs, targets)

    def sample(self, outputs: Float[Tensor, "rows pixels"], seeds: Sequence[int]) -> Tensor:
        """Draw each pixel black or white as the model predicts it, one seed an image."""
        return sample_pixels(outputs, seeds)

    def root(self, outputs: Float[Tensor, "rows pixels"], seeds: Sequence[int]) -> Float[Tensor, "rows pixels"]:
        """Return random roots of the pixels' Fisher information."""
        return bernoulli_root(outputs, seeds)

    def right(self, outputs: Tensor, targets: Tensor) -> None:
        """Return None: a reconstruction is not right or wrong."""

    def bits_per_byte(self, loss: dict[str, float], split: HeldOut) -> dict[str, float] | None:
        """Return None: an image has no bytes of text."""
        return None

    def sizes(self) -> dict[str, dict[str, int]]:
        """Return split -> digit -> images."""
        return {split: dict(zip(self.categories, map(len, each), strict=True)) for split, each in self._images.items()}

    def assets(self) -> dict[str, bytes]:
        """Return nothing: the network is all there is to export."""
        return {}

    def _batches(self, split: str, orders: Sequence[np.ndarray], rows_at_once: int) -> Iterator[Batch]:
        first = 0
        for picks in rows_of.interleaved(np.array([len(order) for order in orders]), rows_at_once):
            yield self._batch(split, [(digit, int(orders[digit][row])) for digit, row in picks], first)
            first += len(picks)

    def _batch(self, split: str, picks: Sequence[tuple[int, int]], first: int) -> Batch:
        images = torch.stack([self._images[split][digit][row] for digit, row in picks])
        categories, examples = torch.tensor(picks).unbind(1)
        return Batch(images, images, categories, torch.arange(first, first + len(picks)), examples)
