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

from moeify.data.documents import Document
from moeify.data.labels import UNLABELLED, Labels, UnlabelledError
from moeify.data.problems import Problems


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

    Values of the category become names (``moeify.data.labels``). Raises ValueError where the file is not there or
    damaged, and with what is wrong with its lines.
    """
    found: dict[str, list[Document]] = {}
    problems, labels = Problems("line"), Labels(f"field {fields.category!r}")
    for number, line in numbered(existing(path, said), said):
        if not line.strip():
            continue
        try:
            entry = _entry(parsed(line), fields, labels)
        except ValueError as error:
            problems.add(number, error)
            continue
        if entry is not None:
            documents = found.setdefault(entry[0], [])
            if entry[1].text.strip():
                documents.append(entry[1])
    problems.check(f"{said}: {path}")
    return found


def parsed(line: bytes) -> dict[str, Any]:
    """Return the object that a line holds; raise ValueError with what it is instead."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line), wanted JSON lines; is it binary data?") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno}), wanted an object a line") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: it is nested too deeply") from None
    if not isinstance(entry, dict):
        raise ValueError(f"got {type(entry).__name__}, wanted an object a line")
    return entry


def _entry(entry: dict[str, Any], fields: Fields, labels: Labels) -> tuple[str, Document] | None:
    """Return category and document of one line, None where it is not asked for; raise ValueError with what is wrong."""
    if not all(_has(entry.get(name), values) for name, values in fields.where.items()):
        return None
    for name in filter(None, (fields.text, fields.category, fields.group)):
        if name not in entry:
            kind = UnlabelledError if name == fields.category else ValueError
            raise kind(f"no field {name!r}, got {', '.join(map(repr, list(entry)[:8])) or 'no fields'}")
    for name in filter(None, (fields.text, fields.group)):
        if not isinstance(entry[name], str):
            raise ValueError(f"field {name!r} is {type(entry[name]).__name__}, wanted a string")
    category = UNLABELLED if fields.category is None else labels.name(entry[fields.category])
    text = entry[fields.text]
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
