"""Jobs side by side on Ray, a core each, as many at a time as there are cores; one that fails stops no other."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moeify.recipe.config import Cluster
from pipelines.one_line import one_line
from pipelines.ray_cluster import RunFailedError, cluster
from pipelines.stopping import stoppable
from pipelines.worker import Failure

Job = TypeVar("Job")
Payload = dict[str, Any]
"""What travels to a worker and back: JSON-ready."""


@dataclass(frozen=True)
class Broken:
    """A job that failed."""

    reason: str
    """One line."""


def run_pool(
    work: Callable[[Payload], Payload],
    queues: Iterable[Sequence[Job]],
    order: Callable[[Job], Payload],
    ended: Callable[[Job, Payload | Broken, int], None],
    *,
    traces: Path,
    retries: int,
    gpus: int = 0,
) -> None:
    """Have workers do every job, and call ``ended`` after each with what it gave and how many run at a time.

    A queue's first job makes what its others share (twins), so those wait for it; where it fails, the next one is the
    first. ``work``: a function of a module, whose body is ``answered``. ``traces``: the folder of the tracebacks of
    jobs that fail. ``gpus``: those that each job has besides its core.
    """
    one = Cluster(workers=1, threads=1, gpus=gpus)
    with stoppable(), cluster(one, keep_logs=traces / "ray-logs"), stoppable():  # Ray sets handlers of its own
        import ray

        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=retries)(work)
        running: dict[Any, tuple[Job, deque[Job]]] = {}

        def start(queue: deque[Job]) -> None:
            job = queue.popleft()
            running[task.remote(order(job))] = (job, queue)

        for waiting in map(deque, queues):
            if waiting:
                start(waiting)
        there = ray.cluster_resources()
        at_once = int(min(there.get("CPU", 1), there["GPU"] / gpus if gpus else math.inf))
        try:
            while running:
                (ready,), _ = _waited(list(running))
                job, queue = running.pop(ready)
                answer = _answer(ready, traces / f"{job}.txt")
                while queue:
                    start(queue)
                    if isinstance(answer, Broken):
                        break
                ended(job, answer, at_once)
        finally:
            for each in running:  # stopped in the middle: on a cluster that lives on, too
                ray.cancel(each, force=True)


def run_here(
    work: Callable[[Payload], Payload],
    queues: Iterable[Sequence[Job]],
    order: Callable[[Job], Payload],
    ended: Callable[[Job, Payload | Broken, int], None],
    *,
    traces: Path,
) -> None:
    """Do every job in this process, queue by queue, without Ray; otherwise as ``run_pool``."""
    with stoppable():
        for job in (job for queue in queues for job in queue):
            ended(job, _told(work(order(job)), traces / f"{job}.txt"), 1)


def answered(work: Callable[[], Payload]) -> Payload:
    """Do a job in a Ray worker; what fails is returned as a ``Failure``: it would fail again."""
    try:
        return work()
    except Exception as error:
        return {"failure": Failure.of(error).model_dump(mode="json")}


def _waited(running: list[Any]) -> tuple[list[Any], list[Any]]:
    """Wait for one task; ``RunFailedError`` where Ray itself is gone."""
    import ray

    try:
        return ray.wait(running, num_returns=1)
    except ray.exceptions.RayError as error:
        said = one_line(error, 200)
        raise RunFailedError(f"Ray broke down ({said}); go on with the same command") from error


def _answer(ready: Any, trace: Path) -> Payload | Broken:
    """Return what a task gave."""
    import ray

    try:
        answer: Payload = ray.get(ready)
    except ray.exceptions.RayError as error:
        trace.unlink(missing_ok=True)
        return Broken(f"its worker died, on each retry too: killed, or out of memory ({type(error).__name__})")
    return _told(answer, trace)


def _told(answer: Payload, trace: Path) -> Payload | Broken:
    """Return what a job gave; a traceback is kept."""
    trace.unlink(missing_ok=True)
    if "failure" not in answer:
        return answer
    failure = Failure.model_validate(answer["failure"])
    trace.parent.mkdir(parents=True, exist_ok=True)
    trace.write_text(failure.trace, encoding="utf-8")
    return Broken(failure.told())
