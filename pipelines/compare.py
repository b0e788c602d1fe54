"""Run a comparison's jobs side by side on Ray, and keep what they end with in one folder.

A comparison is known by its recipe and the code: the same command goes on where it was stopped, and one with more
methods, seeds or separations adds to what is there.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from moeify.comparison import Job
from moeify.jobs import Ended, Places, code, run_job
from moeify.recipe.config import RunConfig
from moeify.recipe.load import to_yaml
from moeify.result import MEAN, Result
from pipelines.kept_jobs import RECIPE, JobsFolder, by_seed, failed, hold, told
from pipelines.pool import Broken, Payload, answered, run_pool
from pipelines.runs import cache, shelf
from pipelines.wording import nats


class JobOrder(BaseModel):
    """One job as a worker is told of it; travels as JSON, paths absolute and the same on every node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: RunConfig
    job: Job
    places: Places


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
        return failed(self.jobs, self.ended)


Heard = Callable[[Comparison, Job, int], None]
"""Called after each job that ended, with how many run at a time."""


def open_folder(config: RunConfig, base: Path, home: Path) -> JobsFolder:
    """Return the folder of the recipe's comparison, made where there is none."""
    known = [config.model_dump_json(), code()]
    ours = config.data.kind == "digits" or (config.data.kind == "text" and config.data.source.kind == "installed")
    if config.model.kind == "pretrained" or not ours:
        known.append(str(base.absolute()))  # two recipes of the same words, each with data beside it
    digest = hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]
    folder = JobsFolder(home.absolute() / "comparisons" / f"{config.name}-{digest}", "comparison")
    folder.results.mkdir(parents=True, exist_ok=True)
    (folder.path / RECIPE).write_text(to_yaml(config), encoding="utf-8")
    return folder


def compare(
    config: RunConfig, jobs: Sequence[Job], base: Path, folder: JobsFolder, heard: Heard = lambda *_: None
) -> Comparison:
    """Run the jobs that have no result yet, and return how all of them ended; a job that fails stops no other.

    Raises ``RunBusyError`` where another process drives the comparison.
    """
    places = Places(
        base.absolute(),
        cache(),
        results=folder.results,
        twins=cache() / "twins",
        shelf=shelf("text"),
        twins_url=shelf("twins"),
        results_url=folder.results_url,
    )
    with hold(folder):
        return run_jobs(config, jobs, places, folder.traces, heard)


def run_jobs(config: RunConfig, jobs: Sequence[Job], places: Places, traces: Path, heard: Heard) -> Comparison:
    """Run jobs as Ray tasks of one core each, and of a GPU where the recipe asks, as many at a time as the cluster has.

    A seed's first job, which is the loop's, trains the twins that the seed's others share, so those wait for it; where
    it fails, the next one is the first. ``traces``: the folder of the tracebacks of jobs that fail.
    """
    comparison = Comparison(config, tuple(jobs))

    def order(job: Job) -> Payload:
        return JobOrder(config=config, job=job, places=places).model_dump(mode="json")

    def ended(job: Job, answer: Payload | Broken, cores: int) -> None:
        if isinstance(answer, Broken):
            comparison.ended[job] = answer
        else:
            result = Result.model_validate_json(answer["result"])
            comparison.ended[job] = Ended(result, places.kept.near(answer["name"]), answer["before"])
        heard(comparison, job, cores)

    run_pool(work, by_seed(jobs), order, ended, traces=traces, retries=config.cluster.retries, gpus=config.cluster.gpus)
    return comparison


def work(payload: Payload) -> Payload:
    """Do a ``JobOrder`` in a Ray worker; what fails is returned as a ``Failure``: it would fail again."""

    def done() -> Payload:
        order = JobOrder.model_validate(payload)
        torch.set_num_threads(1)
        ended = run_job(order.config, order.job, order.places)
        return {"result": ended.result.model_dump_json(), "name": ended.path.name, "before": ended.before}

    return answered(done)


def progress_line(comparison: Comparison, job: Job, cores: int) -> str:
    """Say how a job ended and what remains, in at most 80 characters unless it failed."""
    ended, how = comparison.ended[job], ""
    if isinstance(ended, Ended):
        how = f"tax {nats(ended.result.tax[MEAN], signed=True)} · "
    what = f"{job.method}, seed {job.seed}, {job.separation:.3g}"
    return told(what, how, job, comparison.ended, len(comparison.jobs), cores)
