"""Start a run's workers and wait for them: on Ray, or in this very process.

One worker group lives through the whole run, so Ray's start is paid once. Without ``RAY_ADDRESS`` a run starts a
private cluster on this machine and takes it down again; nothing of it outlives the run, and nothing is written outside
the run's folder and a temporary one. The token that lets processes into that cluster lives in the temporary folder.
"""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from filelock import FileLock, Timeout

from moeify.events import Failed
from moeify.recipe.config import Cluster, RunConfig
from moeify.storing import StorageError
from pipelines.drawing import Drawing
from pipelines.journal import Follower, JournalError, follow
from pipelines.one_line import one_line
from pipelines.restarts import fit_again
from pipelines.runs import RunFolder, cache, hold
from pipelines.stopping import asking, stoppable
from pipelines.tracking import MlflowFollower
from pipelines.url_journal import journal_of

if TYPE_CHECKING:
    from pipelines.worker import Failure

Worker = Callable[[dict[str, Any]], None]

_OBJECT_STORE_BYTES = 100 * 10**6
"""Workers hand one another nothing through Ray: the smallest store that it starts with, and some."""
_LONGEST_TEMPORARY = 40
"""Characters of a temporary folder's path that leave room for Ray's sockets (107 in all)."""
_PREFIX = "moeify-"
_CLAIM = "driver.lock"
"""File in a temporary folder that its driver holds locked for as long as it lives."""
_FRESH_SECONDS = 60.0
"""Age up to which a folder is left alone: its driver may be about to lock the claim."""

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
}
"""What a cluster of one run can do without: idle workers kept ready, and figures for a dashboard that it has not."""

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


def on_ray(folder: RunFolder, config: RunConfig, base: Path, followers: Sequence[Follower]) -> None:
    """Run, or run on, with Ray's workers; return once the run has ended.

    Raises:
        ValueError: data or recipe are at fault, in the worker's words; nothing was tried twice.
        OSError: the same of files; or Ray did not start (``RayStartError``).
        RunFailedError: workers died more often than ``cluster.retries``, or the program itself erred.
        KeyboardInterrupt: Ctrl-C; see ``pipelines.stopping``.
    """
    with _driven(folder, config, followers), cluster(config.cluster, keep_logs=folder.path / "ray-logs"):
        from pipelines.worker import work

        with asking(folder):
            fit(folder, config.cluster, work, _order(folder, config, base))


def in_process(folder: RunFolder, config: RunConfig, base: Path, followers: Sequence[Follower]) -> None:
    """Run, or run on, in this process, as one worker without Ray; return once the run has ended.

    Raises RunFailedError where there was not enough memory, KeyboardInterrupt as ``on_ray``.
    """
    with _driven(folder, config, followers):
        from moeify.divergence import OutOfMemoryError
        from moeify.stopping import StoppedError
        from pipelines.worker import work

        try:
            with asking(folder), suppress(StoppedError):
                work(_order(folder, config, base))
        except OutOfMemoryError as error:
            raise RunFailedError(f"{error}; 'moeify resume {folder.id}' goes on from the last checkpoint") from error


def fit(folder: RunFolder, wanted: Cluster, worker: Worker, payload: dict[str, Any]) -> None:
    """Let a group of Ray workers call ``worker(payload)``; the cluster must be up.

    ``payload["folder"]`` is the run's folder. A worker that dies has the whole group started again, ``wanted.retries``
    times; an exception of a worker ends the run at once.
    """
    from ray.exceptions import RayError
    from ray.train import RunConfig as RayRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from pipelines.worker import failure_of, failure_path, guarded

    def settled() -> bool:
        with suppress(StorageError):
            return failure_of(payload) is not None
        return False

    class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
        """Leaves Ctrl-C to those who call, where Ray would abort the workers."""

        def _register_sigint_handler(self, controller: Any) -> None: ...

    def entry(payload: dict[str, Any]) -> None:
        guarded(worker, payload)

    payload = {**payload, "attempt": secrets.token_hex(4)} if folder.remote else payload
    failure_path(folder.path).unlink(missing_ok=True)
    scratch = folder.path / "ray"

    def trainer() -> Trainer:
        return Trainer(
            entry,
            train_loop_config=payload,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=wanted.workers, resources_per_worker={"CPU": wanted.threads}),
            run_config=RayRunConfig(
                name=secrets.token_hex(4),  # Ray silently continues a fit of the same name; our own store does that
                storage_path=str(scratch),
            ),
        )

    try:
        with stoppable():  # once more: Ray has set its handlers since
            fit_again(trainer, wanted.retries, settled)
    except TrainingFailedError as error:
        raise RunFailedError(
            f"the workers of {folder.id} died, and died again on each of {wanted.retries} restarts "
            f"({_said(error)}); 'moeify resume {folder.id}' goes on from the last checkpoint"
        ) from error
    except RayError as error:  # not a worker's end: that of what watches the workers, or of the cluster
        raise RunFailedError(
            f"Ray broke down under {folder.id} ({_said(error)}); "
            f"'moeify resume {folder.id}' goes on from the last checkpoint"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if failure := failure_of(payload):
        raise _raised(failure)


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
            _check_cores(wanted)
            yield
        elif address := os.environ.get("RAY_ADDRESS"):
            if "://" in address and not address.startswith("ray://"):
                raise ValueError(f"RAY_ADDRESS is a job API, {address}; use 'moeify submit', or unset it to run here")
            try:
                with _told(f"the Ray cluster at {address} (RAY_ADDRESS) cannot be joined", "start it, or unset it"):
                    ray.init(log_to_driver=False, logging_level="ERROR")
                _check_cores(wanted)
                yield
            finally:
                ray.shutdown()
        else:
            with _private_cluster(wanted, keep_logs):
                yield


@contextmanager
def _private_cluster(wanted: Cluster, keep_logs: Path) -> Iterator[None]:
    import ray

    place = Path(tempfile.gettempdir() if len(tempfile.gettempdir()) <= _LONGEST_TEMPORARY else "/tmp")
    clear_leftovers(place)
    temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    claim = FileLock(temporary / _CLAIM)
    claim.acquire()
    try:
        threads = {"OMP_NUM_THREADS": str(wanted.threads)}
        with _environment(_PRIVATE | _STEADY | _importable() | _token(temporary) | threads):
            try:
                _start(
                    address="local",
                    num_cpus=max(wanted.workers * wanted.threads, os.cpu_count() or 1),
                    num_gpus=0,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _temp_dir=str(temporary),
                )
                yield
            finally:
                ray.shutdown()
    except (RunFailedError, RayStartError):
        shutil.rmtree(keep_logs, ignore_errors=True)
        with suppress(OSError):
            shutil.copytree(temporary / "session_latest" / "logs", keep_logs)
        raise
    finally:
        claim.release()
        shutil.rmtree(temporary, ignore_errors=True)


def _start(**settings: Any) -> None:
    """Start Ray on this machine. It gives up on a node that is not up in 30 s, as happens on a busy machine; then it is
    tried once more."""
    import ray

    with _told(
        "Ray did not start on this machine", "try again when it is less busy; 'moeify run --local' needs no Ray"
    ):
        try:
            ray.init(**settings)
        except Exception as error:
            if _SLOW not in str(error):
                raise
            ray.shutdown()
            ray.init(**settings)


@contextmanager
def _told(what: str, way_out: str) -> Iterator[None]:
    """Tell in one line what Ray raises as it starts: plain ``Exception`` for a slow node, and whatever else."""
    try:
        yield
    except Exception as error:
        raise RayStartError(f"{what} ({_said(error)}); {way_out}") from error


def clear_leftovers(place: Path) -> None:
    """Remove temporary folders whose driver was killed: nobody holds their claim any more."""
    for folder in place.glob(f"{_PREFIX}*"):
        claim = folder / _CLAIM
        with suppress(OSError, Timeout):
            ours = folder.stat().st_uid == os.getuid() and not folder.is_symlink()
            if ours and time.time() - claim.stat().st_mtime > _FRESH_SECONDS:
                with FileLock(claim, timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _driven(folder: RunFolder, config: RunConfig, followers: Sequence[Follower]) -> Iterator[None]:
    """Hold the run, have its journal followed, and note in it how an attempt failed.

    The note is the driver's, for only the driver outlives every worker; workers must have let go of the journal.
    """
    with stoppable(), hold(folder), follow(folder.journal, [*followers, *_own_followers(folder, config)]):
        try:
            yield
        except Exception as error:
            now = time.time()
            with suppress(OSError, JournalError), journal_of(folder) as journal:
                journal.emit(Failed(id=f"failed/{now:.3f}", time=now, reason=_said(error)))
            raise
        finally:
            if folder.remote:  # what workers wrote last, before followers are told that it was all
                with suppress(OSError):
                    folder.remote.catch_up()


def _own_followers(folder: RunFolder, config: RunConfig) -> tuple[Follower, Follower]:
    """Return what draws a run, and what tells MLflow of it and hands it the drawings."""
    drawing = Drawing(folder)
    return drawing, MlflowFollower(folder, config, drawing, machine=True)


def _order(folder: RunFolder, config: RunConfig, base: Path) -> dict[str, Any]:
    from pipelines.worker import Order

    url = folder.remote.place.url if folder.remote else None
    order = Order(folder=folder.path.absolute(), base=base.absolute(), cache=cache(), config=config, url=url)
    return order.model_dump(mode="json")


def _raised(failure: "Failure") -> Exception:
    """Turn a worker's failure into what the driver raises: one line for people, the traceback as a note."""
    error: Exception
    match failure.family:
        case "value":
            error = ValueError(failure.message)
        case "os":
            error = OSError(failure.message)
        case "program":
            error = RunFailedError(f"{failure.kind}: {failure.message}")
        case _:
            assert_never(failure.family)
    error.add_note(failure.trace)
    return error


def _check_cores(wanted: Cluster) -> None:
    """Refuse what the cluster can never hold; Ray would wait for it without a word."""
    import ray

    cores = sorted((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), reverse=True)
    if sum(count // wanted.threads for count in cores) < wanted.workers:
        raise ValueError(
            f"{wanted.workers} workers of {wanted.threads} cores do not fit into the cluster, whose nodes have "
            f"{cores} cores; lower cluster.workers or cluster.threads"
        )


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


def _said(error: BaseException) -> str:
    """Return what Ray says of workers that died, or what one that had no memory left says itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(failure, MemoryError):
            return str(failure)
    return one_line(error)
