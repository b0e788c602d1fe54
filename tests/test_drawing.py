"""A run's pictures and report: made without a server, each once, whoever asks for them."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_runs import fake_run, finish, leave_rounds, recipe, story, tell

from moeify.events import Event, Failed
from pipelines import drawing
from pipelines.drawing import Drawing
from pipelines.journal import follow, left_behind
from pipelines.runs import RunFolder
from pipelines.tracking import MlflowFollower
from tests.test_journal import wait_until

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = fake_run(tmp_path)
    leave_rounds(folder, sites=1)
    return folder


def test_an_mlflow_that_never_answers_costs_the_run_no_picture_and_no_report(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked, over = threading.Event(), threading.Event()

    def hang(_: MlflowFollower) -> None:
        asked.set()
        over.wait(120)
        raise ConnectionError

    monkeypatch.setattr(MlflowFollower, "_connected", hang)
    draws = Drawing(folder)
    tracker = MlflowFollower(folder, recipe(), draws)
    with follow(folder.journal, [draws, tracker], poll_seconds=0.01, drain_seconds=0.1):
        tell(folder, story()[:1])
        assert asked.wait(30)
        tell(folder, story()[1:])
        finish(folder)
    said = capfd.readouterr().err
    assert f"moeify: warning: MLflow is still busy 0.1 s after the run; later: moeify sync {folder.id}\n" in said
    wait_until(lambda: folder.report.is_file() and '<span class="status">finished<' in folder.report.read_text(), 60)
    assert (folder.plots / "attribution-round-2.png").is_file()
    assert (folder.plots / "tax-separation.png").is_file()
    over.set()
    wait_until(lambda: not left_behind(), 60)


def test_what_two_ask_for_is_made_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    reports: list[str | None] = []
    monkeypatch.setattr(drawing.plots, "draw", lambda _, round_: rounds.append(round_))
    monkeypatch.setattr(drawing, "write_or_warn", lambda _, status: reports.append(status))
    draws = Drawing(folder)
    tell(folder, story())
    finish(folder)

    def ask() -> None:
        draws.take(story())
        draws.close()

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert rounds == [1, 2]
    assert reports == ["running", "running", "finished"]


def test_who_goes_on_draws_what_is_new(folder: RunFolder) -> None:
    taken: list[Event] = []

    class Seen(Drawing):
        def take(self, events: Sequence[Event]) -> None:
            taken.extend(events)

    tell(folder, story()[:5])
    failed = Failed(id="failed/1", time=1.0, reason="no room")
    with follow(folder.journal, [Seen(folder)], poll_seconds=0.01):
        tell(folder, [failed])
    assert taken == [failed]
    assert '<span class="status">failed</span>' in folder.report.read_text()
