"""Sets of small labelled images, read from the files in which they are commonly had."""

import gzip
import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from moeify.data.root import data_file
from moeify.recipe.data import ImageSource

_MNIST = "MNIST's four idx files, gzipped or not (yann.lecun.com/exdb/mnist and its mirrors)"
_CIFAR = "the binary version of CIFAR-10 (cs.toronto.edu/~kriz/cifar.html)"
_JPEG = (
    "CIFAR-10 as JPEG files: an npz with data (uint8, all files joined), offsets, labels; the images are those of "
    "cs.toronto.edu/~kriz/cifar.html, whose binary version is read as source cifar10"
)
HOLDS: Mapping[ImageSource, str] = {
    "mnist": f"mnist/, {_MNIST}",
    "cifar10": f"cifar-10-batches-bin/, {_CIFAR}",
    "cifar10-jpeg": f"cifar10-jpeg/, {_JPEG}",
}
"""What a folder of data has to hold, for people."""
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMS: Mapping[ImageSource, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": _CIFAR_NORM,
    "cifar10-jpeg": _CIFAR_NORM,
}
"""Mean and standard deviation of each channel's intensities 0..1, that published classifiers are given images by."""


@dataclass(frozen=True)
class Images:
    """Images of one split, and the class of each."""

    pixels: np.ndarray
    """uint8 [images, channels, height, width]."""
    labels: np.ndarray
    """int64 [images], from 0."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or len(self.pixels) != len(self.labels) or not len(self.labels):
            raise ValueError(f"got {self.pixels.shape} pixels and {len(self.labels)} labels, wanted a label an image")


def load(source: ImageSource, root: Path) -> tuple[Images, Images]:
    """Return the train and the test split as they are published, in the files' order.

    Raises ValueError, with the names of the files, where one is missing or damaged.
    """
    match source:
        case "mnist":
            return _mnist(root, "train"), _mnist(root, "t10k")
        case "cifar10":
            batches = [_cifar_batch(root, f"data_batch_{number}.bin") for number in range(1, 6)]
            train = Images(np.concatenate([b.pixels for b in batches]), np.concatenate([b.labels for b in batches]))
            return train, _cifar_batch(root, "test_batch.bin")
        case "cifar10-jpeg":
            return _cifar_jpeg(root, "train"), _cifar_jpeg(root, "test")


def _mnist(root: Path, split: str) -> Images:
    pixels = _idx(root, f"{split}-images-idx3-ubyte", 3)
    labels = _idx(root, f"{split}-labels-idx1-ubyte", 1)
    return Images(pixels[:, None], labels.astype(np.int64))


def _idx(root: Path, name: str, axes: int) -> np.ndarray:
    path = data_file(root, f"mnist/{name}.gz", f"mnist/{name}", what=_MNIST)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:4] != bytes([0, 0, 8, axes]):
            raise ValueError("its first bytes are not those of an idx file of bytes")
        shape = np.frombuffer(content, ">u4", count=axes, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()  # the bytes are read-only
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}), wanted one of {_MNIST}") from None


def _cifar_batch(root: Path, name: str) -> Images:
    path = data_file(root, f"cifar-10-batches-bin/{name}", what=_CIFAR)
    try:
        rows = np.fromfile(path, np.uint8).reshape(-1, 1 + int(np.prod(_CIFAR_SHAPE)))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}), wanted a file of {_CIFAR}") from None
    return Images(rows[:, 1:].reshape(-1, *_CIFAR_SHAPE), rows[:, 0].astype(np.int64))


def _cifar_jpeg(root: Path, split: str) -> Images:
    path = data_file(root, f"cifar10-jpeg/cifar10_{split}_jpeg.npz", what=_JPEG)
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            data, offsets, labels = (file[name] for name in ("data", "offsets", "labels"))
        joined = data.tobytes()
        pixels = np.stack(
            [
                np.asarray(Image.open(io.BytesIO(joined[first:last])).convert("RGB"))
                for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
            ]
        )
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}), wanted {_JPEG}") from None
    return Images(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), labels.astype(np.int64))
