"""Errors as people are told them: on one line, cut to length, and without what opens a door."""

import re

_USER = re.compile(r"(?<=://)(?:[^\s/?#]*|[^\s/?#@]*:(?!\d*[/?#])[^\s@]*)@")
"""User and password of an address; the second form: one whose password holds what should have been escaped."""


def public(text: str) -> str:
    """Return an address, or a text with addresses in it, without users and passwords."""
    return _USER.sub("", text)


def one_line(error: BaseException | str, most: int | None = 300, *, kind: bool = False) -> str:
    """Return what an error says on one line of at most so many characters; ``kind``: its class's name before it."""
    said = f"{type(error).__name__}: {error}" if kind else str(error)
    return public(" ".join(said.split()))[:most] or type(error).__name__
