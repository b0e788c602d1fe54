"""Paths of recipes: of files that every node sees, or that lie in an object store."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

from moeify.place import KINDS, checked_url


def url_of(path: Path) -> str | None:
    """Return the URL that a path of a recipe stands for; None where it is one of this machine.

    >>> url_of(Path("s3://bucket/texts.jsonl")), url_of(Path("texts.jsonl"))
    ('s3://bucket/texts.jsonl', None)
    """
    scheme, *rest = path.parts or ("",)
    return f"{scheme}//{'/'.join(rest)}" if scheme in _SCHEMES and rest else None


def _checked(given: object) -> object:
    if not isinstance(given, str) or "://" not in given:
        return given
    try:
        return checked_url(given)
    except ValueError as error:
        raise ValueError(f": {error}") from None  # the recipe's problems say where


def _told(path: Path) -> str:
    return url_of(path) or str(path)


_SCHEMES = {f"{kind}:" for kind in (*KINDS, "memory")}

Where = Annotated[Path, BeforeValidator(_checked), PlainSerializer(_told, return_type=str, when_used="json")]
"""A path, or a URL (``s3://BUCKET/PREFIX``, ``gs://...``), which as a path has one slash less; ``url_of`` tells."""
Glob = Annotated[str, BeforeValidator(_checked)]
"""The same as text, where ``*`` and ``**`` may stand for names."""
