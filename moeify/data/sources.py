"""From a recipe's source to documents in categories: installed text, the user's folders, JSON lines and tables."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import assert_never

from moeify.data import corpora, tables
from moeify.data.documents import Document, distinct, misnamed
from moeify.data.labels import UNLABELLED, WAY_OUT
from moeify.data.lines import Fields, existing, read_lines
from moeify.data.root import data_root
from moeify.recipe.data import (
    BuiltinSource,
    FolderPart,
    InstalledPart,
    InstalledText,
    JsonLines,
    LinesPart,
    MixedText,
    Source,
    StreamedText,
    Table,
    TextFolders,
)

LEAST_MEGABYTES = 2.0
"""What every installed source must yield, in 10^6 bytes."""
_MARGIN = 1.25
"""How much more than it may keep an installed source reads, since duplicates are dropped."""


def fingerprint(source: Source, base: Path) -> str:
    """Return a hash of everything that ``read`` would read."""
    match source:
        case InstalledText():
            return corpora.fingerprint(source.sources)
        case TextFolders():
            folders = source.categories.items()
            return _digest(f"{category}\0{_folder_hash(base / path, source.pattern)}" for category, path in folders)
        case JsonLines():
            return _file_hash(base / source.path, "data.source.path")
        case Table():
            return tables.content_hash(base / source.path)
        case StreamedText():
            raise TypeError("the files of a streamed source are looked at by moeify.data.streamed_files")
        case MixedText():
            root = _root(source, base)
            return _digest(f"{category}\0{_part_hash(category, part, root)}" for category, part in _parts(source))
        case _ as never:
            assert_never(never)


def read(source: Source, base: Path) -> dict[str, list[Document]]:
    """Return each category's distinct documents, categories in the recipe's order (by name for JSON lines and tables).

    JSON lines and tables without a category field are all ``UNLABELLED``.

    Raises:
        ValueError: The source cannot be read, says something else than text in at least two well-named categories, or
            holds too little of it.
    """
    match source:
        case InstalledText():
            return _installed(source)
        case TextFolders() | JsonLines() | Table():
            return distinct(whole(source, base))
        case MixedText():
            root = _root(source, base)
            found = {name: _part(name, part, root, source.megabytes) for name, part in _parts(source)}
            return _up_to(source.megabytes, distinct(_with_text(found)))
        case StreamedText():
            raise TypeError("a streamed source is read by moeify.data.streamed, some documents at a time")
        case _ as never:
            assert_never(never)


def whole(source: TextFolders | JsonLines | Table, base: Path) -> dict[str, list[Document]]:
    """Return what ``read`` does, duplicates among it."""
    match source:
        case TextFolders():
            for category in source.categories:
                if problem := misnamed(category):
                    raise ValueError(f"data.source.categories: {problem}")
            found = {
                category: list(_folder(base / folder, source.pattern)) for category, folder in source.categories.items()
            }
        case JsonLines():
            path = base / source.path
            found = _labelled(path, read_lines(path, Fields(source.text, source.category)), source.category)
        case Table():
            path = base / source.path
            found = _labelled(path, tables.read_table(path, source.text, source.category), source.category)
    return _with_text(found)


def _with_text(found: dict[str, list[Document]]) -> dict[str, list[Document]]:
    for category, documents in found.items():
        if not documents:
            raise ValueError(f"data.source: category {category!r} has no text; give it documents or leave it out")
    return found


def _up_to(megabytes: float, found: Mapping[str, Sequence[Document]]) -> dict[str, list[Document]]:
    """Return each category's first documents that fit into a size, those that do not fit passed over."""
    kept: dict[str, list[Document]] = {}
    for name, documents in found.items():
        size = 0
        kept[name] = []
        for document in documents:
            if size + document.size <= megabytes * 1e6:
                kept[name].append(document)
                size += document.size
    return kept


def _installed(source: InstalledText) -> dict[str, list[Document]]:
    wanted = min(LEAST_MEGABYTES, 0.9 * source.megabytes)
    kept = _up_to(source.megabytes, distinct({name: _builtin(name, source.megabytes) for name in source.sources}))
    for name in source.sources:
        if (size := sum(document.size for document in kept[name])) < wanted * 1e6:
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


def _labelled(path: Path, found: dict[str, list[Document]], category: str | None) -> dict[str, list[Document]]:
    """Return the categories of a file by name, where there are enough."""
    if category is None:
        if not any(found.values()):
            raise ValueError(f"data.source.path: {path} has no text, wanted at least one document")
    elif len(found) < 2:
        raise ValueError(
            f"data.source.path: {path} has {len(found)} categories ({', '.join(found) or 'no document'}), wanted at "
            f"least 2 in the field {category!r}; {WAY_OUT}"
        )
    return dict(sorted(found.items()))


# --- mixed --------------------------------------------------------------------------------------------


def _root(source: MixedText, base: Path) -> Path:
    """Return the folder that parts' paths start at; it need not be there where no path is relative."""
    paths = [part.path for part in source.categories.values() if part.kind != "installed"]
    relative = [str(path) for path in paths if not path.is_absolute()]
    return data_root(source.root, base, " and ".join(relative)) if relative else base


def _parts(source: MixedText) -> Iterator[tuple[str, InstalledPart | FolderPart | LinesPart]]:
    for category, part in source.categories.items():
        if problem := misnamed(category):
            raise ValueError(f"data.source.categories: {problem}")
        yield category, part


def _part(category: str, part: InstalledPart | FolderPart | LinesPart, root: Path, megabytes: float) -> list[Document]:
    """Return a part's documents, those of files in an order that has nothing to do with theirs."""
    match part:
        case InstalledPart():
            return _builtin(part.source, megabytes)
        case FolderPart():
            documents = list(_folder(root / part.path, part.pattern))
        case LinesPart():
            fields = Fields(part.text, group=part.group, where=part.where)
            found = read_lines(root / part.path, fields, f"data.source.categories.{category}.path")
            documents = found.get(UNLABELLED, [])
    return sorted(documents, key=lambda document: hashlib.sha256(document.group.encode()).digest())


def _part_hash(category: str, part: InstalledPart | FolderPart | LinesPart, root: Path) -> str:
    match part:
        case InstalledPart():
            return corpora.fingerprint([part.source])
        case FolderPart():
            return _folder_hash(root / part.path, part.pattern)
        case LinesPart():
            return _file_hash(root / part.path, f"data.source.categories.{category}.path")


def _builtin(source: BuiltinSource, megabytes: float) -> list[Document]:
    return list(corpora.documents(source, int(megabytes * 1e6 * _MARGIN)))


def _file_hash(path: Path, said: str) -> str:
    with existing(path, said).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_hash(folder: Path, pattern: str) -> str:
    files = files_in(folder, pattern)
    return _digest(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in files)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
