"""Comparisons and studies behind an S3 URL, through the command line, from two machines that share nothing else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from fsspec.implementations.memory import MemoryFileSystem

from moeify.kept_results import KeptResults
from moeify.place import Place
from pipelines import compare, compare_tracking, lease, study_tracking
from pipelines.pool import run_here
from pipelines.studies.study import Arm, Bench, Column, Measures, Study, shipped_recipe
from tests.stores import BUCKET, s3_server
from tests.test_compare import SHORT, Tracked
from tests.test_url_runs import Machine


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def machines(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Machine, Machine]:
    """Two machines on which MLflow is a stand-in, and a comparison's jobs run in this process."""

    def here(*given: Any, retries: int, gpus: int, **more: Any) -> None:
        run_here(*given, **more)

    monkeypatch.setattr(compare, "run_pool", here)
    monkeypatch.setattr(compare_tracking, "ComparisonTracker", Tracked)
    monkeypatch.setattr(study_tracking, "StudyTracker", Tracked)
    url = f"s3://{BUCKET}/{tmp_path.name}"
    return Machine(tmp_path / "one", url, s3), Machine(tmp_path / "other", url, s3)


def measured(bench: Bench) -> Measures:
    return {"loss": 2.0 + bench.config.seed}


def unlike(bench: Bench) -> Measures:
    return {"loss": 3.0 + bench.config.seed}


DIGITS = shipped_recipe("digits")
STUDY = Study(
    lambda _: (Arm("plain", DIGITS, measured), Arm("other", DIGITS, unlike)),
    columns=(Column("loss", "loss, nats"),),
    note="loss: of nothing.",
    reference="plain",
)


def ended_well(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, (done.output, done.exception)
    return dict(json.loads(done.stdout))


def test_what_one_machine_ran_of_a_study_is_taken_by_another(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("pipelines.study", "pipelines.studies.catalogue"):
        monkeypatch.setattr(f"{place}.find_study", lambda _: STUDY)
    one, other = machines
    command = ("study", "spurious_cue", "--quick", "--local", "--json", "--seeds", "1")
    first = one.call(*command)
    known = ended_well(first)
    assert f"kept in {one.url}/studies/spurious_cue-quick\n" in first.stderr
    shutil.rmtree(one.place)
    again = other.call(*command)
    assert again.stderr.count("done before") == len(known["runs"])
    assert ended_well(again)["rows"] == known["rows"]
    with other.here():
        there = Place(f"{one.url}/studies/spurious_cue-quick")
        assert {"study.json", "study.png", "driver.json"} < set(there.found())
        assert len(there.found("results")) == len(known["runs"])
        assert json.loads(there.read("study.json"))["rows"] == known["rows"]
    assert json.loads(other.call("runs", "--json").stdout) == []  # it is no run


def test_what_one_machine_ran_of_a_comparison_is_taken_and_added_to_by_another(
    machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    one, other = machines
    recipe = tmp_path / "short.yaml"
    recipe.write_text(SHORT.replace("steps: 40", "steps: 8").replace("train: 10, recover: 10", "train: 2, recover: 2"))
    known = ended_well(one.call("compare", str(recipe), "--methods", "init", "--seeds", "1", "--json"))
    assert known["path"] == f"{one.url}/comparisons/{known['comparison']}"
    shutil.rmtree(one.place)
    more = other.call("compare", str(recipe), "--methods", "init", "random", "--seeds", "1")
    assert more.exit_code == 0, (more.output, more.exception)
    assert more.stderr.count("done before") == 2
    assert f"files:   {known['path']}" in more.stdout
    with other.here():
        there = Place(known["path"])
        assert {"comparison.json", "frontier.png", "recipe.yaml"} < set(there.found())
        kept = json.loads(there.read("comparison.json"))
    assert [run["method"] for run in kept["runs"]] == ["loop", "init", "random"]
    assert kept["runs"][:2] == known["runs"]


def test_what_another_machine_drives_is_refused(machines: tuple[Machine, Machine]) -> None:
    one, _ = machines
    with one.here():
        held = {"host": "far", "pid": 7, "copy": "another", "left": False}
        Place(f"{one.url}/studies/spurious_cue-quick").write(lease.NAME, json.dumps(held).encode())
    said = one.call("study", "spurious_cue", "--quick", "--local")
    assert said.exit_code == 2
    assert (
        "study spurious_cue-quick is driven by process 7 on far; if that was killed, its lease ends in" in said.stderr
    )


# --- results ----------------------------------------------------------------------------------------------


@pytest.fixture
def far(tmp_path: Path) -> Iterator[str]:
    yield f"memory://{tmp_path.name}"
    MemoryFileSystem.store.clear()


def test_a_result_is_there_for_all_machines_and_fetched_where_it_is_missing(tmp_path: Path, far: str) -> None:
    one, other = KeptResults(tmp_path / "one", far), KeptResults(tmp_path / "other", far)
    assert one.read("a.json") is None
    one.write("a.json", b"{}")
    assert other.near("a.json").read_bytes() == b"{}"
    (tmp_path / "other" / "a.json").write_bytes(b"{")  # damaged
    assert other.read("a.json") == b"{}"
    assert other.near("a.json").read_bytes() == b"{}"


def test_a_result_that_could_not_be_sent_is_sent_when_it_is_next_read(
    tmp_path: Path, far: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptResults(tmp_path, far)

    def refused(*_: object) -> None:
        raise OSError("the store is away")

    with monkeypatch.context() as away:
        away.setattr(Place, "write", refused)
        with pytest.raises(OSError, match="away"):
            kept.write("a.json", b"{}")
    assert Place(far).found() == {}
    assert kept.read("a.json") == b"{}"
    assert list(Place(far).found()) == ["a.json"]


def test_without_a_url_a_folder_is_all(tmp_path: Path) -> None:
    kept = KeptResults(tmp_path / "results")
    assert kept.read("a.json") is None
    kept.write("a.json", b"{}")
    assert (kept.read("a.json"), kept.near("a.json")) == (b"{}", tmp_path / "results" / "a.json")
