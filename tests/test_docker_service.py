"""The scripts of docker/ for real: Ray's nodes and MLflow, with an S3 and a PostgreSQL, as compose has them."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from pipelines.cluster import _free_ports
from tests.docker_files import BIN, DOCKER, ROOT, SECRET, kept, read, run
from tests.stores import KEY, s3_server
from tests.stores import SECRET as S3_SECRET

# MLflow's own database layer warns of its own future.
pytestmark = pytest.mark.filterwarnings(r"ignore::Warning:(mlflow|alembic|sqlalchemy|pydantic|google)\.")

BINARIES = Path(sys.executable).parent
Parts = dict[str, subprocess.Popen[bytes]]


def end(*processes: subprocess.Popen[bytes], how: int = signal.SIGTERM) -> None:
    """End processes, and what is left below them."""
    below = [
        child
        for process in processes
        if process.poll() is None
        for child in psutil.Process(process.pid).children(recursive=True)
    ]
    for process in processes:
        process.send_signal(how)
    _, left = psutil.wait_procs(below, timeout=0 if how == signal.SIGKILL else 20)
    for child in left:
        child.kill()
    for process in processes:
        process.wait(20)


@pytest.fixture
def parts() -> Iterator[Parts]:
    """The processes of a test, which are ended with all below them."""
    started: Parts = {}
    yield started
    end(*started.values())


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, str]:
    """What every part has in its environment, with its secrets in files."""
    pytest.importorskip("flask_wtf")
    if not (BINARIES / "ray").exists() or not (BINARIES / "mlflow").exists():
        pytest.skip(f"ray and mlflow are not in {BINARIES}")
    secrets = {"token": SECRET, "password": SECRET, "flask": SECRET, "key": KEY, "secret": S3_SECRET}
    for name, value in secrets.items():
        (tmp_path / name).write_text(value)
    return {
        "PATH": f"{BINARIES}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "MOEIFY_HOME": str(tmp_path),
        "AWS_DEFAULT_REGION": "us-east-1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
    }


@pytest.fixture
def start(parts: Parts, plain: dict[str, str], tmp_path: Path) -> Callable[..., None]:
    """Starts a part and waits until the images' health check finds it well.

    ``within``: the command that runs both elsewhere, where the scripts are in the folder ``scripts``.
    """

    def start(
        name: str,
        role: str,
        settings: dict[str, str],
        *arguments: str,
        within: Sequence[str] = (),
        scripts: Path = BIN,
    ) -> None:
        with (tmp_path / f"{role}.log").open("wb") as log:
            parts[role] = subprocess.Popen(
                [*within, "sh", scripts / name, *arguments], env=plain | settings, stdout=log, stderr=log, cwd=tmp_path
            )
        deadline = time.monotonic() + 150
        while run([*within, sys.executable, scripts / "health.py", role], plain | settings).returncode:
            told = (tmp_path / f"{role}.log").read_text()
            assert parts[role].poll() is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.5)

    return start


def mlflow_settings(folder: Path, port: str) -> dict[str, str]:
    return {
        "MLFLOW_ADMIN_PASSWORD_FILE": str(folder / "password"),
        "MLFLOW_FLASK_SECRET_FILE": str(folder / "flask"),
        "MLFLOW_PORT": port,
        "MLFLOW_WORKERS": "1",
    }


def in_store(folder: Path) -> dict[str, str]:
    return {"S3_ACCESS_KEY_FILE": str(folder / "key"), "S3_SECRET_KEY_FILE": str(folder / "secret")}


def answer(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        return error.code


def log_a_run(port: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Log a metric and a file through the server, as the account that the head delivers with; return the run's id."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    client = MlflowClient(f"http://127.0.0.1:{port}")
    logged = client.create_run(client.create_experiment("moeify")).info.run_id
    client.log_metric(logged, "loss", 0.5)
    (folder / "note.txt").write_text("kept")
    client.log_artifact(logged, str(folder / "note.txt"))
    return logged


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_head_worker_and_mlflow_start_from_the_images_scripts_and_are_well(
    parts: Parts,
    plain: dict[str, str],
    start: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ports = _free_ports()
    head, dashboard, head_agent, worker_agent, mlflow = (str(next(ports)) for _ in range(5))
    short = Path("/tmp") / f"moeify-docker-{os.getpid()}"

    def node(agent: str, folder: str) -> list[str]:
        return [
            *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={next(ports)}"),
            *(f"--temp-dir={short / folder}", "--object-store-memory=100000000"),
        ]

    with s3_server() as endpoint:
        try:
            at = {"RAY_PORT": head, "RAY_DASHBOARD_PORT": dashboard, "MOEIFY_HOME": "s3://moeify-of-head/runs"}
            at |= in_store(tmp_path) | {"AWS_ENDPOINT_URL": endpoint}
            start("ray_head.sh", "head", at, *node(head_agent, "0"), f"--ray-client-server-port={next(ports)}")
            start(
                "ray_worker.sh",
                "worker",
                {"RAY_HEAD": parts_address(parts["head"], int(head)), "RAY_AGENT_PORT": worker_agent},
                *node(worker_agent, "1"),
                "--num-cpus=1",
            )
            store = {
                "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db",
                "MLFLOW_ARTIFACTS_DESTINATION": "s3://files-of-mlflow",
                "MLFLOW_S3_ENDPOINT_URL": endpoint,
            }
            start("mlflow_server.sh", "mlflow", mlflow_settings(tmp_path, mlflow) | in_store(tmp_path) | store)
            jobs = f"http://127.0.0.1:{dashboard}/api/jobs/"
            assert answer(jobs) == 401
            assert answer(jobs, Authorization="Bearer wrong") == 403
            assert answer(jobs, Authorization=f"Bearer {SECRET}") == 200
            experiments = f"http://127.0.0.1:{mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
            assert answer(experiments) == 401
            basic = base64.b64encode(f"admin:{SECRET}".encode()).decode()
            assert answer(experiments, Authorization=f"Basic {basic}") == 200
            logged = log_a_run(mlflow, tmp_path, monkeypatch)
            there = kept(endpoint)
            assert there["moeify-of-head"] == []
            (name,) = there["files-of-mlflow"]
            assert name.endswith(f"/{logged}/artifacts/note.txt")
        finally:
            shutil.rmtree(short, ignore_errors=True)


def parts_address(head: subprocess.Popen[bytes], port: int) -> str:
    """Return where the head's node listens: Ray takes the machine's own address, whatever that is."""
    commands = [" ".join(child.cmdline()) for child in psutil.Process(head.pid).children(recursive=True)]
    (address,) = {
        word.partition("=")[2] for line in commands for word in line.split() if word.startswith("--node-ip-address=")
    }
    return f"{address}:{port}"


# --- on a read-only root ------------------------------------------------------------------------------------

LIKE_A_CONTAINER = """
set -eu
mount --bind "$SCRIPTS" /media
mount --bind "$VOLUME" /srv
mount -t tmpfs -o mode=1777 tmpfs /tmp
if [ -n "$CLOSED" ]; then
  mkdir /tmp/python
  mount --bind "$PYTHON" /tmp/python
  mount -t tmpfs -o mode=755 tmpfs "$CLOSED"
  mkdir -p "$PYTHON"
  mount --move /tmp/python "$PYTHON"
  rmdir /tmp/python
fi
mount -o remount,bind,ro /media
mount -o remount,bind,ro /
cd /tmp
exec setpriv --reuid=1000 --regid=1000 --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""
WRITABLE = """
import os, sys
for place in sys.argv[1:]:
    try:
        open(os.path.join(place, "probe"), "w").close()
        print(place)
    except OSError:
        pass
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_every_part_is_well_on_a_read_only_root_as_user_1000_without_a_capability(
    plain: dict[str, str], start: Callable[..., None], tmp_path: Path
) -> None:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root may lay out such a place")
    volume = tmp_path / "volume"
    volume.mkdir()
    for name in ("token", "password", "flask"):
        shutil.copy(tmp_path / name, volume)
    for path in (volume, *volume.iterdir()):
        os.chown(path, 1000, 1000)
    plain |= {"SCRIPTS": str(BIN), "VOLUME": str(volume), "HOME": "/tmp", "MOEIFY_HOME": "/srv"}
    plain["RAY_AUTH_TOKEN_PATH"] = "/srv/token"
    python = Path(sys.base_prefix).resolve()
    closed = [str(path) for path in python.parents if not path.stat().st_mode & 0o001]  # root's own home, it may be
    plain |= {"PYTHON": str(python), "CLOSED": closed[-1] if closed else ""}
    within = ["unshare", "--mount", "--propagation=private", "sh", "-c", LIKE_A_CONTAINER, "sh"]
    places = ("/", "/etc", "/media", "/opt", "/usr", "/var/tmp", "/srv", "/tmp")
    probed = run([*within, sys.executable, "-c", WRITABLE, *places], plain)
    if probed.returncode:
        pytest.skip(f"this machine lets nobody lay out such a place: {probed.stderr[-200:]}")
    assert probed.stdout.split() == ["/srv", "/tmp"]

    there = {"within": within, "scripts": Path("/media")}
    ports = _free_ports()
    head, dashboard, head_agent, worker_agent, mlflow = (str(next(ports)) for _ in range(5))

    def node(agent: str) -> list[str]:
        taken = (f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={next(ports)}")
        return [*taken, "--object-store-memory=100000000"]

    at = {"RAY_PORT": head, "RAY_DASHBOARD_PORT": dashboard}
    client = f"--ray-client-server-port={next(ports)}"
    start("ray_head.sh", "head", at, "--node-ip-address=127.0.0.1", client, *node(head_agent), **there)
    at = {"RAY_HEAD": f"127.0.0.1:{head}", "RAY_AGENT_PORT": worker_agent, "RAY_WORKER_CPUS": "1"}
    start("ray_worker.sh", "worker", at, "--node-ip-address=127.0.0.1", *node(worker_agent), **there)
    store = {"MLFLOW_BACKEND_STORE_URI": "sqlite:////tmp/mlflow.db", "MLFLOW_ARTIFACTS_DESTINATION": "/tmp/artifacts"}
    start("mlflow_server.sh", "mlflow", mlflow_settings(Path("/srv"), mlflow) | store, **there)
    jobs = f"http://127.0.0.1:{dashboard}/api/jobs/"
    assert answer(jobs, Authorization=f"Bearer {SECRET}") == 200


# --- with a PostgreSQL --------------------------------------------------------------------------------------


@pytest.fixture
def postgres() -> Iterator[dict[str, str]]:
    """A PostgreSQL as compose's image makes it: account and database ``mlflow``, a password for who comes by network.

    The environment of clients inside, which come by its socket.
    """
    pytest.importorskip("psycopg2")
    found = [Path(path).parent for path in (shutil.which("initdb"),) if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
    if not found:
        pytest.skip("PostgreSQL's programs are not installed")
    port = next(_free_ports())
    place = Path(tempfile.mkdtemp(prefix="moeify-postgres-"))
    other = {"user": "nobody"} if os.geteuid() == 0 else {}  # it refuses to be root
    if other:
        shutil.chown(place, **other)
    environment = {"PATH": f"{found[0]}:{BINARIES}:/usr/bin:/bin", "PGHOST": str(place), "PGPORT": str(port)}
    (place / "password").write_text(SECRET)
    asks = ["--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={place / 'password'}"]
    made = run(["initdb", "--username=mlflow", *asks, "-D", place / "data"], environment, cwd=place, **other)
    assert made.returncode == 0, made.stderr
    with (place / "log").open("wb") as log:
        server = subprocess.Popen(
            [found[0] / "postgres", "-D", place / "data", "-h", "127.0.0.1", "-p", str(port), "-k", str(place)],
            env=environment,
            cwd=place,
            stdout=log,
            stderr=log,
            **other,
        )
    try:
        how, *asked = read(DOCKER / "compose.yaml")["services"]["db"]["healthcheck"]["test"]
        assert how == "CMD"
        deadline = time.monotonic() + 60
        while run(asked, environment).returncode:
            assert server.poll() is None, (place / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert run(["createdb", "-U", "mlflow", "mlflow"], environment).returncode == 0
        yield environment
    finally:
        end(server, how=signal.SIGINT)
        shutil.rmtree(place)


def of_the_guide(begun: str) -> str:
    """Return what the guide has a container of compose run, which begins so."""
    text = (DOCKER / "README.md").read_text(encoding="utf-8")
    pattern = rf"^.*?docker compose -f docker/compose\.yaml \S+ (?:-T|--rm) \S+ ({begun}[^`\n]*)(?:`|$)"
    (command,) = re.findall(pattern, text, re.MULTILINE)
    return command


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mlflow_keeps_its_runs_in_postgresql_and_dump_restore_and_upgrade_are_as_the_guide_says(
    postgres: dict[str, str],
    parts: Parts,
    plain: dict[str, str],
    start: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = str(next(_free_ports()))
    named = read(DOCKER / "compose.yaml")["services"]["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
    there = named.replace("@db:5432/", f"@127.0.0.1:{postgres['PGPORT']}/")
    assert there != named
    settings = mlflow_settings(tmp_path, port) | {
        "DATABASE_PASSWORD_FILE": str(tmp_path / "password"),
        "MLFLOW_ARTIFACTS_DESTINATION": str(tmp_path / "artifacts"),
        "MLFLOW_BACKEND_STORE_URI": there,
    }
    start("mlflow_server.sh", "mlflow", settings)
    logged = log_a_run(port, tmp_path, monkeypatch)
    assert SECRET not in (tmp_path / "mlflow.log").read_text()
    end(parts.pop("mlflow"))

    def rows(question: str) -> str:
        return run(["psql", "-U", "mlflow", "-d", "mlflow", "-Atc", question], postgres).stdout.strip()

    metrics = "SELECT key, value FROM metrics"
    assert rows(metrics) == "loss|0.5"
    dump, restore = of_the_guide("pg_dump"), of_the_guide("pg_restore")
    assert dump.endswith("> mlflow.dump")
    assert restore.endswith("< mlflow.dump")
    for command in (dump, f"psql -q -U mlflow -d mlflow -c 'DELETE FROM metrics' && {restore}"):
        done = run(["sh", "-c", command], postgres, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert rows(metrics) == "loss|0.5"
    assert rows("SELECT run_uuid FROM runs") == logged
    done = run(["sh", "-c", of_the_guide("sh -c")], plain | settings, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert rows(metrics) == "loss|0.5"


# --- KubeRay's job ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1000)
def test_a_rayjobs_next_try_goes_on_with_the_run_of_the_one_that_died(plain: dict[str, str], tmp_path: Path) -> None:
    entrypoint = read(DOCKER / "kuberay" / "rayjob.yaml")["spec"]["entrypoint"]
    folder = tmp_path / entrypoint.split()[-1]
    environment = plain | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_AUTH_TOKEN_PATH")
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(["sh", "-c", f"exec {entrypoint}"], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while not list(folder.glob("checkpoints/[0-9]*")):
            assert first.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.5)
    finally:
        end(first, how=signal.SIGKILL)
    assert not (folder / "result.json").exists()
    done = run(["sh", "-c", entrypoint], environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "result.json").exists()
    assert "resumed: " in done.stdout
    kinds = [json.loads(line)["kind"] for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert kinds[-1] == "finished"
