"""What a comparison says: as plain data with stable keys, as tables for people, and in markdown for MLflow."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console

from moeify.comparison import Interval, Job, Row, losses, rows
from moeify.jobs import Ended
from moeify.result import MEAN, Result
from moeify.store import write_atomically
from pipelines.compare import Comparison
from pipelines.frontier_plot import frontier
from pipelines.kept_jobs import JobsFolder
from pipelines.pool import Broken
from pipelines.show import finite, to_json
from pipelines.tables import console_for, table_for
from pipelines.wording import counted, nats, percent

Summary = dict[str, Any]

_WIDE = 90
"""Columns of a terminal that hold the losses, too."""
_NOTE = (
    "tax: above the dense twin; on test data, nats per {unit}, paired seed by seed\n"
    "±: half of the 95 % interval over seeds (Student's t){single}"
)


def summary(comparison: Comparison, folder: JobsFolder) -> Summary:
    """Return the comparison as JSON-ready data; null for what is not known, and for numbers that are not finite."""
    jobs, results = comparison.jobs, comparison.results
    told = losses(results, "told")
    first = next(iter(results.values()), None)
    known: Summary = {
        "comparison": folder.id,
        "recipe": comparison.config.name,
        "path": folder.address,
        "unit": first.unit if first else None,
        "categories": list(first.categories) if first else None,
        "methods": list(dict.fromkeys(job.method for job in jobs)),
        "separations": list(dict.fromkeys(job.separation for job in jobs)),
        "seeds": list(dict.fromkeys(job.seed for job in jobs)),
        "rows": [_row(row) for row in rows(results)],
        "runs": [_run(job, comparison.ended.get(job), told.get(job.seed), folder) for job in jobs],
    }
    return finite(known)


def write(comparison: Comparison, folder: JobsFolder) -> None:
    """Leave the summary, and the picture where there is anything to draw, in the comparison's folder."""
    write_atomically(folder.summary, (to_json(summary(comparison, folder)) + "\n").encode())
    if found := list(rows(comparison.results)):
        unit = next(iter(comparison.results.values())).unit
        frontier(found, folder.id, unit, folder.picture)
    else:
        folder.picture.unlink(missing_ok=True)


def _row(row: Row) -> Summary:
    def ends(interval: Interval | None) -> dict[str, float] | None:
        return interval and {"mean": interval.mean, "low": interval.low, "high": interval.high}

    return {
        "method": row.method,
        "separation": row.separation,
        "seeds": row.seeds,
        "active": ends(row.active),
        "loss": ends(row.loss),
        "tax": ends(row.tax),
        "tax_told": ends(row.tax_told),
        "above_loop": ends(row.above_loop),
    }


def _run(job: Job, ended: Ended | Broken | None, told: float | None, folder: JobsFolder) -> Summary:
    run: Summary = {"method": job.method, "separation": job.separation, "seed": job.seed}
    match ended:
        case Ended(result=result):
            far = folder.results_url
            where = f"{far}/{ended.path.name}" if far else str(ended.path)
            return {**run, "status": "finished", **figures(result, told), "result": where, "problem": None}
        case Broken():
            return {**run, "status": "failed", **_UNKNOWN, "problem": ended.reason}
        case None:
            return {**run, "status": "missing", **_UNKNOWN, "problem": None}


_UNKNOWN = dict.fromkeys(("active", "loss", "tax", "tax_error", "tax_told", "test_loss", "seconds", "result"))


def figures(result: Result, told: float | None) -> Summary:
    """Return a run's figures, means over categories; ``told``: the told twin's loss on its seed, where it is known."""
    loss = sum(result.test_loss["split"].values()) / len(result.categories)
    return {
        "active": result.active_fraction[MEAN],
        "loss": loss,
        "tax": result.tax[MEAN],
        "tax_error": result.tax_error,
        "tax_told": None if told is None else loss - told,
        "test_loss": result.test_loss,
        "seconds": result.seconds,
    }


# --- for people -----------------------------------------------------------------------------------------


def print_comparison(comparison: Comparison, folder: JobsFolder, stream: TextIO) -> None:
    """Print a table for each separation, and which jobs failed; 80 columns wide on an 80-column terminal."""
    console = console_for(stream)
    console.print(f"{folder.id} · {_extent(comparison.jobs)}", style="bold")
    found = list(rows(comparison.results))
    for separation in dict.fromkeys(row.separation for row in found):
        here = [row for row in found if row.separation == separation]
        console.print(f"\nSeparation {separation:.3g}", style="bold")
        _print_rows(console, here)
        most = max(row.seeds for row in here)
        few = [f"{row.method} {row.seeds}" for row in here if row.seeds < most]
        if few:
            console.print(f"seeds that ended, of {most}: {', '.join(few)}", style="dim")
    if found:
        single = "; one seed has none" if any(row.seeds == 1 for row in found) else ""
        unit = next(iter(comparison.results.values())).unit
        console.print(_NOTE.format(unit=unit, single=single), style="dim")
    for line in _failures(comparison):
        console.print(f"\n{line}")
    if comparison.broken and folder.traces.is_dir():
        console.print(f"tracebacks: {folder.traces}", style="dim")


def _print_rows(console: Console, found: Sequence[Row]) -> None:
    wide = console.width >= _WIDE
    table = table_for(console, "method", "active", *(["loss"] if wide else []), "tax", "above told", "above loop")
    for row in found:
        loss = [nats(row.loss.mean)] if wide else []
        table.add_row(row.method, percent(row.active.mean), *loss, *map(_cell, (row.tax, row.tax_told, row.above_loop)))
    console.print(table)


def _extent(jobs: Sequence[Job]) -> str:
    of: dict[str, Callable[[Job], object]] = {
        "method": lambda job: job.method,
        "seed": lambda job: job.seed,
        "separation": lambda job: job.separation,
    }
    return " x ".join(counted(len({get(job) for job in jobs}), thing) for thing, get in of.items())


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return ""
    half = "" if math.isnan(interval.half) else f" ±{interval.half:.4f}"
    return f"{nats(interval.mean, signed=True)}{half}"


def markdown(comparison: Comparison) -> str:
    """Return the tables as MLflow shows them."""
    return "\n".join(_markdown(comparison))


def _markdown(comparison: Comparison) -> Iterator[str]:
    yield f"{_extent(comparison.jobs)}; {len(comparison.ended)} of {len(comparison.jobs)} runs have ended"
    found = list(rows(comparison.results))
    for separation in dict.fromkeys(row.separation for row in found):
        yield f"\n**Separation {separation:.3g}**\n"
        yield "| method | seeds | active | loss | tax | above the told twin | above the loop |"
        yield f"|---|{'--:|' * 6}"
        for row in found:
            if row.separation == separation:
                cells = map(_cell, (row.tax, row.tax_told, row.above_loop))
                head = [row.method, str(row.seeds), percent(row.active.mean), nats(row.loss.mean)]
                yield f"| {' | '.join([*head, *cells])} |"
    if found:
        unit = next(iter(comparison.results.values())).unit
        yield "\n" + _NOTE.format(unit=unit, single="").replace("\n", "; ")
    yield from (f"\n{line}" for line in _failures(comparison))


def _failures(comparison: Comparison) -> Iterator[str]:
    """Say which jobs failed, and why; jobs that failed alike share a line."""
    alike: dict[str, list[str]] = {}
    for job, broken in comparison.broken.items():
        alike.setdefault(broken.reason, []).append(str(job))
    for reason, jobs in alike.items():
        yield f"failed (method-separation-seed): {', '.join(jobs)}: {reason}"
