"""A study: one question, the arms that answer it, and what their measures say over seeds.

An arm is a recipe, made from a shipped one by changes, and a function from a prepared run to named numbers. Arms of one
seed share data, order and initial weights, so what is held against the reference arm is held against it seed by seed;
intervals are Student's t over seeds, 95 %.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moeify.comparison import Interval, mean_interval
from moeify.recipe.config import RunConfig
from moeify.recipe.load import parse_recipe
from moeify.task import Task
from pipelines.find_recipe import find_recipe

Size = Literal["quick", "full", "large"]
"""``quick``: seconds, to see that it runs; ``full``: minutes on two cores, what the results page has; ``large``: the
network of the shipped recipe, hours on two cores."""
Measures = dict[str, float]
"""Name -> number. A name with slashes is one of many of a kind, such as ``loss/python``."""


@dataclass(frozen=True)
class Bench:
    """What an arm works with, on one seed."""

    config: RunConfig
    """The arm's recipe; its seed is the job's."""
    task: Task
    twins: Path
    """Folder of twins that arms share (``moeify.twin_cache``)."""


@dataclass(frozen=True)
class Arm:
    """One way to do it."""

    name: str
    config: RunConfig
    work: Callable[[Bench], Measures]
    """A function of a module of ``pipelines.studies``; the same measures for the same bench."""


@dataclass(frozen=True)
class Column:
    """A measure that the table shows."""

    measure: str
    title: str
    against: bool = True
    """Whether it is also held against the reference arm's."""


@dataclass(frozen=True)
class Scatter:
    """Measures ``x/LABEL`` against ``y/LABEL``, a point for each label, means over seeds; of the first arm."""

    x: str
    y: str
    x_title: str
    y_title: str


@dataclass(frozen=True)
class Study:
    """What is asked, of whom, and what is shown."""

    arms: Callable[[Size], tuple[Arm, ...]]
    columns: tuple[Column, ...]
    note: str
    """How the columns are to be read."""
    reference: str | None = None
    """The arm that the others are held against, seed by seed; of several groups, whose arms are called ``GROUP: ARM``,
    each has its own."""
    scatter: Scatter | None = None
    """What is drawn; None: the columns, an interval for each arm."""
    seeds: int = 3
    """As many as it asks for, where nobody says how many."""

    def held_against(self, arm: str) -> str | None:
        """Return the name of the arm that this one is held against; None for a reference, and where there is none."""
        group, colon, _ = arm.rpartition(": ")
        other = f"{group}{colon}{self.reference}"
        return None if self.reference is None or arm == other else other


@dataclass(frozen=True)
class ArmJob:
    """One arm on one seed."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm.replace(' ', '_')}-{self.seed}"


@dataclass(frozen=True)
class Cell:
    """A measure of an arm, over the seeds that have ended."""

    value: Interval
    above: Interval | None
    """Above the reference arm, seed by seed; None for that arm itself, where there is none, and where none is asked."""


@dataclass(frozen=True)
class Row:
    """An arm."""

    arm: str
    seeds: int
    cells: Mapping[str, Cell]
    """Measure -> what is known; measures that the arm does not have are left out."""


def table(study: Study, found: Mapping[ArmJob, Measures]) -> list[Row]:
    """Return a row for each arm that has ended on some seed, in the order of the jobs."""
    rows = []
    for arm in dict.fromkeys(job.arm for job in found):
        mine = {job.seed: measures for job, measures in found.items() if job.arm == arm}
        other = {job.seed: measures for job, measures in found.items() if job.arm == study.held_against(arm)}
        cells = {}
        for column in study.columns:
            values = {seed: each[column.measure] for seed, each in mine.items() if column.measure in each}
            if values:
                cells[column.measure] = Cell(mean_interval(values.values()), _above(column, values, other))
        rows.append(Row(arm, len(mine), cells))
    return rows


def _above(column: Column, values: Mapping[int, float], other: Mapping[int, Measures]) -> Interval | None:
    rises = [v - other[seed][column.measure] for seed, v in values.items() if column.measure in other.get(seed, {})]
    return mean_interval(rises) if rises and column.against else None


def jobs(arms: Sequence[Arm], seeds: Sequence[int]) -> tuple[ArmJob, ...]:
    """Return every arm on every seed, seed by seed."""
    return tuple(ArmJob(arm.name, seed) for seed in seeds for arm in arms)


def shipped_recipe(name: str, **changes: Any) -> RunConfig:
    """Return a recipe that comes with moeify, changed: sections are merged, and what is not a section is replaced.

    A section whose ``kind`` changes is replaced as a whole. Its runs have one worker of one thread.
    """
    text, where, _ = find_recipe(name)
    return changed(parse_recipe(text, where=where), cluster={"workers": 1, "threads": 1}, **changes)


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    """Return the recipe with these changes, see ``shipped_recipe``."""
    return RunConfig.model_validate(_merged(config.model_dump(mode="json"), changes))


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if "kind" in new and new["kind"] != old.get("kind"):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
