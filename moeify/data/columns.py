"""What the fields of lines or the columns of a table hold, counted a row at a time; memory stays small."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeify.data.documents import SPLITS
from moeify.data.labels import told

_MOST = 64
"""Values that a column of categories has at most."""
_SHORT = 64
"""Characters of a category at most."""
_NAMES = 10_000
"""Columns that are looked at; one that comes after so many others is in few lines."""


@dataclass
class Column:
    """One field or column."""

    texts: int = 0
    """Rows that hold text, blank or not."""
    labels: int = 0
    """Rows that hold what may tell a category: text that is not blank, a whole number, a truth value."""
    characters: int = 0
    """Of all texts."""
    values: dict[str, None] = field(default_factory=dict)
    """Different values as text, in the order in which they come, as long as they are few; none that is long."""
    long: bool = False
    """Whether a value is too long for a category."""

    def add(self, value: Any) -> None:
        """Count one row's value."""
        label = told(value)
        if isinstance(value, str):
            self.texts += 1
            self.characters += len(value)
        if isinstance(label, str) and label.strip():
            self.labels += 1
        elif isinstance(label, float):  # no category, but a column of them may be meant to be one
            label = str(label)
        else:
            return
        self.long |= len(label) > _SHORT
        if not self.long and len(self.values) <= _MOST:
            self.values[label] = None

    @property
    def length(self) -> float:
        """Characters of a text, on average."""
        return self.characters / max(1, self.texts)

    def few(self, rows: int) -> bool:
        """Say whether values are so short and come so often, in so many rows, that they may be categories."""
        return not self.long and 1 <= len(self.values) <= min(_MOST, rows // len(SPLITS))

    def tells(self, rows: int) -> bool:
        """Say whether it can tell the categories of all rows."""
        return self.few(rows) and len(self.values) > 1 and self.labels == rows

    def described(self, rows: int) -> str:
        """Return what it holds, in some words."""
        if self.labels and not self.long and len(self.values) <= _MOST and (self.texts or self.few(rows)):
            there = f", in {self.labels:,} of {rows:,} rows" if self.labels < rows else ""
            return f"{len(self.values)} value{'s' * (len(self.values) != 1)}{there}"
        if self.texts == rows:
            return f"text of {self.length:.0f} characters"
        return "text in some" if self.texts else "not text"


@dataclass
class Columns:
    """All of them."""

    rows: int = 0
    named: dict[str, Column] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row."""
        self.rows += 1
        for name, value in row.items():
            if name in self.named or len(self.named) < _NAMES:
                self.named.setdefault(name, Column()).add(value)
