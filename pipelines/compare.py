"""Run a comparison's jobs side by side on Ray, and keep what they end with in one folder.

A comparison is known by its recipe and the code: the same command goes on where it was stopped, and one with more
methods, seeds or separations adds to what is there.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from moeify.comparison import Job
from moeify.jobs import Ended, Places, code, run_job
from moeify.recipe.config import Cluster, RunConfig
from moeify.recipe.load import to_yaml
from moeify.result import MEAN, Result
from pipelines.launch import cluster, stoppable
from pipelines.runs import cache, cache_url, hold_lock
from pipelines.wording import clock, nats
from pipelines.worker import Failure


@dataclass(frozen=True)
class ComparisonFolder:
    """The files of one comparison."""

    path: Path

    @property
    def id(self) -> str:
        """``<name>-<8 hex>``, the same for the same recipe and code."""
        return self.path.name

    @property
    def home(self) -> Path:
        """The folder of all runs and comparisons."""
        return self.path.parent.parent

    @property
    def recipe(self) -> Path:
        """The recipe with every default filled in."""
        return self.path / "recipe.yaml"

    @property
    def results(self) -> Path:
        """Folder of results, one file a job, named by its content too."""
        return self.path / "results"

    @property
    def traces(self) -> Path:
        """Folder of the tracebacks of jobs that failed."""
        return self.path / "failed"

    @property
    def summary(self) -> Path:
        """JSON of the table and of every job; see ``pipelines.compare_report.summary``."""
        return self.path / "comparison.json"

    @property
    def picture(self) -> Path:
        """Tax against separation, every method."""
        return self.path / "frontier.png"

    @property
    def lock(self) -> Path:
        """Held by the process that drives the comparison."""
        return self.path / "lock"


class JobOrder(BaseModel):
    """One job as a worker is told of it; travels as JSON, paths absolute and the same on every node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: RunConfig
    job: Job
    places: Places


@dataclass(frozen=True)
class Broken:
    """A job that failed."""

    reason: str
    """One line."""


@dataclass
class Comparison:
    """How far a comparison has come."""

    config: RunConfig
    """As it was given; see ``moeify.comparison.job_recipe`` for what is made of it."""
    jobs: tuple[Job, ...]
    ended: dict[Job, Ended | Broken] = field(default_factory=dict)

    @property
    def results(self) -> dict[Job, Result]:
        """The results there are, in the jobs' order."""
        ended = ((job, self.ended.get(job)) for job in self.jobs)
        return {job: done.result for job, done in ended if isinstance(done, Ended)}

    @property
    def broken(self) -> dict[Job, Broken]:
        """The jobs that failed, in their order."""
        ended = ((job, self.ended.get(job)) for job in self.jobs)
        return {job: broken for job, broken in ended if isinstance(broken, Broken)}


Heard = Callable[[Comparison, Job, int], None]
"""Called after each job that ended, with how many run at a time."""


def open_folder(config: RunConfig, base: Path, home: Path) -> ComparisonFolder:
    """Return the folder of the recipe's comparison, made where there is none."""
    known = [config.model_dump_json(), code()]
    ours = config.data.kind == "digits" or (config.data.kind == "text" and config.data.source.kind == "installed")
    if config.model.kind == "pretrained" or not ours:
        known.append(str(base.absolute()))  # two recipes of the same words, each with data beside it
    digest = hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]
    folder = ComparisonFolder(home.absolute() / "comparisons" / f"{config.name}-{digest}")
    folder.results.mkdir(parents=True, exist_ok=True)
    folder.recipe.write_text(to_yaml(config), encoding="utf-8")
    return folder


def compare(
    config: RunConfig, jobs: Sequence[Job], base: Path, folder: ComparisonFolder, heard: Heard = lambda *_: None
) -> Comparison:
    """Run the jobs that have no result yet, and return how all of them ended; a job that fails stops no other.

    Raises ``RunBusyError`` where another process drives the comparison.
    """
    twins_url = f"{url}/twins" if (url := cache_url()) else None
    places = Places(base.absolute(), cache(), results=folder.results, twins=cache() / "twins", twins_url=twins_url)
    with hold_lock(folder.lock, f"comparison {folder.id}"):
        return run_jobs(config, jobs, places, folder.traces, heard)


def run_jobs(config: RunConfig, jobs: Sequence[Job], places: Places, traces: Path, heard: Heard) -> Comparison:
    """Run jobs as Ray tasks of one core each, as many at a time as the cluster has cores.

    A seed's first job, which is the loop's, trains the twins that the seed's others share, so those wait for it; where
    it fails, the next one is the first. ``traces``: the folder of the tracebacks of jobs that fail.
    """
    comparison = Comparison(config, tuple(jobs))
    waiting = {seed: deque(job for job in jobs if job.seed == seed) for seed in dict.fromkeys(j.seed for j in jobs)}
    one = Cluster(workers=1, threads=1)
    with stoppable(), cluster(one, keep_logs=traces / "ray-logs"), stoppable():  # Ray sets handlers of its own
        import ray

        task = ray.remote(num_cpus=1, max_retries=config.cluster.retries)(work)
        running: dict[Any, Job] = {}

        def start(job: Job) -> None:
            order = JobOrder(config=config, job=job, places=places)
            running[task.remote(order.model_dump(mode="json"))] = job

        for queue in waiting.values():
            start(queue.popleft())
        cores = int(ray.cluster_resources().get("CPU", 1))
        try:
            while running:
                (ready,), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(ready)
                ended = comparison.ended[job] = _outcome(ready, job, traces)
                queue = waiting[job.seed]
                while queue:
                    start(queue.popleft())
                    if isinstance(ended, Broken):
                        break
                heard(comparison, job, cores)
        finally:
            for each in running:  # stopped in the middle: on a cluster that lives on, too
                ray.cancel(each, force=True)
    return comparison


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """Do a ``JobOrder`` in a Ray worker; what fails is returned as a ``Failure``: it would fail again."""
    order = JobOrder.model_validate(payload)
    torch.set_num_threads(1)
    try:
        ended = run_job(order.config, order.job, order.places)
    except Exception as error:
        return {"failure": Failure.of(error).model_dump(mode="json")}
    return {"result": ended.result.model_dump_json(), "path": str(ended.path), "before": ended.before}


def _outcome(ready: Any, job: Job, traces: Path) -> Ended | Broken:
    """Return how a task ended; a traceback is kept beside the results."""
    import ray

    trace = traces / f"{job}.txt"
    trace.unlink(missing_ok=True)
    try:
        told = ray.get(ready)
    except ray.exceptions.RayError as error:
        return Broken(f"its worker died, on each retry too: killed, or out of memory ({type(error).__name__})")
    if "failure" not in told:
        return Ended(Result.model_validate_json(told["result"]), Path(told["path"]), told["before"])
    failure = Failure.model_validate(told["failure"])
    traces.mkdir(parents=True, exist_ok=True)
    trace.write_text(failure.trace, encoding="utf-8")
    return Broken(failure.told())


def progress_line(comparison: Comparison, job: Job, cores: int) -> str:
    """Say how a job ended and what remains, in at most 80 characters unless it failed."""
    ended, count, of = comparison.ended[job], len(comparison.ended), len(comparison.jobs)
    what = f"{job.method}, seed {job.seed}, {job.separation:.3g}"
    if isinstance(ended, Broken):
        return f"{what}: failed: {ended.reason[:120]} · {count}/{of}"
    took = "done before" if ended.before else clock(ended.result.seconds)
    own = [e.result.seconds for e in comparison.ended.values() if isinstance(e, Ended) and not e.before]
    left = fmean(own) * (of - count) / min(cores, of - count) if own and count < of else None
    rest = "" if left is None else f", about {clock(left)} left"
    return f"{what}: tax {nats(ended.result.tax[MEAN], signed=True)} · {took} · {count}/{of}{rest}"
