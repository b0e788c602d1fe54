"""What a run's folder says, read once for the whole page; what is not there (yet) is empty or None."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from moeify.events import Evaluated, Event, Failed, Phase, RoundEnded, Started, Step
from moeify.examples import Portraits
from moeify.result import Result
from pipelines.examples import read_portraits
from pipelines.journal import read_events
from pipelines.kept_speeds import KeptSpeed, read_speeds
from pipelines.one_line import one_line
from pipelines.plots import recipe_budget
from pipelines.round_files import Ownership, RoundMap, attribution_file, read_map, read_ownership
from pipelines.runs import RunFolder, Status, status
from pipelines.show import Summary, summary

if TYPE_CHECKING:
    from moeify.routers.report import RouterReport

T = TypeVar("T")


@dataclass(frozen=True)
class Recorded:
    """A run as its files tell it."""

    folder: RunFolder
    status: Status
    known: Summary
    """See ``pipelines.show.summary``: stable keys, null for what is not known."""
    events: tuple[Event, ...]
    """The journal."""
    problems: list[str] = field(default_factory=list)
    """Files that are there and cannot be read, a line each; grows while the page is made."""

    @classmethod
    def read(cls, folder: RunFolder, ended_as: Status | None = None) -> "Recorded":
        """Read a run; ``ended_as``: how it stands, from a driver that knows better than the lock it still holds.

        Raises ValueError where the journal or the result is damaged.
        """
        events, _ = read_events(folder.journal, 0)
        return cls(folder, ended_as or status(folder), summary(folder), tuple(events))

    @cached_property
    def started(self) -> Started | None:
        """The run's plan."""
        return next((event for event in self.events if isinstance(event, Started)), None)

    @cached_property
    def result(self) -> Result | None:
        """What the run ended with."""
        path = self.folder.result
        return Result.model_validate_json(path.read_bytes()) if path.is_file() else None

    @cached_property
    def rounds(self) -> tuple[RoundEnded, ...]:
        """Every round that was judged, those that were rolled back included."""
        return tuple(event for event in self.events if isinstance(event, RoundEnded))

    @property
    def kept(self) -> tuple[RoundEnded, ...]:
        """The rounds that stand."""
        return tuple(event for event in self.rounds if event.outcome == "kept")

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """How training went."""
        return tuple(event for event in self.events if isinstance(event, Step))

    @cached_property
    def evaluated(self) -> tuple[Evaluated, ...]:
        """Losses on held-out data."""
        return tuple(event for event in self.events if isinstance(event, Evaluated))

    @cached_property
    def portraits(self) -> Portraits | None:
        """What each expert does, by example; None where that was not kept, or, noted as a problem, is damaged."""
        return self._undamaged(lambda: read_portraits(self.folder))

    @cached_property
    def router(self) -> "RouterReport | None":
        """How well the run's router routes; None where it has none, or, noted as a problem, is damaged."""
        path = self.folder.router
        return self._undamaged(lambda: _read_router(path)) if path.is_file() else None

    @cached_property
    def speeds(self) -> tuple[KeptSpeed, ...]:
        """How fast exports of the run were; empty where none was timed, or, noted as a problem, it is damaged."""
        return self._undamaged(lambda: read_speeds(self.folder)) or ()

    @property
    def notes(self) -> tuple[Phase, ...]:
        """What the run said besides its figures: resumptions, null tests, cuts that fell short."""
        return tuple(event for event in self.events if isinstance(event, Phase) and event.note)

    @property
    def failure(self) -> str:
        """The last attempt's error in a line; empty where it did not fail."""
        last = self.events[-1] if self.events else None
        return last.reason if isinstance(last, Failed) else ""

    @property
    def unit(self) -> str:
        """What losses are counted by: ``token`` or ``example``."""
        return self.known["unit"] or "unit"

    @property
    def tree(self) -> Summary | None:
        """The nested tree as it stands: of the last round kept, or the dense model's."""
        return self.known["tree"]

    @property
    def budget(self) -> str:
        """The budget of a round in words; empty without one."""
        budget = recipe_budget(self.folder)
        if not budget:
            return ""
        limit = f"{budget['tax']} of the dense twin's loss" if isinstance(budget["tax"], str) else f"{budget['tax']:g}"
        return limit + (" in every category" if budget.get("per") == "category" else "")

    @property
    def origin(self) -> dict[str, Any]:
        """Where and with what the run was made; empty for runs from before that was kept."""
        path = self.folder.origin
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found if isinstance(found, dict) else {}

    def map_of(self, round_: int) -> RoundMap | None:
        """Read a round's attribution and owners; None where they were not kept, or, noted as a problem, are damaged."""
        if not attribution_file(self.folder, round_).is_file():
            return None
        return self._undamaged(lambda: read_map(self.folder, round_))

    def ownership(self) -> Ownership | None:
        """Read who owns what after the last round kept; None as in ``map_of``."""
        if not self.kept:
            return None
        return self._undamaged(lambda: read_ownership(self.folder, self.kept[-1].round))

    def _undamaged(self, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            told = one_line(error)
            if told not in self.problems:
                self.problems.append(told)
            return None


def _read_router(path: Path) -> "RouterReport":
    from moeify.routers.report import RouterReport

    try:
        found = RouterReport.model_validate_json(path.read_bytes())
        if any(expert >= len(found.experts) for text in found.texts for expert in text.experts):
            raise ValueError("router/report.json is damaged (no such expert); make it anew with 'moeify route'")
        return found
    except ValidationError as error:
        what = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise ValueError(f"router/report.json is damaged ({what}); make it anew with 'moeify route'") from None
