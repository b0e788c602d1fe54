"""Jobs of one whole, a comparison or a study, that are run side by side and keep what they end with in one folder.

Where ``MOEIFY_HOME`` is a URL, the folder is a copy of what is there: it is fetched when the jobs are driven, and each
job's worker sends what the job ended with itself (``moeify.kept_results``).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal, Protocol, TypeVar

from pipelines import homes, lease
from pipelines.pool import Broken
from pipelines.remote_run import RemoteRun, files_in
from pipelines.runs import hold_lock
from pipelines.wording import clock

RECIPE = "recipe.yaml"
"""File of a comparison: its recipe with every default filled in."""


class Seeded(Protocol):
    """A job."""

    @property
    def seed(self) -> int:
        """Jobs of one seed share data and twins."""
        ...


class Ended(Protocol):
    """What is kept of a job that ended well."""

    @property
    def before(self) -> bool:
        """Whether it was there already."""
        ...

    @property
    def seconds(self) -> float:
        """Wall time of the job."""
        ...


J = TypeVar("J", bound=Seeded)


@dataclass(frozen=True)
class JobsFolder:
    """The files of one whole."""

    path: Path
    kind: Literal["comparison", "study"]

    @property
    def id(self) -> str:
        """A comparison's ``<name>-<8 hex>``; a study's name, and its size where that is not the usual one."""
        return self.path.name

    @property
    def home(self) -> Path:
        """The folder of all runs, comparisons and studies."""
        return self.path.parent.parent

    @property
    def remote(self) -> RemoteRun | None:
        """What the folder is a copy of; None where it is the truth itself."""
        home = homes.home_of(self.home)
        return RemoteRun(home.place(f"{self.path.parent.name}/{self.id}"), self.path) if home else None

    @property
    def address(self) -> str:
        """Where it is, for people: a path, or a URL."""
        return self.remote.place.url if self.remote else str(self.path)

    @property
    def results_url(self) -> str | None:
        """Where workers send results to; None where they write them into the folder."""
        return f"{self.remote.place.url}/{self.results.name}" if self.remote else None

    @property
    def results(self) -> Path:
        """Folder of what jobs ended with, one file a job, named by what it depends on too."""
        return self.path / "results"

    @property
    def traces(self) -> Path:
        """Folder of the tracebacks of jobs that failed."""
        return self.path / "failed"

    @property
    def summary(self) -> Path:
        """JSON of the table and of every job."""
        return self.path / f"{self.kind}.json"

    @property
    def picture(self) -> Path:
        """The table, or what is drawn instead."""
        return self.path / ("frontier.png" if self.kind == "comparison" else "study.png")

    @property
    def lock(self) -> Path:
        """Held by the process that drives the jobs."""
        return self.path / "lock"


def publish(folder: JobsFolder) -> None:
    """Send what the driver made, where the folder is a copy."""
    if remote := folder.remote:
        remote.push(*_made_by_driver(folder))


@contextmanager
def hold(folder: JobsFolder) -> Iterator[None]:
    """Drive the jobs; raise ``RunBusyError`` when another process does, on whatever machine."""
    what = f"{folder.kind} {folder.id}"
    with hold_lock(folder.lock, what), ExitStack() as stack:
        if (remote := folder.remote) and (home := homes.home_of(folder.home)):
            made = partial(_made_by_driver, folder)
            stack.enter_context(lease.held(remote, home.copy, what, made, journaled=False))
        yield


def _made_by_driver(folder: JobsFolder) -> list[Path]:
    """Return the files that there are, but for those that workers send."""
    places = (folder.path / RECIPE, folder.summary, folder.picture, folder.traces)
    return [path for place in places if place.exists() for path in files_in(place)]


def by_seed(jobs: Sequence[J]) -> list[list[J]]:
    """Return the jobs in one queue for each seed."""
    return [[job for job in jobs if job.seed == seed] for seed in dict.fromkeys(job.seed for job in jobs)]


def failed(jobs: Sequence[J], ended: Mapping[J, Ended | Broken]) -> dict[J, Broken]:
    """Return the jobs that failed, in their order."""
    return {job: known for job in jobs if isinstance(known := ended.get(job), Broken)}


def told(what: str, how: str, job: J, ended: Mapping[J, Ended | Broken], of: int, cores: int) -> str:
    """Say in a line how a job ended and what remains of ``of``; ``what`` it is, and ``how`` it ended if it did well."""
    mine, count = ended[job], len(ended)
    if isinstance(mine, Broken):
        return f"{what}: failed: {mine.reason[:120]} · {count}/{of}"
    own = [each.seconds for each in ended.values() if not isinstance(each, Broken) and not each.before]
    left = fmean(own) * (of - count) / min(cores, of - count) if own and count < of else None
    rest = "" if left is None else f", about {clock(left)} left"
    took = "done before" if mine.before else clock(mine.seconds)
    return f"{what}: {how}{took} · {count}/{of}{rest}"
