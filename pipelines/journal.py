"""The journal: what a run reported, one event a line. It is the truth; followers deliver it elsewhere.

The loop writes to the journal and to nothing else, so a slow or absent tracking server can neither stop nor delay
it. A follower reads behind at its own pace, and can begin again at any whole line.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from moeify.events import Event
from moeify.storing import storing
from pipelines.one_line import one_line, warn

_EVENT: TypeAdapter[Event] = TypeAdapter(Event)
_BATCH = 1000
"""Events that a follower is handed at once."""
_LONGEST_PAUSE = 30.0
"""Seconds between two tries of a follower that fails."""
_LONGEST_WAIT = 60.0
"""Seconds that a journal's next writer waits for the one before."""
_LAST_TRIES = 3
"""Tries that a failing follower gets once the run has ended."""


class JournalError(ValueError):
    """A line of a journal that no run can have written."""


class JournalTracker:
    """Appends events to a journal; knows the ids that are already in it.

    A partial last line, left by a kill, is cut off on opening. Unlike other trackers it raises ``StorageError``: a run
    whose own state cannot be written must not go on. There is one writer at a time: a worker outlives its killed
    driver by some seconds, and whoever goes on with the run waits here until it is gone.
    """

    def __init__(self, path: Path, wait_seconds: float = _LONGEST_WAIT) -> None:
        self._path = path
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._sole = FileLock(path.with_suffix(".lock"), timeout=wait_seconds, thread_local=False)
        try:
            with storing(path):  # a lock is a file too
                self._sole.acquire()
        except Timeout:
            raise JournalError(
                f"{path} is still written by a worker of an earlier attempt, {wait_seconds:g} s on; stop that process"
            ) from None
        try:
            self._open(path)
        except BaseException:
            self._sole.release()
            raise

    def _open(self, path: Path) -> None:
        events, end = read_events(path, 0)
        self._seen = {event.id for event in events}
        with storing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            os.ftruncate(self._fd, end)

    def emit(self, event: Event) -> None:
        """Append one event; an ``id`` that the journal holds is ignored."""
        if event.id in self._seen:
            return
        line = line_of(event)
        start = os.fstat(self._fd).st_size
        with storing(self._path):
            try:
                while line:
                    line = line[os.write(self._fd, line) :]
            except OSError:
                os.ftruncate(self._fd, start)  # leave no torn line for the next event to be glued to
                raise
        self._seen.add(event.id)

    def close(self) -> None:
        """Let go of the file; the tracker takes no more events."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._sole.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def line_of(event: Event) -> bytes:
    """Return an event as a journal holds it."""
    return json.dumps(event.model_dump(), ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n"


def read_events(path: Path, offset: int, most: int | None = None) -> tuple[list[Event], int]:
    """Return the whole lines from a byte offset on, up to ``most`` of them, and the offset behind them.

    A journal that does not exist yet is an empty one.
    """
    events: list[Event] = []
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n") or len(events) == most:
                    break
                try:
                    events.append(_EVENT.validate_json(line))
                except ValidationError as error:
                    what = error.errors(include_url=False, include_input=False)[0]["msg"]
                    raise JournalError(
                        f"{path}, line {_line_number(path, offset)} is not an event ({what}); "
                        f"the file was changed or the disk lost part of it"
                    ) from None
                offset += len(line)
    except FileNotFoundError:
        return [], offset
    return events, offset


def _line_number(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        return file.read(offset).count(b"\n") + 1


class Follower(Protocol):
    """Takes the journal's events, in order, in a thread of its own."""

    offset: int
    """Byte offset in the journal where this follower begins. Set to the offset behind a batch once ``take`` has
    returned: a follower that begins where it stopped makes this a property and saves it."""

    def take(self, events: Sequence[Event]) -> None:
        """Take the events that follow those taken before; if it raises, they come again, perhaps with later ones."""
        ...

    def close(self) -> None:
        """No more events will come."""
        ...


@runtime_checkable
class Named(Protocol):
    """A follower that people know by a name of its own, and can have go on later."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def later(self) -> str:
        """The command that has it take what it missed."""
        ...


@contextmanager
def follow(
    path: Path, followers: Sequence[Follower], *, poll_seconds: float = 0.25, drain_seconds: float = 30.0
) -> Iterator[None]:
    """Deliver the journal to followers while the body runs, and what is left of it afterwards.

    Each follower has a thread, so that a slow one holds up no other; one that raises is reported once on stderr and
    tried again, and never disturbs the body. Leaving takes at most ``drain_seconds``.
    """
    ended = threading.Event()
    pumps = [_Pump(path, follower, ended, poll_seconds) for follower in followers]
    for pump in pumps:
        pump.start()
    try:
        yield
    finally:
        ended.set()
        deadline = time.monotonic() + drain_seconds
        for pump in pumps:
            pump.join(max(0.0, deadline - time.monotonic()))
            if pump.is_alive():
                pump.report(f"is still busy {drain_seconds:g} s after the run", left=True)


def left_behind() -> bool:
    """Whether a follower is still busy after its run, as the warning said."""
    return any(isinstance(thread, _Pump) and thread.ended.is_set() for thread in threading.enumerate())


class _Pump(threading.Thread):
    def __init__(self, path: Path, follower: Follower, ended: threading.Event, poll_seconds: float) -> None:
        super().__init__(name=f"follow-{type(follower).__name__}", daemon=True)
        self.path, self.follower, self.ended, self.poll_seconds = path, follower, ended, poll_seconds

    def run(self) -> None:
        failures = 0
        gave_up = False
        last_tries = _LAST_TRIES
        while True:
            ended = self.ended.is_set()  # before reading: what was written until then is read below
            try:
                delivered = self._deliver()
            except Exception as error:  # a follower's trouble is never the run's
                failures += 1
                if failures == 1:
                    self.report(f"failed and will be tried again ({one_line(error, kind=True)})")
                last_tries -= ended
                if last_tries <= 0:
                    gave_up = True
                    self.report(f"gave up ({one_line(error, kind=True)})", left=True)
                    break
                if ended:
                    time.sleep(self.poll_seconds)
                else:
                    self.ended.wait(min(_LONGEST_PAUSE, self.poll_seconds * 2**failures))
            else:
                failures = 0
                if not delivered:
                    if ended:
                        break
                    self.ended.wait(self.poll_seconds)
        try:
            self.follower.close()
        except Exception as error:
            if not gave_up:
                self.report(f"failed while closing ({one_line(error, kind=True)})", left=True)

    def report(self, what: str, *, left: bool = False) -> None:
        """Say what is wrong with the follower; ``left``: and where what it missed is."""
        named = self.follower if isinstance(self.follower, Named) else None
        name = named.name if named else type(self.follower).__name__
        where = f"later: {named.later}" if named else f"what it missed stays in {self.path}"
        warn(f"{name} {what}{f'; {where}' if left else ''}")

    def _deliver(self) -> bool:
        events, end = read_events(self.path, self.follower.offset, _BATCH)
        if events:
            self.follower.take(events)
            self.follower.offset = end
        return bool(events)
