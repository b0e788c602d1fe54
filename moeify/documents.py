"""Documents in categories: read from a user's files, freed of repetition, split by whole documents.

The built-in documents come from ``moeify.corpora``.
"""

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from moeify.config import JsonLines, TextFolders

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

RESERVED = "mean"
"""Tables and metrics use this name for the mean over categories."""
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_REPORTED = 5
"""Faults of one source that are told in full."""

_SEPARATORS = re.compile(r"[\n;{}]")
_TELLING = 16
"""Characters from which a segment of a document is taken to tell documents apart."""
_KNOWN_SHARE = 0.5
"""Fraction of a document's telling characters; what has more of them in earlier documents is dropped."""


@dataclass(frozen=True)
class Document:
    """A text, and what it was cut from: documents of one group always fall into the same split."""

    text: str
    group: str
    """A name that is the same on every machine."""


# --- a user's files -----------------------------------------------------------------------------------


def files_of(source: TextFolders | JsonLines, base: Path) -> list[Path]:
    """Return the files that a source names, in order of their names; raises ValueError where there are none."""
    if isinstance(source, JsonLines):
        path = base / source.path
        if not path.is_file():
            raise ValueError(f"data.source.path: got {path}, which is no file, wanted JSON lines, plain, .gz or .xz")
        return [path]
    return [path for category in source.categories for path in _folder_files(source, category, base)]


def read(source: TextFolders | JsonLines, base: Path) -> dict[str, list[Document]]:
    """Return the documents of each category, categories in the recipe's order or, for JSON lines, in the alphabet's.

    Raises ValueError that names file and line for whatever cannot be read as asked.
    """
    documents = _read_folders(source, base) if isinstance(source, TextFolders) else _read_lines(source, base)
    for category in documents:
        if not _SAFE_NAME.fullmatch(category) or category == RESERVED:
            raise ValueError(
                f"category {category!r} cannot be used: wanted letters, digits, '_', '.' and '-', at most 64, "
                f"a letter or digit first, and not {RESERVED!r}, which stands for the mean over categories"
            )
    if len(documents) < 2:
        raise ValueError(
            f"the data has one category, {next(iter(documents))!r}, wanted at least 2: "
            f"there is nothing to split a model by"
        )
    return documents


def _folder_files(source: TextFolders, category: str, base: Path) -> list[Path]:
    folder = base / source.categories[category]
    if not folder.is_dir():
        raise ValueError(f"data.source.categories.{category}: got {folder}, which is no folder")
    try:
        found = [path for path in folder.glob(source.pattern) if path.is_file()]
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"data.source.pattern: got {source.pattern!r}, wanted a glob below a folder ({error})") from None
    files = sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    if not files:
        raise ValueError(f"data.source.categories.{category}: no file in {folder} matches {source.pattern!r}")
    return files


def _read_folders(source: TextFolders, base: Path) -> dict[str, list[Document]]:
    documents: dict[str, list[Document]] = {}
    faults: list[str] = []
    for category in source.categories:
        folder = base / source.categories[category]
        documents[category] = []
        for path in _folder_files(source, category, base):
            content = path.read_bytes()
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                line = content.count(b"\n", 0, error.start) + 1
                faults.append(f"{path}, line {line}: not UTF-8 ({error.reason})")
                continue
            if text.strip():
                documents[category].append(Document(text, path.relative_to(folder).as_posix()))
            else:
                faults.append(f"{path}: empty")
    _refuse(faults, "save these files as UTF-8 text, or choose others with data.source.pattern")
    return documents


def _read_lines(source: JsonLines, base: Path) -> dict[str, list[Document]]:
    (path,) = files_of(source, base)
    documents: dict[str, list[Document]] = {}
    faults: list[str] = []
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text, category = _fields(line, source)
                except ValueError as error:
                    faults.append(f"{path}, line {number}: {error}")
                    continue
                documents.setdefault(category, []).append(Document(text, _hash(text).hex()))
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be decompressed ({error}); is the file whole?") from error
    _refuse(faults, "mend these lines, or name other fields in data.source.text and data.source.category")
    if not documents:
        raise ValueError(f"{path}: holds no document, wanted one JSON object a line")
    return dict(sorted(documents.items()))


def _open(path: Path) -> TextIO:
    """Open as text; bytes that are not UTF-8 become lone surrogates, to be reported with their line."""
    match path.suffix:
        case ".gz":
            return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")
        case ".xz":
            return lzma.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")
        case _:
            return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _fields(line: str, source: JsonLines) -> tuple[str, str]:
    """Return text and category of one line."""
    try:
        line.encode()
    except UnicodeEncodeError:
        raise ValueError("not UTF-8") from None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"got a JSON {type(row).__name__}, wanted an object")
    values = []
    for field in (source.text, source.category):
        if field not in row:
            raise ValueError(f"no field {field!r}, only {', '.join(map(repr, row)) or 'none'}")
        value = row[field]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"field {field!r}: got {json.dumps(value)[:40]}, wanted a string that is not empty")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"field {field!r} holds half of a surrogate pair, which is no character") from None
        values.append(value)
    return values[0], values[1]


def _refuse(faults: Sequence[str], way_out: str) -> None:
    if faults:
        more = [f"... and {len(faults) - _REPORTED} more"] if len(faults) > _REPORTED else []
        shown = "\n  ".join([*faults[:_REPORTED], *more])
        raise ValueError(f"{len(faults)} of the documents cannot be read; {way_out}:\n  {shown}")


# --- repetition ---------------------------------------------------------------------------------------


class Sieve:
    """Lets a document pass unless it, or more than half of it, was seen before in any category.

    A document is compared as the set of its segments (between line ends, semicolons and braces) of at least 16
    characters once spaces are squeezed: those of earlier documents count as seen. One without any such segment is
    compared as a whole. What passes depends on the order of the documents and on nothing else.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def passes(self, document: Document) -> bool:
        """Say whether the document brings something new; if so, its segments count as seen from now on."""
        squeezed = {" ".join(segment.split()) for segment in _SEPARATORS.split(document.text)}
        segments = {segment for segment in squeezed if len(segment) >= _TELLING}
        lengths = {_hash(s): len(s) for s in segments or {" ".join(document.text.split())}}
        known = sum(length for digest, length in lengths.items() if digest in self._seen)
        if known > _KNOWN_SHARE * sum(lengths.values()):
            return False
        self._seen.update(lengths)
        return True


def deduplicate(documents: Mapping[str, Iterable[Document]]) -> dict[str, list[Document]]:
    """Return the documents that pass one sieve over all categories; raises ValueError for a category left empty."""
    sieve = Sieve()
    kept = {category: [d for d in each if sieve.passes(d)] for category, each in documents.items()}
    for category, each in kept.items():
        if not each:
            raise ValueError(f"category {category!r} holds nothing that earlier categories do not hold already")
    return kept


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


# --- splits -------------------------------------------------------------------------------------------


def divide(documents: Sequence[Document], *, validation: float, test: float, name: str) -> dict[Split, list[Document]]:
    """Divide a category's documents into splits that hold about these fractions of its bytes.

    Groups of documents, in an order that hashes their names, go to the test split as long as they fit into its share
    (where none fits: the smallest), then to the validation split likewise; train gets the rest. Within a split
    documents keep that order. Raises ValueError below three groups, since no split may be empty.
    """
    groups: dict[str, list[Document]] = {}
    for document in sorted(documents, key=lambda d: (_hash(d.group), _hash(d.text))):
        groups.setdefault(document.group, []).append(document)
    if len(groups) < len(SPLITS):
        raise ValueError(
            f"category {name!r} has {len(groups)} different documents, wanted at least {len(SPLITS)}: "
            f"train, validation and test take whole documents; cut it into more of them"
        )
    sizes = {group: sum(len(d.text.encode()) for d in each) for group, each in groups.items()}
    total, left = sum(sizes.values()), dict(sizes)
    parts: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    shares: tuple[tuple[Split, float, int], ...] = (("test", test, 2), ("validation", validation, 1))
    for split, share, reserve in shares:
        parts[split] = list(_fill(left, share * total, reserve))
        for group in parts[split]:
            del left[group]
    parts["train"] = list(left)
    return {split: [d for group in parts[split] for d in groups[group]] for split in SPLITS}


def _fill(sizes: Mapping[str, int], room: float, reserve: int) -> Iterator[str]:
    """Yield the groups that fit, or else the smallest; never the last ``reserve`` ones."""
    if min(sizes.values()) > room:
        yield min(sizes, key=lambda group: sizes[group])
        return
    left = len(sizes)
    for group, size in sizes.items():
        if size <= room and left > reserve:
            room -= size
            left -= 1
            yield group
