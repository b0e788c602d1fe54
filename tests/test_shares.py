"""Shares of tensors: what a single process can show of them, quickly; test_fsdp.py has two."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moeify.parts import Part, part_names, write_parts
from moeify.place import Place
from moeify.recipe.parallel import Fsdp
from moeify.routed.shard import shard
from moeify.routed.split_model import SplitModel
from moeify.shares import Gathered, assign, like, own, whole
from moeify.splitting.surgery import permute
from moeify.store import CorruptCheckpointError, FolderStore, Store
from moeify.storing import StorageError
from moeify.training import Contestant
from moeify.url_store import UrlStore
from moeify.world import CPU
from tests.toy import TEXT_CONFIG, ToyTextTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

T = TypeVar("T")


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process."""
    meet = tmp_path_factory.mktemp("group") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Rank:
    """One of two workers, which are threads of this process."""

    size = 2
    parallel = Fsdp(kind="fsdp")

    def __init__(self, rank: int, said: dict[int, Any], barrier: threading.Barrier) -> None:
        self.rank, self._said, self._barrier = rank, said, barrier

    def sum(self, tensors: object) -> None:
        raise AssertionError

    def share(self, value: T) -> T:
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        self._said[self.rank] = value
        self._barrier.wait()
        found = [self._said[rank] for rank in range(2)]
        self._barrier.wait()
        return found


def both(work: Callable[[Rank], T]) -> list[T]:
    """Return what two workers make of it."""
    said: dict[int, Any] = {}
    barrier = threading.Barrier(2, timeout=20)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: work(Rank(rank, said, barrier)), range(2)))


def contestants() -> tuple[Contestant, Contestant]:
    """The same told decoder twice, the second shared out (over one worker)."""
    config = toy_config(**TEXT_CONFIG)
    task = ToyTextTask(config)
    plain, shared = (SplitModel(task.build(), task.categories, told=True) for _ in range(2))
    shard(shared, CPU)
    return Contestant(plain, config.training), Contestant(shared, config.training)


def stepped(contestant: Contestant) -> None:
    for number, parameter in enumerate(contestant.model.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    contestant.optimizer.step()


def test_what_is_shared_out_moves_and_comes_back_as_whole_tensors_do() -> None:
    plain, shared = contestants()
    assert all(isinstance(parameter, DTensor) for parameter in shared.model.parameters())
    assert [len(group["params"]) for group in shared.optimizer.param_groups] == [
        len(group["params"]) for group in plain.optimizer.param_groups
    ]
    for each in (plain, shared):
        stepped(each)
    order = {site.name: torch.arange(site.units).flip(0) for site in plain.model.space.sites}
    for each in (plain, shared):
        permute(each.model.network, each.optimizer, each.model.space, order)
    kept = {name: whole(tensor).clone() for name, tensor in shared.tensors().items()}
    assert kept.keys() == plain.tensors().keys()
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(kept[name], tensor)
    stepped(shared)
    assert not torch.equal(
        whole(shared.tensors()["parameter/model.embed_tokens.weight"]), kept["parameter/model.embed_tokens.weight"]
    )
    shared.load(kept)
    for name, tensor in shared.tensors().items():
        assert torch.equal(whole(tensor), kept[name]), name
        assert isinstance(tensor, DTensor) == (not name.startswith("optimizer/step/"))


def test_whole_values_are_assigned_and_copied_as_shares() -> None:
    _, shared = contestants()
    weight = shared.model.network.get_parameter("lm_head.weight")
    values = torch.arange(float(weight.numel())).view(weight.shape)
    assign(weight, values)
    assert torch.equal(whole(weight), values)
    copied = like(weight, values)
    assert isinstance(copied, DTensor)
    assert copied.shape == weight.shape
    values[0] = -1
    assert not torch.equal(own(copied), values)
    assert like(weight, torch.ones(())).shape == ()


def test_tensors_are_gathered_one_at_a_time() -> None:
    asked: list[str] = []

    def give(name: str) -> Tensor:
        asked.append(name)
        return torch.ones(1)

    gathered = Gathered({"a": lambda: give("a"), "b": lambda: give("b")})
    assert list(gathered) == ["a", "b"]
    assert len(gathered) == 2
    for name in ("a", "a", "b", "a"):
        assert bool(gathered[name] == 1)
    assert asked == ["a", "b", "a"]


def held() -> dict[str, dict[str, Tensor]]:
    _, shared = contestants()
    weight = shared.model.network.get_parameter("lm_head.weight")
    return {"arm": {"w": weight, "step": torch.tensor(3.0)}, "other": {"x": torch.ones(2)}}


def test_files_of_two_workers_are_read_as_one_part(tmp_path: Path) -> None:
    tensors = held()
    files, again = both(lambda world: write_parts(tmp_path, tensors, world))
    assert files == again
    assert sorted(files) == ["arm.0-of-2.safetensors", "arm.1-of-2.safetensors", "other.safetensors"]
    part = Part([tmp_path / name for name in part_names(files, "arm")])
    assert set(part) == {"step", "w"}
    assert len(part) == 2
    assert float(part["step"]) == 3.0
    assert torch.equal(part["w"], torch.cat([own(tensors["arm"]["w"])] * 2))
    with pytest.raises(KeyError):
        part["nothing"]
    with pytest.raises(CorruptCheckpointError, match="not those of so many workers"):
        part_names(["arm.1-of-2.safetensors"], "arm")
    assert part_names(["armed.0-of-1.safetensors", "arm.safetensors"], "arm") == ["arm.safetensors"]


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_two_workers_publish_one_checkpoint_wherever_they_are(kind: str, tmp_path: Path) -> None:
    tensors, place = held(), Place(f"memory://{tmp_path.name}")

    def opened(machine: int) -> Store:
        return FolderStore(tmp_path, 2) if kind == "folder" else UrlStore(place, tmp_path / str(machine), 2)

    def save(world: Rank) -> None:
        store = opened(world.rank)
        for number in range(3):
            store.save(f"000{number}", {"number": number}, tensors, world=world)

    both(save)
    store = opened(2)
    found = store.newest()
    assert found is not None
    assert (found.name, found.damaged) == ("0002", ())
    assert store.facts("0002") == {"number": 2}
    assert torch.equal(store.tensors("0002", "arm")["w"], torch.cat([own(tensors["arm"]["w"])] * 2))
    assert torch.equal(store.tensors("0002", "other")["x"], torch.ones(2))
    if kind == "url":
        assert sorted({path.split("/")[1] for path in place.found("checkpoints")}) == ["0001", "0002"]
        assert not list(tmp_path.rglob(".unsent-*"))
    else:
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0001", "0002"]


def test_a_worker_without_the_folder_says_so(tmp_path: Path) -> None:
    world = Rank(1, {}, threading.Barrier(2))
    with pytest.raises(StorageError, match=r"worker 1 does not see .* set MOEIFY_HOME"):
        write_parts(tmp_path / "elsewhere", {}, world)
