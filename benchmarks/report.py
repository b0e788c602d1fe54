"""The form that all benchmarks share: arguments, a table, headline figures, JSON."""

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Cell = str | int | float | None


@dataclass(frozen=True)
class Figure:
    """One headline number and what it should be."""

    name: str
    value: float
    goal: str
    """E.g. ``<= 1``; with the unit, if the name does not say it."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments of every benchmark: ``quick`` (bool) and ``json`` (Path or None)."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a small version that ends within a minute on two cores")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the table and the figures there")
    return made


def gpu_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the same with ``gpu`` (bool), for those that can run on one."""
    made = parser(doc)
    made.add_argument("--gpu", action="store_true", help="on a GPU, at sizes that fill it")
    return made


def arguments(doc: str | None) -> argparse.Namespace:
    """Parse the arguments that every benchmark has."""
    return parser(doc).parse_args()


def report(
    name: str,
    rows: Sequence[Mapping[str, Cell]],
    figures: Sequence[Figure],
    path: Path | None,
    *,
    quick: bool,
    details: Sequence[Mapping[str, Cell]] = (),
) -> None:
    """Print ``rows`` as a table (a new one where the columns change), then one line a figure; write both to ``path``.

    The JSON object has ``benchmark``, ``quick``, ``machine``, ``rows``, ``goals`` and ``summary`` (figure -> number),
    and where there are any ``details``, rows that are not printed.
    """
    for columns, alike in itertools.groupby(rows, key=lambda row: list(row)):
        _table(columns, list(alike))
        print()
    for figure in figures:
        print(f"{name}.{figure.name} = {_text(figure.value)} (goal {figure.goal})")
    if path is not None:
        _write(
            path,
            {
                "benchmark": name,
                "quick": quick,
                "machine": {"python": platform.python_version(), "system": sys.platform, "cores": os.cpu_count()},
                "rows": [dict(row) for row in rows],
                **({"details": [dict(row) for row in details]} if details else {}),
                "goals": {figure.name: figure.goal for figure in figures},
                "summary": {figure.name: figure.value for figure in figures},
            },
        )


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Cell]]) -> None:
    lines = [columns, *([_text(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = zip(line, widths, strict=True)
        print("  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(cells)))


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _write(path: Path, content: Mapping[str, object]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    Path(file.name).replace(path)
