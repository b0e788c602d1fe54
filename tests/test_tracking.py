import json
import os
import resource
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

import pytest
import torch
from click.testing import CliRunner
from fake_runs import CATEGORIES, fake_run, finish, leave_rounds, recipe, story, tell

from moeify import loop
from moeify.events import Exported, Failed, Finished, RoundEnded, Started
from moeify.recipe.arms import Arm, Control
from moeify.recipe.config import RunConfig
from moeify.recipe.load import load_recipe, to_yaml
from moeify.result import Result
from moeify.routed.split_model import SplitModel
from moeify.split_folder import bytes_in_run, copy_from_run, load_from_run, load_split, save_split
from moeify.store import FolderStore
from moeify.task import Counted
from moeify.tasks.digits import DigitsTask
from pipelines import doctor
from pipelines.cli import main
from pipelines.journal import JournalTracker, follow, left_behind, read_events
from pipelines.mlflow_models import loader_of
from pipelines.mlflow_store import DeliveryError, lay_out, open_mlflow
from pipelines.mlflow_terms import final_points, flat, points_of, summary
from pipelines.runs import RunBusyError, RunFolder, hold, status
from pipelines.tracking import MlflowFollower, Progress, deliver, where_to_look
from tests.toy import ToyTask, toy_config

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

pytestmark = [
    pytest.mark.usefixtures("shapes_unchecked", "pictures_left_blank"),
    pytest.mark.filterwarnings(r"ignore::Warning:(mlflow|alembic|sqlalchemy|pydantic|google)\."),
]


@pytest.fixture
def home(tmp_path: Path, laid_out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(laid_out, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def folder(home: Path) -> RunFolder:
    folder = fake_run(home)
    leave_rounds(folder, sites=1)
    tell(folder, story())
    finish(folder)
    return folder


def client(home: Path) -> "MlflowClient":
    return open_mlflow().MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")


def runs(home: Path) -> dict[str, "Run"]:
    """Name -> run; no name may stand twice."""
    mlflow = client(home)
    experiment = mlflow.get_experiment_by_name("moeify")
    found = mlflow.search_runs([experiment.experiment_id])
    names = [run.info.run_name for run in found]
    assert len(set(names)) == len(names), names
    return dict(zip(names, found, strict=True))


def curve(home: Path, run: "Run", key: str) -> list[tuple[int, float]]:
    history = client(home).get_metric_history(run.info.run_id, key)
    return [(point.step, point.value) for point in sorted(history, key=lambda point: (point.timestamp, point.step))]


def files(home: Path, run: "Run", below: str | None = None) -> list[str]:
    return sorted(entry.path for entry in client(home).list_artifacts(run.info.run_id, below))


def test_a_run_is_told_whole_and_once(home: Path, folder: RunFolder) -> None:
    with follow(folder.journal, [MlflowFollower(folder, recipe())]):
        pass
    found = runs(home)
    assert sorted(found) == [folder.id, "round 1", "round 2"]
    parent = found[folder.id]
    assert parent.info.status == "FINISHED"
    assert parent.info.end_time == 1_700_000_110_000
    for round_ in (1, 2):
        child = found[f"round {round_}"]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["moeify.accepted"] == str(round_ == 1).lower()
        assert child.info.status == "FINISHED"
        assert files(home, child) == [f"attribution-round-{round_}.png", "partition.json"]
    assert files(home, parent) == [
        "attribution-round-1.png",  # of the round that was kept
        "partition.json",
        "recipe.yaml",
        "report.html",
        "resolved.yaml",
        "result.json",
        "tax-separation.png",
    ]

    assert parent.data.params["training.steps"] == "100"
    assert parent.data.params["rounds.1.separation"] == "0.5"
    tags = parent.data.tags
    assert tags["moeify.run"] == folder.id
    assert (tags["moeify.recipe"], tags["moeify.seed"], tags["moeify.status"]) == ("fake", "3", "finished")
    assert tags["moeify.categories"] == ", ".join(CATEGORIES)
    assert "| python | 3.5000 | 3.5200 | 3.6000 | +0.0200 | +0.1000 | 50.0% |" in tags["mlflow.note.content"]
    assert "| mean | 3.6500 | 3.6700 | 3.7500 | +0.0200 | +0.0200 | 50.0% |" in tags["mlflow.note.content"]
    assert "| 1 | 20.0% | +0.0100 | +0.0400 | 0.020 | 0.050 | kept |" in tags["mlflow.note.content"]
    assert "core: 384" in tags["mlflow.note.content"]
    assert tags["mlflow.source.name"] == "moeify run fake"
    assert parent.info.start_time == 1_700_000_000_000  # of the events, whenever they are delivered
    assert [found[f"round {n}"].info.start_time for n in (1, 2)] == [1_700_000_010_000, 1_700_000_040_000]

    assert [step for step, _ in curve(home, parent, "train/split/python")] == [10, 20, 30, 40, 50, 60]
    assert [step for step, _ in curve(home, found["round 2"], "train/split/python")] == [40, 50, 60]
    assert curve(home, parent, "validation/split/python") == [
        (30, 4.0),
        (30, 4.1),
        (30, 4.5),
        (60, 4.0),
        (60, 4.1),
        (60, 4.5),
    ]
    assert curve(home, parent, "test/dense/web") == [(100, pytest.approx(3.8))]
    assert curve(home, parent, "tax/mean") == [(30, 0.01), (60, 0.04)]
    assert curve(home, parent, "test/dense/mean") == [(100, pytest.approx(3.65))]
    assert curve(home, parent, "test/tax/mean") == [(100, 0.02)]
    assert curve(home, parent, "test/active_fraction/python") == [(100, 0.5)]
    assert curve(home, parent, "predicted_J/split") == [(30, 0.02), (60, 0.04)]
    assert curve(home, parent, "tax_random/mean") == [(30, 0.04), (60, 0.08)]
    assert curve(home, found["round 2"], "separation") == [(60, 0.4)]
    assert curve(home, parent, "tokens_per_second/dense")[0] == (10, 40_000.0)


def test_the_report_is_delivered_anew_with_every_round_and_at_the_end(home: Path) -> None:
    folder = fake_run(home)
    leave_rounds(folder, sites=1)
    events = story()
    follower = MlflowFollower(folder, recipe())

    def delivered() -> str:
        run = runs(home)[folder.id].info.run_id
        return Path(client(home).download_artifacts(run, "report.html", str(home))).read_text()

    first = next(i for i, event in enumerate(events) if isinstance(event, RoundEnded))
    tell(folder, events[: first + 1])
    follower.take(events[: first + 1])
    assert '<span class="status">running</span>' in delivered()
    assert "round 1" in delivered()
    assert "round 2" not in delivered()
    tell(folder, events[first + 1 :])
    follower.take(events[first + 1 :])
    assert "round 2" in delivered()
    follower.close()
    assert '<span class="status">interrupted</span>' in delivered()
    finish(folder)
    deliver(folder, recipe())
    assert '<span class="status">finished</span>' in delivered()
    assert delivered() == folder.report.read_text()


def test_a_report_that_cannot_be_made_keeps_nothing_from_being_delivered(
    home: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("no room")

    monkeypatch.setattr("pipelines.report.page.build", broken)
    deliver(folder, recipe())
    assert runs(home)[folder.id].info.status == "FINISHED"
    said = capsys.readouterr().err
    assert (
        said.count(f"the report of {folder.id} was not written (RuntimeError: no room)") == len(said.splitlines()) == 3
    )


def test_the_told_twin_has_its_curves_and_columns(home: Path) -> None:
    controls: list[Control] = ["random", "told"]
    folder = fake_run(home)
    tell(folder, story(controls))
    finish(folder, controls)
    deliver(folder, recipe())
    parent = runs(home)[folder.id]
    assert [step for step, _ in curve(home, parent, "train/told/python")] == [10, 20, 30, 40, 50, 60]
    assert curve(home, parent, "tax_told/mean") == [(30, 0.04), (60, 0.07)]
    assert curve(home, parent, "test/tax_told/web") == [(100, 0.07)]
    note = parent.data.tags["mlflow.note.content"]
    for row in (
        "| category | dense twin | told twin | split | random split | tax | random split's tax | above the told twin |",
        "| python | 3.5000 | 3.4500 | 3.5200 | 3.6000 | +0.0200 | +0.1000 | +0.0700 | 50.0% |",
        "| 1 | 20.0% | +0.0100 | +0.0400 | +0.0400 | 0.020 | 0.050 | kept |",
    ):
        assert row in note


def test_a_run_without_controls_tells_nothing_of_them(folder: RunFolder) -> None:
    usual = {key for event in story() for key, _, _ in points_of(event, "token")}
    bare = {key for event in story([]) for key, _, _ in points_of(event, "token")}
    assert {key for key in usual if "random" in key}
    assert bare == {key for key in usual if "random" not in key}
    finish(folder, [])
    result = Result.model_validate_json(folder.result.read_bytes())
    assert not [key for key, _, _ in final_points(result) if "random" in key or "told" in key]
    assert "told" not in summary(folder, "finished")


def test_what_is_delivered_twice_shows_once(home: Path, folder: RunFolder) -> None:
    deliver(folder, recipe())
    before = {name: run.data.to_dictionary() for name, run in runs(home).items()}
    folder.tracking.unlink()  # as if it had been lost: all is delivered again
    assert deliver(folder, recipe()) == len(story()) + 1
    assert {name: run.data.to_dictionary() for name, run in runs(home).items()} == before
    parent = runs(home)[folder.id]
    assert len(curve(home, parent, "train/split/python")) == 6
    assert deliver(folder, recipe()) == 0


def test_a_follower_killed_between_two_deliveries_is_carried_on_from(home: Path, folder: RunFolder) -> None:
    class KilledError(BaseException):
        """As sudden as a signal."""

    follower = MlflowFollower(folder, recipe())
    events = story()
    follower.take(events[:20])
    follower.offset = sum(len(line) for line in folder.journal.read_bytes().splitlines(keepends=True)[:20])
    mlflow = follower._connected()
    log_batch, calls = mlflow.log_batch, []

    def dying(run_id: str, **what: Any) -> None:
        log_batch(run_id, **what)
        calls.append(run_id)
        if len(calls) == 2:
            raise KilledError

    mlflow.log_batch = dying  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        follower.take(events[20:])

    assert deliver(folder, recipe()) == len(story()) + 1 - 20
    found = runs(home)
    assert sorted(found) == [folder.id, "round 1", "round 2"]
    for arm in ("dense", "split", "random"):
        assert [step for step, _ in curve(home, found[folder.id], f"train/{arm}/c")] == [10, 20, 30, 40, 50, 60]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(home: Path) -> None:
    folder = fake_run(home)
    events = story()
    tell(folder, events[:8])
    with follow(folder.journal, [MlflowFollower(folder, recipe())]):
        pass
    first = runs(home)[folder.id]
    assert first.info.status == "KILLED"
    tell(folder, [Failed(id="failed/1", time=1_700_000_050.0, reason="the disk was full")])
    with follow(folder.journal, [MlflowFollower(folder, recipe())]):
        pass
    failed = runs(home)[folder.id]
    assert failed.info.status == "FAILED"
    assert failed.data.tags["moeify.last_failure"] == "the disk was full"
    tell(folder, events)
    finish(folder)
    with follow(folder.journal, [MlflowFollower(folder, recipe())]):
        pass
    last = runs(home)[folder.id]
    assert last.info.run_id == first.info.run_id
    assert last.info.status == "FINISHED"
    assert len(curve(home, last, "train/random/prose")) == 6


def test_while_the_server_is_away_nothing_is_lost(
    home: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with follow(folder.journal, [MlflowFollower(folder, recipe())], poll_seconds=0.01):
        pass
    said = capsys.readouterr().err
    assert "MLflow gave up" in said
    assert said.endswith(f"; later: moeify sync {folder.id}\n")
    assert len(said.strip().splitlines()) <= 3
    assert (folder.plots / "attribution-round-1.png").is_file()  # pictures need no server
    assert '<span class="status">finished</span>' in folder.report.read_text()

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert deliver(folder, recipe()) == len(story()) + 1
    assert runs(home)[folder.id].info.status == "FINISHED"


class Moody:
    """MLflow's own server, behind a gate that lets through what its mood is."""

    def __init__(self, app: Callable[[dict[str, Any], Any], Iterable[bytes]]) -> None:
        self.app = app
        self.mood: Literal["silent", "500", "503", "lost", "well"] = "well"
        """``lost``: what is asked is done, but every other answer does not come through."""
        self.let_go = threading.Event()
        self.asked: list[str] = []
        """The mood that met each request."""
        self.points: list[tuple[str, str, int, int]] = []
        """Run, key, time and step of each point that MLflow took, in the order in which it did."""

    def __call__(self, request: dict[str, Any], respond: Any) -> Iterable[bytes]:
        mood, lost = self.mood, self.asked.count("lost")
        self.asked.append(mood)
        if mood == "silent":
            self.let_go.wait(60)
        if mood not in ("lost", "well"):
            respond("500 Broken" if mood == "500" else "503 Busy", [("Content-Length", "0")])
            return []
        body = request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
        request["wsgi.input"] = BytesIO(body)
        hidden = mood == "lost" and lost % 2 == 0
        done = self.app(request, (lambda *_: None) if hidden else respond)
        if request["PATH_INFO"].endswith("/log-batch"):
            told = json.loads(body)
            self.points += [(told["run_id"], m["key"], m["timestamp"], m["step"]) for m in told.get("metrics", [])]
        if hidden:
            b"".join(done)
            respond("503 Busy", [("Content-Length", "0")])
            return []
        return done


@pytest.fixture
def moody(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moody]:
    """An MLflow server with a database in ``home``; clients wait for it a second."""
    open_mlflow()
    from mlflow.server import app, handlers
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log(self, *_: Any) -> None: ...

    store = SqlAlchemyStore(f"sqlite:///{home}/mlflow.db", (home / "mlflow-artifacts").as_uri())
    monkeypatch.setattr(handlers, "_tracking_store", store)
    moody = Moody(app)
    server = make_server("127.0.0.1", 0, moody, threaded=True, request_handler=Silent)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    try:
        yield moody
    finally:
        moody.let_go.set()
        server.shutdown()
        serving.join()
        server.server_close()


def test_a_server_that_hangs_and_errs_gets_every_point_later_in_order_and_once(
    home: Path, moody: Moody, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fake_run(home)
    leave_rounds(folder, sites=1)
    events = story()
    moods: tuple[Literal["silent", "500", "503"], ...] = ("silent", "500", "503")
    with follow(folder.journal, [MlflowFollower(folder, recipe())], poll_seconds=0.01):
        for number, mood in enumerate(moods, 1):
            moody.mood = mood
            tell(folder, events[: len(events) * number // len(moods)])
            deadline = time.monotonic() + 60
            while mood not in moody.asked:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finish(folder)
    assert not left_behind()
    said = capsys.readouterr().err.splitlines()
    assert ["MLflow failed and will be tried again" in line for line in said] == [True, False]
    assert "MLflow gave up" in said[1]
    assert said[1].endswith(f"; later: moeify sync {folder.id}")
    whole = len(events) + 1
    assert len(read_events(folder.journal, 0)[0]) == whole
    assert not moody.points

    with pytest.raises(DeliveryError, match="what is missing stays in "):
        deliver(folder, recipe())

    moody.mood = "lost"
    for _ in range(10):
        with suppress(DeliveryError):
            deliver(folder, recipe())
            break
    moody.mood = "well"
    assert deliver(folder, recipe()) == 0
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    found = runs(home)
    assert sorted(found) == [folder.id, "round 1", "round 2"]
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    parent = found[folder.id]
    written = [(event.time, *point) for event in events for point in points_of(event, "token")]
    keys = {key for _, key, _, _ in written}
    taken = dict.fromkeys(point[1:] for point in moody.points if point[0] == parent.info.run_id)
    assert [point for point in taken if point[0] in keys] == [(key, round(at * 1000), n) for at, key, _, n in written]
    for key in keys:
        assert curve(home, parent, key) == [(n, value) for _, name, value, n in sorted(written) if name == key]


def test_a_driven_run_has_system_metrics_until_it_is_closed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    folder = fake_run(home)
    follower = MlflowFollower(folder, recipe(), machine=True)
    follower.take(story()[:20])
    run = follower._progress.parent

    def sampled() -> list[tuple[int, float]]:
        history = client(home).get_metric_history(run, "system/cpu_utilization_percentage")
        return sorted((point.step, point.value) for point in history)

    deadline = time.monotonic() + 60
    while len(sampled()) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    follower.close()
    steps = [step for step, _ in sampled()]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 3
    assert all(0.0 <= value <= 100.0 for _, value in sampled())
    again = MlflowFollower(folder, recipe(), machine=True)
    again.take(story()[20:24])
    again.close()
    assert {step for step, _ in sampled()} >= set(steps)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    switched_off = MlflowFollower(folder, recipe(), machine=True)
    switched_off.take(story()[24:25])
    assert switched_off._system is not None
    assert not switched_off._system._alive()
    switched_off.close()


def test_a_server_that_goes_away_costs_system_metrics_and_no_time(
    home: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.setattr("pipelines.mlflow_system._PATIENCE", 0.2)
    follower = MlflowFollower(folder, recipe(), machine=True)
    follower.take(story()[:2])
    system = follower._system
    assert system is not None

    def hang(*_: Any) -> None:
        time.sleep(3)
        raise ConnectionError

    monkeypatch.setattr(MlflowClient, "get_run", hang)
    began = time.monotonic()
    system.stop()
    assert time.monotonic() - began < 2.5


def test_a_server_that_is_away_is_told_in_one_line(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(DeliveryError, match=f"^MLflow at {uri} did not take it"):
        deliver(folder, recipe())


def test_a_database_is_laid_out_whole_or_not_at_all(tmp_path: Path) -> None:
    uri, draft = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / ".mlflow.db.draft"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(DeliveryError, match=f"^MLflow cannot make its database {tmp_path}/mlflow.db "):
            lay_out(uri, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "mlflow.db").exists()
    draft.write_bytes(b"half a table")  # of one who was killed
    lay_out(uri, tmp_path)
    assert not draft.exists()
    assert [each.name for each in client(tmp_path).search_experiments()] == ["Default"]
    before = (tmp_path / "mlflow.db").stat()
    lay_out(uri, tmp_path)
    assert (tmp_path / "mlflow.db").stat().st_ino == before.st_ino


def test_a_database_that_lacks_tables_is_told_in_one_line(folder: RunFolder) -> None:
    database = folder.path.parent / "mlflow.db"
    database.unlink()
    with sqlite3.connect(database) as half:
        half.execute("CREATE TABLE secrets (id INTEGER)")
    with pytest.raises(DeliveryError, match=r"did not take it \(.*table secrets already exists") as caught:
        deliver(folder, recipe())
    assert "\n" not in str(caught.value)


def test_the_password_of_a_server_stands_in_no_warning_and_no_error(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:s3cr3tpw@127.0.0.1:1/")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with follow(folder.journal, [MlflowFollower(folder, recipe())], poll_seconds=0.01):
        pass
    with pytest.raises(
        DeliveryError, match=r"^MLflow at http://127\.0\.0\.1:1 did not take it \(API request to"
    ) as caught:
        deliver(folder, recipe())
    said = capsys.readouterr().err
    assert "API request to http://127.0.0.1:1/" in said
    assert "s3cr3tpw" not in said + str(caught.value)


def test_a_run_that_is_being_driven_is_not_delivered_from_beside(folder: RunFolder) -> None:
    with hold(folder), pytest.raises(RunBusyError):
        deliver(folder, recipe())


def test_a_deleted_experiment_is_named(home: Path, folder: RunFolder) -> None:
    mlflow = client(home)
    mlflow.delete_experiment(mlflow.create_experiment("moeify"))
    with pytest.raises(ValueError, match=r"'moeify' was deleted; restore it or change tracking.experiment"):
        deliver(folder, recipe())


def test_an_experiment_whose_files_a_server_keeps_is_told_with_the_way_out(
    home: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = client(home)
    made = mlflow.create_experiment("moeify", artifact_location="mlflow-artifacts:/1")
    with pytest.raises(ValueError, match=r"experiment 'moeify' keeps its files behind the server that made it") as told:
        deliver(folder, recipe())
    _, _, way_out = str(told.value).partition("made: ")
    rename = f"mlflow experiments rename --experiment-id {made} --new-name moeify-served"
    assert way_out == f"MLFLOW_TRACKING_URI=sqlite:///{home}/mlflow.db {rename}"
    monkeypatch.setenv("MOEIFY_HOME", str(home))
    check = doctor._mlflow()
    assert (check.state, check.line) == ("problem", str(told.value))
    mlflow.rename_experiment(made, "moeify-served")
    deliver(folder, recipe())
    assert "report.html" in files(home, runs(home)[folder.id])
    assert doctor._mlflow().state == "ok"


def test_an_artifact_outside_of_the_run_is_refused(home: Path, folder: RunFolder) -> None:
    from moeify.events import Artifact

    follower = MlflowFollower(folder, recipe())
    with pytest.raises(ValueError, match="outside of the run's folder"):
        follower.take([Artifact(id="a", time=1.0, path="../mlflow.db")])


def test_a_broken_round_file_costs_its_picture_and_nothing_else(
    home: Path, folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.rounds / "1" / "partition.json").write_text("{}")
    deliver(folder, recipe())
    assert "round 1 was not drawn" in capsys.readouterr().err
    assert files(home, runs(home)["round 1"]) == ["partition.json"]
    assert runs(home)[folder.id].info.status == "FINISHED"


def test_where_to_look_is_a_command_or_an_address(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert where_to_look(folder) == "moeify ui"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host:5000/")
    assert where_to_look(folder) == "https://host:5000"
    Progress(uri="https://host:5000", experiment="7", parent="abc").save(folder.tracking)
    address = "https://host:5000/#/experiments/7/runs/abc?workflowType=machine_learning"
    assert where_to_look(folder) == address


def test_progress_belongs_to_one_store(folder: RunFolder) -> None:
    Progress(uri="http://one", parent="abc", offset=12, children={1: "x"}).save(folder.tracking)
    assert Progress.load(folder.tracking, "http://one").children == {1: "x"}
    assert Progress.load(folder.tracking, "http://other") == Progress(uri="http://other")
    folder.tracking.write_text("{torn")
    assert Progress.load(folder.tracking, "http://one").offset == 0


def test_timeouts_that_the_user_set_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "99")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    open_mlflow()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "99"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"


def test_a_recipe_is_flattened_to_its_leaves() -> None:
    assert flat({"a": {"b": [1, 2], "c": None}, "r": [{"x": 1.5}], "s": "t", "é": {}}) == {
        "a.b": "[1, 2]",
        "a.c": "null",
        "r.0.x": "1.5",
        "s": "t",
        "_": "{}",
    }
    assert len(flat({"a": "x" * 10_000})["a"]) == 6000
    assert json.loads(flat({"a": ["é"]})["a"]) == ["é"]


def test_every_name_of_a_metric_is_one_that_mlflow_takes() -> None:
    from mlflow.utils.validation import _validate_metric_name

    keys = {key for event in story() for key, _, _ in points_of(event, "token")}
    for key in keys:
        _validate_metric_name(key)
    assert {"train/dense/c", "validation/split/web", "test/dense/prose", "tax/python", "separation"} <= keys


# --- models, data, tags -------------------------------------------------------------------------------


def toy_run(home: Path, **tracking: int) -> tuple[RunFolder, RunConfig]:
    """Return a run folder with the checkpoints of a run that really took place."""
    config = toy_config(name="toy", tracking={"every": 5, **tracking})
    folder = RunFolder(home / "toy-20260102-030405-abcd")
    folder.path.mkdir()
    folder.recipe.write_text("name: toy\n")
    folder.resolved.write_text(to_yaml(config))
    with JournalTracker(folder.journal) as journal:
        result = loop.run(config, ToyTask(config), store=FolderStore(folder.path, 2), tracker=journal)
        folder.result.write_text(result.model_dump_json())
        journal.emit(Finished(id="finished", time=time.time(), seconds=1.0))
    return folder, config


def logits_of(model: SplitModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.linspace(0, 1, 40).view(4, 10), torch.arange(4))


def test_models_are_logged_registered_and_load_again_and_none_comes_twice(home: Path) -> None:
    folder, config = toy_run(home)
    deliver(folder, config)
    folder.tracking.unlink()  # as if it had been lost
    deliver(folder, config)
    mlflow = client(home)
    run = runs(home)[folder.id]
    assert len(run.outputs.model_outputs) == 2
    assert [version.version for version in mlflow.search_model_versions("name = 'toy'")] in ([2, 1], [1, 2])
    arms: tuple[Arm, ...] = ("dense", "split")
    for arm in arms:
        version = mlflow.get_model_version_by_alias("toy", arm)
        model = mlflow.get_logged_model(version.source.removeprefix("models:/"))
        assert model.status == "READY"
        assert model.tags["moeify.run"] == folder.id
        assert model.source_run_id == run.info.run_id
        place = Path(unquote(urlsplit(model.artifact_location).path))
        names = {path.name for path in place.iterdir()}
        assert names == {"MLmodel", "manifest.json", "model.safetensors"}
        assert "loader: moeify.load_split" in (place / "MLmodel").read_text()
        assert torch.equal(logits_of(load_split(place)), logits_of(load_from_run(folder.path, arm)))
    assert copied_like_saved(folder, home)


def copied_like_saved(folder: RunFolder, place: Path) -> bool:
    """Say whether a model copied from its checkpoint is the folder that saving the loaded model writes."""
    copy_from_run(folder.path, "split", place / "copied")
    save_split(load_from_run(folder.path), place / "saved", {})
    copied, saved = load_split(place / "copied"), load_split(place / "saved")
    assert bytes_in_run(folder.path, "split") == sum(4 * tensor.numel() for tensor in saved.parameters())
    return copied.partition == saved.partition and torch.equal(logits_of(copied), logits_of(saved))


def test_models_beyond_the_limit_stay_where_they_are(home: Path) -> None:
    folder, config = toy_run(home, models=0)
    deliver(folder, config)
    mlflow = client(home)
    assert list(mlflow.search_registered_models()) == []
    outputs = runs(home)[folder.id].outputs
    assert not (outputs and outputs.model_outputs)


def test_data_is_an_input_and_tags_say_method_and_verdict(home: Path) -> None:
    folder, config = toy_run(home, models=0)
    deliver(folder, config)
    run = runs(home)[folder.id]
    known = {each.dataset.name: each for each in run.inputs.dataset_inputs}
    assert set(known) == {"toy-train", "toy-validation", "toy-test"}
    started = next(e for e in read_events(folder.journal, 0)[0] if isinstance(e, Started))
    assert known["toy-train"].dataset.digest == started.data_hash[:36]
    assert json.loads(known["toy-test"].dataset.profile)["sha256"] == started.data_hash
    assert {tag.value for tag in known["toy-test"].tags} == {"testing"}
    tags = run.data.tags
    assert (tags["moeify.method"], tags["moeify.data"], tags["moeify.controls"]) == ("attribution", "digits", "random")
    result = Result.model_validate_json(folder.result.read_bytes())
    assert tags["moeify.separation"] == f"{result.rounds[-1].separation:.2f}"
    assert tags["moeify.verdict"] in ("better", "level", "worse")
    found = client(home).search_runs(
        [run.info.experiment_id], f"tags.`moeify.verdict` = '{tags['moeify.verdict']}' and tags.`moeify.kind` = 'run'"
    )
    assert [each.info.run_id for each in found] == [run.info.run_id]


def test_sizes_of_the_data_are_told_where_the_task_counts_them() -> None:
    config = load_recipe(Path(__file__).parents[1] / "pipelines" / "recipes" / "digits.yaml")
    sizes = DigitsTask(config).sizes()
    assert sum(sum(each.values()) for each in sizes.values()) == 1797
    assert isinstance(DigitsTask(config), Counted)
    assert not isinstance(ToyTask(toy_config()), Counted)


def test_an_export_that_mlflow_missed_is_registered_by_sync(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, config = toy_run(home, models=0)
    deliver(folder, config)
    monkeypatch.setenv("MOEIFY_HOME", str(home))
    out = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free.getsockname()[1]}",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        }
    asked = ["export", "last", "--category", "a", "--register", "-o", str(out)]
    done = CliRunner().invoke(main, asked, env=away)
    assert done.exit_code == 0, done.output
    assert f"register it later with: moeify sync {folder.id}" in done.stderr
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert CliRunner().invoke(main, ["sync", "last"]).exit_code == 0
    assert runs(home)[folder.id].info.status == "FINISHED"
    version = client(home).get_model_version_by_alias("toy", "a-only")
    assert version.tags["moeify.role"] == "a-only"
    again = CliRunner().invoke(
        main, ["export", "last", "--split", "--without", "b", "--register", "-o", str(tmp_path / "o")]
    )
    assert again.exit_code == 0, again.output
    assert "registered as toy@without-b" in again.stdout
    assert status(folder) == "finished"


def test_a_folder_without_a_model_is_not_registered(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = toy_run(home, models=0)
    with JournalTracker(folder.journal) as journal:
        journal.emit(Exported(id="exported/x", time=time.time(), folder=str(home / "gone"), alias="x"))
    deliver(folder, config)
    assert "gone holds no model any more" in capsys.readouterr().err
    assert list(client(home).search_registered_models()) == []


@pytest.mark.parametrize(
    ("files", "loader"),
    [
        ({"manifest.json": "{}"}, "moeify.load_split"),
        ({"config.json": '{"model_type": "llama"}'}, "transformers.AutoModelForCausalLM.from_pretrained"),
        ({"config.json": '{"model_type": "glm4_moe"}'}, "transformers.AutoModelForCausalLM.from_pretrained"),
        ({"config.json": '{"model_type": "bert"}'}, "transformers.AutoModelForMaskedLM.from_pretrained"),
        ({"config.json": '{"model_type": "vit"}'}, "transformers.AutoModelForImageClassification.from_pretrained"),
        ({"model.gguf": ""}, "llama.cpp"),
        ({"model.onnx": ""}, "onnxruntime.InferenceSession"),
        ({}, None),
    ],
)
def test_a_models_folder_says_what_loads_it(tmp_path: Path, files: dict[str, str], loader: str | None) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert loader_of(tmp_path) == loader
