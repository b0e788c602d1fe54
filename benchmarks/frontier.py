"""What separation costs, by method: the loop against one-shot, fixed-at-init and every other way to find owners.

A shipped recipe (``text``; ``--recipe`` names another) at several separations, each method and seed a
run of equal tokens; a seed's runs share their twins. Tax is on test data, above the dense twin and above the told twin;
gaps are each rival's loss less the loop's, paired by seed; 95 % intervals (Student's t over seeds). Runs are Ray tasks,
as many at a time as there are cores; those that have ended are kept in ``--work`` and not run again. Text takes hours
on two cores: a loop some ten minutes of one core, a rival three. ``--quick`` shortens the digits to two seeds and one
separation.
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.report import Cell, Figure, parser, report
from moeify.comparison import LOOP, Interval, Job, Row, jobs, rows
from moeify.jobs import Places
from moeify.recipe.config import RunConfig
from moeify.recipe.load import parse_recipe
from moeify.recipe.variants import methods
from pipelines.compare import Comparison, progress_line, run_jobs
from pipelines.find_recipe import find_recipe, shipped
from pipelines.runs import cache

DEEP = 0.55
"""The separation of the headline figures: 45 % of the units active."""
SEPARATIONS = (0.4, DEEP, 0.65)
GAPS = {"oneshot": "gap_oneshot", "random": "gap_random", "init": "gap_init"}


def main() -> None:
    """Run what is missing, then print the table."""
    asks = parser(__doc__)
    asks.add_argument("--recipe", choices=shipped(), default="text")
    asks.add_argument("--methods", nargs="+", choices=methods(), default=list(methods()), metavar="METHOD")
    asks.add_argument("--separations", nargs="+", type=float, default=list(SEPARATIONS), metavar="FRACTION")
    asks.add_argument("--seeds", type=int, default=5)
    asks.add_argument("--work", type=Path, default=cache() / "frontier", help="finished runs and shared twins")
    asked = asks.parse_args()
    if asked.quick:
        with tempfile.TemporaryDirectory() as work:
            found = run(quick(read("digits")), jobs(list(GAPS), [DEEP], range(2)), Path(work))
    else:
        found = run(read(asked.recipe), jobs(asked.methods, asked.separations, range(asked.seeds)), asked.work)
    report("frontier", list(map(cells, found)), list(figures(found)), asked.json, quick=asked.quick)


def read(name: str) -> RunConfig:
    """Return a shipped recipe."""
    text, where, _ = find_recipe(name)
    return parse_recipe(text, where=where)


def quick(config: RunConfig) -> RunConfig:
    """Return a recipe of a few seconds."""
    rounds = [r.model_copy(update={"train": r.train // 8, "recover": r.recover // 8}) for r in config.rounds]
    training = config.training.model_copy(update={"steps": config.training.steps // 8})
    return config.model_copy(update={"rounds": tuple(rounds), "training": training})


def run(config: RunConfig, asked: Sequence[Job], work: Path) -> list[Row]:
    """Run the jobs that have no result in ``work``, and return the table; SystemExit where one fails."""

    def heard(comparison: Comparison, job: Job, cores: int) -> None:
        print(progress_line(comparison, job, cores), file=sys.stderr, flush=True)

    work = work.absolute()
    places = Places(base=Path.cwd(), cache=cache(), results=work / "results", twins=work / "twins")
    done = run_jobs(config, asked, places, work / "failed", heard)
    if done.broken:
        sys.exit("\n".join(f"{job} failed: {broken.reason}" for job, broken in done.broken.items()))
    return list(rows(done.results))


# --- the table --------------------------------------------------------------------------------------------


def cells(row: Row) -> Mapping[str, Cell]:
    """Return a row of the printed table: means over seeds with their intervals."""
    return {
        "active": f"{row.active.mean:.1%}",
        "method": row.method,
        "seeds": row.seeds,
        "loss": row.loss.mean,
        "tax": signed(row.tax),
        "tax, told twin": signed(row.tax_told),
        "above the loop": signed(row.above_loop),
    }


def figures(found: Sequence[Row]) -> Iterator[Figure]:
    """Yield the headlines, each with the ends of its interval; none where their separation was not run."""
    deep = {row.method: row for row in found if row.separation == DEEP}
    if LOOP in deep:
        yield from ends("tax_at_45_percent", deep[LOOP].tax, "<= 0")
        yield from ends("tax_told_at_45_percent", deep[LOOP].tax_told, "<= 0")
    for method, name in GAPS.items():
        if method in deep:
            yield from ends(name, deep[method].above_loop, "> 0, its interval too")


def ends(name: str, found: Interval | None, goal: str) -> Iterator[Figure]:
    """Yield a mean and the ends of its interval."""
    assert found, "every seed has its loop and its twins"
    yield Figure(name, found.mean, goal)
    yield Figure(f"{name}_low", found.low, goal)
    yield Figure(f"{name}_high", found.high, goal)


def signed(found: Interval | None) -> str | None:
    """Return a mean and half of its interval."""
    return found and f"{found.mean:+.4f} ±{found.half:.4f}"


if __name__ == "__main__":
    main()
