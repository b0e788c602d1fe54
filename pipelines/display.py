"""Followers that show a run on a terminal, or as plain lines where there is none.

What earlier attempts reported comes from the journal too: it is caught up without a word, then told in one line.
"""

import os
import time
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moeify.events import Evaluated, Event, Failed, Finished, Mishap, Phase, RoundEnded, Started, Step
from moeify.recipe.config import RunConfig
from pipelines.journal import Follower
from pipelines.remaining import Remaining
from pipelines.wording import clock, counted, percent, two_digits

_PLAIN_PARTS = 20
"""Parts of the run's training work that a plain log tells of."""


def choose_display(quiet: bool, stream: TextIO, earlier: int = 0, config: RunConfig | None = None) -> Follower | None:
    """Return what fits the stream; None for a quiet run.

    ``earlier``: events in the journal before this attempt; ``config``: the recipe, without which the time that is left
    is not told.
    """
    if quiet:
        return None
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return TerminalDisplay(Console(file=stream, highlight=False, markup=False, emoji=False), earlier, config)
    return PlainDisplay(stream, earlier, config)


class RunState:
    """How far a run has come, by the events seen so far; ``config``: the recipe, for the time that is left."""

    def __init__(self, config: RunConfig | None = None) -> None:
        self.started: Started | None = None
        self.phase: Phase | None = None
        self.step: Step | None = None
        self.rounds = 0
        """Rounds that have ended."""
        self.over = False
        """Whether the run has come to an end; workers and followers have yet to close."""
        self._remaining = Remaining(config) if config else None
        self._training = False
        """Whether the last step belongs to the phase."""

    def take(self, event: Event) -> None:
        """Take one event."""
        if self._remaining:
            self._remaining.take(event)
        match event:
            case Started():
                self.started = event
            case Phase():
                self.phase = event
                self._training = False
                self.over = False  # an attempt after one that failed
            case Step():
                self.step = event
                self._training = True
            case RoundEnded():
                self.rounds = max(self.rounds, event.round)
            case Finished() | Failed():
                self.over = True
                self._training = False

    def attempt_begins(self) -> None:
        """Forget the pace of earlier attempts."""
        if self._remaining:
            self._remaining.attempt_begins()

    @property
    def work(self) -> float:
        """Fraction 0..1 of the run's training work that is done."""
        return self.step.work if self.step else 0.0

    def seconds_left(self, now: float) -> float | None:
        """Return the run's remaining seconds at this attempt's pace; None before there is one, or without a recipe."""
        return self._remaining.seconds(now) if self._remaining else None

    def phase_line(self) -> str:
        """Say where the run is, e.g. ``round 1/2 · train``."""
        if self.over:
            return "closing: workers stop, tracking catches up"
        if not self.phase:
            return "starting workers"
        of = f"/{self.started.rounds}" if self.started else ""
        where = f"round {self.phase.round}{of} · " if self.phase.round else ""
        return f"{where}{self.phase.phase}" + (f" · {self.phase.note}" if self.phase.note else "")

    def step_line(self) -> str:
        """Say what is trained and how well it goes."""
        if not self.step or not self._training:
            return ""
        of = f"/{self.started.steps}" if self.started else ""
        unit = self.started.unit if self.started else "unit"
        pace = self.step.units_per_second
        speed = f"{pace / 1000:.1f}k" if pace >= 1000 else f"{pace:.0f}"
        loss = f"loss {fmean(self.step.loss.values()):.3f} · " if self.step.loss else ""
        return f"{self.step.arm} step {self.step.step}{of} · {loss}{speed} {unit}s/s"

    def resumed_line(self) -> str:
        """Say what earlier attempts have done."""
        of = f" of {self.started.rounds}" if self.started else ""
        return f"resumed: {self.rounds}{of} rounds and {self.work:.0%} of the work were done before"


def milestones(event: Event) -> Iterator[str]:
    """Yield the lines, if any, that are worth keeping on the screen when an event comes."""
    match event:
        case Started():
            units = sum(event.sites.values())
            yield (
                f"{len(event.categories)} categories ({', '.join(event.categories)}), {event.parameters:,} parameters, "
                f"{units:,} units in {counted(len(event.sites), 'site')}, {event.steps:,} steps an arm"
            )
        case RoundEnded():
            random = "" if event.tax_random is None else f"random {event.tax_random:+.3f}, "
            told = "" if event.tax_told is None else f"over told {event.tax_told:+.3f}, "
            expected = "" if event.budget_used is None or event.uncut else f" (expected {event.expected:+.3f})"
            yield (
                f"round {event.round} {event.outcome}{f' ({event.uncut})' if event.uncut else ''}: "
                f"separation {percent(event.separation)}, tax {event.tax:+.3f} nats"
                f"{expected}, {random}{told}J {two_digits(event.predicted)}"
            )
        case Mishap():
            yield f"{event.arm}, {event.what}; {event.done}"
        case Evaluated(moment="test") if event.loss:
            yield f"test loss of {event.arm}: {fmean(event.loss.values()):.3f} nats, mean over categories"
        case Finished():
            yield f"finished in {clock(event.seconds)}"
        case Failed():
            yield f"failed: {event.reason}"


class JsonDisplay:
    """The events themselves, one a line."""

    def __init__(self, stream: TextIO) -> None:
        self.offset = 0
        self._stream = stream

    def take(self, events: Sequence[Event]) -> None:
        """Write every event."""
        for event in events:
            self._stream.write(f"{event.model_dump_json()}\n")
        self._stream.flush()


class PlainDisplay:
    """One plain line for each phase, each twentieth of the work, each round; no control codes."""

    def __init__(self, stream: TextIO, earlier: int = 0, config: RunConfig | None = None) -> None:
        self.offset = 0
        self._stream = stream
        self._earlier = earlier
        self._state = RunState(config)
        self._told = 0
        """The part of the work that a step was last told of."""

    def take(self, events: Sequence[Event]) -> None:
        """Write what is worth a line."""
        for event in events:
            self._state.take(event)
            if self._earlier:
                self._earlier -= 1
                if not self._earlier:
                    self._write(self._state.resumed_line())
                    self._state.attempt_begins()
                    self._told = _part(self._state.work)
                continue
            for line in milestones(event):
                self._write(line)
            if isinstance(event, Phase):
                self._write(self._state.phase_line() + self._eta(event))
            if isinstance(event, Step) and _part(event.work) > self._told:
                self._write(f"{event.work:4.0%} · {self._state.step_line()}{self._eta(event)}")
                self._told = _part(event.work)

    def close(self) -> None:
        """Nothing is left to write."""

    def _eta(self, event: Event) -> str:
        left = self._state.seconds_left(event.time)
        return "" if left is None or (isinstance(event, Phase) and event.note) else f" · {clock(left)} left"

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def _part(work: float) -> int:
    return int(work * _PLAIN_PARTS + 1e-6)


class TerminalDisplay:
    """Milestones as lines, and below them two lines that live: where the run is, how far and how long still."""

    def __init__(self, console: Console, earlier: int = 0, config: RunConfig | None = None) -> None:
        self.offset = 0
        self._console = console
        self._earlier = earlier
        self._state = RunState(config)
        self._began = time.time()
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
        self._live.start()

    def take(self, events: Sequence[Event]) -> None:
        """Print milestones; the rest shows in the live lines."""
        for event in events:
            self._state.take(event)
            if self._earlier:
                self._earlier -= 1
                if not self._earlier:
                    self._console.print(self._state.resumed_line())
                    self._state.attempt_begins()
                continue
            for line in milestones(event):
                self._console.print(Text(line, style=_style(event)))

    def close(self) -> None:
        """Take the live lines away."""
        self._live.stop()

    def _render(self) -> RenderableType:
        now = time.time()
        left = self._state.seconds_left(now)
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        rest = "" if left is None or self._state.over else f"  {clock(left)} left"
        times = f"{self._state.work:4.0%}  {clock(now - self._began)} gone{rest}"
        bar.add_row(ProgressBar(total=1.0, completed=self._state.work), times)
        where = " · ".join(filter(None, (self._state.phase_line(), self._state.step_line())))
        return Group(Text(where, no_wrap=True, overflow="ellipsis"), bar)


def _style(event: Event) -> str:
    match event:
        case RoundEnded():
            return "green" if event.outcome == "kept" else "yellow"
        case Failed() | Mishap():
            return "red"
        case _:
            return ""
