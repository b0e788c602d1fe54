"""The command line, with a stand-in for what trains: arguments, errors, exit codes, and what is not imported."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from click import Choice
from click.testing import CliRunner, Result

from moeify.events import Finished, Started
from moeify.export.model_card import Checked
from moeify.export.publish import Dtype, How
from moeify.export.speeds import Speed, Speeds
from moeify.export.stock import Form
from moeify.recipe.config import RunConfig
from moeify.result import Result as RunResult
from pipelines import runs
from pipelines.cli import COMMANDS, main
from pipelines.commands.export import command as export_command
from pipelines.journal import Follower, JournalTracker, follow
from pipelines.kept_speeds import read_speeds
from pipelines.ray_cluster import RunFailedError

RECIPE = """name: tiny
data: {kind: digits}
model: {kind: autoencoder}
training: {steps: 10}
rounds: [{train: 1, recover: 2, separation: 0.4}]
"""
HEAVY = ("torch", "ray", "mlflow", "transformers", "numpy", "matplotlib")


class Launched:
    """What the stand-in for ``pipelines.launch`` was asked, and what it is to do."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Path, int]] = []
        self.then: Callable[[runs.RunFolder], None] = finish
        self.missed = 0
        """Events that MLflow lacks."""

    def deliver(self, folder: runs.RunFolder, config: RunConfig) -> int:
        if self.missed < 0:
            raise OSError("MLflow at http://there did not take it")
        self.calls.append(("sync", config.name, folder.path, 0))
        return self.missed

    def start(self, how: str) -> Callable[[runs.RunFolder, RunConfig, Path, Sequence[Follower]], None]:
        def start(folder: runs.RunFolder, config: RunConfig, base: Path, followers: Sequence[Follower]) -> None:
            self.calls.append((how, config.name, base, len(followers)))
            with runs.hold(folder), follow(folder.journal, followers, poll_seconds=0.01):
                self.then(folder)

        return start


def finish(folder: runs.RunFolder) -> None:
    tree = {"name": "core", "categories": ["a", "b"], "units": 8, "children": []}
    started = Started(
        id="started", time=0.0, categories=("a", "b"), unit="example", steps=10, parameters=9, sites={"s": 8}, rounds=1
    )
    loss = {"a": 1.0, "b": 2.0}
    result = RunResult(
        categories=("a", "b"),
        unit="example",
        tree=tree,
        active_fraction={"a": 1.0, "b": 1.0, "mean": 1.0},
        rounds=(),
        test_loss={"dense": loss, "split": loss, "random": loss},
        bits_per_byte=None,
        own_other={},
        tax={"a": 0.0, "b": 0.0, "mean": 0.0},
        tax_random={"a": 0.0, "b": 0.0, "mean": 0.0},
        steps=10,
        seconds=1.0,
    )
    with JournalTracker(folder.journal) as journal:
        journal.emit(started)
        folder.result.write_text(result.model_dump_json())
        journal.emit(Finished(id="finished", time=1.0, seconds=1.0))


SPEEDS = Speeds(
    (Speed("prefill", 32, "medicine", 1_234_567.0, 1_999_999.0, 1.62, 1.75, "FLOPs"),), "token", "float32", 2, 128
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launched:
    """Put stand-ins in place of what is heavy, and runs into a folder of their own."""
    told = Launched()
    launch, tracking, export = (ModuleType(f"pipelines.{name}") for name in ("launch", "tracking", "export"))

    def exporter(kind: str) -> Callable[..., Checked]:
        def write(run: Path, *what: Any, **part: Any) -> Checked:
            *told, out, how = what
            out.mkdir(exist_ok=True)
            (out / (f"{kind}.{how.file}" if how.file else kind)).write_text(
                json.dumps([run.name, *told, how.dtype, how.verify, part])
            )
            speeds = SPEEDS if how.speed else None
            return Checked(0.01 if how.dtype != "float32" else None, {"a": 1e-6} if how.verify else None, speed=speeds)

        return write

    vars(launch).update(on_ray=told.start("ray"), in_process=told.start("local"))
    vars(tracking).update(where_to_look=lambda folder: f"mlflow ui of {folder.id}", deliver=told.deliver)
    vars(export).update({f"export_{kind}": exporter(kind) for kind in ("dense", "moe", "split")}, How=How)
    monkeypatch.setitem(sys.modules, "pipelines.launch", launch)
    monkeypatch.setitem(sys.modules, "pipelines.tracking", tracking)
    monkeypatch.setitem(sys.modules, "moeify.export.publish", export)
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path / "home"))
    return told


def moeify(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="moeify")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "my.yaml"
    path.parent.mkdir()
    path.write_text(RECIPE)
    return path


def only_run(tmp_path: Path) -> runs.RunFolder:
    (folder,) = runs.every(tmp_path / "home")
    return folder


def test_run_trains_on_ray_and_ends_with_the_tables_and_where_to_look(
    launched: Launched, recipe: Path, tmp_path: Path
) -> None:
    done = moeify("run", recipe)
    folder = only_run(tmp_path)
    assert done.exit_code == 0, done.output
    assert launched.calls == [("ray", "tiny", recipe.parent, 1)]
    assert folder.recipe.read_text() == RECIPE
    for line in (
        f"run {folder.id} in {folder.path}",
        "2 categories (a, b), 9 parameters, 8 units in 1 site, 10 steps an arm",
        "finished in 0:01",
        f"{folder.id} · finished · 10 steps an arm · 0:01",
        f"again:   moeify show {folder.id}",
        f"curves:  mlflow ui of {folder.id}",
    ):
        assert line in done.stdout.splitlines()
    assert done.stderr == ""


def test_a_run_that_is_given_an_id_begins_once_and_then_goes_on(
    launched: Launched, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = "tiny-20260101-000000-abcd"
    assert moeify("run", recipe, "-q", "--id", run, "--pack").exit_code == 0
    assert only_run(tmp_path).id == run
    again = moeify("run", recipe, "--id", run)
    assert (again.exit_code, again.stdout) == (0, f"{run} is finished; see it with: moeify show {run}\n")
    assert launched.calls == [("ray", "tiny", tmp_path / "home" / run / "inputs", 0)]
    recipe.write_text(RECIPE.replace("steps: 10", "steps: 11"))
    other = moeify("run", recipe, "--id", run)
    assert other.exit_code == 2
    assert other.stderr == f"moeify: error: run {run} is there already, of another recipe; give another id\n"
    monkeypatch.delenv("MOEIFY_HOME")
    assert "set MOEIFY_HOME to that folder" in moeify("run", recipe, "--pack").stderr
    assert moeify("run", recipe, "--id", "../../etc").stderr.startswith("moeify: error: '../../etc' is no id of a run")


def test_a_quiet_run_in_this_process_says_nothing(launched: Launched, recipe: Path) -> None:
    done = moeify("run", recipe, "--local", "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    assert launched.calls == [("local", "tiny", recipe.parent, 0)]


def test_a_shipped_recipe_goes_by_its_name(launched: Launched) -> None:
    assert moeify("run", "digits", "-q").exit_code == 0
    assert launched.calls == [("ray", "digits", Path.cwd(), 0)]


def test_a_name_that_is_neither_recipe_nor_file_lists_the_recipes(launched: Launched) -> None:
    done = moeify("run", "digit")
    assert done.exit_code == 2
    assert done.stderr == (
        "moeify: error: 'digit' is neither a file nor a recipe that comes with moeify (cifar, digits, domains, text); "
        "nearest: digits\n"
    )


def test_a_bad_recipe_is_told_line_by_line_and_makes_no_run(launched: Launched, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("steps", "stepz").replace("0.4", "2"))
    done = moeify("run", recipe)
    assert done.exit_code == 2
    first, *rest = done.stderr.splitlines()
    assert first == f"moeify: error: {recipe} is not a recipe that can be run:"
    assert [line.split(":")[0] for line in rest] == ["training.steps", "training.stepz", "rounds[0].separation"]
    assert "Traceback" not in done.output
    assert not (tmp_path / "home").exists()


def test_an_interrupted_run_says_how_to_go_on_and_does(launched: Launched, recipe: Path, tmp_path: Path) -> None:
    def interrupt(folder: runs.RunFolder) -> None:
        raise KeyboardInterrupt

    launched.then = interrupt
    stopped = moeify("run", recipe)
    folder = only_run(tmp_path)
    assert stopped.exit_code == 130
    assert stopped.stderr == f"moeify: stopped; go on with: moeify resume {folder.id}\n"
    assert runs.status(folder) == "interrupted"

    launched.then = finish
    assert moeify("resume", "last", "--local", "-q").exit_code == 0
    assert launched.calls[-1] == ("local", "tiny", recipe.parent, 0)
    assert runs.status(folder) == "finished"

    again = moeify("resume", folder.id[:6])
    assert again.exit_code == 0
    assert again.stdout == f"{folder.id} is finished; see it with: moeify show {folder.id}\n"
    assert len(launched.calls) == 2


def test_a_run_that_another_process_drives_is_left_alone(launched: Launched, recipe: Path, tmp_path: Path) -> None:
    folder = runs.create(RunConfig.model_validate(_config()), RECIPE, tmp_path / "home")
    with runs.hold(folder):
        done = moeify("resume", folder.id)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"moeify: error: run {folder.id} is being driven by another process")
    assert launched.calls == []


def _config() -> dict[str, Any]:
    return {
        "name": "tiny",
        "data": {"kind": "digits"},
        "model": {"kind": "autoencoder"},
        "training": {"steps": 10},
        "rounds": [{"train": 1, "recover": 2, "separation": 0.5}],
    }


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("category 'x' has\nno documents"), 2, "category 'x' has no documents"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.txt"), 2, "x.txt: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (OSError("the worker's disk is full"), 2, "the worker's disk is full"),
        ("broken", 1, "the workers died"),
    ],
)
def test_an_error_of_a_run_is_one_line_and_with_debug_a_traceback(
    launched: Launched, recipe: Path, error: Exception | str, code: int, told: str
) -> None:
    raised = RunFailedError(told) if isinstance(error, str) else error

    def fail(folder: runs.RunFolder) -> None:
        raise raised

    launched.then = fail
    done = moeify("run", recipe, "--quiet")
    assert done.exit_code == code
    assert done.stderr == f"moeify: error: {told}\n"
    assert moeify("--debug", "run", recipe, "--quiet").exception is raised


def test_a_mistake_in_the_program_keeps_its_traceback(launched: Launched, recipe: Path) -> None:
    def fail(folder: runs.RunFolder) -> None:
        raise RuntimeError("shape mismatch")

    launched.then = fail
    done = moeify("run", recipe, "--quiet")
    assert isinstance(done.exception, RuntimeError)


def test_show_and_runs_tell_the_same_to_people_and_to_programs(
    launched: Launched, recipe: Path, tmp_path: Path
) -> None:
    assert moeify("runs").stdout.startswith(f"No runs in {tmp_path / 'home'}")
    assert json.loads(moeify("runs", "--json").stdout) == []
    moeify("run", recipe, "-q")
    folder = only_run(tmp_path)
    assert "Expert tree" in moeify("show", "last").stdout
    known = json.loads(moeify("show", folder.id, "--json").stdout)
    assert (known["run"], known["status"]) == (folder.id, "finished")
    assert folder.id in moeify("runs").stdout
    assert [row["run"] for row in json.loads(moeify("runs", "--json").stdout)] == [folder.id]
    missing = moeify("show", "nothing")
    assert missing.exit_code == 2
    assert missing.stderr.startswith("moeify: error: no run 'nothing'")


@pytest.mark.parametrize(
    ("missed", "told"), [(1200, "1,200 events delivered"), (1, "1 event delivered"), (0, "MLflow misses nothing")]
)
def test_sync_says_how_much_mlflow_missed(
    launched: Launched, recipe: Path, tmp_path: Path, missed: int, told: str
) -> None:
    moeify("run", recipe, "-q")
    folder = only_run(tmp_path)
    launched.missed = missed
    done = moeify("sync", "last")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"{told}\ncurves:  mlflow ui of {folder.id}\n"
    assert launched.calls[-1] == ("sync", "tiny", folder.path, 0)


def test_a_sync_that_fails_is_one_line(launched: Launched, recipe: Path) -> None:
    moeify("run", recipe, "-q")
    launched.missed = -1
    done = moeify("sync", "last")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "moeify: error: MLflow at http://there did not take it\n"


def test_the_help_names_every_command_in_a_whole_line() -> None:
    listed = CliRunner().invoke(main, ["--help"], terminal_width=80).stdout.split("Commands:")[1].split("Examples:")[0]
    assert "..." not in listed
    assert [line.split()[0] for line in listed.splitlines() if line.strip()] == list(COMMANDS)


def test_export_writes_a_part_or_the_whole_into_a_new_folder(launched: Launched, recipe: Path, tmp_path: Path) -> None:
    moeify("run", recipe, "-q")
    run = only_run(tmp_path).id
    out = tmp_path / "out"
    checked = "equal to the split model within 1.0e-06: a\n"
    assert moeify("export", "last", "--category", "a", "-o", out).stdout == f"wrote {out}\n{checked}"
    assert json.loads((out / "dense").read_text()) == [run, ["a"], "float32", True, {}]
    taken = moeify("export", "last", "--split", "-o", out)
    assert taken.exit_code == 2
    assert taken.stderr == f"moeify: error: {out} is there already; give a folder that is new or empty\n"
    unknown = moeify("export", run, "--category", "aa", "-o", tmp_path / "none")
    assert unknown.stderr == "moeify: error: no category 'aa'; the run has a, b; nearest: a\n"


@pytest.mark.parametrize(
    ("arguments", "kind", "written"),
    [
        (["--split"], "split", ["float32", True, {"keep": [], "drop": [], "recover": None}]),
        (
            ["--split", "--category", "a", "--no-verify"],
            "split",
            ["float32", False, {"keep": ["a"], "drop": [], "recover": None}],
        ),
        (
            ["--without", "b", "--dtype", "float16"],
            "split",
            ["float16", True, {"keep": [], "drop": ["b"], "recover": None}],
        ),
        (["--category", "a", "--category", "b"], "dense", [["a", "b"], "float32", True, {}]),
        (["--category", "a", "--gguf"], "dense.gguf", [["a"], "float32", True, {}]),
        (["--category", "a", "--onnx"], "dense.onnx", [["a"], "float32", True, {}]),
        (
            ["--moe", "glm4_moe", "--force", "b"],
            "moe",
            [
                "glm4_moe",
                "float32",
                True,
                {"forced": "b", "distil": None, "join": None, "keep": [], "drop": [], "recover": None},
            ],
        ),
    ],
)
def test_export_knows_kinds_and_parts(
    launched: Launched, recipe: Path, tmp_path: Path, arguments: list[str], kind: str, written: list[Any]
) -> None:
    moeify("run", recipe, "-q")
    done = moeify("export", "last", *arguments, "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert ("moves outputs by up to 1.0e-02" in done.stdout) == ("float16" in arguments)
    assert ("every token runs the expert of one category" in done.stdout) == ("--moe" in arguments)
    assert ("equal to the split model" in done.stdout) == ("--no-verify" not in arguments)
    assert json.loads((tmp_path / "out" / kind).read_text())[1:] == written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to export: --category NAME, --split, --moe FORMAT or --without NAME"),
        (["--category", "a", "--without", "b"], "give either --category or --without"),
        (["--split", "--moe", "glm4_moe"], "give either --split or --moe"),
        (["--split", "--force", "a"], "--force is for --moe"),
        (["--split", "--joint", "5"], "--joint is for --moe, with all categories and without --force"),
        (["--split", "--category", "a", "--category", "a"], "'a' is named twice"),
        (["--split", "--gguf"], "--gguf is for --category NAME or --moe; only moeify loads a split model"),
        (["--without", "a", "--gguf"], "--gguf is for --category NAME or --moe"),
        (["--category", "a", "--onnx", "--gguf"], "--onnx is for --category NAME, alone; a graph has no routes"),
        (["--split", "--recover", "5"], "--recover is for --without NAME"),
        (["--without", "a", "--recover", "0"], "0 is not in the range x>=1"),
        (["--category", "a", "--cache"], "--cache is for --onnx, which --speed times without one"),
        (["--split", "--onnx"], "--onnx is for --category NAME"),
        (["--moe", "mixtral"], "'mixtral' is not one of 'glm4_moe', 'granitemoeshared'"),
    ],
)
def test_export_refuses_what_makes_no_sense(
    launched: Launched, tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = moeify("export", "last", *arguments, "-o", tmp_path / "none")
    assert done.exit_code == 2
    assert said in done.stderr


def test_export_tells_how_fast_it_is_in_80_columns_and_as_json(
    launched: Launched, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    moeify("run", recipe, "-q")
    done = moeify("export", "last", "--split", "--speed", "-o", tmp_path / "out")
    table = done.stdout.partition("\n\n")[2].splitlines()
    assert max(map(len, table)) <= 80
    assert table[0] == "Speed (tokens a second; float32, 2 threads, prompts of 128)"
    assert table[2].split() == [
        "prefill",
        "32",
        "medicine",
        "1,234,567",
        "1,999,999",
        "1.62",
        "1.75",
        "FLOPs",
        "92.6%",
    ]
    told = json.loads(moeify("export", "last", "--split", "--speed", "-o", tmp_path / "two", "--json").stdout)
    assert (told["dtype"], told["differences"], told["out"]) == ("float32", {"a": 1e-6}, str(tmp_path / "two"))
    assert told["speed"]["rows"][0]["of_limit"] == pytest.approx(1.62 / 1.75)
    folder = only_run(tmp_path)
    assert [(each.export, each.form) for each in read_speeds(folder)] == [("split", "split")]
    assert "1,999,999 tokens/s" in folder.report.read_text()


def test_export_offers_every_format_and_dtype() -> None:
    choices = {option.name: option.type.choices for option in export_command.params if isinstance(option.type, Choice)}
    assert choices == {"moe": get_args(Form), "dtype": get_args(Dtype)}


def test_an_unfinished_run_is_not_exported(launched: Launched, tmp_path: Path) -> None:
    folder = runs.create(RunConfig.model_validate(_config()), RECIPE, tmp_path / "home")
    done = moeify("export", folder.id, "--split", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert f"run {folder.id} is interrupted, wanted a finished one" in done.stderr


def test_the_schema_is_json() -> None:
    assert "rounds" in json.loads(moeify("schema").stdout)["properties"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--version"], 0), (["schema"], 0), (["run", "bad.yaml"], 2), (["runs"], 0)],
)
def test_quick_commands_import_nothing_heavy(arguments: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: [")
    program = (
        "import sys\nfrom pipelines.cli import main\n"
        "try:\n    main(sys.argv[1:], prog_name='moeify')\n"
        f"finally:\n    print('HEAVY', sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_a_follower_that_is_still_busy_spoils_no_exit_code(tmp_path: Path) -> None:
    program = """
import atexit, sys, threading
from pathlib import Path
from pipelines import cli
from pipelines.journal import follow

class Busy:
    offset = 0
    def take(self, events): threading.Event().wait()
    def close(self): pass

def command(prog_name):
    Path("journal.jsonl").write_text('{"kind":"finished","id":"finished","time":0.0,"seconds":1.0}\\n')
    with follow(Path("journal.jsonl"), [Busy()], poll_seconds=0.01, drain_seconds=0.5):
        pass
    print("told")
    sys.exit(3)

cli.main = command
atexit.register(print, "torn down")
cli.entry()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "told\n"), done.stderr
    assert "is still busy 0.5 s after the run" in done.stderr
