"""A run's pictures and report, made while its journal is read; none of it waits for a server.

MLflow is handed the same files, and often sooner or later than they would be made here: whoever asks first has them
made, and the other waits.
"""

import threading
from collections.abc import Sequence

from moeify.events import Event, Exported, Failed, Finished, RoundEnded
from pipelines import plots
from pipelines.journal import read_events
from pipelines.one_line import one_line, warn
from pipelines.report.page import write_or_warn
from pipelines.runs import RunFolder, Status


class Drawing:
    """Follows a run: draws each round and the end, and writes the report anew."""

    name = "drawing"

    def __init__(self, folder: RunFolder, *, driven: bool = True) -> None:
        self._folder = folder
        self._driven = driven
        """Whether the run is under way, as against told of later."""
        self.offset = read_events(folder.journal, 0)[1] if driven else 0
        """Earlier attempts drew theirs; what they did not come to is drawn as MLflow is told of it."""
        self._drawn: set[str] = set()
        self._told: str | None = None
        """Id of the event that the final report ends with."""
        self._one_at_a_time = threading.Lock()

    @property
    def later(self) -> str:
        """The command that makes the report."""
        return f"moeify report {self._folder.id}"

    def take(self, events: Sequence[Event]) -> None:
        """Draw what is to be drawn of them, each once."""
        with self._one_at_a_time:
            for event in events:
                if isinstance(event, RoundEnded | Finished) and event.id not in self._drawn:
                    self._drawn.add(event.id)
                    self._draw(event)

    def close(self) -> None:
        """Write the report of a run that is over."""
        with self._one_at_a_time:
            last = last_event(self._folder)
            told = last.id if last else ""
            if told != self._told:
                self._told = told
                write_or_warn(self._folder, ended_as(last))

    def _draw(self, event: RoundEnded | Finished) -> None:
        """Draw a round or the end; a picture that cannot be drawn keeps nothing else from being made or delivered."""
        try:
            if isinstance(event, RoundEnded):
                plots.draw(self._folder, event.round)
            else:
                plots.tax_separation(self._folder)
        except (OSError, ValueError) as error:
            what = f"round {event.round}" if isinstance(event, RoundEnded) else "the end"
            warn(f"{what} was not drawn ({one_line(error)})")
        if isinstance(event, RoundEnded):  # the end's is written when it is known that it was the end
            write_or_warn(self._folder, "running" if self._driven else ended_as(last_event(self._folder)))


def last_event(folder: RunFolder) -> Event | None:
    """Return the last event that says how the run goes."""
    events, _ = read_events(folder.journal, 0)
    return next((event for event in reversed(events) if not isinstance(event, Exported)), None)


def ended_as(last: Event | None) -> Status:
    """Return how a run ended whose last event is that."""
    match last:
        case Finished():
            return "finished"
        case Failed():
            return "failed"
        case _:
            return "interrupted"
