import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_results import CONFIG, results

from moeify.comparison import Job, jobs
from moeify.jobs import Ended
from pipelines import compare_report
from pipelines.compare import Comparison, open_folder
from pipelines.compare_tracking import ComparisonTracker
from pipelines.kept_jobs import JobsFolder
from pipelines.mlflow_store import DeliveryError, open_mlflow
from pipelines.pool import Broken

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

pytestmark = pytest.mark.filterwarnings(r"ignore::Warning:(mlflow|alembic|sqlalchemy|pydantic|google)\.")

ASKED = jobs(["random"], [0.5], range(2))


@pytest.fixture
def folder(tmp_path: Path, laid_out: Path, monkeypatch: pytest.MonkeyPatch) -> JobsFolder:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(laid_out, tmp_path / "mlflow.db")
    return open_folder(CONFIG, tmp_path, tmp_path)


def ended(folder: JobsFolder, *broken: Job, version: str = "1") -> Comparison:
    found = Comparison(CONFIG, ASKED)
    known = results()
    for job in ASKED:
        path = folder.results / f"{job}-{version}.json"
        path.write_text(known[job].model_dump_json())
        found.ended[job] = Broken("no memory") if job in broken else Ended(known[job], path, before=False)
    compare_report.write(found, folder)
    return found


def client(folder: JobsFolder) -> "MlflowClient":
    return open_mlflow().MlflowClient(tracking_uri=f"sqlite:///{folder.home}/mlflow.db")


def runs(folder: JobsFolder) -> dict[str, "Run"]:
    """Name -> run of the comparison's experiment; no name may stand twice."""
    mlflow = client(folder)
    experiment = mlflow.get_experiment_by_name(f"moeify/compare/{folder.id}")
    found = mlflow.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def test_a_comparison_is_one_experiment_with_a_run_for_each_job(folder: JobsFolder) -> None:
    found = ended(folder)
    tracker = ComparisonTracker(folder, CONFIG)
    tracker.tell(found)
    tracker.finish(found)
    told = runs(folder)
    parent = told.pop(folder.id)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["training.steps"] == "60"
    assert "| random | 2 | 50.0% |" in parent.data.tags["mlflow.note.content"]
    files = {entry.path for entry in client(folder).list_artifacts(parent.info.run_id)}
    assert files == {"comparison.json", "frontier.png", "recipe.yaml"}
    assert set(told) == {f"{job.method}, seed {job.seed}, 0.5" for job in ASKED}
    child = told["random, seed 1, 0.5"]
    assert child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params == {"method": "random", "seed": "1", "separation": "0.5"}
    metrics = child.data.metrics
    assert metrics["tax"] == pytest.approx(0.1)
    assert metrics["tax_told"] == pytest.approx(0.3)
    assert metrics["active"] == metrics["reached_separation"] == 0.5
    assert (metrics["test/split/a"], metrics["test/dense/b"]) == (pytest.approx(2.8), pytest.approx(3.7))
    assert child.info.end_time - child.info.start_time == pytest.approx(30_000, abs=2)


def test_what_is_delivered_again_shows_once_and_what_is_new_is_added(folder: JobsFolder) -> None:
    whole = ended(folder)
    part = Comparison(CONFIG, ASKED, dict(list(whole.ended.items())[:1]))
    ComparisonTracker(folder, CONFIG).finish(part)
    (first,) = [run for name, run in runs(folder).items() if name.startswith("loop")]
    ComparisonTracker(folder, CONFIG).finish(whole)
    ComparisonTracker(folder, CONFIG).finish(whole)
    told = runs(folder)
    assert len(told) == 1 + len(ASKED)
    assert told["loop, seed 0, 0.5"].info.run_id == first.info.run_id
    assert len(client(folder).get_metric_history(first.info.run_id, "tax")) == 1


def test_a_job_that_failed_says_why_and_ends_well_when_it_is_run_again(folder: JobsFolder) -> None:
    loop = ASKED[0]
    ComparisonTracker(folder, CONFIG).finish(ended(folder, loop))
    told = runs(folder)
    assert told[folder.id].info.status == "FAILED"
    assert "loop-0.5-0: no memory" in told[folder.id].data.tags["mlflow.note.content"]
    assert told["loop, seed 0, 0.5"].info.status == "FAILED"
    assert told["loop, seed 0, 0.5"].data.tags["moeify.last_failure"] == "no memory"
    assert "tax_told" not in told["random, seed 0, 0.5"].data.metrics

    ComparisonTracker(folder, CONFIG).finish(ended(folder))
    again = runs(folder)
    assert again[folder.id].info.status == again["loop, seed 0, 0.5"].info.status == "FINISHED"
    assert again["loop, seed 0, 0.5"].info.run_id == told["loop, seed 0, 0.5"].info.run_id
    assert again["random, seed 0, 0.5"].data.metrics["tax_told"] == pytest.approx(0.15)  # the loop has the told twin


def test_a_result_of_other_data_takes_the_place_of_the_one_before(folder: JobsFolder) -> None:
    ComparisonTracker(folder, CONFIG).finish(ended(folder))
    before = runs(folder)
    ComparisonTracker(folder, CONFIG).finish(ended(folder, version="2"))
    after = runs(folder)
    assert set(after) == set(before)
    assert after[folder.id].info.run_id == before[folder.id].info.run_id
    assert after["loop, seed 0, 0.5"].info.run_id != before["loop, seed 0, 0.5"].info.run_id


def test_a_server_that_is_away_costs_a_line_and_the_same_command_delivers(
    folder: JobsFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = ended(folder)
    tracker = ComparisonTracker(folder, CONFIG)
    tracker.tell(found)
    with pytest.raises(DeliveryError, match=f"^MLflow at {uri} did not take it .* the same command delivers it"):
        tracker.finish(found)
    assert capsys.readouterr().err.count("will be tried again at the end") == 1
    assert tracker.where_to_look == uri
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    ComparisonTracker(folder, CONFIG).finish(found)
    assert len(runs(folder)) == 1 + len(ASKED)


def test_an_interrupted_comparison_is_told_so(folder: JobsFolder) -> None:
    tracker = ComparisonTracker(folder, CONFIG)
    tracker.stop()  # before the first job: MLflow has heard of nothing
    tracker = ComparisonTracker(folder, CONFIG)
    tracker.tell(ended(folder))
    tracker.stop()
    assert runs(folder)[folder.id].info.status == "KILLED"
