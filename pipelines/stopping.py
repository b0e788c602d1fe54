"""Ctrl-C: pressed once, a run's workers leave a checkpoint and stop; pressed twice, everything ends at once. SIGTERM,
which ``moeify stop`` and cluster managers send, is Ctrl-C once, and twice where that takes too long for those.

The process that drives a run lays a note in the run's folder, or behind its URL, and rank 0 of the workers looks for
it, wherever that is.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from moeify.events import Finished
from moeify.place import Place
from pipelines.journal import read_events
from pipelines.one_line import one_line, say, warn
from pipelines.runs import RunFolder

NOTE = "stop"
_LOOK = 0.2
"""Seconds between two looks for the note in a folder."""
_LOOK_FAR = 3.0
"""The same behind a URL."""
GRACE = 20.0
"""Seconds after SIGTERM in which there may be a checkpoint. Kubernetes kills after 30."""
_PATIENCE = 3.0
"""Seconds that the note may take to be written before it is taken back."""


class Watch:
    """Says whether the run's driver has asked for a stop; cheap to ask at every step.

    Behind a URL a thread looks, so that a store that is slow or away holds up no step.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._next = 0.0
        self._looking: threading.Thread | None = None
        self._asked = False

    def __call__(self) -> bool:
        """Return whether it has; once True, always."""
        now = time.monotonic()
        if not self._asked and now >= self._next and not (self._looking and self._looking.is_alive()):
            remote = self._folder.remote
            self._next = now + (_LOOK_FAR if remote else _LOOK)
            if remote is None:
                self._asked = (self._folder.path / NOTE).exists()
            else:
                self._looking = threading.Thread(target=self._look, args=(remote.place,), daemon=True)
                self._looking.start()
        return self._asked

    def _look(self, place: Place) -> None:
        with suppress(OSError):  # it is not there, or the storage is away for a while
            place.read(NOTE)
            self._asked = True


class Asking:
    """What has become of Ctrl-C and SIGTERM so far."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._timer: threading.Timer | None = None
        self.pressed = 0

    def press(self, signum: int, frame: object) -> None:
        """Ask the workers to stop; raise KeyboardInterrupt the second time."""
        self.pressed += 1
        if self.pressed > 1:
            raise KeyboardInterrupt
        self._thread.start()  # a signal may come in the middle of any write

    def terminate(self, signum: int, frame: object) -> None:
        """Do as ``press`` does, and so once more when the time is up."""
        self.press(signum, frame)
        self._timer = threading.Timer(GRACE, os.kill, (os.getpid(), signal.SIGTERM))
        self._timer.daemon = True
        self._timer.start()

    def _ask(self) -> None:
        say("moeify: stopping after a checkpoint; Ctrl-C again stops at once")
        try:
            if remote := self._folder.remote:
                remote.place.write(NOTE, b"")
            else:
                (self._folder.path / NOTE).touch()
        except OSError as error:
            warn(f"the workers cannot be asked ({one_line(error)}); Ctrl-C again stops at once")

    def take_back(self) -> None:
        """Take the note away, which would stop the next attempt."""
        if self._timer:
            self._timer.cancel()
        if self.pressed:
            self._thread.join(_PATIENCE)
        with suppress(OSError):
            if remote := self._folder.remote:
                remote.place.remove([NOTE])
            else:
                (self._folder.path / NOTE).unlink(missing_ok=True)


@contextmanager
def asking(folder: RunFolder) -> Iterator[None]:
    """Let the first Ctrl-C ask the run's workers to stop while the body waits for them, and the second end it at once.

    SIGTERM is the first, and the second, too, where the body is not over in ``GRACE`` seconds. Raises
    KeyboardInterrupt, which says that there is a checkpoint, where the body then returns before the run has ended. In
    another thread than the main one, where no signal arrives, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = Asking(folder)
    mine.take_back()
    heard = {signal.SIGINT: mine.press, signal.SIGTERM: mine.terminate}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    try:
        yield
    finally:
        try:
            if mine.pressed:
                mine.take_back()  # first of all the timer, whose signal nobody would expect any more
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if mine.pressed and not _over(folder):
        raise KeyboardInterrupt("stopped with a checkpoint")


def _over(folder: RunFolder) -> bool:
    if folder.remote:
        folder.remote.catch_up()
    return any(isinstance(event, Finished) for event in read_events(folder.journal, 0)[0])


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM end the body like Ctrl-C, with everything taken down in order.

    Ray puts handlers of its own in the way, which exit with 0 or dump core, and leaves them behind. Where ``asking``
    hears SIGTERM already, it goes on to.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if not isinstance(getattr(before[signal.SIGTERM], "__self__", None), Asking):
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
