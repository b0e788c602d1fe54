"""Numbers that go wrong: named, kept out of every checkpoint, and got over as the recipe says."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gloo import run_together
from moeify.divergence import DivergedError, OutOfMemoryError, check_kept
from moeify.events import MemoryTracker, Mishap, Step
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.routed.split_model import SplitModel
from moeify.store import FolderStore, Store
from moeify.task import Batch, HeldOut
from moeify.training import Contestant, train
from moeify.world import Group, Solo
from pipelines import launch
from pipelines.ray_cluster import RunFailedError
from pipelines.runs import RunFolder
from tests.test_loop import DyingStore, KilledError, final, outcome
from tests.toy import CONFIG, ToyTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

POISON = 3.0
"""Marks the target of a row whose loss is finite and whose gradient is not."""


class Trouble(ToyTask):
    """Rows of category c go wrong at some steps, counted from 1."""

    def __init__(self, config: RunConfig, at: tuple[int, ...] = (20,), kind: str = "nan", rows: slice = slice(None)):
        super().__init__(config)
        self.at, self.kind, self.bad = at, kind, rows

    def train_batch(self, step: int) -> Batch:
        batch = super().train_batch(step)
        if step + 1 not in self.at:
            return batch
        targets = batch.targets.clone()
        rows = (batch.categories == 2).nonzero().flatten()[self.bad]
        targets[rows, 0] = {"nan": math.nan, "infinite": math.inf, "gradient": POISON, "memory": -1.0}[self.kind]
        return Batch(batch.inputs, targets, batch.categories, batch.ids)

    def nats(self, outputs: Tensor, targets: Tensor) -> Tensor:
        nats = super().nats(outputs, targets)
        if bool((targets[:, 0] == -1.0).any()):
            torch.empty(10**15)
        poisoned = (targets[:, 0] == POISON).nonzero().flatten()
        return nats.index_add(0, poisoned, (outputs[poisoned].sum(1) * 0).sqrt())


def config_with(policy: dict[str, Any], **training: Any) -> RunConfig:
    return toy_config(training={**CONFIG["training"], "on_divergence": policy, **training})  # type: ignore[dict-item]


def finite(store: FolderStore) -> bool:
    return all(bool(t.isfinite().all()) for held in final(store).values() for t in held.values())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", r"dense, step 20: the loss of 'c' is not finite \(nan\)"),
        ("infinite", r"dense, step 20: the loss of 'c' is not finite \(-?inf\)"),
        ("gradient", r"dense, step 20: the gradient of 'c' is not finite \(norm nan\), though the loss is"),
    ],
)
def test_by_default_the_run_stops_and_names_arm_step_and_category(tmp_path: Path, kind: str, said: str) -> None:
    config, store, tracker = toy_config(), FolderStore(tmp_path, 9), MemoryTracker()
    for _ in range(2):  # resuming the same recipe stops at the same place
        with pytest.raises(DivergedError, match=said) as caught:
            run(config, Trouble(config, kind=kind), store=store, tracker=tracker)
        assert "\n" not in str(caught.value)
        assert "training.on_divergence" in str(caught.value)
    found = store.newest()
    assert found is not None
    assert store.facts(found.name)["arms"]["dense"]["step"] == 16
    assert finite(store)
    assert max(e.step for e in tracker.events.values() if isinstance(e, Step)) == 16


@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_a_batch_is_skipped_and_nothing_else(tmp_path: Path, kind: str) -> None:
    """A batch that is skipped leaves the weights as they were: what comes after equals training without that step."""
    config = config_with({"kind": "skip_batch"})
    task = Trouble(config, kind=kind)
    contestants = []
    for skipped in (False, True):
        contestant = Contestant(SplitModel(task.build(), task.categories), config.training)
        train(contestant, task, Solo(), config.training, 19, 100, lambda *_: None)
        if skipped:
            with pytest.raises(DivergedError):
                train(contestant, task, Solo(), config.training, 25, 100, lambda *_: None)
        assert contestant.step == 19
        contestants.append(contestant.tensors())
    for name, tensor in contestants[0].items():
        assert torch.equal(tensor, contestants[1][name]), name
    store, tracker = FolderStore(tmp_path, 9), MemoryTracker()
    result = run(config, task, store=store, tracker=tracker)
    assert math.isfinite(result.tax["mean"])
    assert finite(store)
    told = [e for e in tracker.events.values() if isinstance(e, Mishap)]
    assert [(e.arm, e.step, e.done) for e in told] == [
        (arm, 20, "the batch is skipped") for arm in ("dense", "split", "random")
    ]
    assert all(e.what.startswith("step 20: ") for e in told)


def test_too_many_batches_end_the_run(tmp_path: Path) -> None:
    config = config_with({"kind": "skip_batch", "most": 2})
    with pytest.raises(DivergedError, match=r"dense, step 12: .* after 2 that were got over"):
        run(config, Trouble(config, at=(3, 7, 12)))


@pytest.mark.parametrize("policy", [{"kind": "skip_batch", "most": 60}, {"kind": "lower_rate", "factor": 0.1}])
def test_an_explosion_is_got_over_from_the_last_checkpoint_and_resumed_to_the_same_bits(
    tmp_path: Path, policy: dict[str, Any]
) -> None:
    config = config_with(policy, learning_rate=0.3, explosion=1.05)
    calm, tracker = FolderStore(tmp_path / "calm", 2), MemoryTracker()
    wanted = run(config, ToyTask(config), store=calm, tracker=tracker)
    told = [e for e in tracker.events.values() if isinstance(e, Mishap)]
    assert told
    assert all("exploded" in e.what for e in told)
    assert all(re.search(r"checkpoint \d+-\d+|the beginning", e.done) for e in told)
    stormy, again, result = DyingStore(tmp_path / "stormy", 2), MemoryTracker(), None
    while result is None:
        stormy.lives = 3
        try:
            result = run(config, ToyTask(config), store=stormy, tracker=again)
        except KilledError:
            continue
    assert outcome(result) == outcome(wanted)
    assert {i for i in again.events if not i.startswith("resumed/")} == set(tracker.events)
    for arm, tensors in final(calm).items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, final(stormy)[arm][name]), (arm, name)


def test_a_lowered_rate_is_told_and_stays(tmp_path: Path) -> None:
    config = config_with({"kind": "lower_rate", "factor": 0.1}, learning_rate=0.3, explosion=1.05)
    tracker = MemoryTracker()
    run(config, ToyTask(config), store=FolderStore(tmp_path, 2), tracker=tracker)
    steps = [e for e in tracker.events.values() if isinstance(e, Step) and e.arm == "dense"]
    lowered = [e for e in steps if "/again/" in e.id]
    assert lowered
    assert max(e.learning_rate for e in lowered) <= 0.3 * 0.1 + 1e-12
    assert steps[-1] is lowered[-1]


def _one_rank_sees_it(rank: int, folder: Path) -> None:
    config = config_with({"kind": "skip_batch"})
    for kind in ("nan", "gradient"):
        task = Trouble(config, kind=kind, rows=slice(1))  # one row, which one of the ranks has
        contestant = Contestant(SplitModel(task.build(), task.categories), config.training)
        try:
            train(contestant, task, Group(), config.training, 30, 100, lambda *_: None)
        except DivergedError as error:
            (folder / f"{kind}-{rank}").write_text(f"{error} {contestant.step}")
    store: Store = FolderStore(folder / "run", 2)
    result = run(config, Trouble(config, rows=slice(1)), world=Group(), store=store)
    (folder / f"tax-{rank}").write_text(f"{result.tax['mean']!r}")
    assert dist.get_world_size() == 2


def test_all_ranks_come_to_the_same_conclusion(tmp_path: Path) -> None:
    run_together(_one_rank_sees_it, tmp_path)
    for kind in ("nan", "gradient", "tax"):
        one, other = ((tmp_path / f"{kind}-{rank}").read_text() for rank in (0, 1))
        assert one == other
        assert kind == "tax" or ("'c'" in one and one.endswith(" 19"))


def test_a_number_that_is_not_finite_is_never_kept() -> None:
    good = {"split": {"w": torch.ones(3), "step": torch.tensor(3)}}
    check_kept(good)
    with pytest.raises(DivergedError, match="split: w is not finite at a checkpoint, which was not written"):
        check_kept({"dense": {"w": torch.ones(1)}, "split": {"w": torch.tensor([1.0, math.nan])}})


class Hungry(Trouble):
    """Rows of category c take all memory, where the run is at ``place``."""

    def __init__(self, config: RunConfig, place: str) -> None:
        super().__init__(config, kind="memory", at=(20,) if place == "training" else ())
        self.place = place

    def _marked(self, batch: Batch) -> Batch:
        targets = batch.targets.clone()
        targets[batch.categories == 2, 0] = -1.0
        return Batch(batch.inputs, targets, batch.categories, batch.ids)

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        found = super().probe_batches(round_, rows, rows_at_once)
        return map(self._marked, found) if self.place == "attribution" else found

    def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
        found = super().held_out_batches(split, rows, rows_at_once)
        return map(self._marked, found) if self.place == "evaluation" else found


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("training", r"dense, step 20, worker 0, rows of 'a' \(2\), 'b' \(2\), 'c' \(2\), 'd' \(2\)"),
        ("attribution", r"attribution of round 1, worker 0, rows of 'a' \(4\), 'b' \(4\), 'c' \(4\), 'd' \(4\)"),
        ("evaluation", r"evaluation of dense, worker 0, rows of 'a' \(4\), 'b' \(4\), 'c' \(4\), 'd' \(4\)"),
    ],
)
def test_memory_that_runs_out_is_named_by_step_and_categories_and_the_run_goes_on_from_the_last_checkpoint(
    tmp_path: Path, place: str, said: str
) -> None:
    config, store = toy_config(training={**CONFIG["training"], "accumulate": 2}), FolderStore(tmp_path, 2)  # type: ignore[dict-item]
    with pytest.raises(OutOfMemoryError, match=rf"^{said}: out of memory \(.*can't allocate memory"):
        run(config, Hungry(config, place), store=store)
    resumed = run(config, ToyTask(config), store=store)
    assert outcome(resumed) == outcome(run(config, ToyTask(config)))


def test_a_local_run_without_memory_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.worker
    from tests.test_launch import Deaf, recipe

    def work(payload: dict[str, Any]) -> None:
        raise OutOfMemoryError("split, step 7, worker 0: out of memory")

    monkeypatch.setattr(launch, "MlflowFollower", Deaf)
    monkeypatch.setattr(launch, "Drawing", Deaf)
    monkeypatch.setattr(pipelines.worker, "work", work)
    folder = RunFolder(tmp_path / "tiny-20260101-000000-abcd")
    folder.path.mkdir()
    with pytest.raises(RunFailedError, match=f"step 7, worker 0: out of memory; 'moeify resume {folder.id}'"):
        launch.in_process(folder, recipe(), tmp_path, [])
    with pytest.raises(OutOfMemoryError):  # on Ray, another attempt may find memory
        pipelines.worker.guarded(work, {"folder": str(tmp_path)})
    assert not pipelines.worker.failure_path(tmp_path).exists()
