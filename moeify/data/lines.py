"""JSON lines: one object a line, plain or compressed, whose fields say text and category."""

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from moeify.data.documents import Document, misnamed

UNLABELLED = ""
"""The one category of documents that have none."""
_SHOWN = 5
"""Problems that an error spells out; it counts the others."""


@dataclass(frozen=True)
class Fields:
    """What is read of each line."""

    text: str
    category: str | None = None
    """None: all lines are ``UNLABELLED``."""
    group: str | None = None
    """Documents with the same value fall into the same split; None: only equal texts do."""
    where: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Field to values of which a line must have one, be it or list it; other lines are left out."""


def read_lines(path: Path, fields: Fields, said: str = "data.source.path") -> dict[str, list[Document]]:
    """Return each category's documents, in the file's order; ``said`` is where the recipe names the file.

    Raises ValueError where the file is not there or damaged, and with its first bad lines.
    """
    found: dict[str, list[Document]] = {}
    problems: list[str] = []
    count = 0
    for number, line in numbered(existing(path, said), said):
        if not line.strip():
            continue
        try:
            entry = _entry(line, fields)
        except ValueError as error:
            count += 1
            if len(problems) < _SHOWN:
                problems.append(f"line {number}: {error}")
            continue
        if entry is not None:
            documents = found.setdefault(entry[0], [])
            if entry[1].text.strip():
                documents.append(entry[1])
    if count:
        more = [f"and {count - _SHOWN} more lines"] if count > _SHOWN else []
        raise ValueError("\n".join([f"{said}: {path} has {count} bad lines", *problems, *more]))
    return found


def _entry(line: bytes, fields: Fields) -> tuple[str, Document] | None:
    """Return category and document of one line, None where it is not asked for; raise ValueError with what is wrong."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: it is nested too deeply") from None
    if not isinstance(entry, dict):
        raise ValueError(f"got {type(entry).__name__}, wanted an object")
    if not all(_has(entry.get(name), values) for name, values in fields.where.items()):
        return None
    for name in filter(None, (fields.text, fields.category, fields.group)):
        if name not in entry:
            way_out = "; data.source.category null is for lines without" if name == fields.category else ""
            got = ", ".join(map(repr, list(entry)[:8])) or "no fields"
            raise ValueError(f"no field {name!r}, got {got}{way_out}")
        if not isinstance(entry[name], str):
            raise ValueError(f"field {name!r} is {type(entry[name]).__name__}, wanted a string")
    category, text = UNLABELLED if fields.category is None else entry[fields.category], entry[fields.text]
    if fields.category is not None and (problem := misnamed(category)):
        raise ValueError(f"field {fields.category!r}: {problem}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {fields.text!r} holds half a surrogate pair, which is no Unicode text") from None
    group = text if fields.group is None else entry[fields.group]
    return category, Document(text, hashlib.sha256(group.encode(errors="surrogatepass")).hexdigest())


def _has(value: Any, wanted: Collection[str]) -> bool:
    return any(each in wanted for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))


def numbered(path: Path, said: str = "data.source.path") -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, plain or compressed, from 1."""
    with path.open("rb") as file:
        head = file.read(6)
    try:
        with _opened(path, head) as lines:
            yield from enumerate(cast(Iterable[bytes], lines), 1)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{said}: {path} is damaged or cut short: {error}") from None


def _opened(path: Path, head: bytes) -> BinaryIO:
    if head.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if head == b"\xfd7zXZ\0":
        return cast(BinaryIO, lzma.open(path, "rb"))
    return path.open("rb")


def existing(path: Path, said: str = "data.source.path") -> Path:
    """Return the path of a file that is there."""
    if not path.is_file():
        raise ValueError(f"{said}: {path} is not a file; a relative path starts at the recipe's folder")
    return path
