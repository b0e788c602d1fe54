"""Two gloo workers against one: the same run, up to the rounding of a sum that is taken in another order."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attribution.measure import Moments, measure
from attribution.subject import Subject
from attribution.table import AttributionTable
from benchmarks.gloo import run_together
from moeify.loop import run
from moeify.result import Result
from moeify.routed.split_model import SplitModel
from moeify.store import FolderStore
from moeify.world import Group, Solo
from tests.toy import ToyTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


def test_alone_every_collective_is_the_identity() -> None:
    tensor = torch.arange(3.0)
    Solo().sum([tensor])
    assert tensor.tolist() == [0.0, 1.0, 2.0]
    assert Solo().share("x") == "x"


def table_of_shard(rank: int, size: int) -> AttributionTable:
    config = toy_config()
    task = ToyTask(config)
    model = SplitModel(task.build().double(), task.categories)
    batches = [batch.shard(rank, size) for batch in task.probe_batches(1, 16, 16)]
    for batch in batches:
        object.__setattr__(batch, "inputs", batch.inputs.double())
        object.__setattr__(batch, "targets", batch.targets.double())
    with model.masked():
        subject = Subject(model.network, model.space.readers, task.categories, task.nats, task.sample, model)
        return measure(subject, batches, moments=Moments())


def worker(rank: int, folder: Path) -> None:
    world = Group()
    numbers = [torch.tensor([1.0 + rank]), torch.tensor([[1], [rank]], dtype=torch.int64)]
    world.sum(numbers)
    assert numbers[0].tolist() == [3.0]
    assert numbers[1].tolist() == [[2], [1]]
    assert world.share(f"rank {rank}") == "rank 0"
    table = table_of_shard(rank, world.size)
    world.sum(table.tensors())
    config = toy_config(cluster={"workers": 2})
    result = run(config, ToyTask(config), world=world, store=FolderStore(folder, 2))
    if rank == 0:
        save_file({f"{i:03d}": tensor for i, tensor in enumerate(table.tensors())}, folder / "table.safetensors")
        (folder / "result.json").write_text(result.model_dump_json())


def test_two_workers_equal_one(tmp_path: Path) -> None:
    run_together(worker, tmp_path)
    both = load_file(tmp_path / "table.safetensors")
    for i, one in enumerate(table_of_shard(0, 1).tensors()):
        two = both[f"{i:03d}"]
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)
    together = Result.model_validate_json((tmp_path / "result.json").read_text())
    alone = run(toy_config(), ToyTask(toy_config()))
    assert together.tree == alone.tree
    for arm, losses in alone.test_loss.items():
        for category, nats in losses.items():
            assert together.test_loss[arm][category] == pytest.approx(nats, abs=1e-3), (arm, category)
