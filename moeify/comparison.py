"""A comparison: the loop and its rivals on several seeds and separations as jobs, and what their results say.

Runs of one seed share data, order, initial weights and twins, so every difference is taken seed by seed; intervals are
Student's t over seeds, 95 %. Pure: who runs the jobs, and where results are kept, is the caller's.
"""

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from scipy.special import stdtrit

from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.recipe.variants import methods as known_methods
from moeify.recipe.variants import scaled, variant
from moeify.result import MEAN, Result

LOOP = "loop"
"""The method that all others are held against; it alone trains the told twin, which is every method's."""
DENSE, TOLD = "dense twin", "told twin"
TWINS: Mapping[str, Arm] = {DENSE: "dense", TOLD: "told"}
"""The methods that are no job of their own, and the arm of the loop's result that has their losses."""


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    separation: float
    """As asked for; the run's own figures say what was reached."""
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-{self.separation:g}-{self.seed}"


class Interval(NamedTuple):
    """A mean over seeds."""

    mean: float
    half: float
    """Half of the 95 % interval; NaN for a single seed."""

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.half


@dataclass(frozen=True)
class Row:
    """A method at a separation, over the seeds that have ended; losses are on test data, in nats per unit."""

    method: str
    """One of ``variants.methods()`` or of ``TWINS``."""
    separation: float
    """As asked for."""
    seeds: int
    active: Interval
    """Mean active fraction of the units, 0..1."""
    loss: Interval
    """Mean over categories."""
    tax: Interval | None
    """Above the dense twin, seed by seed; None for that twin itself."""
    tax_told: Interval | None
    """Above the told twin, seed by seed; None for that twin itself, and where no seed's loop has ended."""
    above_loop: Interval | None
    """Above the loop, seed by seed; None for the loop itself, and where no seed has both."""


def jobs(methods: Sequence[str], separations: Sequence[float], seeds: Sequence[int]) -> tuple[Job, ...]:
    """Return the jobs of a comparison, each once, the loop's among them whether it is named or not.

    ValueError for a method that there is not and a separation that is no fraction.
    """
    for method in methods:
        if method not in known_methods():
            raise ValueError(f"method: got {method!r}, wanted some of {', '.join(known_methods())}")
    for separation in separations:
        if not 0.0 < separation < 1.0:
            raise ValueError(f"separation: got {separation:g}, wanted a fraction between 0 and 1, such as 0.5")
    each = product(dict.fromkeys(separations), dict.fromkeys([LOOP, *methods]), dict.fromkeys(seeds))
    return tuple(Job(method, separation, seed) for separation, method, seed in each)


def seeded(config: RunConfig, job: Job) -> RunConfig:
    """Return the recipe with the job's seed and separation, for one worker of one thread.

    Its task is the job's, too: what a method changes, no task depends on.
    """
    cluster = config.cluster.model_copy(update={"workers": 1, "threads": 1})
    return scaled(config, job.separation).model_copy(update={"seed": job.seed, "cluster": cluster})


def job_recipe(config: RunConfig, job: Job, categories: int) -> RunConfig:
    """Return a job's whole recipe; ``categories``: how many the data has."""
    controls = ("told",) if job.method == LOOP else ()
    return variant(seeded(config, job).model_copy(update={"controls": controls}), job.method, categories)


def rows(found: Mapping[Job, Result]) -> Iterator[Row]:
    """Yield every method that has a result, in the jobs' order, then the twins; separation by separation."""
    twins = {name: losses(found, arm) for name, arm in TWINS.items()}
    for separation in dict.fromkeys(job.separation for job in found):
        here = {job: result for job, result in found.items() if job.separation == separation}
        active: dict[str, list[float]] = {}
        mine: dict[str, dict[int, float]] = {}
        for method in dict.fromkeys(job.method for job in here):
            active[method] = [r.active_fraction[MEAN] for job, r in here.items() if job.method == method]
            mine[method] = losses(here, "split", method)
        seeds = {job.seed for job in here}
        for name, known in twins.items():
            mine[name] = {seed: loss for seed, loss in known.items() if seed in seeds}
            active[name] = [1.0] * len(mine[name])
        for method, loss in mine.items():
            if loss:
                yield Row(
                    method=method,
                    separation=separation,
                    seeds=len(loss),
                    active=mean_interval(active[method]),
                    loss=mean_interval(loss.values()),
                    tax=_paired(loss, twins[DENSE]) if method != DENSE else None,
                    tax_told=_paired(loss, twins[TOLD]) if method != TOLD else None,
                    above_loop=_paired(loss, mine.get(LOOP, {})) if method != LOOP else None,
                )


def losses(found: Mapping[Job, Result], arm: Arm, method: str | None = None) -> dict[int, float]:
    """Return seed -> an arm's mean test loss over categories, of one method's results or of all that have the arm.

    Without a method the arm should be a twin: its losses are those of a seed, whichever run they are taken from.
    """
    taken: dict[int, float] = {}
    for job, result in found.items():
        if arm in result.test_loss and method in (None, job.method):
            taken.setdefault(job.seed, statistics.fmean(result.test_loss[arm].values()))
    return dict(sorted(taken.items()))


def mean_interval(values: Collection[float]) -> Interval:
    """Return the mean over seeds and half of its 95 % interval (Student's t); NaN for a single seed."""
    if len(values) < 2:
        return Interval(statistics.fmean(values), math.nan)
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(statistics.fmean(values), half)


def _paired(mine: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """Return how far ``mine`` lies above ``other`` on the seeds of both; None where there is no such seed."""
    rises = [loss - other[seed] for seed, loss in mine.items() if seed in other]
    return mean_interval(rises) if rises else None
