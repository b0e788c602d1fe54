"""How tables look on a terminal and in a pipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Block:
    """A table with what stands above and below it, which may be wider than the table."""

    title: str
    table: Table
    note: str = ""


def console_for(stream: TextIO) -> Console:
    """Return a console that prints words as they are."""
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def in_columns(console: Console, names: Sequence[str], taken: int, each: int) -> list[Sequence[str]]:
    """Return the names in as many parts as the width asks for, with ``taken`` characters spent, ``each`` a column."""
    size = max(1, (console.width - taken) // each)
    return [names[start : start + size] for start in range(0, len(names), size)]


def table_for(console: Console, *columns: str, text: Sequence[int] = (0,)) -> Table:
    """Return an empty table; columns whose position is not in ``text`` hold numbers."""
    if console.is_terminal:  # a rule below the head; the box puts a blank of its own between columns
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 1))
    for position, column in enumerate(columns):
        if position in text:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table
