"""Published sets of labelled images as a task: say the class, or reconstruct the image.

Categories are groups of classes. **A route tells a split model its row's category**, so a classifier that were routed
by its own classes would be told the answer: a recipe that asks for it is refused, and categories of a classifier have
two classes or more. What the group gives away, the control ``told`` is given too, and is the fair rival.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from attribution.roots import bernoulli_root, categorical_root
from moeify import rows as rows_of
from moeify.data.documents import Split
from moeify.data.images import HOLDS, NORMS, Images, load
from moeify.data.root import data_root
from moeify.models.build import build_autoencoder
from moeify.models.pretrained import Checkpoint, look
from moeify.models.resnet import build_resnet
from moeify.recipe.config import RunConfig
from moeify.recipe.data import CLASSES, ImageData
from moeify.recipe.model import AutoencoderModel, PretrainedModel, ResnetModel
from moeify.task import Batch, HeldOut
from moeify.tasks.language import sample_tokens
from moeify.tasks.pixels import pixel_nats, sample_pixels

_BRIGHTEST = 255
_SHIFT = 4
"""Pixels that an augmented image may move, each way."""


class ImagesTask:
    """A row is an image. ``classify``: nats are the cross-entropy of its class; ``reconstruct``: of every pixel.

    Validation images are part of the train split as it is published, each class in the same share; the test split is
    the published one. Every image lies in one split.
    """

    unit: Literal["token", "example"] = "example"
    units_per_row = 1

    def __init__(self, config: RunConfig, train: Images, test: Images, checkpoint: Checkpoint | None = None) -> None:
        if not isinstance(config.data, ImageData) or not isinstance(
            config.model, ResnetModel | AutoencoderModel | PretrainedModel
        ):
            raise ValueError(
                f"images need a resnet, an autoencoder or a pretrained classifier, got model.kind {config.model.kind!r}"
            )
        self.config = config
        self._checkpoint = checkpoint
        """Of a pretrained model."""
        self._norms, self._size = NORMS[config.data.source], train.pixels.shape[2:]
        if checkpoint is not None:
            channels = train.pixels.shape[1]
            self._size = checkpoint.classifies(channels, CLASSES)
            self._norms = checkpoint.norms(channels) or self._norms
        self._data = config.data
        self._model = config.model
        self.categories = tuple(config.data.categories)
        self._sets = {"train": train, "validation": train, "test": test}
        random = rows_of.generator(config.seed, "split")
        self._places: dict[Split, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
        """Split -> for each category, where its images lie in the set, in an order drawn at random."""
        for classes in config.data.categories.values():
            held_out, kept = [], []
            for each in classes:
                order = random.permutation(np.flatnonzero(train.labels == each))
                size = round(len(order) * config.data.validation)
                held_out.append(order[:size])
                kept.append(order[size:])
            tested = np.flatnonzero(np.isin(test.labels, classes))
            self._places["train"].append(random.permutation(np.concatenate(kept)))
            self._places["validation"].append(random.permutation(np.concatenate(held_out)))
            self._places["test"].append(random.permutation(tested))
        for split, of_split in self._places.items():
            for category, places in zip(self.categories, of_split, strict=True):
                if not len(places):
                    raise ValueError(
                        f"data: the {split} split of category {category!r} has no image; choose other classes or "
                        f"another data.validation"
                    )

    @classmethod
    def prepare(cls, config: RunConfig, base: Path) -> Self:
        """Read the recipe's images; ``base`` is the folder that a relative ``data.root`` starts at."""
        if not isinstance(config.data, ImageData):
            raise ValueError(f"an image task needs data.kind 'images', got {config.data.kind!r}")
        root, checkpoint = data_root(config.data.root, base, HOLDS[config.data.source]), None
        if isinstance(config.model, PretrainedModel):
            checkpoint = look(base / config.model.path).images()
        return cls(config, *load(config.data.source, root), checkpoint)

    def build(self) -> nn.Module:
        """Return a freshly initialised network, the same bits each time."""
        channels, height, width = self._sets["train"].pixels.shape[1:]
        match self._model:
            case AutoencoderModel():
                return build_autoencoder(self._model, inputs=channels * height * width, seed=self.config.seed)
            case ResnetModel() as model:
                sizes = {"width": model.width, "blocks": model.blocks, "stages": model.stages}
                return build_resnet((channels, height, width), classes=CLASSES, **sizes, seed=self.config.seed)
            case PretrainedModel():
                assert self._checkpoint is not None
                return self._checkpoint.network()

    def train_batch(self, step: int) -> Batch:
        """Return the images of one optimizer step, categories in equal shares, drawn with replacement."""
        random = rows_of.generator(self.config.seed, "train", step)
        counts = rows_of.shares(self.config.training.rows, len(self.categories), random)
        picks = [
            (category, int(row))
            for category, count in enumerate(counts)
            for row in random.integers(len(self._places["train"][category]), size=count)
        ]
        shifts = random.integers(2 * _SHIFT + 1, size=(len(picks), 2)) if self._data.augment else None
        mirrored = random.random(len(picks)) < 0.5 if self._data.augment and self._data.source != "mnist" else None
        return self._batch("train", picks, step * self.config.training.rows, shifts, mirrored)

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield train images of each category, a random sample without replacement, for attribution."""
        random = rows_of.generator(self.config.seed, "probe", round_)
        orders = [random.permutation(len(places))[:rows] for places in self._places["train"]]
        yield from self._batches("train", orders, rows_at_once)

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        """Yield up to ``rows`` images of each category, always the same ones."""
        orders = [np.arange(min(rows, len(places))) for places in self._places[split]]
        yield from self._batches(split, orders, rows_at_once)

    def nats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each image's loss in nats: the cross-entropy of its class, or of its pixels, summed."""
        if self._data.objective == "classify":
            return F.cross_entropy(outputs, targets, reduction="none")
        return pixel_nats(outputs, targets)

    def sample(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        """Draw a class, or pixels, as the model predicts them, one seed an image."""
        if self._data.objective == "classify":
            return sample_tokens(outputs[:, None], seeds)[:, 0]
        return sample_pixels(outputs, seeds)

    def root(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return random roots of the Fisher information of the class, or of the pixels."""
        root = categorical_root if self._data.objective == "classify" else bernoulli_root
        return root(outputs, seeds)

    def right(self, outputs: Tensor, targets: Tensor) -> Bool[Tensor, " rows"] | None:
        """Say whose class is the likeliest one; None where images are reconstructed."""
        return outputs.argmax(1) == targets if self._data.objective == "classify" else None

    def bits_per_byte(self, loss: dict[str, float], split: HeldOut) -> dict[str, float] | None:
        """Return None: an image has no bytes of text."""
        return None

    def sizes(self) -> dict[str, dict[str, int]]:
        """Return split -> category -> images."""
        return {split: dict(zip(self.categories, map(len, each), strict=True)) for split, each in self._places.items()}

    def assets(self) -> dict[str, bytes]:
        """Return what a pretrained model's folder says of how images become its inputs, if it does."""
        return {} if self._checkpoint is None else self._checkpoint.preprocessing()

    def _batches(self, split: Split, orders: Sequence[np.ndarray], rows_at_once: int) -> Iterator[Batch]:
        first = 0
        for picks in rows_of.interleaved(np.array([len(order) for order in orders]), rows_at_once):
            yield self._batch(split, [(category, int(orders[category][row])) for category, row in picks], first)
            first += len(picks)

    def _batch(
        self,
        split: Split,
        picks: Sequence[tuple[int, int]],
        first: int,
        shifts: Int[np.ndarray, "rows 2"] | None = None,
        mirrored: np.ndarray | None = None,
    ) -> Batch:
        places = np.array([self._places[split][category][row] for category, row in picks])
        images = torch.from_numpy(self._sets[split].pixels[places]).float() / _BRIGHTEST
        ids = torch.arange(first, first + len(picks))
        categories, examples = torch.tensor(picks).unbind(1)
        if self._data.objective == "reconstruct":
            flat = images.flatten(1)
            return Batch(flat, flat, categories, ids, examples)
        mean, deviation = (torch.tensor(values)[:, None, None] for values in self._norms)
        images = (images - mean) / deviation
        if shifts is not None:
            images = _shifted(images, shifts)
        if mirrored is not None:
            images = torch.where(torch.from_numpy(mirrored)[:, None, None, None], images.flip(3), images)
        if images.shape[2:] != self._size:
            images = F.interpolate(images, self._size, mode="bilinear", align_corners=False, antialias=True)
        return Batch(images, torch.from_numpy(self._sets[split].labels[places]), categories, ids, examples)


def _shifted(images: Tensor, shifts: Int[np.ndarray, "rows 2"]) -> Tensor:
    """Move each image by up to ``_SHIFT`` pixels either way; what comes in is the mean of all images, 0."""
    height, width = images.shape[2:]
    padded = F.pad(images, [_SHIFT] * 4)
    moved = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, shifts.tolist(), strict=True)]
    return torch.stack(moved)
