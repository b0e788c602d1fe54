"""Moments to kill at: in each phase of a run once at least, whatever is killed, and then anywhere.

The phases are those that an undisturbed run tells in its journal, and two that none tells: ``start``, before an attempt
has told anything, and ``closing``, once the result is there. No target is left out of any; of a worker or a node, whose
kill needs a worker that lives, ``start`` begins with its process, and ``closing`` lasts until that ends.

An aim follows the journal until a phase is told, and lets a random part of the phase's length go by. What it hit is
what the journal says right before the kill, so it may come too late, and is repeated, each time for an earlier part; a
phase that no aim has hit stays without a kill, and is counted. An attempt's workers outlive what was killed by seconds,
and may tell more: what the next attempt tells is counted from when they are gone.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from benchmarks.killable import LONGEST, Attempt, Tally, Target, alive, any_left, workers_below
from pipelines.journal import read_events
from pipelines.runs import RunFolder

START, CLOSING = "start", "closing"
_RESUMED = "resumed/"
"""How the id of the event begins that says where an interrupted run goes on."""
_TRIES = 6
"""Aims at one phase before it is given up."""
_POLL = 0.004
"""Seconds between two looks at a journal."""
_OUTLIVED = 30.0
"""Seconds that workers of an earlier attempt are waited for."""


@dataclass(frozen=True)
class Length:
    """How long an undisturbed run takes, in seconds."""

    whole: float
    """In which it can be killed: from its first event to a while after its last."""
    phases: dict[str, float]
    """The longest stretch of each phase, in the order in which they first come."""

    @classmethod
    def of(cls, folder: RunFolder, start: float, closing: float) -> "Length":
        """Read it from a journal; how long an attempt starts and closes is not told there."""
        events, _ = read_events(folder.journal, 0)
        told = [(event.phase, event.time) for event in events if event.kind == "phase"]
        ends = [*(begin for _, begin in told[1:]), events[-1].time]
        phases = {START: start}
        for (name, begin), end in zip(told, ends, strict=True):
            phases[name] = max(phases.get(name, 0.0), end - begin)
        return cls(1.3 * (events[-1].time - events[0].time) + 1.0, {**phases, CLOSING: closing})


@dataclass
class Aims:
    """What to aim at next, of one target."""

    target: Target
    length: Length
    tally: Tally
    draw: random.Random
    every: bool = True
    """Whether every phase has to be hit."""
    tried: Counter[str] = field(default_factory=Counter[str])

    def __post_init__(self) -> None:
        if self.every:
            self.tally.asked |= {(self.target, phase) for phase in self.length.phases}

    def left(self) -> list[str]:
        """Return the phases that had no kill yet, those given up left out, in a run's order."""
        lacking = self.tally.lacking()
        return [p for p in self.length.phases if (self.target, p) in lacking and self.tried[p] < _TRIES]

    def of_run(self, most: int) -> Sequence[str | None]:
        """Return what to aim at in one run: phases in their order, or, where each had its kill, any moment."""
        return self.left()[:most] or [None] * most

    def wait(self, phase: str | None, process: Attempt, folder: RunFolder, since: int) -> list[psutil.Process]:
        """Wait for a moment of a phase, or of the whole run, or for the end; return the attempt's train workers then.

        To list them takes as long as a short phase: where one is aimed at, that is done before. ``since``: see
        ``phase_of``.
        """
        if phase is None:
            wait(process, self.draw.uniform(0.0, self.length.whole))
            return workers_below(process.pid)
        part = self.draw.uniform(0.0, self.length.phases[phase] / 2 ** self.tried[phase])
        self.tried[phase] += 1
        if phase == START:
            wait(process, part)
            return workers_below(process.pid)
        wait(process, LONGEST, lambda: phase_of(folder, since) != START)
        workers = workers_below(process.pid)
        wait(process, LONGEST, lambda: phase_of(folder, since) == phase)
        wait(process, part)
        return workers


def wait(process: Attempt, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    """Wait so long, or for the attempt's end, or until something is so."""
    last = time.monotonic() + seconds
    while alive(process) and time.monotonic() < last and not until():
        time.sleep(_POLL)


def past(phase: str | None, folder: RunFolder) -> bool:
    """Say whether a run has come to its result before it was aimed at, so that no attempt is in a phase of it again."""
    return phase is not None and folder.result.exists()


def outlived(process: Attempt, workers: Sequence[psutil.Process], folder: RunFolder) -> int:
    """Wait for the workers of an earlier attempt to be gone; return how much the journal holds then, see ``told``."""
    wait(process, _OUTLIVED, lambda: not any_left(workers))
    return told(folder)


def told(folder: RunFolder) -> int:
    """Return how much a journal holds, in bytes."""
    with suppress(FileNotFoundError):
        return folder.journal.stat().st_size
    return 0


def phase_of(folder: RunFolder, since: int) -> str:
    """Return the phase that a run is in: the last told, if anything was told after ``since`` bytes of the journal.

    A resumed run says that it is prepared, and then not again what it said before it was interrupted.
    """
    if folder.result.exists():
        return CLOSING
    with suppress(OSError, ValueError):
        if read_events(folder.journal, since, 1)[0]:
            events, _ = read_events(folder.journal, 0)
            phases = [event for event in events if event.kind == "phase"]
            if events[-1].id.startswith(_RESUMED):
                return phases[-1].phase
            return next((each.phase for each in reversed(phases) if not each.id.startswith(_RESUMED)), START)
    return START
