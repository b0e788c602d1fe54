from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gloo import run_together
from moeify.data.images import Images
from moeify.loop import run
from moeify.models.resnet import ResNet
from moeify.recipe.config import RunConfig
from moeify.result import Result
from moeify.split_folder import load_from_run, load_split
from moeify.store import FolderStore
from moeify.task import HeldOut, Task
from moeify.tasks.build import build_task
from moeify.tasks.images import ImagesTask
from moeify.training import Contestant, train
from moeify.world import Group, Solo
from pipelines.mlflow_terms import final_points
from tests.finished_runs import call, finish
from tests.pictures import CONFIG, GROUPS, drawn, pictures, pictures_config
from tests.test_images import write_mnist
from tests.test_loop import DyingStore, KilledError, final, outcome


@pytest.fixture(scope="module")
def task() -> ImagesTask:
    return pictures(pictures_config())


@pytest.fixture(scope="module")
def finished() -> Result:
    config = pictures_config()
    return run(config, pictures(config))


def seen(task: ImagesTask, split: HeldOut) -> Tensor:
    return torch.cat([batch.inputs.flatten(1) for batch in task.held_out_batches(split, 10**6, 32)])


def test_every_image_lies_in_one_split_and_every_class_in_each(task: ImagesTask) -> None:
    places = task._places
    own = [set(np.concatenate(places[split]).tolist()) for split in ("train", "validation")]
    assert not own[0] & own[1]
    assert own[0] | own[1] == set(range(400))
    for category, classes in enumerate(GROUPS.values()):
        for split, each in (("train", 32), ("validation", 8), ("test", 20)):
            labels = task._sets[split].labels[places[split][category]]
            assert np.bincount(labels, minlength=10).tolist() == [each if c in classes else 0 for c in range(10)]
    assert len(seen(task, "validation")) == 80
    assert len(seen(task, "test")) == 200
    assert {split: sum(each.values()) for split, each in task.sizes().items()} == {
        "train": 320,
        "validation": 80,
        "test": 200,
    }


def test_a_row_is_a_normed_image_its_class_and_its_group(task: ImagesTask) -> None:
    batch = task.train_batch(3)
    again, other = task.train_batch(3), task.train_batch(4)
    assert torch.equal(batch.inputs, again.inputs)
    assert not torch.equal(batch.inputs, other.inputs)
    assert batch.inputs.shape == (20, 1, 8, 8)
    assert torch.bincount(batch.categories).tolist() == [5, 5, 5, 5]
    groups = list(GROUPS.values())
    assert all(label in groups[c] for label, c in zip(batch.targets.tolist(), batch.categories.tolist(), strict=True))
    bytes_ = (batch.inputs * 0.3081 + 0.1307) * 255
    torch.testing.assert_close(bytes_, bytes_.round(), rtol=0, atol=1e-3)
    shown = [task._places["train"][c][e] for c, e in zip(batch.categories, batch.examples, strict=True)]
    assert batch.targets.tolist() == task._sets["train"].labels[shown].tolist()
    assert isinstance(task.build(), ResNet)
    assert isinstance(task, Task)


def test_probes_are_drawn_without_replacement_from_train_images(task: ImagesTask) -> None:
    batches = list(task.probe_batches(1, 12, 16))
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(48))
    assert torch.bincount(torch.cat([batch.categories for batch in batches])).tolist() == [12] * 4
    rows = torch.cat([batch.inputs.flatten(1) for batch in batches])
    assert len(rows.unique(dim=0)) == 48
    assert not (rows[:, None] == seen(task, "test")[None]).all(2).any()


def test_the_loss_is_the_classs_and_labels_are_drawn_from_the_prediction(task: ImagesTask) -> None:
    logits, labels = torch.randn(3, 10), torch.tensor([2, 0, 9])
    slow = -logits.softmax(1).log()[torch.arange(3), labels]
    torch.testing.assert_close(task.nats(logits, labels), slow)
    right = task.right(logits, logits.argmax(1))
    assert right is not None
    assert right.tolist() == [True] * 3
    many = torch.linspace(-1, 1, 10).repeat(4000, 1)
    drawn_ = task.sample(many, list(range(4000)))
    assert torch.equal(drawn_[1::2], task.sample(many[1::2], list(range(4000))[1::2]))
    shares = torch.bincount(drawn_, minlength=10) / 4000
    assert (shares - many[0].softmax(0)).abs().max() < 0.03


def test_augmented_images_are_moved_the_same_way_each_time() -> None:
    plain, moved = (
        pictures(pictures_config(data={**CONFIG["data"], "augment": augment}))  # type: ignore[dict-item]
        for augment in (False, True)
    )
    before, after = plain.train_batch(2), moved.train_batch(2)
    assert torch.equal(before.targets, after.targets)
    assert torch.equal(after.inputs, moved.train_batch(2).inputs)
    padded = F.pad(before.inputs, [4] * 4)
    for image, room in zip(after.inputs, padded, strict=True):
        views = room.unfold(1, 8, 1).unfold(2, 8, 1)[0].reshape(81, 8, 8)
        assert bool((views == image[0]).flatten(1).all(1).any())
    assert torch.equal(seen(moved, "test"), seen(plain, "test"))


def refused(**data: Any) -> str:
    with pytest.raises(ValidationError) as error:
        pictures_config(data={**CONFIG["data"], **data})  # type: ignore[dict-item]
    return str(error.value)


def test_a_classifier_may_not_be_routed_by_its_own_classes() -> None:
    told = "which its route would tell the classifier, wanted two or more"
    assert told in refused(categories={"a": [0], "b": [1, 2]})
    assert "got class 1 twice" in refused(categories={"a": [0, 1], "b": [1, 2]})
    assert "less than 10" in refused(categories={"a": [0, 1], "b": [9, 10]})
    assert "wanted 'autoencoder', which data.objective 'reconstruct' needs" in refused(objective="reconstruct")
    with pytest.raises(
        ValidationError, match=r"wanted 'resnet' or 'pretrained', which data\.objective 'classify' needs"
    ):
        pictures_config(model={"kind": "autoencoder"})
    with pytest.raises(ValidationError, match=r"beside model\.kind 'resnet', wanted 'none'; gradients of channels"):
        pictures_config(routing={"gradients": "parameters", "core": "frozen"})
    assert pictures_config().category_names == tuple(GROUPS)


def test_a_category_without_images_is_named() -> None:
    train, few = drawn(5, 0), drawn(2, 0)
    without = Images(train.pixels[train.labels < 8], train.labels[train.labels < 8])
    with pytest.raises(ValueError, match="the test split of category 'top' has no image"):
        ImagesTask(pictures_config(), train, without)
    with pytest.raises(ValueError, match="the validation split of category 'low' has no image"):
        ImagesTask(pictures_config(), few, train)


def test_images_are_read_from_the_recipes_root_and_reconstructed(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=True)
    train = drawn(5, 0, side=4)
    write_classes(tmp_path / "mnist", train)
    data = {"kind": "images", "source": "mnist", "root": ".", "objective": "reconstruct", "validation": 0.4}
    config = pictures_config(
        data={**data, "categories": {str(c): [c] for c in range(10)}}, model={"kind": "autoencoder", "hidden": 16}
    )
    task = build_task(config, cache=tmp_path, base=tmp_path)
    batch = task.train_batch(0)
    assert batch.inputs.shape == (20, 16)
    assert torch.equal(batch.inputs, batch.targets)
    assert float(batch.inputs.max()) <= 1.0
    outputs = task.build()(batch.inputs)
    assert outputs.shape == (20, 16)
    assert task.right(outputs, batch.targets) is None
    p = torch.sigmoid(outputs)
    slow = -(batch.inputs * p.log() + (1 - batch.inputs) * (1 - p).log()).sum(1)
    torch.testing.assert_close(task.nats(outputs, batch.targets), slow, rtol=1e-4, atol=1e-4)
    assert set(task.sample(outputs, range(20)).unique().tolist()) == {0.0, 1.0}


def write_classes(folder: Path, images: Images) -> None:
    """Write the same images as both splits."""
    import gzip

    from tests.test_images import idx

    for split in ("train", "t10k"):
        for name, array in (("images-idx3", images.pixels[:, 0]), ("labels-idx1", images.labels.astype(np.uint8))):
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))


def test_a_run_splits_channels_by_groups_and_reports_accuracy(finished: Result) -> None:
    assert sorted(leaf["name"] for group in finished.tree["children"] for leaf in group["children"]) == sorted(GROUPS)
    assert finished.active_fraction["mean"] == pytest.approx(0.65, abs=0.05)
    assert finished.active_flops is not None
    assert finished.active_flops["mean"] < 0.75
    assert finished.accuracy is not None
    assert set(finished.accuracy) == {"dense", "told", "split", "random"}
    for arm, shares in finished.accuracy.items():
        assert shares["mean"] == pytest.approx(np.mean([shares[c] for c in GROUPS])), arm
        assert 0.5 < shares["mean"] <= 1.0, arm  # ten classes, and groups of two or three
    points = {key: value for key, value, _ in final_points(finished)}
    assert points["test/accuracy/split/mean"] == finished.accuracy["split"]["mean"]
    assert finished.test_loss["dense"].keys() == set(GROUPS)
    for category, rises in finished.own_other.items():
        for expert, rise in rises.items():
            assert (rise != 0.0) == (category in expert.split("+"))


def test_a_run_killed_between_its_cuts_goes_on_to_the_same_bits(tmp_path: Path, finished: Result) -> None:
    config, store = pictures_config(), DyingStore(tmp_path, 2)
    store.lives = 4
    with pytest.raises(KilledError):
        run(config, pictures(config), store=store)
    assert outcome(run(config, pictures(config), store=FolderStore(tmp_path, 2))) == outcome(finished)
    kept = final(FolderStore(tmp_path, 2))["split"]
    model = load_from_run(tmp_path)
    assert all(torch.equal(b, kept[f"buffer/{n}"]) for n, b in model.network.named_buffers())
    assert any(n.endswith("running_var") for n, _ in model.network.named_buffers())


def test_a_cut_that_is_only_tried_leaves_statistics_as_they_were(finished: Result) -> None:
    config = pictures_config(budget={"tax": 9.0})
    assert run(config, pictures(config)).test_loss == finished.test_loss


def two_workers(rank: int, folder: Path) -> None:
    config = pictures_config()
    contestant = trained(config, Group(), steps=3)
    running = {n: b.clone() for n, b in contestant.model.network.named_buffers()}
    save_file(running, folder / f"{rank}.safetensors")
    result = run(config, pictures(config), world=Group(), store=FolderStore(folder / f"run-{rank}", 2))
    (folder / f"{rank}.json").write_text(result.model_dump_json(exclude={"seconds", "rounds"}), encoding="utf-8")


def trained(config: RunConfig, world: Solo | Group, steps: int) -> Contestant:
    task = pictures(config)
    from moeify.routed.split_model import SplitModel

    contestant = Contestant(SplitModel(task.build(), task.categories), config.training)
    train(contestant, task, world, config.training, steps, 10, lambda *_: None)
    return contestant


@pytest.mark.slow
def test_two_workers_agree_on_running_statistics_to_the_bit(tmp_path: Path) -> None:
    run_together(two_workers, tmp_path)
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    alone = dict(trained(pictures_config(), Solo(), steps=3).model.network.named_buffers())
    for name in (n for n in one if n.endswith("running_mean")):
        assert torch.corrcoef(torch.stack([one[name], alone[name]]))[0, 1] > 0.9
    results = [(tmp_path / f"{rank}.json").read_text(encoding="utf-8") for rank in (0, 1)]
    assert results[0] == results[1]


RECIPE = """name: pictures
data:
  kind: images
  source: mnist
  root: .
  categories: {low: [0, 1, 2, 3, 4], high: [5, 6, 7, 8, 9]}
  validation: 0.2
model: {kind: resnet, width: 4, blocks: 1, stages: 2}
training: {steps: 12, rows: 20}
attribution: {rows: 8, rows_at_once: 16}
partition: {multiple: 1, min_units: 1}
rounds: [{train: 4, recover: 4, separation: 0.3}]
controls: [told]
evaluation: {validation_rows: 8, test_rows: 16, rows_at_once: 32}
"""


@pytest.mark.slow
def test_what_the_command_line_makes_of_images(tmp_path: Path, laid_out: Path) -> None:
    (tmp_path / "mnist").mkdir()
    write_classes(tmp_path / "mnist", drawn(10, 0))
    place = finish(tmp_path, {"pictures": RECIPE}, laid_out)
    said = call(place, "show", "pictures").stdout
    assert all(words in said for words in ("low", "high", "over told", "Test accuracy", "Rise of test loss"))
    report = call(place, "report", "pictures")
    assert report.exit_code == 0, report.output
    (page,) = (place / "runs").glob("pictures-*/report.html")
    assert "<dt>accuracy</dt>" in page.read_text(encoding="utf-8")
    for name, more in (("whole", ["--split"]), ("low", ["--category", "low"]), ("less", ["--without", "high"])):
        done = call(place, "export", "pictures", *more, "-o", str(tmp_path / name))
        assert done.exit_code == 0, done.output
        assert "equal to the split model within" in done.stdout
        assert len(load_split(tmp_path / name).categories) == (1 if name == "low" else 2)
    refused_ = call(place, "export", "pictures", "--moe", "glm4_moe", "-o", str(tmp_path / "moe"))
    assert refused_.exit_code == 2
    assert "no stock MoE holds a network of family 'resnet'" in refused_.stderr
    attributed = call(place, "attribute", "pictures")
    assert attributed.exit_code == 0, attributed.output
    assert "layer2.0.channels" in attributed.stdout
