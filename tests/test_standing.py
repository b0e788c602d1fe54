"""Where a run stands, and that stopping it ends its driver and nobody else."""

import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_runs import fake_run, finish, story, tell

from moeify.events import Failed
from pipelines import runs, standing
from pipelines.cli import main
from pipelines.display import PlainDisplay
from pipelines.runs import RunFolder

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

DRIVER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from pipelines.stopping import stoppable
    from pipelines.runs import RunFolder, hold

    with stoppable(), hold(RunFolder(Path(sys.argv[1]))):
        try:
            print("held", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("stopped", flush=True)
    """
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    path = tmp_path / "tiny-20260101-000000-abcd"
    path.mkdir()
    return RunFolder(path)


@pytest.fixture
def driver(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder.path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_stop_ends_the_driver_at_once(folder: RunFolder, driver: subprocess.Popen[str]) -> None:
    assert standing.stop(folder) == "interrupted"
    assert driver.stdout
    assert driver.stdout.read() == "stopped\n"
    assert driver.wait(10) == 0
    with pytest.raises(ValueError, match=r"is interrupted, so there is nothing to stop"):
        standing.stop(folder)


def test_a_run_that_finishes_while_a_stop_is_on_its_way_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run(tmp_path)
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path))
    monkeypatch.setattr(standing, "_driver", lambda _: (123, ""))
    monkeypatch.setattr(os, "kill", lambda *_: finish(run))
    monkeypatch.setattr(standing, "status", lambda _: "finished" if run.result.exists() else "running")
    told = CliRunner().invoke(main, ["stop", run.id, "--address", "local"])
    assert (told.exit_code, told.output) == (
        0,
        f"{run.id} finished before it could be stopped; see it with: moeify show {run.id}\n",
    )


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"pid": 1}, "by process 1 on "), ({"host": "elsewhere"}, "on elsewhere"), ({"pid": "x"}, "did not say which")],
)
def test_a_process_that_does_not_hold_the_run_is_left_alone(
    folder: RunFolder, driver: subprocess.Popen[str], changed: dict[str, object], told: str
) -> None:
    known = json.loads(folder.driver.read_text())
    folder.driver.write_text(json.dumps(known | changed))
    with pytest.raises(ValueError, match=told):
        standing.stop(folder)
    assert driver.poll() is None


def test_a_finished_run_stands_so_and_its_journal_is_told(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    tell(folder, story())
    finish(folder)
    stands = standing.standing(folder)
    assert (stands["run"], stands["status"], stands["work"]) == (folder.id, "finished", 1.0)
    first, *_, last = standing.lines(stands)
    assert first.startswith(f"{folder.id} · finished · 100% of the work · ")
    assert last == f"files:   {folder.path}"
    out = io.StringIO()
    standing.tell(folder, PlainDisplay(out), follow=True)
    assert "finished in " in out.getvalue()


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    tell(folder, [*story(), Failed(id="failed/1", time=1.0, reason="the disk is full")])
    stands = standing.standing(folder)
    assert (stands["status"], runs.status(folder)) == ("failed", "failed")
    assert "reason:  the disk is full" in standing.lines(stands)
