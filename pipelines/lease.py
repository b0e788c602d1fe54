"""Who drives a run behind a URL: told by its driver every few seconds, since no lock reaches across machines.

``driver.json`` says host, process and working copy. It counts for half a minute after it was written, by the store's
clock against this machine's; a driver that ends says that it left. On the machine whose copy the driver used, the
copy's own lock says at once whether it lives. A lease only keeps people from starting twice; that two attempts never
mix is the journal's doing.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moeify.place import Place
from moeify.storing import StorageError
from pipelines.one_line import one_line, warn
from pipelines.remote_run import RemoteRun

NAME = "driver.json"
BEAT_SECONDS = 5.0
LAPSE_SECONDS = 30.0
_POLL_SECONDS = 1.0


class RunBusyError(ValueError):
    """Another process drives the run."""


@dataclass(frozen=True)
class Holder:
    """The driver of a run, elsewhere."""

    host: str
    pid: int
    quiet_seconds: float
    """Since it was last heard of."""

    def told(self) -> str:
        """Return who that is, and what to do if it was killed."""
        left = max(1, round(LAPSE_SECONDS - self.quiet_seconds))
        return f"process {self.pid} on {self.host}; if that was killed, its lease ends in {left} s"


def holder(place: Place, copy: str) -> Holder | None:
    """Return who drives the run, through another working copy than ``copy``; None where nobody does."""
    try:
        known = json.loads(place.read(NAME))
        modified = place.item(NAME).modified
    except (FileNotFoundError, ValueError):
        return None
    quiet = time.time() - modified
    if not isinstance(known, dict) or known.get("left") or known.get("copy") == copy or quiet > LAPSE_SECONDS:
        return None
    return Holder(str(known.get("host", "?"))[:100], int(known.get("pid") or 0), max(0.0, quiet))


@contextmanager
def held(
    run: RemoteRun, copy: str, what: str, files: Callable[[], list[Path]], *, journaled: bool = True
) -> Iterator[None]:
    """Say that this process drives the run while the body works, and keep copy and URL alike; ``what``: it is called.

    New parts of the journal, where it has one (``journaled``), come into the copy, and ``files`` are sent when they
    changed. Trouble on the way costs a line on stderr and is no trouble of the body. Raises RunBusyError where the run
    is driven through another copy.
    """
    if other := holder(run.place, copy):
        raise RunBusyError(f"{what} is driven by {other.told()}")
    run.pull()
    keeper = _Keeper(run, copy, files, journaled)
    keeper.beat()
    keeper.start()
    try:
        yield
    finally:
        keeper.end()


class _Keeper(threading.Thread):
    def __init__(self, run: RemoteRun, copy: str, files: Callable[[], list[Path]], journaled: bool) -> None:
        super().__init__(name=f"keep-{run.copy.name}", daemon=True)
        self._remote, self._copy, self._files, self._journaled = run, copy, files, journaled
        self._ended = threading.Event()
        self._sent = self._stamps()
        self._warned = False

    def run(self) -> None:
        began = last = time.monotonic()
        while not self._ended.wait(min(BEAT_SECONDS, max(_POLL_SECONDS, (time.monotonic() - began) / 100))):
            if self._journaled:
                self._try(self._remote.catch_up)
            if time.monotonic() - last >= BEAT_SECONDS:
                last = time.monotonic()
                self._try(self.beat)
                self._try(self._send)

    def beat(self, *, left: bool = False) -> None:
        """Write who drives the run."""
        known = {"host": socket.gethostname(), "pid": os.getpid(), "copy": self._copy, "left": left}
        self._remote.place.write(NAME, (json.dumps(known) + "\n").encode())

    def end(self) -> None:
        """Bring copy and URL to one state for the last time, and leave."""
        self._ended.set()
        self.join()
        if self._journaled:
            self._try(self._remote.compact)
        self._try(self._send)
        self._try(lambda: self.beat(left=True))

    def _send(self) -> None:
        now = self._stamps()
        changed = [path for path, stamp in now.items() if self._sent.get(path) != stamp]
        if changed:
            self._remote.push(*changed)
        self._sent = now

    def _stamps(self) -> dict[Path, tuple[int, int]]:
        return {path: (stat.st_mtime_ns, stat.st_size) for path in self._files() if (stat := path.stat())}

    def _try(self, what: Callable[[], None]) -> None:
        try:
            what()
        except StorageError as error:
            if not self._warned:
                warn(one_line(error))
            self._warned = True
        except FileNotFoundError:  # a file that went while it was looked at; it is looked at again
            pass
