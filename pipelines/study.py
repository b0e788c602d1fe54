"""Run a study's arms side by side on Ray, and keep what they end with in one folder.

An arm's measures are a function of its recipe, its data and the code; these are hashed into the name of their file. So
the same command goes on where it was stopped, one with more seeds adds to what is there, and nothing is out of date.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from moeify.jobs import code
from moeify.kept_results import KeptResults
from moeify.tasks.build import build_task
from moeify.twin_cache import fingerprint
from moeify.world import Solo
from pipelines import studies
from pipelines.kept_jobs import JobsFolder, by_seed, failed, hold, told
from pipelines.pool import Broken, Payload, answered, run_here, run_pool
from pipelines.runs import cache, shelf
from pipelines.studies import study
from pipelines.studies.catalogue import find_study
from pipelines.studies.study import Arm, ArmJob, Bench, Measures, Size, Study, changed


class Done(BaseModel):
    """What a job ended with: the file that is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")

    arm: str
    seed: int
    seconds: float
    """Wall time of the job."""
    measures: Measures


class ArmOrder(BaseModel):
    """One job as a worker is told of it; travels as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    study: str
    size: Size
    job: ArmJob
    results: Path
    results_url: str | None
    cache: Path

    @property
    def kept(self) -> KeptResults:
        """What jobs ended with."""
        return KeptResults(self.results, self.results_url)


@dataclass(frozen=True)
class EndedArm:
    """A job that ended well."""

    done: Done
    path: Path
    """Its file."""
    before: bool
    """Whether it was there already."""

    @property
    def seconds(self) -> float:
        """Wall time of the job."""
        return self.done.seconds


@dataclass
class Progress:
    """How far a study has come."""

    name: str
    size: Size
    study: Study
    jobs: tuple[ArmJob, ...]
    ended: dict[ArmJob, EndedArm | Broken] = field(default_factory=dict)

    @property
    def measures(self) -> dict[ArmJob, Measures]:
        """The measures there are, in the jobs' order."""
        ended = ((job, self.ended.get(job)) for job in self.jobs)
        return {job: each.done.measures for job, each in ended if isinstance(each, EndedArm)}

    @property
    def broken(self) -> dict[ArmJob, Broken]:
        """The jobs that failed, in their order."""
        return failed(self.jobs, self.ended)


Heard = Callable[[Progress, ArmJob, int], None]
"""Called after each job that ended, with how many run at a time."""


def open_folder(name: str, size: Size, home: Path) -> JobsFolder:
    """Return the study's folder, made where there is none."""
    folder = JobsFolder(home.absolute() / "studies" / (name if size == "full" else f"{name}-{size}"), "study")
    folder.results.mkdir(parents=True, exist_ok=True)
    return folder


def run_study(
    name: str,
    size: Size,
    jobs: Sequence[ArmJob],
    folder: JobsFolder,
    heard: Heard = lambda *_: None,
    *,
    local: bool = False,
) -> Progress:
    """Run the jobs that have no measures yet, and return how all of them ended; a job that fails stops no other.

    ``local``: in this process, one after another, seed by seed, without Ray. Raises ``RunBusyError`` where another
    process drives the study.
    """
    progress = Progress(name, size, find_study(name), tuple(jobs))

    kept = KeptResults(folder.results, folder.results_url)

    def order(job: ArmJob) -> Payload:
        known = ArmOrder(study=name, size=size, job=job, results=kept.folder, results_url=kept.url, cache=cache())
        return known.model_dump(mode="json")

    def ended(job: ArmJob, answer: Payload | Broken, cores: int) -> None:
        if isinstance(answer, Broken):
            progress.ended[job] = answer
        else:
            done = Done.model_validate_json(answer["done"])
            progress.ended[job] = EndedArm(done, kept.near(answer["name"]), answer["before"])
        heard(progress, job, cores)

    with hold(folder):
        if local:
            run_here(work, by_seed(jobs), order, ended, traces=folder.traces)
        else:
            run_pool(work, by_seed(jobs), order, ended, traces=folder.traces, retries=2)
    return progress


def work(payload: Payload) -> Payload:
    """Do an ``ArmOrder`` in a Ray worker."""

    def done() -> Payload:
        order = ArmOrder.model_validate(payload)
        torch.set_num_threads(1)
        ended = run_arm(order)
        return {"done": ended.done.model_dump_json(), "name": ended.path.name, "before": ended.before}

    return answered(done)


def run_arm(order: ArmOrder) -> EndedArm:
    """Run a job in this process, unless its measures are there. ValueError where data are at fault."""
    (arm,) = [each for each in find_study(order.study).arms(order.size) if each.name == order.job.arm]
    config = changed(arm.config, seed=order.job.seed)
    task = build_task(config, cache=order.cache, base=Path.cwd(), shelf=shelf("text"))
    content = f"{config.model_dump_json()} {fingerprint(config, task, Solo())} {code()} {_code_of(arm)}"
    file = f"{order.job}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if known := _understood(order.kept.read(file)):
        return EndedArm(known, order.results / file, before=True)
    began = time.perf_counter()
    measures = arm.work(Bench(config, task, order.cache / "twins"))
    seconds = time.perf_counter() - began
    done = Done(arm=arm.name, seed=order.job.seed, seconds=seconds, measures=measures)
    order.kept.write(file, (done.model_dump_json(indent=1) + "\n").encode())
    return EndedArm(done, order.results / file, before=False)


def _code_of(arm: Arm) -> str:
    """Return a hash of the studies' modules that an arm's function stands on; this frame has no say in its measures."""
    own = arm.work.__module__
    found, waiting = dict[str, Path](), [own]
    while waiting:
        name = waiting.pop()
        counts = name == own or (name != study.__name__ and name.startswith(f"{studies.__name__}."))
        if counts and name not in found:
            found[name] = Path(str(sys.modules[name].__file__))
            waiting += [_module_of(each) for each in vars(sys.modules[name]).values()]
    others = [found[name] for name in sorted(found) if name != own]
    return hashlib.sha256(b"".join(path.read_bytes() for path in (found[own], *others))).hexdigest()


def _module_of(thing: object) -> str:
    """Return the module that something is, or was made in."""
    return thing.__name__ if isinstance(thing, ModuleType) else str(getattr(thing, "__module__", None))


def _understood(content: bytes | None) -> Done | None:
    """Return what a job ended with; None where there is nothing, or it is damaged."""
    try:
        return None if content is None else Done.model_validate_json(content)
    except ValidationError:
        return None


def progress_line(progress: Progress, job: ArmJob, cores: int) -> str:
    """Say how a job ended and what remains."""
    return told(f"{job.arm}, seed {job.seed}", "", job, progress.ended, len(progress.jobs), cores)
