"""Run one job of a comparison, or take the result that it ended with before.

A result is a function of the job's recipe, its data and the code; these are hashed into the name of its file, the data
by the content of sample batches. So what is there is never out of date, and what is interrupted leaves nothing.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import attribution
from moeify.comparison import Job, job_recipe, seeded
from moeify.device import take_device
from moeify.kept_results import KeptResults
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.result import Result
from moeify.tasks.build import build_task
from moeify.twin_cache import code_of, fingerprint
from moeify.world import Solo


@dataclass(frozen=True)
class Places:
    """The folders that jobs read and write; all may be shared by comparisons."""

    base: Path
    """Where the recipe's relative paths start."""
    cache: Path
    """Of prepared data."""
    results: Path
    twins: Path
    """Of ``moeify.twin_cache``."""
    shelf: str | None = None
    """URL where machines share prepared text."""
    twins_url: str | None = None
    """Where they share twins."""
    results_url: str | None = None
    """The same of results."""

    @property
    def kept(self) -> KeptResults:
        """What jobs ended with."""
        return KeptResults(self.results, self.results_url)


@dataclass(frozen=True)
class Ended:
    """A job's result, and where it came from."""

    result: Result
    path: Path
    """The result's file."""
    before: bool
    """Whether it was there already."""

    @property
    def seconds(self) -> float:
        """Wall time of the job."""
        return self.result.seconds


def run_job(config: RunConfig, job: Job, places: Places) -> Ended:
    """Run a job of the comparison of ``config`` in this process, unless its result is in ``places.results``.

    Bits, and so what counts as the same, depend on torch's threads. ValueError where recipe or data are at fault.
    """
    task = build_task(seeded(config, job), cache=places.cache, base=places.base, shelf=places.shelf)
    recipe = job_recipe(config, job, len(task.categories))
    world = Solo(take_device(recipe.cluster.gpus))
    content = f"{recipe.model_dump_json()} {fingerprint(recipe, task, world)} {code()}"
    name = f"{job}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if known := _understood(places.kept.read(name)):
        return Ended(known, places.results / name, before=True)
    result = run(recipe, task, world=world, twins=places.twins, twins_url=places.twins_url)
    places.kept.write(name, (result.model_dump_json(indent=1) + "\n").encode())
    return Ended(result, places.results / name, before=False)


def _understood(content: bytes | None) -> Result | None:
    """Return a result; None where there is none, or it is damaged."""
    try:
        return None if content is None else Result.model_validate_json(content)
    except ValueError:
        return None


def code() -> str:
    """Return a hash of the code that a result depends on: this package and attribution."""
    packages = Path(__file__).parent, Path(str(attribution.__file__)).parent
    return hashlib.sha256(b"".join(map(code_of, packages))).hexdigest()[:32]
