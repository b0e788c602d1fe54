"""What people are told of trouble: on one line, cut to length, and without what opens a door."""

import re
import sys
from contextlib import suppress

_USER = re.compile(r"(?<=://)(?:[^\s/?#]*|[^\s/?#@]*:(?!\d*[/?#])[^\s@]*)@")
"""User and password of an address; the second form: one whose password holds what should have been escaped."""


def public(text: str) -> str:
    """Return an address, or a text with addresses in it, without users and passwords."""
    return _USER.sub("", text)


def one_line(error: BaseException | str, most: int | None = 300, *, kind: bool = False) -> str:
    """Return what an error says on one line of at most so many characters; ``kind``: its class's name before it."""
    said = f"{type(error).__name__}: {error}" if kind else str(error)
    return public(" ".join(said.split()))[:most] or type(error).__name__


def say(line: str) -> None:
    """Say a line on stderr beside the work, which goes on where nobody is left to read it."""
    with suppress(OSError, ValueError):  # a pipe without a reader, a terminal that is gone; a closed file
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def warn(what: str) -> None:
    """Say what went wrong beside the work."""
    say(f"moeify: warning: {what}")
