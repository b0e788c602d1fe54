"""Ctrl-C once leaves a checkpoint from which a run goes on to the same bits; twice ends it at once."""

import io
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from moeify.events import Event, MemoryTracker, Step
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.stopping import Stoppable, StoppedError
from moeify.store import FolderStore
from moeify.world import Solo
from pipelines import launch
from pipelines.cli import main
from pipelines.homes import note
from pipelines.journal import read_events
from pipelines.runs import RunFolder, status
from pipelines.stopping import NOTE, Watch, asking
from tests.checkpoints import save_checkpoint
from tests.test_launch import Deaf, recipe
from tests.test_loop import final, outcome
from tests.texts import write_texts
from tests.toy import ToyTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


class Impatient:
    """Asks for a stop when it has been asked so often."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def __call__(self) -> bool:
        self.patience -= 1
        return self.patience < 0


def press(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


def talkative() -> RunConfig:
    """A run of 400 steps that tells each of them."""
    config = recipe().model_copy(update={"tracking": recipe().tracking.model_copy(update={"every": 1})})
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": 400})})


class Presses:
    """A follower that presses Ctrl-C at the first step of training that it hears of."""

    offset = 0

    def __init__(self, *_: Any, times: int = 1) -> None:
        self.times = times

    def take(self, events: Sequence[Event]) -> None:
        if self.times and any(isinstance(event, Step) for event in events):
            press(self.times)
            self.times = 0

    def close(self) -> None: ...


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(launch, "MlflowFollower", Deaf)
    monkeypatch.setattr(launch, "Drawing", Deaf)
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pipelines.journal._BATCH", 1)
    path = tmp_path / "tiny-20260101-000000-abcd"
    path.mkdir()
    return RunFolder(path)


# --- the loop ---------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = toy_config(partition={"multiple": 2, "min_units": 2, "null_test": {"permutations": 3, "level": 0.99}})
    whole = FolderStore(tmp_path / "whole", 2)
    wanted = run(config, ToyTask(config), store=whole)
    store, tracker, where = FolderStore(tmp_path / "stopped", 2), MemoryTracker(), []
    for patience in (0, 7, 11, 25, 40, 64, 90, 10**6):
        try:
            got = run(config, ToyTask(config), store=store, tracker=tracker, stop=Impatient(patience))
        except StoppedError as stopped:
            where.append(str(stopped))
    assert where[0] == "asked to stop at step 1 of dense; the run goes on from there"
    assert len(where) == 7
    assert any("goes on from its newest checkpoint" in told for told in where)  # between two phases of training
    assert outcome(got) == outcome(wanted)
    for arm, tensors in final(whole).items():
        assert all(torch.equal(tensor, final(store)[arm][name]) for name, tensor in tensors.items())
    steps = [event.step for event in tracker.events.values() if isinstance(event, Step) and event.arm == "split"]
    assert steps == sorted(set(steps))


def test_a_step_that_is_asked_for_a_stop_is_the_last_one_and_in_the_checkpoint(tmp_path: Path) -> None:
    config, store = toy_config(), FolderStore(tmp_path, 2)
    with pytest.raises(StoppedError, match="at step 5 of dense"):
        run(config, ToyTask(config), store=store, stop=Impatient(4))
    (name,) = [path.name for path in (tmp_path / "checkpoints").iterdir() if not path.name.startswith(".")]
    assert store.facts(name)["arms"]["dense"]["step"] == 5


def test_only_rank_0_is_asked_and_a_sum_still_adds_up() -> None:
    class Second(Solo):
        rank, size = 1, 2

    asked = Impatient(0)
    total = torch.ones(2)
    Stoppable(Second(), asked).sum([total])
    assert (asked.patience, total.tolist()) == (0, [1.0, 1.0])
    with pytest.raises(StoppedError):
        Stoppable(Solo(), asked).sum([total])


# --- the driver and its worker ----------------------------------------------------------------------------


def test_ctrl_c_in_process_leaves_a_checkpoint_and_the_run_goes_on_to_the_same_bits(
    folder: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = talkative()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped with a checkpoint"):
        launch.in_process(folder, config, tmp_path, [Presses()])
    assert signal.getsignal(signal.SIGINT) is before
    assert "moeify: stopping after a checkpoint; Ctrl-C again stops at once\n" in capfd.readouterr().err
    assert status(folder) == "interrupted"
    assert not (folder.path / NOTE).exists()
    store = FolderStore(folder.path, 2)
    newest = store.newest()
    assert newest is not None
    heard = [event.step for event in read_events(folder.journal, 0)[0] if isinstance(event, Step)]
    assert store.facts(newest.name)["arms"]["dense"]["step"] == heard[-1] < 400
    launch.in_process(folder, config, tmp_path, [])
    beside = RunFolder(tmp_path / "tiny-20260101-000001-abcd")
    beside.path.mkdir()
    launch.in_process(beside, config, tmp_path, [])
    losses = [json.loads(run_.result.read_text())["test_loss"] for run_ in (folder, beside)]
    assert losses[0] == losses[1]


def test_ctrl_c_twice_ends_a_run_at_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.worker

    def work(payload: dict[str, Any]) -> None:
        press(2)
        time.sleep(30)

    monkeypatch.setattr(pipelines.worker, "work", work)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as stopped:
        launch.in_process(folder, recipe(), folder.path, [])
    assert str(stopped.value) == ""
    assert time.monotonic() - began < 15
    assert not (folder.path / NOTE).exists()


def test_sigterm_leaves_a_checkpoint_where_there_is_time(folder: RunFolder, tmp_path: Path) -> None:
    class Terminates(Presses):
        def take(self, events: Sequence[Event]) -> None:
            if self.times and any(isinstance(event, Step) for event in events):
                os.kill(os.getpid(), signal.SIGTERM)
                self.times = 0

    config = talkative()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped with a checkpoint"):
        launch.in_process(folder, config, tmp_path, [Terminates()])
    assert signal.getsignal(signal.SIGTERM) is before
    assert status(folder) == "interrupted"
    newest = FolderStore(folder.path, 2).newest()
    heard = [event.step for event in read_events(folder.journal, 0)[0] if isinstance(event, Step)]
    assert newest is not None
    assert FolderStore(folder.path, 2).facts(newest.name)["arms"]["dense"]["step"] == heard[-1] < 400


def test_sigterm_again_ends_a_run_at_once(folder: RunFolder) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt) as stopped, asking(folder):
        twice()
    assert str(stopped.value) == ""
    assert not (folder.path / NOTE).exists()


def test_a_run_can_be_stopped_though_nobody_is_left_to_be_told(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = io.StringIO()
    gone.close()
    monkeypatch.setattr("sys.stderr", gone)
    watch, heard = Watch(folder), []

    def work() -> None:
        press()
        deadline = time.monotonic() + 10
        while not watch() and time.monotonic() < deadline:
            time.sleep(0.01)
        heard.append(watch())

    with pytest.raises(KeyboardInterrupt, match="stopped with a checkpoint"), asking(folder):
        work()
    assert heard == [True]


def test_a_run_that_ends_before_it_can_stop_has_ended(folder: RunFolder, tmp_path: Path) -> None:
    launch.in_process(folder, recipe(), tmp_path, [])
    with asking(folder):
        press()


def test_the_note_of_an_attempt_that_was_killed_does_not_stop_the_next(folder: RunFolder, tmp_path: Path) -> None:
    (folder.path / NOTE).touch()
    launch.in_process(folder, recipe(), tmp_path, [])
    assert status(folder) == "finished"


def test_behind_a_url_the_note_lies_where_workers_elsewhere_see_it(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.stopping._LOOK_FAR", 0.0)
    note(folder.path.parent, f"memory://stopping-{os.getpid()}")
    watch = Watch(folder)

    def work() -> bool:
        before = watch()
        press()
        deadline = time.monotonic() + 10
        while not watch() and time.monotonic() < deadline:
            time.sleep(0.01)
        return before

    heard = []
    with pytest.raises(KeyboardInterrupt, match="stopped with a checkpoint"), asking(folder):
        heard.append(work())
    assert heard == [False]
    assert watch()
    last = Watch(folder)
    assert not last()
    assert last._looking is not None
    last._looking.join()
    assert not last()


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_in_moeify_split_says_so_and_exits_as_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "CACHE"):
        monkeypatch.setenv(f"MOEIFY_{name}", str(tmp_path / name))
    monkeypatch.setattr(launch, "MlflowFollower", Deaf)
    monkeypatch.setattr(launch, "Drawing", Deaf)
    monkeypatch.setattr("pipelines.display.choose_display", Presses)
    save_checkpoint(tmp_path / "checkpoint", "llama")
    write_texts(tmp_path)
    asked = ("--data", str(tmp_path / "texts.jsonl"), "--separation", "0.4", "--steps", "300", "-o", "words", "--local")
    stopped = CliRunner().invoke(main, ["split", str(tmp_path / "checkpoint"), *asked])
    (folder,) = map(RunFolder, (tmp_path / "HOME").glob("words-*"))
    assert stopped.exit_code == 130, stopped.output
    said = stopped.stderr.splitlines()[-1]
    assert said == f"moeify: stopped with a checkpoint; go on with: moeify resume {folder.id}"
    assert status(folder) == "interrupted"
    assert FolderStore(folder.path, 2).newest() is not None
