"""Two gloo workers of which each holds half of every model (``cluster.parallel: {kind: fsdp}``), against whole ones."""

import contextlib
import dataclasses
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from benchmarks.gloo import run_together
from moeify.distillation import Teacher, teaching
from moeify.events import MemoryTracker, Mishap
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.recipe.parallel import Fsdp, Parallel, Replicate
from moeify.recipe.partition import UnitKind
from moeify.recipe.routing import Routing
from moeify.recipe.training import Distillation
from moeify.result import Result
from moeify.routed.gradients import GradientRouter
from moeify.routed.shard import shard
from moeify.routed.split_model import SplitModel
from moeify.shares import own, whole
from moeify.split_folder import bytes_in_run, load_from_run, split_hash
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.store import CorruptCheckpointError, FolderStore
from moeify.task import Batch
from moeify.training import Contestant, train
from moeify.world import CPU, Group, shares_models
from tests.networks import CATEGORIES
from tests.test_exchange import LEAN, Mortal
from tests.test_loop import KilledError, final, outcome
from tests.toy import TEXT_CONFIG, ToyTextTask

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shapes_unchecked")]

TREE = ExpertTree.undivided(CATEGORIES).split({0: [("a", "b"), ("c", "d")]})
BAD = 299
"""Marks the target of a spoilt row."""
KINDS: dict[str, Parallel] = {"replicate": Replicate(), "fsdp": Fsdp(kind="fsdp")}


def trained(world: Group, training: dict[str, Any], *, heads: bool) -> dict[str, Tensor]:
    """Whole tensors of a split decoder that was trained for three steps."""
    config = RunConfig.model_validate({**TEXT_CONFIG, "training": {**TEXT_CONFIG["training"], **training}})  # type: ignore[dict-item]
    task = ToyTextTask(config)
    model = SplitModel(task.build(), task.categories, told=True, kinds=get_args(UnitKind) if heads else ("ffn",))
    widths = {site.name: (0, 1, 1) if site.width > 1 else (16, 8, 8) for site in model.space.readers}
    model.repartition(Partition(TREE, widths))
    if shares_models(world):
        shard(model, CPU)
    routing = Routing.model_validate({"gradients": "both", "routes": "soft", "apart": ["a"], "labelled": 0.5})
    router = None if heads else GradientRouter(routing, CATEGORIES, model.space.readers, 0)
    contestant = Contestant(model, config.training, router)
    teacher = Teacher(task.build(), Distillation(weight=0.1, stream=0.5), None, task.units_per_row)
    with teaching(teacher, model) as taught:
        train(contestant, task, world, config.training, 3, 9, lambda *_: None, taught)
    held = contestant.tensors()
    if shares_models(world):
        halves = [own(tensor).numel() / tensor.numel() for tensor in held.values() if isinstance(tensor, DTensor)]
        assert len(halves) == sum(not name.startswith("optimizer/step/") for name in held)
        assert max(halves) <= 0.5
    return {name: whole(tensor).contiguous() for name, tensor in held.items()}


def recipe(parallel: Parallel, **training: Any) -> RunConfig:
    """Two rounds of a decoder with all that is done to weights."""
    return RunConfig.model_validate(
        {
            **TEXT_CONFIG,
            "training": {"steps": 24, "rows": 16, "learning_rate": 0.01, **training},
            "partition": {"multiple": 2, "min_units": 2, "told": True, "compensation": {"follow": True}},
            "rounds": [{"train": 8, "recover": 4, "separation": 0.2}, {"train": 4, "recover": 4, "separation": 0.3}],
            "controls": ["random", "told"],
            "attribution": {"rows": 33, "rows_at_once": 26},
            "evaluation": {"validation_rows": 17, "test_rows": 15, "rows_at_once": 22, "null_draws": 1},
            "cluster": {"workers": 2, "parallel": parallel.model_dump()},
        }
    )


class Odd(ToyTextTask):
    """The last batch that is read has one row."""

    def _all(self, purpose: list[int], rows: int, rows_at_once: int) -> Iterator[Any]:
        yield from super()._all(purpose, rows, rows_at_once)
        yield self._rows([*purpose, 7], 1, 10_000)


class Spoilt(ToyTextTask):
    """In step 6 one row of category c goes wrong, which one of the two workers has."""

    def __init__(self, config: RunConfig, kind: str) -> None:
        super().__init__(config)
        self.kind = kind

    def train_batch(self, step: int) -> Batch:
        batch = super().train_batch(step)
        if step == 5:
            targets = batch.targets.clone()
            targets[(batch.categories == 2).nonzero()[0], 0] = BAD
            batch = dataclasses.replace(batch, targets=targets)
        return batch

    def nats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        bad_R = targets[:, 0] == BAD
        nats_R = super().nats(outputs, targets)
        if self.kind == "nan":
            return torch.where(bad_R, torch.nan, nats_R)
        return nats_R.index_add(0, bad_R.nonzero().flatten(), (outputs[bad_R].flatten(1).sum(1) * 0).sqrt())


def a_run(folder: Path, parallel: Parallel, world: Group | None = None) -> Result:
    config = recipe(parallel)
    return run(config, Odd(config), world=world or Group(parallel), store=FolderStore(folder, 2))


@contextlib.contextmanager
def gathering() -> Iterator[list[int]]:
    """Numbers in gathered tensors that are alive at once, at each gathering."""
    alive: list[weakref.ref[Tensor]] = []
    seen: list[int] = []
    real = DTensor.full_tensor

    def full_tensor(self: DTensor, **more: Any) -> Tensor:
        found = real(self, **more)
        alive.append(weakref.ref(found))
        seen.append(sum(each.numel() for ref in alive if (each := ref()) is not None))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "full_tensor", full_tensor)
        yield seen


def worker(rank: int, folder: Path) -> None:
    for kind, parallel in KINDS.items():
        for name, training in LEAN.items():
            for heads in (False, True):
                tensors = trained(Group(parallel), training, heads=heads)
                save_file(tensors, folder / f"{kind}-{name}-{heads}-{rank}.safetensors")
        with gathering() as seen:
            result = a_run(folder / kind, parallel)
        (folder / f"{kind}-{rank}.json").write_text(json.dumps([outcome(result), max(seen, default=0)]))
    for bad in ("nan", "gradient"):
        for kind, parallel in KINDS.items():
            tracker, config = MemoryTracker(), recipe(parallel, on_divergence={"kind": "skip_batch"})
            run(config, Spoilt(config, bad), world=Group(parallel), tracker=tracker)
            told = [f"{e.step} {e.what}; {e.done}" for e in tracker.events.values() if isinstance(e, Mishap)]
            (folder / f"{kind}-{bad}-{rank}.txt").write_text("\n".join(told))
    done = False
    while not done:
        with contextlib.suppress(KilledError):
            a_run(folder / "killed", KINDS["fsdp"], Mortal(KINDS["fsdp"], lives=9))
            done = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("fsdp")
    run_together(worker, found)
    return found


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("name", list(LEAN))
def test_halves_of_a_model_learn_what_whole_ones_learn(folder: Path, name: str, heads: bool) -> None:
    wanted, got, other = (
        load_file(folder / f"{kind}-{name}-{heads}-{rank}.safetensors")
        for kind, rank in (("replicate", 0), ("fsdp", 0), ("fsdp", 1))
    )
    assert wanted.keys() == got.keys() == other.keys()
    for key, tensor in got.items():
        assert torch.equal(tensor, other[key]), key
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-2, atol=1e-4 if name == "plain" else 2e-2)


def test_a_run_on_halves_finds_what_one_on_whole_models_finds(folder: Path) -> None:
    (wanted, none), (got, gathered), (other, _) = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("replicate-0", "fsdp-0", "fsdp-1")
    )
    assert got == other
    assert got["tree"] == wanted["tree"]
    assert got["active_fraction"] == wanted["active_fraction"]
    for arm, losses in wanted["test_loss"].items():
        assert got["test_loss"][arm] == pytest.approx(losses, abs=1e-3)
    assert none == 0
    layer = 4 * 16 * 16 + 3 * 16 * 32 + 4 * 32  # projections, maps and biases of categories
    assert 0 < gathered <= layer


def test_a_killed_run_ends_with_the_same_bits(folder: Path) -> None:
    wanted = final(FolderStore(folder / "fsdp", 2))
    assert set(wanted) == {"dense", "split", "random", "told"}
    for arm, tensors in final(FolderStore(folder / "killed", 2)).items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, wanted[arm][key]), (arm, key)


def test_each_worker_writes_its_half_and_readers_need_not_know(folder: Path) -> None:
    store = FolderStore(folder / "fsdp", 2)
    found = store.newest()
    assert found is not None
    checkpoint = folder / "fsdp" / "checkpoints" / found.name
    halves = [checkpoint / f"split.{rank}-of-2.safetensors" for rank in (0, 1)]
    assert abs(halves[0].stat().st_size - halves[1].stat().st_size) < 0.2 * halves[0].stat().st_size
    assert not (checkpoint / "split.safetensors").exists()
    split = load_from_run(folder / "fsdp")
    whole_run = load_from_run(folder / "replicate")
    assert split.partition.widths.keys() == whole_run.partition.widths.keys()
    assert bytes_in_run(folder / "fsdp", "split") == bytes_in_run(folder / "replicate", "split")
    assert len(split_hash(folder / "fsdp")) == 64
    parameters = dict(split.network.named_parameters())
    joined = store.tensors(found.name, "split")
    assert {name for name in joined if name.startswith("parameter/")} == {f"parameter/{name}" for name in parameters}
    for name, parameter in parameters.items():
        assert torch.equal(joined[f"parameter/{name}"], parameter), name


def resharded(rank: int, folder: Path) -> None:
    """Read a part as torch.distributed.checkpoint does, into the halves of two workers."""
    store = FolderStore(folder / "fsdp", 2)
    newest = store.newest()
    assert newest is not None
    wanted = {name: store.tensors(newest.name, "split")[name] for name in store.tensors(newest.name, "split")}
    mesh = init_device_mesh("cpu", (2,))
    into = {name: distribute_tensor(torch.zeros_like(t), mesh) if t.dim() else t * 0 for name, t in wanted.items()}
    dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "torch")))
    for name, tensor in into.items():
        assert torch.equal(whole(tensor), wanted[name]), name


def test_torchs_own_checkpoints_read_the_files_into_other_shares(folder: Path) -> None:
    store = FolderStore(folder / "fsdp", 2)
    newest = store.newest()
    assert newest is not None
    (folder / "torch").mkdir()
    for path in (folder / "fsdp" / "checkpoints" / newest.name).glob("split.*.safetensors"):
        shutil.copy(path, folder / "torch")
    (folder / "meet").unlink(missing_ok=True)  # where the fixture's workers met
    run_together(resharded, folder)


def test_a_run_goes_on_with_another_number_of_workers(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "fsdp", tmp_path / "run")
    for checkpoint in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    alone = RunConfig.model_validate({**recipe(KINDS["fsdp"]).model_dump(), "cluster": {"workers": 1}})
    result = run(alone, Odd(alone), store=FolderStore(tmp_path / "run", 2))
    wanted, _ = json.loads((folder / "fsdp-0.json").read_text())
    assert result.test_loss["split"] == pytest.approx(wanted["test_loss"]["split"], abs=1e-3)


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_half_that_is_damaged_is_seen(folder: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(folder / "fsdp", tmp_path / "run")
    store = FolderStore(tmp_path / "run", 2)
    found = store.newest()
    assert found is not None
    half = tmp_path / "run" / "checkpoints" / found.name / "split.1-of-2.safetensors"
    if damage == "missing":
        half.unlink()
    else:
        half.write_bytes(half.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptCheckpointError, match=r"split\.1-of-2\.safetensors"):
        store.tensors(found.name, "split")
    passed = store.newest()
    assert passed is not None
    assert passed.name < found.name


def test_trouble_of_one_worker_is_seen_and_got_over_by_both(folder: Path) -> None:
    for bad, what in (("nan", "the loss of 'c' is not finite"), ("gradient", "the gradient of 'c' is not finite")):
        told = [(folder / f"{kind}-{bad}-0.txt").read_text() for kind in KINDS]
        assert told[0] == told[1]
        assert what in told[0]
        assert "the batch is skipped" in told[0]
