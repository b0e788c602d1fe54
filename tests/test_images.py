import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moeify.data.images import Images, load
from moeify.data.root import data_root

RANDOM = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    shape = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def write_mnist(root: Path, packed: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    (root / "mnist").mkdir()
    written = {}
    for split, number in (("train", 6), ("t10k", 3)):
        pixels = RANDOM.integers(0, 256, (number, 5, 4), dtype=np.uint8)
        labels = RANDOM.integers(0, 10, number, dtype=np.uint8)
        written[split] = pixels, labels
        for name, array in ((f"{split}-images-idx3-ubyte", pixels), (f"{split}-labels-idx1-ubyte", labels)):
            content = idx(array)
            path = root / "mnist" / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)
    return written


def test_root_is_the_recipes_or_else_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    monkeypatch.setenv("MOEIFY_DATA", str(tmp_path))
    assert data_root(None, Path("/nowhere")) == tmp_path
    assert data_root(Path("own"), tmp_path) == tmp_path / "own"
    with pytest.raises(ValueError, match=r"^data\.root: .*other is not a folder, wanted the one that holds the data$"):
        data_root(Path("other"), tmp_path)
    monkeypatch.setenv("MOEIFY_DATA", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"^MOEIFY_DATA: .*gone is not a folder"):
        data_root(None, tmp_path)
    monkeypatch.delenv("MOEIFY_DATA")
    with pytest.raises(ValueError, match=r"^data\.root: got null, and MOEIFY_DATA is not set; set one to the folder"):
        data_root(None, tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_read_from_idx_files(tmp_path: Path, packed: bool) -> None:
    written = write_mnist(tmp_path, packed)
    for images, split in zip(load("mnist", tmp_path), ("train", "t10k"), strict=True):
        pixels, labels = written[split]
        assert np.array_equal(images.pixels, pixels[:, None])
        assert images.labels.dtype == np.int64
        assert np.array_equal(images.labels, labels)


def test_cifar_is_read_from_its_binary_version(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    rows = {name: RANDOM.integers(0, 10, (2, 1 + 3072), dtype=np.uint8) for name in names}
    for name, content in rows.items():
        (folder / name).write_bytes(content.tobytes())
    train, test = load("cifar10", tmp_path)
    assert train.pixels.shape == (10, 3, 32, 32)
    assert np.array_equal(train.labels, np.concatenate([rows[name][:, 0] for name in names[:-1]]))
    assert np.array_equal(test.pixels[1].reshape(-1), rows["test_batch.bin"][1, 1:])


def test_cifar_of_jpeg_files_keeps_channels_and_order(tmp_path: Path) -> None:
    (tmp_path / "cifar10-jpeg").mkdir()
    for split in ("train", "test"):
        files = []
        for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), colour).save(file, "JPEG", quality=95)
            files.append(file.getvalue())
        np.savez(
            tmp_path / "cifar10-jpeg" / f"cifar10_{split}_jpeg.npz",
            data=np.frombuffer(b"".join(files), np.uint8),
            offsets=np.cumsum([0, *map(len, files)]),
            labels=np.array([2, 0, 1], np.uint8),
        )
    train, _ = load("cifar10-jpeg", tmp_path)
    assert train.pixels.mean((2, 3)).argmax(1).tolist() == [0, 1, 2]
    assert train.labels.tolist() == [2, 0, 1]


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no mnist/train-images-idx3-ubyte\.gz or mnist/train-images-idx3-ubyte, wanted"
    ):
        load("mnist", tmp_path)
    with pytest.raises(ValueError, match=r"has no cifar-10-batches-bin/data_batch_1\.bin, wanted the binary version"):
        load("cifar10", tmp_path)
    with pytest.raises(ValueError, match=r"has no cifar10-jpeg/cifar10_train_jpeg\.npz, wanted CIFAR-10 as JPEG files"):
        load("cifar10-jpeg", tmp_path)
    write_mnist(tmp_path, packed=True)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    short, other = gzip.decompress(whole)[:-3], b"\0\0\x09\x03" + whole
    for content in (whole[:-9], b"", whole[:20] + b"???" + whole[23:], gzip.compress(short), gzip.compress(other)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged or cut short"):
            load("mnist", tmp_path)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"data_batch_1\.bin is damaged or cut short"):
        load("cifar10", tmp_path)
    (tmp_path / "cifar10-jpeg").mkdir()
    damaged = tmp_path / "cifar10-jpeg" / "cifar10_train_jpeg.npz"
    damaged.write_bytes(b"PK\3\4 and no more")
    with pytest.raises(ValueError, match=r"cifar10_train_jpeg\.npz is damaged"):
        load("cifar10-jpeg", tmp_path)


def test_every_image_has_a_label() -> None:
    with pytest.raises(ValueError, match="wanted a label an image"):
        Images(np.zeros((2, 1, 2, 2), np.uint8), np.zeros(3, np.int64))


@pytest.mark.slow
def test_published_sets_are_whole(published: Path) -> None:
    train, test = load("mnist", published)
    assert train.pixels.shape == (60_000, 1, 28, 28)
    assert test.pixels.shape == (10_000, 1, 28, 28)
    train, test = load("cifar10-jpeg", published)
    assert np.bincount(train.labels).tolist() == [5_000] * 10
    assert test.pixels.shape == (10_000, 3, 32, 32)
