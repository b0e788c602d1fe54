"""A run's journal behind a URL, as the worker that speaks for the run writes it.

Events are sent in batches, every second at first and more seldom as a run grows old. A checkpoint waits until all
events before it are there, and whoever follows the run reads what is there and nothing else. So a kill can lose only
what nobody was told and what comes after the last checkpoint: the run that goes on says it again, under the same ids.

A writer claims the journal with a number, the highest one counts: a worker that outlives its driver finds a higher one
and stops, so that it never mixes with the attempt that went on without it.
"""

import threading
import time
from typing import Self

from moeify.events import Event
from moeify.storing import StorageError
from pipelines.journal import JournalError, JournalTracker, line_of, read_events
from pipelines.remote_run import RemoteRun, part_name
from pipelines.runs import RunFolder

_CLAIMS = "claims"
_SHORTEST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
_PAUSE_SHARE = 0.01
"""Of the writer's age: a batch is never longer than this share of what it took to come here, nor than the longest."""


class UrlJournal:
    """Takes events and sends them; raises ``StorageError`` where they cannot be sent, like ``JournalTracker``."""

    def __init__(self, run: RemoteRun) -> None:
        self._run = run
        self._claim = self._claimed()
        run.catch_up()
        events, self._end = read_events(run.journal, 0)
        self._seen = {event.id for event in events}
        self._waiting: list[tuple[str, bytes]] = []
        """Id and line of events that are not there yet."""
        self._trouble: Exception | None = None
        self._taking, self._sending = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._send_along, name="journal", daemon=True)
        self._thread.start()

    def emit(self, event: Event) -> None:
        """Take one event; an ``id`` that the journal holds is ignored."""
        if self._trouble:
            raise self._trouble
        with self._taking:
            if event.id not in self._seen:
                self._seen.add(event.id)
                self._waiting.append((event.id, line_of(event)))

    def flush(self) -> None:
        """Return when all events that were taken are there; raise JournalError where another attempt took over."""
        if self._trouble:
            raise self._trouble
        with self._sending:
            self._check_claim()
            while self._waiting:
                self._send()

    def close(self) -> None:
        """Send what is left; the tracker takes no more events."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except (StorageError, JournalError):
            if kind is None:  # else: what ended the body matters more
                raise

    def _send_along(self) -> None:
        began = time.monotonic()
        while not self._closed.wait(_pause(time.monotonic() - began)):
            try:
                if self._waiting:
                    self.flush()
            except StorageError:  # it waits; a checkpoint, or the end, will not go on without it
                continue
            except Exception as error:
                self._trouble = error
                return

    def _send(self) -> None:
        """Send what waits as one part, or see what another writer put in its place."""
        with self._taking:
            batch = list(self._waiting)
        part = b"".join(line for _, line in batch)
        try:
            self._run.place.create(part_name(self._end), part)
        except FileExistsError:
            self._check_claim()  # ours is the highest: a worker of an earlier attempt was a moment faster
            self._run.catch_up()
            events, end = read_events(self._run.journal, self._end)
            if end == self._end:
                raise JournalError(f"{self._run.place.url}/{part_name(end)} does not go on with the journal") from None
            there, self._end = {event.id for event in events}, end
            with self._taking:
                self._waiting = [(id_, line) for id_, line in self._waiting if id_ not in there]
            return
        self._run.append(self._end, part)
        self._end += len(part)
        with self._taking:
            del self._waiting[: len(batch)]

    def _claimed(self) -> int:
        place = self._run.place
        while True:
            there = _numbers(place.names(_CLAIMS))
            mine = max(there, default=0) + 1
            try:
                place.create(f"{_CLAIMS}/{mine:06d}", f"{time.time():.3f}\n".encode())
            except FileExistsError:
                continue
            place.remove(f"{_CLAIMS}/{number:06d}" for number in there)
            return mine

    def _check_claim(self) -> None:
        if (newest := max(_numbers(self._run.place.names(_CLAIMS)), default=0)) != self._claim:
            raise JournalError(
                f"{self._run.place.url} is driven by a later attempt (number {newest}, this is {self._claim}); this "
                f"one has stopped and left it alone"
            )


Journal = JournalTracker | UrlJournal


def journal_of(folder: RunFolder) -> Journal:
    """Open a run's journal to write to it, where the run is."""
    return UrlJournal(folder.remote) if folder.remote else JournalTracker(folder.journal)


def _pause(age: float) -> float:
    return min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, _PAUSE_SHARE * age))


def _numbers(names: list[str]) -> list[int]:
    return [int(name) for name in names if name.isascii() and name.isdigit()]
