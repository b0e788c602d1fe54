"""`moeify ui` with MLflow's real server, and `moeify completion` with real shells."""

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from fake_runs import fake_run, finish, leave_rounds, recipe, story, tell

from pipelines.cli import main
from pipelines.mlflow_ui import page
from pipelines.tracking import Progress, deliver
from tests.chromium import CHROMIUM, Page, look


def test_the_page_is_the_list_of_runs_or_a_run_as_far_as_it_is_known(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    assert page("http://x", folder, alone=True) == "http://x/#/experiments?workflowType=machine_learning"
    Progress(uri="u", experiment="7", parent="abc").save(folder.tracking)
    assert page("http://x", folder, alone=False) == "http://x/#/experiments/7?workflowType=machine_learning"
    assert page("http://x", folder, alone=True) == "http://x/#/experiments/7/runs/abc?workflowType=machine_learning"


def test_a_server_that_is_there_is_named_and_nothing_is_served(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    tell(folder, story())
    there = {"MOEIFY_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": "https://me:secret@host:5000/"}
    done = CliRunner().invoke(main, ["ui"], env=there)
    assert done.exit_code == 0, done.output
    assert done.output == "runs:    https://host:5000/#/experiments?workflowType=machine_learning\n"


def test_a_port_that_is_taken_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fake_run(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(main, ["ui", "--port", port], env={"MOEIFY_HOME": str(tmp_path)})
    assert done.exit_code == 2
    assert done.output == f"moeify: error: port {port} is taken; give another one with --port, or none\n"


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore::Warning:(mlflow|alembic|sqlalchemy|pydantic|google)\.")
def test_the_real_pages_show_the_run_and_ctrl_c_leaves_no_process(
    tmp_path: Path, laid_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(laid_out, tmp_path / "mlflow.db")
    folder = fake_run(tmp_path)
    leave_rounds(folder, sites=1)
    tell(folder, story())
    finish(folder)
    deliver(folder, recipe())
    command = [sys.executable, "-m", "pipelines", "ui", folder.id]
    environment = {**os.environ, "MOEIFY_HOME": str(tmp_path)}
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # where tests run in a background
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=hear) as ui:
        try:
            assert ui.stdout is not None
            said = ui.stdout.readline()
            assert said.startswith("runs:    http://127.0.0.1:")
            address = said.split()[1]
            run = Progress.load(folder.tracking, f"sqlite:///{tmp_path}/mlflow.db").parent
            assert address.endswith(f"/runs/{run}?workflowType=machine_learning")
            base = address.partition("/#")[0]
            with urllib.request.urlopen(f"{base}/get-artifact?run_uuid={run}&path=report.html") as report:
                assert report.read() == folder.report.read_bytes()
            if CHROMIUM:
                errors = look(tmp_path, functools.partial(seen, address=address, run=folder.id))
                assert [each for each in errors if f"{base}/ajax-api" not in each] == []  # what MLflow asks in vain
            family = psutil.Process(ui.pid).children(recursive=True)
            assert 1 <= len(family) <= 4
            ui.send_signal(signal.SIGINT)
            assert ui.wait(60) == 0
        finally:
            ui.kill()
    assert not [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


async def seen(page: Page, address: str, run: str) -> None:
    """Look at the run's page, and at its report in MLflow's viewer: a frame that may run scripts and nothing else."""
    await page.go(address)
    await page.wait(f"document.body.innerText.includes({run!r})")
    for words in ("round 1", "moeify.verdict", "Registered models"):
        await page.wait(f"document.body.innerText.includes({words!r})")
    await page.go(address.replace("?", "/artifacts/report.html?"))
    report = await page.frame("blob:")
    await page.wait("document.readyState === 'complete' && document.querySelector('h1') !== null", session=report)
    assert "separated" in await page.value("document.querySelector('h1').innerText", report)
    drawn = "[...document.querySelectorAll('section')].filter((each) => each.offsetHeight > 50).map((each) => each.id)"
    assert {"tree", "ownership", "attribution", "tax", "training", "cost"} <= set(await page.value(drawn, report))
    assert not await page.value("document.querySelector('[data-follow-bar]').hidden", report)  # its script has run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_what_the_shell_reads(shell: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0, done.output
    assert "_MOEIFY_COMPLETE" in done.output
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=done.output, text=True, check=False).returncode == 0


def test_a_shell_that_asks_is_told_commands_and_options() -> None:
    asked = {**os.environ, "_MOEIFY_COMPLETE": "bash_complete", "COMP_WORDS": "moeify ro", "COMP_CWORD": "1"}
    program = "import sys; from pipelines.cli import main; main(prog_name='moeify')"
    told = subprocess.run([sys.executable, "-c", program], env=asked, capture_output=True, text=True, check=True).stdout
    assert told == "plain,route\n"
    asked |= {"COMP_WORDS": "moeify export last --mo", "COMP_CWORD": "3"}
    told = subprocess.run([sys.executable, "-c", program], env=asked, capture_output=True, text=True, check=True).stdout
    assert told == "plain,--moe\n"
