"""Run folders: made whole, found by what a person types, and honest about who drives them."""

import json
import platform
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest

from moeify.events import Failed, Finished, Phase
from moeify.recipe.load import load_recipe, parse_recipe
from pipelines import runs
from pipelines.journal import JournalTracker
from pipelines.versions import package_version

RECIPE = """name: tiny
data: {kind: digits}
model: {kind: autoencoder}
training: {steps: 10}
rounds: [{train: 1, recover: 2, separation: 0.4}]
"""
CONFIG = parse_recipe(RECIPE, where="tiny")


def make(home: Path, when: str, name: str = "tiny", tail: str = "0000") -> runs.RunFolder:
    made = runs.create(CONFIG, RECIPE, home)
    return runs.RunFolder(made.path.rename(home / f"{name}-{when}-{tail}"))


def test_a_new_run_holds_its_recipe_as_given_and_as_resolved_and_where_its_paths_start(tmp_path: Path) -> None:
    folder = runs.create(CONFIG, RECIPE, tmp_path / "home", base=tmp_path / "recipes")
    assert folder.recipe.read_text() == RECIPE
    assert load_recipe(folder.resolved) == CONFIG
    assert folder.base == tmp_path / "recipes"
    origin = json.loads(folder.origin.read_text())
    assert origin["moeify"] == package_version()
    assert origin["versions"]["python"] == platform.python_version()
    assert origin["versions"]["torch"] == version("torch")
    assert folder.id.startswith("tiny-2")
    assert runs.every(tmp_path / "home") == [folder]


@pytest.mark.parametrize("written", ["", "[]", "{}", '{"base": ["a"]}', '{"base": null}', '"base"'])
def test_where_paths_start_is_told_to_be_unknown_where_it_is(tmp_path: Path, written: str) -> None:
    folder = make(tmp_path / "home", "20260101-000000")
    folder.origin.write_text(written)
    with pytest.raises(ValueError, match=r"origin\.json is not what moeify wrote there \(\w+\), so nobody knows"):
        _ = folder.base


def test_a_run_may_be_given_its_id_once_and_data_of_its_own(tmp_path: Path) -> None:
    run = "tiny-20260101-000000-abcd"
    folder = runs.create(CONFIG, RECIPE, tmp_path, run=run, fill=lambda to: (to / "data").write_text("x"))
    assert (folder.id, folder.base) == (run, tmp_path / run / "inputs")
    assert (folder.base / "data").read_text() == "x"
    with pytest.raises(FileExistsError, match=f"run {run} is there already"):
        runs.create(CONFIG, RECIPE, tmp_path, run=run)
    for hostile in ("../x-20260101-000000-abcd", "a/b-20260101-000000-abcd", f"{run}\n", "x" * 99 + run, "last", ""):
        with pytest.raises(ValueError, match="is no id of a run"):
            runs.check_id(hostile)
    assert [path.name for path in tmp_path.iterdir()] == [run]


def test_runs_made_at_the_same_moment_do_not_meet(tmp_path: Path) -> None:
    made: list[runs.RunFolder] = []

    def some() -> None:
        made.extend(runs.create(CONFIG, RECIPE, tmp_path) for _ in range(10))

    threads = [threading.Thread(target=some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({folder.id for folder in made}) == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(folder.id for folder in made)


def test_a_run_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "to_yaml", full)
    with pytest.raises(OSError, match="No space left"):
        runs.create(CONFIG, RECIPE, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_found_by_id_by_unique_start_and_as_the_last(tmp_path: Path) -> None:
    new = make(tmp_path, "20250102-000000", "apple")
    old = make(tmp_path, "20250101-000000", "zebra")
    (tmp_path / "not-a-run").mkdir()
    assert runs.every(tmp_path) == [old, new]
    assert runs.find(old.id, tmp_path) == old
    assert runs.find("z", tmp_path) == old
    assert runs.find("last", tmp_path) == new


def test_an_id_that_starts_another_id_is_still_itself(tmp_path: Path) -> None:
    short = make(tmp_path, "20250101-000000", "a")
    make(tmp_path, "20250101-000001", f"{short.id}")
    assert runs.find(short.id, tmp_path) == short


def test_a_reference_that_fits_several_runs_or_none_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no runs in .*; start one with 'moeify run RECIPE'"):
        runs.find("last", tmp_path)
    made = [make(tmp_path, f"2025010{day}-000000") for day in range(1, 8)]
    with pytest.raises(ValueError, match=f"'tiny' fits 7 runs: {made[-1].id}, .* and 2 older ones; give more"):
        runs.find("tiny", tmp_path)
    with pytest.raises(ValueError, match=f"no run 'x' in .*; there are {made[-1].id}"):
        runs.find("x", tmp_path)


@pytest.mark.parametrize("reference", ["", "../tiny", "..", "a/b", "/etc", "a\\b"])
def test_a_path_is_no_reference(reference: str, tmp_path: Path) -> None:
    make(tmp_path, "20250101-000000")
    with pytest.raises(ValueError, match="is not a run; give its id"):
        runs.find(reference, tmp_path)


def test_a_run_is_running_exactly_while_its_lock_is_held(tmp_path: Path) -> None:
    folder = runs.create(CONFIG, RECIPE, tmp_path)
    assert runs.status(folder) == "interrupted"
    with runs.hold(folder):
        assert runs.status(folder) == "running"
        with pytest.raises(runs.RunBusyError, match=f"run {folder.id} is driven by another process"), runs.hold(folder):
            pass
        assert runs.status(folder) == "running"
    assert runs.status(folder) == "interrupted"
    with runs.hold(folder):
        pass


def test_the_lock_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    folder = runs.create(CONFIG, RECIPE, tmp_path)
    code = (
        "import sys, pathlib\nfrom pipelines import runs\n"
        "with runs.hold(runs.RunFolder(pathlib.Path(sys.argv[1]))):\n"
        "    print('held', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert runs.status(folder) == "running"
        child.kill()
    assert runs.status(folder) == "interrupted"


def test_the_files_tell_finished_failed_and_interrupted_apart(tmp_path: Path) -> None:
    folder = runs.create(CONFIG, RECIPE, tmp_path)
    with JournalTracker(folder.journal) as journal:
        journal.emit(Failed(id="failed/1", time=1.0, reason="no data"))
        assert runs.status(folder) == "failed"
        journal.emit(Phase(id="p", time=2.0, phase="train", round=1))
        assert runs.status(folder) == "interrupted"
        folder.result.write_text("{}")
        assert runs.status(folder) == "interrupted"
        journal.emit(Finished(id="finished", time=3.0, seconds=2.0))
        assert runs.status(folder) == "finished"
    with folder.journal.open("ab") as file:
        file.write(b'{"kind":"fai')
    assert runs.status(folder) == "finished"


def test_home_and_cache_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOEIFY_HOME", raising=False)
    monkeypatch.delenv("MOEIFY_CACHE", raising=False)
    assert runs.home() == tmp_path / "runs"
    assert runs.cache() == Path.home() / ".cache" / "moeify"
    monkeypatch.setenv("MOEIFY_HOME", "elsewhere")
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    assert runs.home() == tmp_path / "elsewhere"
    assert runs.cache() == tmp_path / "cache"
