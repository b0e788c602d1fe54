"""The split of CIFAR-10's classes: who teaches which features, what accuracies mean, and every arm on tiny images."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from moeify.models.resnet import build_resnet
from moeify.tasks.build import build_task
from pipelines.studies.cifar_split import _accuracies, _Parted, arms, objective
from pipelines.studies.study import Bench

RANDOM = np.random.default_rng(0)


def model() -> _Parted:
    torch.manual_seed(0)
    return _Parted(build_resnet((3, 8, 8), classes=10, width=4, blocks=1, stages=2, seed=0))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Twelve images of every class in each split."""
    folder = tmp_path_factory.mktemp("data") / "cifar10-jpeg"
    folder.mkdir()
    for split in ("train", "test"):
        files = []
        for _ in range(120):
            with io.BytesIO() as file:
                Image.fromarray(RANDOM.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
                files.append(file.getvalue())
        np.savez(
            folder / f"cifar10_{split}_jpeg.npz",
            data=np.frombuffer(b"".join(files), np.uint8),
            offsets=np.cumsum([0, *map(len, files)]),
            labels=np.arange(120) % 10,
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEIFY_DATA", str(folder.parent))
        config = arms("quick")[0].config
        return Bench(config, build_task(config, cache=Path(), base=Path()), folder)


@pytest.mark.parametrize("routed", [False, True])
def test_rows_of_a_half_teach_the_features_of_that_half_alone(routed: bool) -> None:
    parted = model()
    images, classes = torch.randn(12, 3, 8, 8), torch.arange(12) * 10 // 12
    half = (classes >= 5).long()
    features = parted.network.features(images)
    seen = features
    if routed:
        own = parted.own(half)
        seen = features * own + features.detach() * (1 - own)
    loss = F.cross_entropy(parted.network.linear(seen), classes)
    for said in parted.read(features):
        loss = loss + F.cross_entropy(said, classes)
    found = objective(parted, images, classes, half, routed=routed, regularised=False)
    torch.testing.assert_close(found, loss)
    parameters = list(parted.parameters())
    for one, other in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_accuracies_are_along_the_own_route_and_along_the_other(bench: Bench) -> None:
    """A reader that is right on 0-4 along their own route, and on all with everything."""
    batches = list(bench.task.held_out_batches("test", 5000, bench.config.evaluation.rows_at_once))
    assert sum(len(batch.categories) for batch in batches) == 120
    known = {
        image.numpy().tobytes(): int(label) for b in batches for image, label in zip(b.inputs, b.targets, strict=True)
    }

    def read(images: torch.Tensor, route: torch.Tensor | None) -> torch.Tensor:
        classes = torch.tensor([known[image.numpy().tobytes()] for image in images])
        right = torch.ones(len(images), dtype=torch.bool) if route is None else (route == 0) & (classes < 5)
        return F.one_hot(torch.where(right, classes, (classes + 1) % 10), 10).float()

    found = _accuracies(bench, read)
    assert (found["before/0-4"], found["before/5-9"], found["before"]) == (1.0, 1.0, 1.0)
    assert (found["after/0-4"], found["after/5-9"], found["after"]) == (1.0, 0.0, 0.5)
    assert (found["other/0-4"], found["other/5-9"]) == (0.0, 0.0)


def test_every_arm_of_the_quick_form_ends_with_accuracies(bench: Bench) -> None:
    for arm in arms("quick"):
        found = arm.work(Bench(arm.config, bench.task, bench.twins))
        assert all(0.0 <= value <= 1.0 for value in found.values()), arm.name
        assert {"before/0-4", "after/5-9", "other", "before", "after"} <= set(found)
        assert ("told" in found) == arm.name.startswith("loop")
        assert ("probe_other" in found) != arm.name.startswith("loop")


def test_without_data_it_is_said_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEIFY_DATA", raising=False)
    with pytest.raises(
        ValueError,
        match=r"MOEIFY_DATA is not set; set one to the folder that holds cifar10-jpeg/, CIFAR-10 as JPEG files",
    ):
        build_task(arms("quick")[0].config, cache=Path(), base=Path())
