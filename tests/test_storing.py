"""A full disk and storage that may not be written to: told in one line, nothing lost, and gone on from."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors import SafetensorError

import moeify.store
from moeify.loop import run
from moeify.store import FolderStore
from moeify.storing import StorageError, storing
from pipelines import launch, runs
from pipelines.cli import main
from pipelines.journal import JournalTracker, read_events
from tests.test_launch import Deaf
from tests.test_loop import final, outcome
from tests.toy import ToyTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

RECIPE = """name: tiny
data: {kind: digits}
model: {kind: autoencoder, hidden: 64, code: 2}
training: {steps: 4, rows: 20}
rounds: [{train: 2, recover: 2, separation: 0.3}]
"""


class Disk:
    """Refuses one write, or every write from there on, with the given error."""

    def __init__(self, patch: pytest.MonkeyPatch, code: int) -> None:
        self.left, self.lasting, self.code = 10**9, False, code
        self.writes = 0
        for module, name in ((os, "write"), (os, "fsync"), (moeify.store, "save_file")):
            patch.setattr(module, name, self.guarded(getattr(module, name), name == "save_file"))
        for name in ("write_bytes", "write_text", "rename", "replace", "mkdir"):
            patch.setattr(Path, name, self.guarded(getattr(Path, name), False))

    def guarded(self, real: Callable[..., Any], rust: bool) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            self.writes += 1
            self.left -= 1
            if self.left == 0 or (self.left < 0 and self.lasting):
                text = os.strerror(self.code)
                raise SafetensorError(f"I/O error: {text}") if rust else OSError(self.code, text)
            return real(*args, **kwargs)

        return write


CONFIG = toy_config(
    training={"steps": 20, "rows": 16, "learning_rate": 0.01},
    rounds=[{"train": 5, "recover": 5, "separation": 0.3}],
    controls=[],
)


EVERY_WRITE = [pytest.mark.slow, pytest.mark.timeout(3600)]  # hundreds of runs


def attempt(place: Path) -> Any:
    with JournalTracker(place / "journal.jsonl") as journal:
        return run(CONFIG, ToyTask(CONFIG), store=FolderStore(place, 2), tracker=journal)


@pytest.mark.parametrize(
    ("code", "lasting", "places"),
    [
        (errno.EROFS, True, 2),
        (errno.ENOSPC, False, 5),
        pytest.param(errno.ENOSPC, False, 1000, marks=EVERY_WRITE),
        pytest.param(errno.ENOSPC, True, 1000, marks=EVERY_WRITE),
    ],
)
def test_whatever_write_fails_the_run_says_so_and_goes_on_from_the_last_good_checkpoint(
    tmp_path: Path, code: int, lasting: bool, places: int
) -> None:
    wanted = outcome(attempt(tmp_path / "calm"))
    bits = final(FolderStore(tmp_path / "calm", 2))
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, code)
        attempt(tmp_path / "counted")
        writes = disk.writes
    assert writes > 50
    for number in range(1, writes, max(1, writes // places)):
        place = tmp_path / f"full-{number}"
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, code)
            disk.left, disk.lasting = number, lasting
            with pytest.raises(StorageError) as caught:
                attempt(place)
        told = str(caught.value)
        assert "\n" not in told
        assert os.strerror(code) in told
        assert str(place) in told
        store = FolderStore(place, 2)
        found = store.newest()
        assert found is None or not found.damaged
        assert outcome(attempt(place)) == wanted
        assert not [path for path in place.rglob(".*") if path.name.startswith(".draft-")]
        events, end = read_events(place / "journal.jsonl", 0)
        assert len({event.id for event in events}) == len(events)
        assert end == (place / "journal.jsonl").stat().st_size
        for arm, tensors in final(store).items():
            assert all(tensor.equal(bits[arm][name]) for name, tensor in tensors.items())
        shutil.rmtree(place)


@pytest.fixture
def homed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path / "runs"))
    monkeypatch.setattr(launch, "MlflowFollower", Deaf)
    monkeypatch.setattr(launch, "Drawing", Deaf)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def test_a_full_disk_is_one_line_on_the_command_line_and_resume_ends_the_run(homed: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, errno.ENOSPC)
        disk.left, disk.lasting = 40, True
        failed = CliRunner().invoke(main, ["run", str(homed / "tiny.yaml"), "--local", "--quiet"])
    assert failed.exit_code == 2
    (line,) = failed.output.splitlines()
    assert line.startswith("moeify: error: ")
    assert "cannot be written: No space left on device; what was kept before is whole" in line
    resumed = CliRunner().invoke(main, ["resume", "last", "--local", "--quiet"])
    assert (resumed.exit_code, resumed.output) == (0, "")
    assert runs.status(runs.find("last", homed / "runs")) == "finished"


def test_a_home_that_may_not_be_written_to_is_named(homed: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, errno.EROFS)
        disk.left, disk.lasting = 1, True
        failed = CliRunner().invoke(main, ["run", str(homed / "tiny.yaml"), "--local", "--quiet"])
    assert failed.exit_code == 2
    assert f"{homed / 'runs'} cannot be written: Read-only file system" in failed.output
    assert len(failed.output.splitlines()) == 1


def test_errors_that_are_none_of_writing_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storing(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file")
    with pytest.raises(StorageError, match="half is there"), storing(tmp_path):
        raise SafetensorError("half\nis there")
