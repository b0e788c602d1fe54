"""Start a run's workers and wait for them: on Ray, or in this very process.

One worker group lives through the whole run, so Ray's start is paid once.
"""

import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from moeify.events import Failed
from moeify.recipe.config import Cluster, RunConfig
from moeify.storing import StorageError
from pipelines.drawing import Drawing
from pipelines.journal import Follower, JournalError, follow
from pipelines.ray_cluster import RunFailedError, cluster, told
from pipelines.restarts import fit_again
from pipelines.runs import RunFolder, cache, hold, shelf
from pipelines.standing import last_heard
from pipelines.stopping import asking, stoppable
from pipelines.tracking import MlflowFollower
from pipelines.url_journal import journal_of
from pipelines.wording import counted

if TYPE_CHECKING:
    from pipelines.worker import Failure

Worker = Callable[[dict[str, Any]], None]


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
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from pipelines.rendezvous import NodeTorchConfig
    from pipelines.worker import failure_of, failure_path, guarded

    def settled(raised: Mapping[int, Exception]) -> bool:
        with suppress(StorageError):
            if failure_of(payload) is not None:
                return True
        if not folder.remote:  # behind a URL it may be there again; a full disk takes not even the failure
            for error in raised.values():
                if isinstance(error, StorageError):
                    raise error
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
            torch_config=NodeTorchConfig(backend="cpu:gloo,cuda:nccl" if wanted.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=wanted.workers,
                use_gpu=bool(wanted.gpus),
                resources_per_worker={"CPU": wanted.threads, "GPU": wanted.gpus},
            ),
            run_config=RayRunConfig(
                name=secrets.token_hex(4),  # Ray silently continues a fit of the same name; our own store does that
                storage_path=str(scratch),
            ),
        )

    try:
        with stoppable():  # once more: Ray has set its handlers since
            fit_again(trainer, wanted.retries, settled)
    except TrainingFailedError as error:
        again = f", and died again on each of {counted(wanted.retries, 'restart')}" if wanted.retries else ""
        raise RunFailedError(
            f"the workers of {folder.id} died{again} ({told(error)}); "
            f"last heard of: {last_heard(folder) or 'nothing'}; "
            f"'moeify resume {folder.id}' goes on from the last checkpoint"
        ) from error
    except RayError as error:  # not a worker's end: that of what watches the workers, or of the cluster
        raise RunFailedError(
            f"Ray broke down under {folder.id} ({told(error)}); "
            f"'moeify resume {folder.id}' goes on from the last checkpoint"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if failure := failure_of(payload):
        raise _raised(failure)


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
                journal.emit(Failed(id=f"failed/{now:.3f}", time=now, reason=told(error)))
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
    order = Order(
        folder=folder.path.absolute(),
        base=base.absolute(),
        cache=cache(),
        shelf=shelf("text"),
        config=config,
        url=url,
    )
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
