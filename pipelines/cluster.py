"""A Ray cluster of several processes on this machine, with its job API and an MLflow server, for trying the service.

Everything binds to loopback and asks for a token. What was started is written down, process by process with its start
time, so that it is ended exactly and nothing else is: a number that another process has got since is left alone.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.mlflow_store import artifact_root, lay_out
from pipelines.ray_cluster import LOOPBACK
from pipelines.runs import told_home

_START_SECONDS = 180.0
"""Time to answer that each process is given."""
_END_SECONDS = 20.0
"""Time to end in order; then they are killed."""
_ORPHAN_SECONDS = 5.0
"""The same for what parents that have ended leave behind."""
_OBJECT_STORE_BYTES = 100 * 10**6
"""Of each node; workers hand one another nothing through Ray."""
_PORTS = (20_000, 32_000)
"""Where free ports are sought: beyond those that Ray gives its workers, below those that outgoing connections get."""

_NEEDED = ("aiohttp_cors", "opencensus", "prometheus_client")
"""Without them Ray starts no job API, and says so nowhere."""
_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a name from history; see pipelines.loopback_node
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
_UNSET = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR")
"""Of the caller's environment: they name another cluster."""


class Process(BaseModel):
    """One process that was started."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    pid: int
    started: float
    """Seconds since 1970, as the system says: tells this process from a later one with its number."""


class LocalCluster(BaseModel):
    """What runs, and where; kept as ``cluster.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    nodes: int
    cores: int
    """That each node counts."""
    gpus: int = 0
    """GPUs that each node has of this machine's."""
    api: str
    """Address of the job API and the dashboard."""
    mlflow: str
    """Address of the MLflow server."""
    home: Path
    """Folder of all runs."""
    temporary: Path
    """Ray's own folder."""
    processes: tuple[Process, ...] = ()

    @property
    def token(self) -> Path:
        """File with the token."""
        return folder(self.home) / "token"

    @property
    def exports(self) -> dict[str, str]:
        """Environment of a shell that works with the cluster."""
        return {
            "RAY_API_SERVER_ADDRESS": self.api,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MOEIFY_HOME": told_home(self.home),
        }


def folder(home: Path) -> Path:
    """Return where a local cluster keeps its record, its token and its logs: beside the runs."""
    return home / ".cluster"


def up(home: Path, nodes: int, cores: int | None = None, gpus: int = 0) -> LocalCluster:
    """Start a cluster and return once it answers; it lives on when this process ends.

    ``cores``: what each node counts, real or not; None: an equal share of this machine's, at least one. ``gpus``: how
    many of this machine's each node has for itself.

    Raises:
        ValueError: there is one already.
        OSError: a process of it ended, or does not answer; nothing is left of it.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ValueError(f"Ray's dashboard lacks {', '.join(missing)}; install it with: pip install 'ray[default]'")
    place = folder(home)
    place.mkdir(parents=True, exist_ok=True)
    with _alone(place):
        if (known := _read(place)) and any(map(_alive, known.processes)):
            raise ValueError(f"a cluster is up at {known.api}; end it with 'moeify cluster down'")
        _clear(place, known)
        lay_out(f"sqlite:///{(home / 'mlflow.db').absolute()}", home)
        (place / "token").touch(mode=0o600)
        (place / "token").write_text(secrets.token_hex(32), encoding="ascii")
        ports = _free_ports()
        cluster = LocalCluster(
            nodes=nodes,
            cores=cores or max(1, (os.cpu_count() or 1) // nodes),
            gpus=gpus,
            api=f"http://{LOOPBACK}:{next(ports)}",
            mlflow=f"http://{LOOPBACK}:{next(ports)}",
            home=home,
            temporary=Path(tempfile.mkdtemp(prefix="moeify-cluster-", dir="/tmp")),  # short: it holds Ray's sockets
        )
        try:
            for name, command in commands(cluster, ports).items():
                cluster = _start(cluster, place, name, command)
        except BaseException:
            _end((_read(place) or cluster).processes)  # with the one that did not start
            _clear(place, cluster, keep_logs=True)
            raise
        cluster = cluster.model_copy(update={"processes": tuple(_family(p.pid for p in cluster.processes))})
        _write(place, cluster)
    return cluster


def down(home: Path) -> int:
    """End the cluster that ``up`` started there; return how many processes that took.

    Raises:
        ValueError: none was started.
    """
    place = folder(home)
    if not place.is_dir() or (known := _read(place)) is None:
        raise ValueError(f"no local cluster was started for {home}; see 'moeify cluster up'")
    with _alone(place):
        ended = _end(known.processes)
        _clear(place, known)
    return ended


def commands(cluster: LocalCluster, ports: Iterator[int]) -> dict[str, list[str]]:
    """Return the argument list of every process, the head first."""
    ray = [sys.executable, "-m", "pipelines.loopback_node", "start", "--block", "--disable-usage-stats"]
    gcs = f"{LOOPBACK}:{next(ports)}"

    def node(number: int) -> list[str]:
        return [
            f"--node-ip-address={LOOPBACK}",
            f"--temp-dir={cluster.temporary / str(number)}",
            f"--num-cpus={cluster.cores}",
            f"--num-gpus={cluster.gpus}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            f"--dashboard-agent-listen-port={next(ports)}",
            f"--metrics-export-port={next(ports)}",
        ]

    head = [
        *ray,
        "--head",
        f"--port={gcs.rpartition(':')[2]}",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={_port(cluster.api)}",
        f"--ray-client-server-port={next(ports)}",
        "--include-dashboard=true",
        *node(0),
    ]
    mlflow = [
        *(sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(_port(cluster.mlflow))),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{cluster.home / 'mlflow.db'}"),
        *("--default-artifact-root", artifact_root(cluster.home)),  # so that runs without the server reach it too
        *("--artifacts-destination", str(cluster.home / "mlartifacts")),  # of experiments from before
    ]
    workers = {f"worker-{number}": [*ray, f"--address={gcs}", *node(number)] for number in range(1, cluster.nodes)}
    return {"head": head, **workers, "mlflow": mlflow}


def _environment(cluster: LocalCluster) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    binaries = str(Path(sys.executable).parent)
    ports = _free_ports()
    return {
        **{name: value for name, value in os.environ.items() if name not in _UNSET},
        **_SETTINGS,
        **{name: str(next(ports)) for name in ("DASHBOARD_METRIC_PORT", "AUTOSCALER_METRIC_PORT")},  # else fixed ones
        **{name: value for name, value in cluster.exports.items() if name != "RAY_API_SERVER_ADDRESS"},
        "PATH": os.pathsep.join(filter(None, (binaries, os.environ.get("PATH")))),
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }


def _visible(cluster: LocalCluster, name: str) -> dict[str, str]:
    """Return which GPUs a process sees: of those that this one does, a node's are no other node's."""
    if not cluster.gpus or name == "mlflow":
        return {}
    first = cluster.gpus * (0 if name == "head" else int(name.rpartition("-")[2]))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = named.split(",") if named else [str(place) for place in range(cluster.gpus * cluster.nodes)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(there[first : first + cluster.gpus])}


def _spawn(log: Path, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=log.parent,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )


def _start(cluster: LocalCluster, place: Path, name: str, command: list[str]) -> LocalCluster:
    """Start one process and return the cluster with it once it answers.

    Ray gives up on a node that is not up in 30 s, as happens on a busy machine; then it is started again.
    """
    log = place / f"{name}.log"
    before = cluster.processes
    deadline = time.monotonic() + _START_SECONDS
    while True:
        process = _spawn(log, command, _environment(cluster) | _visible(cluster, name))
        cluster = cluster.model_copy(update={"processes": (*before, *_family([process.pid]))})
        _write(place, cluster)
        try:
            while process.poll() is None:
                if _answers(cluster, name):
                    return cluster
                if time.monotonic() > deadline:
                    raise OSError(f"{name} did not answer in {_START_SECONDS:g} s; its log is {log}")
                time.sleep(0.25)
        finally:
            process.returncode = process.poll() or 0  # it outlives this process: nobody here waits for it
        if "timed out during startup" not in (text := log.read_text(encoding="utf-8", errors="replace")):
            last = text.strip().rpartition("\n")[2][:200]
            raise OSError(f"{name} ended while it started ({last}); its log is {log}")


def _answers(cluster: LocalCluster, name: str) -> bool:
    """Whether MLflow answers, or every Ray node that was started so far has joined."""
    if name == "mlflow":
        return _get(f"{cluster.mlflow}/health", {}) is not None
    header = {"Authorization": f"Bearer {cluster.token.read_text(encoding='ascii')}"}
    body = _get(f"{cluster.api}/nodes?view=summary", header)
    with suppress(ValueError, KeyError, TypeError):
        nodes = json.loads(body or b"")["data"]["summary"]
        wanted = 1 if name == "head" else 1 + int(name.rpartition("-")[2])
        return sum(node["raylet"]["state"] == "ALIVE" for node in nodes) >= wanted
    return False


def _get(url: str, headers: dict[str, str]) -> bytes | None:
    with suppress(OSError), urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5.0) as answer:
        return bytes(answer.read())
    return None


# --- processes ----------------------------------------------------------------------------------------


def _family(pids: Iterable[int]) -> Iterator[Process]:
    """Yield these processes and all below them, each once, parents first."""
    seen: set[int] = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for each in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    if each.pid not in seen:
                        yield Process(pid=each.pid, started=each.create_time())
                        seen.add(each.pid)


def _alive(process: Process) -> bool:
    """Whether this very process runs."""
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        return found.create_time() == process.started and found.status() != psutil.STATUS_ZOMBIE
    return False


def _end(recorded: Iterable[Process]) -> int:
    """End these processes and all below them: the parents are asked, and what they leave is killed."""
    alive = [process for process in recorded if _alive(process)]
    family = list(_family(process.pid for process in alive))
    below = {child.pid for process in alive for child in list(_family([process.pid]))[1:]}
    parents = [process for process in alive if process.pid not in below]
    for process in parents:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(process.pid).terminate()
    _await_end(parents, _END_SECONDS)
    _await_end(family, _ORPHAN_SECONDS)
    for process in filter(_alive, family):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(process.pid).kill()
    _await_end(family, _ORPHAN_SECONDS)
    return len(family)


def _await_end(processes: Sequence[Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)


def _free_ports() -> Iterator[int]:
    """Yield ports that nothing listens at, none twice."""
    first, last = _PORTS
    tried: set[int] = set()
    while len(tried) < last - first:
        port = first + secrets.randbelow(last - first)
        if port in tried:
            continue
        tried.add(port)
        with socket.socket() as probe:
            free = True
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                free = False
        if free:
            yield port
    raise OSError(f"no port from {first} to {last} is free")


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


# --- the record ---------------------------------------------------------------------------------------


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    try:
        with FileLock(place / "lock", timeout=0):
            yield
    except Timeout:
        raise ValueError("another 'moeify cluster' is at work here; wait for it") from None


def _read(place: Path) -> LocalCluster | None:
    try:
        return LocalCluster.model_validate_json((place / "cluster.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise ValueError(
            f"{place / 'cluster.json'} is damaged; end the processes named in it by hand and remove it"
        ) from None


def _write(place: Path, cluster: LocalCluster) -> None:
    draft = place / ".cluster.json.draft"
    draft.write_text(cluster.model_dump_json(indent=2) + "\n", encoding="utf-8")
    draft.replace(place / "cluster.json")


def _clear(place: Path, known: LocalCluster | None, *, keep_logs: bool = False) -> None:
    """Remove what a cluster that has ended left."""
    if known:
        shutil.rmtree(known.temporary, ignore_errors=True)
    for name in ("cluster.json", "token"):
        (place / name).unlink(missing_ok=True)
    if not keep_logs:
        for log in place.glob("*.log"):
            log.unlink(missing_ok=True)
