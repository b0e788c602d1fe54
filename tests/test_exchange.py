"""Two gloo workers: gradients that are exchanged during the backward pass against those that are exchanged after it."""

import contextlib
from pathlib import Path
from typing import Any, TypeVar, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.gloo import run_together
from moeify.divergence import DivergedError
from moeify.events import MemoryTracker, Mishap
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.recipe.parallel import Ddp, Parallel, Replicate
from moeify.recipe.partition import UnitKind
from moeify.recipe.routing import Routing
from moeify.routed.gradients import GradientRouter
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.store import FolderStore
from moeify.training import Contestant, train
from moeify.world import Group, Solo, World
from tests.networks import CATEGORIES
from tests.test_divergence import Trouble, config_with
from tests.test_loop import KilledError, final
from tests.toy import CONFIG, TEXT_CONFIG, ToyTask, ToyTextTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

T = TypeVar("T")
TREE = ExpertTree.undivided(CATEGORIES).split({0: [("a", "b"), ("c", "d")]})
KINDS: dict[str, Parallel] = {"replicate": Replicate(), "ddp": Ddp(kind="ddp", bucket=1)}
LEAN: dict[str, dict[str, Any]] = {
    "plain": {},
    "lean": {"accumulate": 2, "autocast": "bfloat16", "checkpoint_activations": True},
}


def trained(world: World, training: dict[str, Any], *, heads: bool, steps: int = 3) -> dict[str, Tensor]:
    """A split decoder that was trained a few steps; the second of two heads runs on rows of c and d alone."""
    config = RunConfig.model_validate({**TEXT_CONFIG, "training": {**TEXT_CONFIG["training"], **training}})  # type: ignore[dict-item]
    task = ToyTextTask(config)
    kinds = get_args(UnitKind) if heads else ("ffn",)
    model = SplitModel(task.build(), task.categories, told=True, kinds=kinds)
    widths = {site.name: (0, 1, 1) if site.width > 1 else (16, 8, 8) for site in model.space.readers}
    model.repartition(Partition(TREE, widths))
    routing = Routing.model_validate({"gradients": "both", "routes": "soft", "apart": ["a"], "labelled": 0.5})
    router = None if heads else GradientRouter(routing, CATEGORIES, model.space.readers, 0)
    contestant = Contestant(model, config.training, router)
    train(contestant, task, world, config.training, steps, 9, lambda *_: None)
    return contestant.tensors()


def short(parallel: Parallel, **training: Any) -> RunConfig:
    """A run of one round."""
    return toy_config(
        training={**CONFIG["training"], "steps": 20, **training},  # type: ignore[dict-item]
        rounds=[{"train": 10, "recover": 6, "separation": 0.3}],
        cluster={"workers": 2, "parallel": parallel.model_dump()},
    )


def worker(rank: int, folder: Path) -> None:
    for kind, parallel in KINDS.items():
        world = Group(parallel)
        for name, training in LEAN.items():
            for heads in (False, True):
                tensors = trained(world, training, heads=heads)
                save_file(tensors, folder / f"{kind}-{name}-{heads}-{rank}.safetensors")
        config = short(parallel)
        run(config, ToyTask(config), world=world, store=FolderStore(folder / kind, 2))
        seen = _trouble(rank, world)
        (folder / f"{kind}-trouble-{rank}").write_text("\n".join(seen))
    _killed(rank, folder)


def _trouble(rank: int, world: World) -> list[str]:
    """What a worker makes of one bad row, which one of the two has."""
    seen, config = [], config_with({"kind": "skip_batch"})
    for kind in ("nan", "gradient"):
        task = Trouble(config, kind=kind, at=(3,), rows=slice(1))
        contestant = Contestant(SplitModel(task.build(), task.categories), config.training)
        try:
            train(contestant, task, world, config.training, 30, 100, lambda *_: None)
        except DivergedError as error:
            seen.append(f"{contestant.step} {error.what}")
        contestant.step += 1  # the batch is skipped
        train(contestant, task, world, config.training, 5, 100, lambda *_: None)
        seen.append(str(float(contestant.tensors()["parameter/encoder.up.weight"].double().sum())))
    tracker = MemoryTracker()
    config = short(world.parallel, on_divergence={"kind": "skip_batch"})
    run(config, Trouble(config, at=(13,), rows=slice(1)), world=world, tracker=tracker)
    return seen + [f"{e.step} {e.done}" for e in tracker.events.values() if isinstance(e, Mishap)]


def _killed(rank: int, folder: Path) -> None:
    """A run whose workers all stop at the same checkpoint, again and again."""
    config = short(KINDS["ddp"])
    done = False
    while not done:
        world = Mortal(config.cluster.parallel, lives=4)
        with contextlib.suppress(KilledError):
            run(config, ToyTask(config), world=world, store=FolderStore(folder / "killed", 2))
            done = True


class Mortal(Group):
    """Dies, on every rank, at the n-th barrier that guards a checkpoint."""

    def __init__(self, parallel: Parallel, lives: int) -> None:
        super().__init__(parallel)
        self.lives = lives

    def share(self, value: T) -> T:
        found = super().share(value)
        self.lives -= found is None
        if self.lives < 0:
            raise KilledError
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("exchange")
    run_together(worker, found)
    return found


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("name", list(LEAN))
def test_gradients_on_the_way_make_the_same_bits(folder: Path, name: str, heads: bool) -> None:
    after, during = (load_file(folder / f"{kind}-{name}-{heads}-0.safetensors") for kind in KINDS)
    other = load_file(folder / f"ddp-{name}-{heads}-1.safetensors")
    alone = trained(Solo(), LEAN[name], heads=heads)
    assert after.keys() == during.keys() == other.keys() == alone.keys()
    for key, tensor in after.items():
        assert torch.equal(during[key], tensor), key
        assert torch.equal(other[key], tensor), key
        if name == "plain" and not key.startswith("optimizer/step"):
            torch.testing.assert_close(tensor, alone[key], rtol=1e-2, atol=1e-3)


def test_a_run_whose_gradients_are_on_the_way_is_the_run_and_resumes_to_its_bits(folder: Path) -> None:
    after = final(FolderStore(folder / "replicate", 2))
    assert set(after) == {"dense", "split", "random"}
    for name in ("ddp", "killed"):
        for arm, tensors in final(FolderStore(folder / name, 2)).items():
            for key, tensor in tensors.items():
                assert torch.equal(tensor, after[arm][key]), (name, arm, key)


def test_trouble_is_seen_and_got_over_alike(folder: Path) -> None:
    for rank in (0, 1):
        (text,) = {(folder / f"{kind}-trouble-{rank}").read_text() for kind in KINDS}  # the same for both kinds
        seen = text.split("\n")
        assert seen[0] == "2 step 3: the loss of 'c' is not finite (nan)"
        assert seen[2].startswith("2 step 3: the gradient of 'c' is not finite")
        assert seen[4:] == ["13 the batch is skipped"] * (3 if rank == 0 else 0)
