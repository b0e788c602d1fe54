"""From a recipe's source to documents in categories: installed text, the user's folders, the user's JSON lines."""

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, assert_never, cast

from moeify.data import corpora
from moeify.data.documents import Document, distinct
from moeify.recipe.data import InstalledText, JsonLines, Source, TextFolders

LEAST_MEGABYTES = 2.0
"""What every installed source must yield, in 10^6 bytes."""
UNLABELLED = ""
"""The one category of documents that have none."""
_MARGIN = 1.25
"""How much more than it may keep an installed source reads, since duplicates are dropped."""
_SHOWN = 5
"""Problems that an error spells out; it counts the others."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED = "mean"
"""Stands for the mean over categories in results."""


def fingerprint(source: Source, base: Path) -> str:
    """Return a hash of everything that ``read`` would read."""
    match source:
        case InstalledText():
            return corpora.fingerprint(source.sources)
        case TextFolders():
            digest = hashlib.sha256()
            for category, folder in source.categories.items():
                for name, path in files_in(base / folder, source.pattern):
                    digest.update(f"{category}\0{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
            return digest.hexdigest()
        case JsonLines():
            with existing(base / source.path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        case _ as never:
            assert_never(never)


def read(source: Source, base: Path) -> dict[str, list[Document]]:
    """Return each category's distinct documents, categories in the recipe's order (by name for JSON lines).

    JSON lines without a category field are all ``UNLABELLED``.

    Raises:
        ValueError: The source cannot be read, says something else than text in at least two well-named categories, or
            holds too little of it.
    """
    match source:
        case InstalledText():
            return _installed(source)
        case TextFolders():
            for category in source.categories:
                if problem := misnamed(category):
                    raise ValueError(f"data.source.categories: {problem}")
            found = {
                category: list(_folder(base / folder, source.pattern)) for category, folder in source.categories.items()
            }
        case JsonLines():
            found = _json_lines(base / source.path, source.text, source.category)
        case _ as never:
            assert_never(never)
    for category, documents in found.items():
        if not documents:
            raise ValueError(f"data.source: category {category!r} has no text; give it documents or leave it out")
    return distinct(found)


def _installed(source: InstalledText) -> dict[str, list[Document]]:
    limit = source.megabytes * 1e6
    wanted = min(LEAST_MEGABYTES, 0.9 * source.megabytes)
    found = distinct({name: list(corpora.documents(name, int(limit * _MARGIN))) for name in source.sources})
    kept: dict[str, list[Document]] = {}
    for name in source.sources:
        size = 0
        kept[name] = []
        for document in found[name]:
            if size + document.size <= limit:
                kept[name].append(document)
                size += document.size
        if size < wanted * 1e6:
            raise ValueError(
                f"data.source.sources: got {size / 1e6:.2f} MB of {name!r} on this machine, wanted at least "
                f"{wanted:g} MB; leave it out, or install these whole: {', '.join(corpora.distributions(name))}"
            )
    return kept


# --- folders ------------------------------------------------------------------------------------------


def _folder(folder: Path, pattern: str) -> Iterator[Document]:
    for name, path in files_in(folder, pattern):
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data.source: {path} is not UTF-8 text (byte {error.start}); convert it, or narrow "
                f"data.source.pattern, {pattern!r}, so that it names text files only"
            ) from None
        if text.strip():
            yield Document(text, name)


def files_in(folder: Path, pattern: str) -> list[tuple[str, Path]]:
    """Return relative name and path of the files below a folder, those of hidden files and folders left out."""
    if not folder.is_dir():
        raise ValueError(f"data.source: {folder} is not a folder; relative paths start at the recipe's folder")
    try:
        paths = [path for path in folder.glob(pattern) if path.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"data.source.pattern: got {pattern!r}, wanted a glob like '**/*.txt' ({error})") from None
    names = ((path.relative_to(folder), path) for path in paths)
    files = [(name.as_posix(), path) for name, path in names if not any(part.startswith(".") for part in name.parts)]
    if not files:
        raise ValueError(f"data.source: no file below {folder} matches data.source.pattern, {pattern!r}")
    return sorted(files)


# --- JSON lines ---------------------------------------------------------------------------------------


def _json_lines(path: Path, text: str, category: str | None) -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = {}
    problems: list[str] = []
    count = 0
    for number, line in numbered(existing(path)):
        if not line.strip():
            continue
        try:
            name, content = _entry(line, text, category)
        except ValueError as error:
            count += 1
            if len(problems) < _SHOWN:
                problems.append(f"line {number}: {error}")
            continue
        documents = found.setdefault(name, [])
        if content.strip():
            documents.append(Document(content, hashlib.sha256(content.encode()).hexdigest()))
    if count:
        more = [f"and {count - _SHOWN} more lines"] if count > _SHOWN else []
        raise ValueError("\n".join([f"data.source.path: {path} has {count} bad lines", *problems, *more]))
    if category is None:
        if not any(found.values()):
            raise ValueError(f"data.source.path: {path} has no text, wanted at least one document")
    elif len(found) < 2:
        raise ValueError(
            f"data.source.path: {path} has {len(found)} categories ({', '.join(found) or 'no document'}), wanted at "
            f"least 2; data.source.category, {category!r}, names the field that tells them apart; "
            f"null leaves that to data.discover"
        )
    return dict(sorted(found.items()))


def _entry(line: bytes, text: str, category: str | None) -> tuple[str, str]:
    """Return category and text of one line, or raise ValueError with what is wrong with it."""
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
    for field in (text,) if category is None else (text, category):
        if field not in entry:
            way_out = "; data.source.category null is for lines without" if field == category else ""
            got = ", ".join(map(repr, list(entry)[:8])) or "no fields"
            raise ValueError(f"no field {field!r}, got {got}{way_out}")
        if not isinstance(entry[field], str):
            raise ValueError(f"field {field!r} is {type(entry[field]).__name__}, wanted a string")
    if category is not None and (problem := misnamed(entry[category])):
        raise ValueError(f"field {category!r}: {problem}")
    try:
        entry[text].encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {text!r} holds half a surrogate pair, which is no Unicode text") from None
    return UNLABELLED if category is None else entry[category], entry[text]


def numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, plain or compressed, from 1."""
    with path.open("rb") as file:
        head = file.read(6)
    try:
        with _opened(path, head) as lines:
            yield from enumerate(cast(Iterable[bytes], lines), 1)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"data.source.path: {path} is damaged or cut short: {error}") from None


def _opened(path: Path, head: bytes) -> BinaryIO:
    if head.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if head == b"\xfd7zXZ\0":
        return cast(BinaryIO, lzma.open(path, "rb"))
    return path.open("rb")


def existing(path: Path) -> Path:
    """Return the path of a file that is there."""
    if not path.is_file():
        raise ValueError(f"data.source.path: {path} is not a file; a relative path starts at the recipe's folder")
    return path


def misnamed(category: str) -> str | None:
    """Return what is wrong with a category's name, or None."""
    if category == _RESERVED:
        return f"the category name {_RESERVED!r} is reserved for the mean over categories; rename the category"
    if not _NAME.fullmatch(category):
        return f"got category {category[:80]!r}, wanted 1 to 64 letters, digits, '_', '.', '-', the first no sign"
    return None
