"""A comparison's folder, what it says and shows, and, with Ray, how its jobs are run."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_results import CONFIG, results
from filelock import FileLock
from rich.console import Console

from moeify.comparison import Job, jobs
from moeify.jobs import Ended
from moeify.recipe.variants import methods
from pipelines import compare, compare_report, compare_tracking
from pipelines.cli import main
from pipelines.compare import Comparison, Heard, open_folder, progress_line
from pipelines.kept_jobs import JobsFolder
from pipelines.pool import Broken
from pipelines.runs import RunBusyError, every

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

ASKED = jobs(["random"], [0.5], range(3))


def comparison(**reasons: str) -> Comparison:
    """Return a comparison that has ended, with the jobs that failed."""
    found = Comparison(CONFIG, ASKED)
    for job, result in results().items():
        found.ended[job] = Ended(result, Path(f"/results/{job}.json"), before=False)
    for job in ASKED:
        if reason := reasons.get(str(job).replace("-", "_").replace(".", "_")):
            found.ended[job] = Broken(reason)
    return found


def printed(found: Comparison, width: int, *, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, no_color=True, highlight=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_report, "console_for", lambda _: console)
        compare_report.print_comparison(
            found, JobsFolder(Path("/home/comparisons/fake-12345678"), "comparison"), stream
        )
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


def test_a_comparison_is_known_by_its_recipe(tmp_path: Path) -> None:
    folder = open_folder(CONFIG, tmp_path, tmp_path)
    assert folder.path.parent == tmp_path / "comparisons"
    assert folder.home == tmp_path
    assert open_folder(CONFIG, tmp_path / "elsewhere", tmp_path) == folder
    assert open_folder(CONFIG.model_copy(update={"seed": 1}), tmp_path, tmp_path) != folder
    assert every(tmp_path) == []  # it is no run


def test_recipes_of_the_same_words_with_other_data_beside_them_are_two(tmp_path: Path) -> None:
    data = {"kind": "text", "source": {"kind": "jsonl", "path": "docs.jsonl"}}
    config = CONFIG.model_validate({**CONFIG.model_dump(), "data": data, "model": {"kind": "llama"}})
    assert open_folder(config, tmp_path / "a", tmp_path) != open_folder(config, tmp_path / "b", tmp_path)


def test_a_comparison_that_another_process_drives_is_refused(tmp_path: Path) -> None:
    folder = open_folder(CONFIG, tmp_path, tmp_path)
    with FileLock(folder.lock), pytest.raises(RunBusyError, match=f"comparison {folder.id} is driven by another"):
        compare.compare(CONFIG, ASKED, tmp_path, folder)


def test_a_line_says_how_a_job_ended_and_what_remains() -> None:
    found, lines = comparison(random_0_5_2="the disk was full"), []
    ended, found.ended = found.ended, {}
    for job in ASKED:
        found.ended[job] = ended[job]
        lines.append(progress_line(found, job, cores=2))
    assert lines[0] == "loop, seed 0, 0.5: tax +0.0100 · 0:30 · 1/6, about 1:15 left"  # 5 x 30 s on two cores
    assert lines[4] == "random, seed 1, 0.5: tax +0.1000 · 0:30 · 5/6, about 0:30 left"
    assert lines[5] == "random, seed 2, 0.5: failed: the disk was full · 6/6"


def test_a_job_that_was_there_before_says_nothing_of_the_pace() -> None:
    found = Comparison(CONFIG, ASKED)
    found.ended[ASKED[0]] = Ended(results()[ASKED[0]], Path("x"), before=True)
    assert progress_line(found, ASKED[0], cores=2) == "loop, seed 0, 0.5: tax +0.0100 · done before · 1/6"


def test_the_summary_has_every_row_and_every_run(tmp_path: Path) -> None:
    found = comparison(loop_0_5_1="bad data")
    folder = open_folder(CONFIG, tmp_path, tmp_path)
    compare_report.write(found, folder)
    known = json.loads(folder.summary.read_text())
    assert (known["methods"], known["seeds"], known["separations"]) == (["loop", "random"], [0, 1, 2], [0.5])
    loop, random, dense, told = known["rows"]
    assert (loop["method"], loop["seeds"], loop["above_loop"]) == ("loop", 2, None)
    assert random["tax"]["low"] < random["tax"]["mean"] < random["tax"]["high"]
    assert (dense["tax"], told["tax_told"]) == (None, None)
    runs = {(run["method"], run["seed"]): run for run in known["runs"]}
    assert len(runs) == 6
    assert runs["random", 0]["tax_told"] == pytest.approx(3.05 - 2.9)
    assert runs["random", 1]["tax_told"] is None  # the loop that has its told twin failed
    assert (runs["loop", 1]["status"], runs["loop", 1]["problem"], runs["loop", 1]["tax"]) == (
        "failed",
        "bad data",
        None,
    )
    assert folder.picture.read_bytes().startswith(b"\x89PNG")


def test_what_has_not_ended_is_missing_and_nothing_is_drawn(tmp_path: Path) -> None:
    folder = open_folder(CONFIG, tmp_path, tmp_path)
    folder.picture.touch()  # of an earlier command
    compare_report.write(Comparison(CONFIG, ASKED), folder)
    known = json.loads(folder.summary.read_text())
    assert {run["status"] for run in known["runs"]} == {"missing"}
    assert (known["rows"], known["unit"]) == ([], None)
    assert not folder.picture.exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_fits_eighty_columns_and_has_the_losses_where_there_is_room(terminal: bool) -> None:
    found = comparison()
    found.jobs += tuple(Job("coactivation", 0.5, seed) for seed in range(3))  # the longest name, the widest numbers
    for seed, loss in enumerate((1.0, 30.0, 90.0)):
        done = results({"coactivation": {seed: loss}})
        found.ended |= {job: Ended(result, Path("x"), before=False) for job, result in done.items()}
    narrow, wide = printed(found, 80, terminal=terminal), printed(found, 120, terminal=terminal)
    for text in (narrow, wide):
        assert "…" not in text
        assert "+0.0100 ±0.0248" in text  # the loop above the dense twin
        assert "coactivation" in text
    assert max(map(len, narrow.splitlines())) <= 80
    assert "loss" in wide
    assert "loss" not in narrow


def test_jobs_that_failed_alike_share_a_line_and_missing_seeds_are_told() -> None:
    text = printed(
        comparison(loop_0_5_1="too deep", random_0_5_1="too deep", random_0_5_2="no memory"), 120, terminal=False
    )
    assert "failed (method-separation-seed): loop-0.5-1, random-0.5-1: too deep" in text
    assert "failed (method-separation-seed): random-0.5-2: no memory" in text
    assert "seeds that ended, of 2: random 1" in text


# --- the command ------------------------------------------------------------------------------------------


class Tracked:
    """Stands for MLflow."""

    where_to_look = "mlflow ui"

    def __init__(self, *_: object) -> None: ...

    def tell(self, _: Comparison) -> None: ...

    def finish(self, _: Comparison) -> None: ...

    def stop(self) -> None: ...


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Job, ...]]:
    """Put stand-ins in place of Ray and MLflow; return what is asked of them."""
    calls: list[tuple[Job, ...]] = []

    def run(config: object, jobs: tuple[Job, ...], base: Path, folder: JobsFolder, heard: Heard) -> Comparison:
        calls.append(jobs)
        found = comparison()
        for job in ASKED:
            heard(found, job, 2)
        return found

    monkeypatch.setattr(compare, "compare", run)
    monkeypatch.setattr(compare_tracking, "ComparisonTracker", Tracked)
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path))
    return calls


def test_options_take_several_values_wherever_they_stand(asked: list[tuple[Job, ...]]) -> None:
    for arguments in (
        ("digits", "--methods", "oneshot", "init", "--seeds", "2", "--separations", "0.3", "0.5"),
        ("--methods", "oneshot", "init", "--separations", "0.3", "0.5", "--seeds", "2", "digits"),
        ("--methods", "oneshot", "--methods", "init", "--separations=0.3", "--separations=0.5", "--seeds=2", "digits"),
    ):
        done = CliRunner().invoke(main, ["compare", *arguments])
        assert done.exit_code == 0, done.output
        assert asked.pop() == jobs(["oneshot", "init"], [0.3, 0.5], range(2))


def test_all_methods_three_seeds_and_the_recipes_separation_if_nothing_is_said(asked: list[tuple[Job, ...]]) -> None:
    done = CliRunner().invoke(main, ["compare", "text"])
    assert {(job.separation, job.seed) for job in asked[0]} == {(0.5, seed) for seed in range(3)}
    no_rivals = {*methods()} - {job.method for job in asked[0]}
    assert no_rivals == {"uncompensated", "closed_form", "following", "unrefined"}, "what the recipe is or has not"
    assert len(asked[0]) == (len(methods()) - 4) * 3
    assert "each run has one worker of one thread, not the recipe's 2 of 1" in done.stderr
    assert done.stderr.count("random, seed") == 3
    assert "Separation 0.5" in done.stdout
    assert "picture: " in done.stdout


def test_the_help_names_every_method() -> None:
    said = " ".join(CliRunner().invoke(main, ["compare", "--help"]).stdout.split())
    assert [method for method in methods() if method not in said] == []


def test_json_is_all_of_the_output(asked: list[tuple[Job, ...]]) -> None:
    done = CliRunner().invoke(main, ["compare", "digits", "--json"])
    assert json.loads(done.stdout)["rows"][0]["method"] == "loop"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("digits", "--methods", "lop"), "method: got 'lop'"),
        (("digits", "--separations", "2"), "separation: got 2"),
        (("--methods", "random", "digits"), "Missing argument 'RECIPE'"),
        (("nowhere",), "'nowhere' is neither a file nor"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(main, ["compare", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.usefixtures("asked")
def test_a_job_that_failed_makes_the_exit_code_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "compare", lambda *_: comparison(random_0_5_2="no memory"))
    done = CliRunner().invoke(main, ["compare", "digits"])
    assert done.exit_code == 1
    assert "random-0.5-2: no memory" in done.stdout


@pytest.mark.usefixtures("asked")
def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> Comparison:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare", stop)
    done = CliRunner().invoke(main, ["compare", "digits"])
    assert done.exit_code == 130
    assert done.stderr.endswith("moeify: stopped; go on with the same command\n")


# --- with Ray ---------------------------------------------------------------------------------------------

SHORT = """
name: short
data: {kind: digits}
model: {kind: autoencoder, hidden: 32, code: 4}
training: {steps: 40, rows: 20}
attribution: {rows: 10, rows_at_once: 20}
partition: {multiple: 2, min_units: 1}
rounds: [{train: 10, recover: 10, branching: 10, separation: 0.4}]
evaluation: {validation_rows: 10, test_rows: 20, rows_at_once: 20}
"""


@pytest.mark.ray
def test_a_killed_comparison_goes_on_and_what_cannot_be_run_stops_nothing_else(tmp_path: Path, laid_out: Path) -> None:
    shutil.copy(laid_out, tmp_path / "mlflow.db")
    recipe = tmp_path / "short.yaml"
    recipe.write_text(SHORT)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "MOEIFY_HOME": str(tmp_path), "MOEIFY_CACHE": str(tmp_path / "c")}
    environment.pop("RAY_ADDRESS", None)
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "pipelines", "compare", str(recipe), "--methods", "random", "--seeds", "2"]
    command += ["--separations", "0.95", "0.4", "--json"]  # a seed's first jobs fail: another trains the twins

    def finished() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("comparisons/*/results/*.json")}

    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not finished() and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    before = finished()

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    after = finished()
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    assert done.stderr.count("done before") >= len(before)
    known = json.loads(done.stdout)
    assert known == json.loads(Path(known["path"], "comparison.json").read_text())
    ended = {(run["method"], run["separation"], run["seed"]): run["status"] for run in known["runs"]}
    assert ended == {
        (method, separation, seed): "finished" if separation == 0.4 else "failed"
        for method in ("loop", "random")
        for separation in (0.4, 0.95)
        for seed in (0, 1)
    }
    assert all("can be reached" in run["problem"] for run in known["runs"] if run["problem"])
    assert len(list(Path(known["path"], "failed").glob("*.txt"))) == 4
    dense = {run["seed"]: run["test_loss"]["dense"] for run in known["runs"] if run["method"] == "loop" and run["tax"]}
    for run in known["runs"]:
        if run["method"] == "random" and run["status"] == "finished":
            assert run["test_loss"]["dense"] == dense[run["seed"]]
