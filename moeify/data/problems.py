"""What is wrong with a file, line by line or row by row, told in one line however much it is."""

import re
from dataclasses import dataclass, field

from moeify.data.labels import WAY_OUT, UnlabelledError

_SHOWN = 5
"""Problems that an error spells out; it counts the others."""


@dataclass
class _Problem:
    first: int
    words: str
    count: int = 1


@dataclass
class Problems:
    """Each problem once, with the first place that has it; those that differ in numbers alone are the same."""

    place: str
    """What is counted: ``line`` or ``row``."""
    _found: dict[str, _Problem] = field(default_factory=dict)
    _others: int = 0
    _unlabelled: bool = False

    def add(self, number: int, error: ValueError) -> None:
        """Note what is wrong with a line or row, counted from 1."""
        self._unlabelled |= isinstance(error, UnlabelledError)
        words = str(error)
        if problem := self._found.get(kind := re.sub(r"\d+", "0", words)):
            problem.count += 1
        elif len(self._found) < _SHOWN:
            self._found[kind] = _Problem(number, words)
        else:
            self._others += 1

    def check(self, said: str) -> None:
        """Raise ValueError where something is wrong; ``said`` names the file."""
        if not self._found:
            return
        count = sum(problem.count for problem in self._found.values()) + self._others
        told = [f"{self._at(problem)}: {problem.words}" for problem in self._found.values()]
        told += [f"and {self._others:,} more {self.place}s"] * (self._others > 0)
        told += [f"give every {self.place} a category or leave it out; or {WAY_OUT}"] * self._unlabelled
        raise ValueError(f"{said} has {count:,} bad {self.place}{'s' * (count > 1)}: {'; '.join(told)}")

    def _at(self, problem: _Problem) -> str:
        more = problem.count - 1
        return f"{self.place} {problem.first}" + (f" and {more:,} more" if more else "")
