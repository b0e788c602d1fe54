"""The local cluster: what it starts, what it ends, and the whole service on it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines import cluster
from pipelines.cluster import LocalCluster, Process
from pipelines.runs import RunFolder

ROOT = Path(__file__).parents[1]


def sleeper() -> subprocess.Popen[bytes]:
    """Start a process with a child of its own."""
    program = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    return process


def recorded(home: Path, *processes: Process) -> LocalCluster:
    known = LocalCluster(
        nodes=1,
        cores=1,
        api="http://127.0.0.1:1",
        mlflow="http://127.0.0.1:2",
        home=home,
        temporary=home / "temporary",
        processes=processes,
    )
    cluster.folder(home).mkdir(parents=True)
    known.temporary.mkdir()
    cluster._write(cluster.folder(home), known)
    return known


def started(pid: int) -> float:
    return psutil.Process(pid).create_time()


def test_down_ends_what_was_started_with_all_below_it(tmp_path: Path) -> None:
    mine = sleeper()
    child = psutil.Process(mine.pid).children()[0]
    known = recorded(tmp_path, Process(pid=mine.pid, started=started(mine.pid)))
    assert cluster.down(tmp_path) == 2
    assert mine.wait(10) == -15
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert not known.temporary.exists()
    with pytest.raises(ValueError, match="no local cluster was started"):
        cluster.down(tmp_path)


def test_down_leaves_a_later_process_with_the_same_number_alone(tmp_path: Path) -> None:
    other = sleeper()
    family = [psutil.Process(other.pid), *psutil.Process(other.pid).children()]
    recorded(tmp_path, Process(pid=other.pid, started=started(other.pid) - 1.0))
    assert cluster.down(tmp_path) == 0
    assert other.poll() is None
    for process in reversed(family):
        process.kill()
    other.wait(10)


def test_there_is_one_cluster_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_NEEDED", ())
    recorded(tmp_path, Process(pid=os.getpid(), started=started(os.getpid())))
    with pytest.raises(ValueError, match=r"a cluster is up at http://127.0.0.1:1; end it with 'moeify cluster down'"):
        cluster.up(tmp_path, 1)


def test_a_ray_without_its_dashboard_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_NEEDED", ("no_such_module",))
    with pytest.raises(ValueError, match=r"lacks no_such_module; install it with: pip install 'ray\[default\]'"):
        cluster.up(tmp_path, 1)


def test_a_process_that_ends_while_it_starts_takes_the_rest_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_NEEDED", ())
    monkeypatch.setattr(cluster, "_answers", lambda *_: len(spawned) == 1)
    spawned: list[Path] = []

    def commands(*_: object) -> dict[str, list[str]]:
        return {"head": ["sleep", "60"], "worker-1": [sys.executable, "-c", "raise SystemExit('no room')"]}

    def spawn(log: Path, *rest: object) -> subprocess.Popen[bytes]:
        spawned.append(log)
        processes.append(original(log, *rest))  # type: ignore[arg-type]
        return processes[-1]

    processes: list[subprocess.Popen[bytes]] = []
    original = cluster._spawn
    monkeypatch.setattr(cluster, "commands", commands)
    monkeypatch.setattr(cluster, "_spawn", spawn)
    with pytest.raises(OSError, match=r"worker-1 ended while it started \(no room\); its log is "):
        cluster.up(tmp_path, 2)
    assert not psutil.pid_exists(processes[0].pid) or not cluster._alive(
        Process(pid=processes[0].pid, started=started(processes[0].pid))
    )
    assert sorted(path.name for path in cluster.folder(tmp_path).iterdir()) == ["head.log", "lock", "worker-1.log"]


def test_a_process_that_does_not_answer_in_time_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_NEEDED", ())
    monkeypatch.setattr(cluster, "_START_SECONDS", 0.5)
    monkeypatch.setattr(cluster, "_answers", lambda *_: False)
    monkeypatch.setattr(cluster, "commands", lambda *_: {"head": ["sh", "-c", "echo $$ > pid; exec sleep 60"]})
    with pytest.raises(OSError, match=r"head did not answer in 0.5 s; its log is "):
        cluster.up(tmp_path, 1)
    pid = int((cluster.folder(tmp_path) / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_everything_binds_to_loopback_with_ports_of_its_own(tmp_path: Path) -> None:
    ports = cluster._free_ports()
    known = LocalCluster(
        nodes=3, cores=2, api="http://127.0.0.1:1", mlflow="http://127.0.0.1:2", home=tmp_path, temporary=Path("/tmp/x")
    )
    commands = cluster.commands(known, ports)
    assert list(commands) == ["head", "worker-1", "worker-2", "mlflow"]
    words = [word for command in commands.values() for word in command]
    assert sum(word == "--node-ip-address=127.0.0.1" for word in words) == 3
    assert "--dashboard-host=127.0.0.1" in words
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--default-artifact-root") + 1] == f"file://{tmp_path}/mlflow-artifacts"
    taken = [word for word in words if "port=" in word and not word.startswith("--dashboard-port")]
    assert len({word.partition("=")[2] for word in taken}) == len(taken) == 8


@pytest.mark.parametrize(
    ("named", "seen"), [(None, ["0,1", "2,3", "4,5"]), ("7,1,3,5,0,2", ["7,1", "3,5", "0,2"]), ("3,1", ["3,1", "", ""])]
)
def test_no_gpu_is_two_nodes(
    tmp_path: Path, named: str | None, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    api, mlflow = "http://127.0.0.1:1", "http://127.0.0.1:2"
    known = LocalCluster(nodes=3, cores=2, gpus=2, api=api, mlflow=mlflow, home=tmp_path, temporary=Path("/tmp/x"))
    started = cluster.commands(known, cluster._free_ports())
    assert ["--num-gpus=2" in command for command in started.values()] == [True, True, True, False]
    assert [cluster._visible(known, name).get("CUDA_VISIBLE_DEVICES") for name in started] == [*seen, None]
    assert cluster._visible(known.model_copy(update={"gpus": 0}), "head") == {}


# --- the whole service ------------------------------------------------------------------------------------

RECIPE = """name: NAME
data: {kind: digits}
model: {kind: autoencoder, hidden: 64, code: 8}
training: {steps: STEPS, rows: 20, weight_decay: 0}
attribution: {rows: 20, rows_at_once: 20}
partition: {multiple: 2, min_units: 2}
rounds:
  - {train: 40, recover: 20, branching: 2, separation: 0.3}
evaluation: {validation_rows: 16, test_rows: 16, rows_at_once: 40}
checkpoints: {every: 50}
"""
WAIT = 240.0


def moeify(environment: dict[str, str], *arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout if not code else done.stderr


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, laid_out: Path) -> Iterator[dict[str, str]]:
    """A cluster of two nodes; the environment that its start told."""
    home = tmp_path_factory.mktemp("service")
    shutil.copy(laid_out, home / "mlflow.db")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "MOEIFY_"))}
    plain |= {"MOEIFY_HOME": str(home), "MOEIFY_CACHE": str(home / "cache"), "HOME": str(home)}
    exports = moeify(plain, "cluster", "up", "--local", "2", "--cores", "1")
    pairs = [line.removeprefix("export ").split("=", 1) for line in exports.splitlines()]
    processes = LocalCluster.model_validate_json((home / ".cluster" / "cluster.json").read_bytes()).processes
    try:
        yield plain | dict(pairs)
    finally:
        told = moeify(plain, "cluster", "down")
    assert told.startswith("the cluster is down; ")
    assert not any(map(cluster._alive, processes))
    assert not list((home / ".cluster").glob("*.log"))


def write(folder: Path, name: str, steps: int) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.replace("NAME", name).replace("STEPS", str(steps)))
    return path


def losses(home: Path, run: str) -> object:
    return json.loads((home / run / "result.json").read_text())["test_loss"]


@pytest.mark.ray
@pytest.mark.timeout(900)
class TestService:
    def test_only_loopback_listens_and_only_a_token_lets_in(self, service: dict[str, str]) -> None:
        home = Path(service["MOEIFY_HOME"])
        known = LocalCluster.model_validate_json((home / ".cluster" / "cluster.json").read_bytes())
        listening = [
            connection.laddr.ip
            for process in known.processes
            if psutil.pid_exists(process.pid)
            for connection in psutil.Process(process.pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1"}
        assert len(listening) > 5
        assert known.token.stat().st_mode & 0o777 == 0o600
        for wrong in ({"RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_MODE": "disabled"}):
            told = moeify(service | wrong, "runs", code=2)
            assert told == (
                f"moeify: error: the cluster at {known.api} refused the token; set RAY_AUTH_TOKEN, or "
                f"RAY_AUTH_TOKEN_PATH to the file with it\n"
            )

    def test_a_run_is_submitted_and_told_of_as_a_local_one(self, service: dict[str, str], tmp_path: Path) -> None:
        told = moeify(service, "submit", write(tmp_path, "first", 80), "--wait")
        run = told.split()[1]
        assert f"{run} · finished · 80 steps an arm" in told
        assert json.loads(moeify(service, "status", run, "--json"))["job"] == {"id": run, "status": "SUCCEEDED"}
        assert "test loss of split" in moeify(service, "logs", "first")
        shown = json.loads(moeify(service, "show", run, "--json"))
        assert (shown["run"], shown["status"]) == (run, "finished")
        assert run in moeify(service, "runs")

    @pytest.mark.slow
    def test_of_two_runs_that_each_need_the_whole_cluster_one_waits_for_the_other(
        self, service: dict[str, str], tmp_path: Path
    ) -> None:
        recipes = [write(tmp_path, name, 800) for name in ("one", "other")]
        for recipe in recipes:
            recipe.write_text(recipe.read_text() + "cluster: {workers: 2}\n")
        told = [moeify(service, "submit", recipe) for recipe in recipes]
        ids = [line.split()[1] for line in told]

        def stand() -> list[dict[str, Any]]:
            return [json.loads(moeify(service, "status", run, "--json")) for run in ids]

        deadline = time.monotonic() + WAIT
        waits = ""
        while not waits:
            assert time.monotonic() < deadline, stand()
            first, second = sorted(stand(), key=lambda each: -each["work"])
            if first["work"] and first["status"] == "running" and second["where"] == "starting workers":
                waits = second["run"]
        assert "now:     starting workers\n" in moeify(service, "status", waits)
        while {each["job"]["status"] for each in stand()} != {"SUCCEEDED"}:
            assert time.monotonic() < deadline + WAIT, stand()
            time.sleep(0.5)
        listed = moeify(service, "runs")
        for run, each in zip(ids, stand(), strict=True):
            assert (each["run"], each["job"]["id"], each["status"]) == (run, run, "finished")
            assert run in moeify(service, "logs", run)
            assert json.loads(moeify(service, "show", run, "--json"))["run"] == run
            assert run in listed

    @pytest.mark.slow
    @pytest.mark.parametrize("killed", [False, True])
    def test_a_run_that_was_stopped_or_whose_driver_was_killed_ends_with_the_same_bits(
        self, service: dict[str, str], tmp_path: Path, killed: bool
    ) -> None:
        home = Path(service["MOEIFY_HOME"])
        recipe = write(tmp_path, "killed" if killed else "stopped", 1500)
        run = moeify(service, "submit", recipe).split()[1]
        deadline = time.monotonic() + WAIT
        while not list((home / run).glob("checkpoints/*")):
            assert time.monotonic() < deadline, moeify(service, "logs", run)
            time.sleep(0.2)
        assert moeify(service, "stop", run) == f"{run} is stopped; go on with: moeify resume {run}\n"
        assert json.loads(moeify(service, "status", run, "--json"))["status"] == "interrupted"
        if killed:
            folder = RunFolder(home / run)
            first = folder.driver.read_text()
            moeify(service, "resume", run)
            while folder.driver.read_text() in (first, ""):
                assert time.monotonic() < deadline + WAIT, moeify(service, "logs", run)
                time.sleep(0.1)
            os.kill(json.loads(folder.driver.read_text())["pid"], signal.SIGKILL)
            while json.loads(moeify(service, "status", run, "--json"))["job"]["status"] != "FAILED":
                assert time.monotonic() < deadline + WAIT
        told = moeify(service, "resume", run, "--wait")
        assert "resumed: " in told
        assert f"{run} · finished" in told
        moeify(service | {"MOEIFY_HOME": str(tmp_path)}, "run", recipe, "--local", "-q")
        (alone,) = (path for path in tmp_path.iterdir() if (path / "result.json").exists())
        assert losses(home, run) == losses(tmp_path, alone.name)
