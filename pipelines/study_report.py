"""What a study says: as plain data with stable keys, as tables for people, and in markdown for MLflow and documents."""

import math
import platform
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from moeify.comparison import Interval
from moeify.store import write_atomically
from pipelines.kept_jobs import JobsFolder
from pipelines.pool import Broken
from pipelines.show import finite, to_json
from pipelines.studies.catalogue import QUESTIONS
from pipelines.studies.study import ArmJob, Cell, Row, table
from pipelines.study import EndedArm, Progress
from pipelines.study_plot import draw
from pipelines.tables import console_for, in_columns, table_for

Summary = dict[str, Any]

_INTERVALS = "±: half of the 95 % interval over seeds (Student's t){single}"


def command_of(progress: Progress) -> str:
    """Return the command that makes the study as it stands."""
    seeds = len({job.seed for job in progress.jobs})
    size = "" if progress.size == "full" else f" --{progress.size}"
    return f"moeify study {progress.name}{size} --seeds {seeds}"


def summary(progress: Progress) -> Summary:
    """Return the study as JSON-ready data; null for what is not known, and for numbers that are not finite."""
    known: Summary = {
        "study": progress.name,
        "question": QUESTIONS[progress.name],
        "command": command_of(progress),
        "reference": progress.study.reference,
        "seeds": list(dict.fromkeys(job.seed for job in progress.jobs)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": [_row(row) for row in table(progress.study, progress.measures)],
        "runs": [_run(job, progress.ended.get(job)) for job in progress.jobs],
    }
    return finite(known)


def write(progress: Progress, folder: JobsFolder) -> None:
    """Leave the summary, and the picture where there is anything to draw, in the study's folder."""
    write_atomically(folder.summary, (to_json(summary(progress)) + "\n").encode())
    if progress.measures:
        draw(progress.study, progress.measures, progress.name, QUESTIONS[progress.name], folder.picture)
    else:
        folder.picture.unlink(missing_ok=True)


def _row(row: Row) -> Summary:
    def ends(interval: Interval | None) -> dict[str, float] | None:
        return interval and {"mean": interval.mean, "low": interval.low, "high": interval.high}

    cells = {name: {"value": ends(cell.value), "above": ends(cell.above)} for name, cell in row.cells.items()}
    return {"arm": row.arm, "seeds": row.seeds, "measures": cells}


def _run(job: ArmJob, ended: EndedArm | Broken | None) -> Summary:
    run: Summary = {"arm": job.arm, "seed": job.seed}
    match ended:
        case EndedArm(done=done):
            return {**run, "status": "finished", "seconds": done.seconds, "measures": done.measures, "problem": None}
        case Broken():
            return {**run, "status": "failed", "seconds": None, "measures": None, "problem": ended.reason}
        case None:
            return {**run, "status": "missing", "seconds": None, "measures": None, "problem": None}


# --- for people -----------------------------------------------------------------------------------------


def print_study(progress: Progress, folder: JobsFolder, stream: TextIO) -> None:
    """Print the question, the arms' measures, how they differ from the reference arm, and which jobs failed."""
    console = console_for(stream)
    console.print(f"{folder.id} · {QUESTIONS[progress.name]}", style="bold")
    found = table(progress.study, progress.measures)
    for title, head, rows in _tables(progress, found):
        console.print(f"\n{title}", style="bold")
        for shown in _fitting(console, head, rows):
            console.print(shown)
    if found:
        console.print(f"{progress.study.note} {_intervals(found)}.", style="dim")
    for line in _failures(progress):
        console.print(f"\n{line}")
    if progress.broken and folder.traces.is_dir():
        console.print(f"tracebacks: {folder.traces}", style="dim")


def _fitting(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[Table]:
    """Yield the table, in as many as the width asks for, each with the arms' names."""
    names, each = (max(len(row[0]) for row in rows), max(len(cell) for row in (head, *rows) for cell in row[1:]))
    start = 1
    for part in in_columns(console, head[1:], names + 2, each + 2):
        end = start + len(part)
        shown = table_for(console, head[0], *part)
        for row in rows:
            shown.add_row(row[0], *row[start:end])
        yield shown
        start = end


def markdown(progress: Progress) -> str:
    """Return the tables in markdown."""
    return "\n".join(_markdown(progress))


def _markdown(progress: Progress) -> Iterator[str]:
    yield f"{QUESTIONS[progress.name]}\n"
    yield f"`{command_of(progress)}`: {len(progress.ended)} of {len(progress.jobs)} runs have ended"
    found = table(progress.study, progress.measures)
    for title, head, rows in _tables(progress, found):
        yield f"\n**{title}**\n"
        yield f"| {' | '.join(head)} |"
        yield f"|---|{'--:|' * (len(head) - 1)}"
        yield from (f"| {' | '.join(row)} |" for row in rows)
    if found:
        yield f"\n{progress.study.note} {_intervals(found)}."
    yield from (f"\n{line}" for line in _failures(progress))


def _tables(progress: Progress, found: Sequence[Row]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield the tables as title, head and rows: what the arms measured, and how far above the reference arm that is."""
    study = progress.study
    seeds = max((row.seeds for row in found), default=0)
    shown = [column for column in study.columns if any(column.measure in row.cells for row in found)]
    if not shown:
        return
    head = [column.title for column in shown]
    few = any(row.seeds < seeds for row in found)
    title = f"Mean of {seeds} seeds" if seeds > 1 else "One seed"
    yield (
        title,
        ["arm", *(["seeds"] if few else []), *head],
        [
            [row.arm, *([str(row.seeds)] if few else []), *(_value(row.cells.get(c.measure)) for c in shown)]
            for row in found
        ],
    )
    held = [c for c in shown if any((cell := row.cells.get(c.measure)) and cell.above for row in found)]
    if held:
        rows = [
            [row.arm, *(_above(row.cells.get(c.measure)) for c in held)] for row in found if study.held_against(row.arm)
        ]
        yield f"Above {study.reference}, seed by seed", ["arm", *(c.title for c in held)], rows


def _value(cell: Cell | None) -> str:
    return "" if cell is None else _number(cell.value, signed=False)


def _above(cell: Cell | None) -> str:
    return "" if cell is None or cell.above is None else _number(cell.above, signed=True)


def _number(interval: Interval, *, signed: bool) -> str:
    half = "" if math.isnan(interval.half) or interval.half == 0.0 else f" ±{interval.half:.3f}"
    return f"{interval.mean:+.3f}{half}" if signed else f"{interval.mean:.3f}{half}"


def _intervals(found: Sequence[Row]) -> str:
    return _INTERVALS.format(single="; one seed has none" if any(row.seeds == 1 for row in found) else "")


def _failures(progress: Progress) -> Iterator[str]:
    """Say which jobs failed, and why; jobs that failed alike share a line."""
    alike: dict[str, list[str]] = {}
    for job, broken in progress.broken.items():
        alike.setdefault(broken.reason, []).append(f"{job.arm}, seed {job.seed}")
    for reason, jobs in alike.items():
        yield f"failed: {'; '.join(jobs)}: {reason}"
