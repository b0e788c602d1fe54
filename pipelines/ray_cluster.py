"""Have a Ray cluster to work on: the one there is, or a private one on this machine that is gone afterwards.

Nothing of a private cluster is written outside a temporary folder. The token that lets processes into it lives there.
"""

import gc
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moeify.recipe.config import Cluster
from pipelines.one_line import one_line
from pipelines.wording import counted

LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 100 * 10**6
"""Workers hand one another nothing through Ray: the smallest store that it starts with, and some."""
_LONGEST_TEMPORARY = 40
"""Characters of a temporary folder's path that leave room for Ray's sockets (107 in all)."""
_PREFIX = "moeify-"
_CLAIM = "driver.lock"
"""File in a temporary folder that its driver holds locked for as long as it lives."""
_FRESH_SECONDS = 60.0
"""Age up to which a folder is left alone: its driver may be about to lock the claim."""
_PATIENCE = 30.0
"""Seconds that a GPU which others use is waited for, to try it."""

_SLOW = "timed out during startup"
"""What Ray says of a node that took too long."""
_QUICK = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""What Ray Train need not do for one group of workers: it starts and ends in half the time."""
_PRIVATE = {
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""What a cluster of one run can do without: idle workers kept ready, figures for a dashboard that it has not, and
listening to other machines."""
_STEADY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(512 * 2**20),
    "OMP_WAIT_POLICY": "passive",
    "RAY_worker_niceness": "0",
}
"""For the workers' arithmetic: freed activations stay for the next step (thousands of page faults a step less), torch
threads that wait leave the core to whoever has work, and on a busy machine workers get their share (Ray's own niceness
of 15 leaves them a thirtieth of what another process gets)."""


class RunFailedError(RuntimeError):
    """Workers died too often, or hit an error that is no fault of recipe or data."""


class RayStartError(OSError):
    """Ray could not be started on this machine, or the cluster that is named could not be joined."""


@contextmanager
def cluster(wanted: Cluster, *, keep_logs: Path) -> Iterator[None]:
    """Have a Ray cluster that holds ``wanted``: the one that is connected, that of ``RAY_ADDRESS``, or a private one.

    A private cluster counts at least as many cores as the recipe asks for: with fewer real ones, workers take turns.
    It is gone afterwards; when it did not start, or the body raised ``RunFailedError``, its logs are moved to
    ``keep_logs``. Raises ``RayStartError``.
    """
    with _environment(_QUICK):
        import ray

        if ray.is_initialized():
            _check_room(wanted)
            yield
        elif address := os.environ.get("RAY_ADDRESS"):
            if "://" in address and not address.startswith("ray://"):
                raise ValueError(f"RAY_ADDRESS is a job API, {address}; use 'moeify submit', or unset it to run here")
            try:
                with _explained(
                    f"the Ray cluster at {address} (RAY_ADDRESS) cannot be joined", "start it, or unset it"
                ):
                    ray.init(log_to_driver=False, logging_level="ERROR")
                _check_room(wanted)
                yield
            finally:
                _shut_down()
        else:
            with _private_cluster(wanted, keep_logs):
                yield


@contextmanager
def _private_cluster(wanted: Cluster, keep_logs: Path) -> Iterator[None]:

    place = Path(tempfile.gettempdir() if len(tempfile.gettempdir()) <= _LONGEST_TEMPORARY else "/tmp")
    clear_leftovers(place)
    temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    claim = FileLock(temporary / _CLAIM)
    claim.acquire()
    try:
        threads = {"OMP_NUM_THREADS": str(wanted.threads)}
        with _environment(_PRIVATE | _STEADY | _importable() | _token(temporary) | threads), _on_loopback():
            try:
                _start(
                    address="local",
                    _node_ip_address=LOOPBACK,
                    num_cpus=max(wanted.workers * wanted.threads, os.cpu_count() or 1),
                    num_gpus=None if wanted.gpus else 0,  # None: as many as there are
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _temp_dir=str(temporary),
                )
                if wanted.gpus:
                    _check_room(wanted)
                yield
            finally:
                _shut_down()
    except (RunFailedError, RayStartError):
        shutil.rmtree(keep_logs, ignore_errors=True)
        with suppress(OSError):
            shutil.copytree(temporary / "session_latest" / "logs", keep_logs)
        raise
    finally:
        claim.release()
        shutil.rmtree(temporary, ignore_errors=True)


def _shut_down() -> None:
    """Shut Ray down, its garbage first, and collect none meanwhile: a reference to an object of Ray's that another
    thread lets go of while it shuts down has Ray end the whole process, with exit code 1 and no word of the run."""
    import ray

    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if collecting:
            gc.enable()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray stay with loopback, which it else takes for the machine's public address; see ``loopback_node``."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _start(**settings: Any) -> None:
    """Start Ray on this machine. It gives up on a node that is not up in 30 s, as happens on a busy machine; then it is
    tried once more."""
    import ray

    with _explained(
        "Ray did not start on this machine", "try again when it is less busy; 'moeify run --local' needs no Ray"
    ):
        try:
            ray.init(**settings)
        except Exception as error:
            if _SLOW not in str(error):
                raise
            _shut_down()
            ray.init(**settings)


@contextmanager
def _explained(what: str, way_out: str) -> Iterator[None]:
    """Tell in one line what Ray raises as it starts: plain ``Exception`` for a slow node, and whatever else."""
    try:
        yield
    except Exception as error:
        raise RayStartError(f"{what} ({told(error)}); {way_out}") from error


def clear_leftovers(place: Path) -> None:
    """Remove temporary folders whose driver was killed: nobody holds their claim any more."""
    for folder in place.glob(f"{_PREFIX}*"):
        claim = folder / _CLAIM
        with suppress(OSError, Timeout):
            ours = folder.stat().st_uid == os.getuid() and not folder.is_symlink()
            if ours and time.time() - claim.stat().st_mtime > _FRESH_SECONDS:
                with FileLock(claim, timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)


def _check_room(wanted: Cluster) -> None:
    """Refuse what the cluster can never hold; Ray would wait for it without a word."""
    import ray

    asked = {"CPU": wanted.threads, "GPU": wanted.gpus}
    nodes = [{kind: int(node["Resources"].get(kind, 0)) for kind in asked} for node in ray.nodes() if node["Alive"]]
    room = [min(node[kind] // number for kind, number in asked.items() if number) for node in nodes]
    if sum(room) < wanted.workers:
        cores, gpus = (sorted((node[kind] for node in nodes), reverse=True) for kind in asked)
        each, have = counted(wanted.threads, "core"), f"{cores} cores"
        way_out = "lower cluster.workers or cluster.threads"
        if wanted.gpus:
            each, have, way_out = f"{each} and a GPU", f"{have} and {gpus} GPUs", f"{way_out}, or set cluster.gpus: 0"
        raise ValueError(
            f"{counted(wanted.workers, 'worker')} of {each} will never fit into the cluster, whose nodes have {have}; "
            f"{way_out}"
        )
    if wanted.gpus:
        _check_gpu(wanted)


def _check_gpu(wanted: Cluster) -> None:
    """Refuse GPUs that torch cannot use before a group is made of workers that all find the same.

    Where none is free, those who are given one later will say so.
    """
    import ray

    found = ray.remote(num_gpus=wanted.gpus)(_trouble).remote(wanted.gpus)
    ready, _ = ray.wait([found], timeout=_PATIENCE)
    if not ready:
        ray.cancel(found)
        return
    with _explained("a GPU of the cluster could not be tried", "see its nodes' logs, or set cluster.gpus: 0"):
        trouble = ray.get(found)
    if trouble:
        raise ValueError(trouble)


def _trouble(gpus: int) -> str | None:
    """Return what keeps this process from using the GPU that it was lent; None: nothing does."""
    from moeify.device import take_device

    try:
        take_device(gpus)
    except ValueError as error:
        return str(error)
    return None


def _importable() -> dict[str, str]:
    """Let workers import these packages from where this process did, installed or not."""
    root = str(Path(__file__).resolve().parents[1])
    return {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


@lru_cache(maxsize=1)
def _secret() -> str:
    """One secret a process, since Ray reads a token once a process."""
    return secrets.token_hex(32)


def _token(temporary: Path) -> dict[str, str]:
    """Keep strangers on this machine out of the private cluster, and Ray out of the home folder.

    Ray would write its token to ``~/.ray``. What the user has set about tokens stands.
    """
    if any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return {}
    path = temporary / "token"
    path.touch(mode=0o600)
    path.write_text(_secret(), encoding="ascii")
    return {"RAY_AUTH_TOKEN_PATH": str(path)}


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that the body starts; restore them afterwards.

    Ray itself sets ``RAY_AUTH_MODE`` as it starts a cluster; that is restored too.
    """
    before = {name: os.environ.get(name) for name in (*settings, "RAY_AUTH_MODE")}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def told(error: BaseException) -> str:
    """Return what Ray says of workers that died, or what one that had no memory left says itself.

    Where one was killed, the others raise too, of a peer that is gone: that is not what happened.
    """
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        if isinstance(failure, MemoryError):
            return str(failure)
    for rank, failure in failures.items():
        if (death := getattr(failure, "health_check_failure", None)) is not None:
            return f"worker {rank}: {_death(death)}"
    return one_line(error)


def _death(error: Exception) -> str:
    """Return how a worker's process ended, of which Ray says more than fits a line."""
    said = str(error)
    if "NODE_OUT_OF_MEMORY" in said or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; Ray ended it before its machine would have"
    if "SYSTEM_ERROR" in said:
        return "it was killed, as a machine does that is out of memory (see its dmesg), or crashed"
    return one_line(error)
