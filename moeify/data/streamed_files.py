"""The files of a streamed corpus, on this machine or behind a URL: which they are, and what says that they changed.

They are listed once, for all workers, and read by one each, so that no machine fetches what others read.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from moeify.data.lines import existing
from moeify.far import copied
from moeify.place import Item, Place, checked_url, is_url
from moeify.recipe.data import StreamedFiles, StreamedText

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
_PACKED = (".gz", ".xz", ".zst", ".bz2")
_BY_PLACE = (".parquet", ".arrow")
"""Of files that are read here and there, which a packed one cannot be."""


@dataclass(frozen=True)
class File:
    """One file, which ``near`` finds on this machine, and ``mark`` tells from other ones."""

    told: str
    """Its path or URL."""
    bytes: int
    changed: int = 0
    """When, in nanoseconds, where it is on this machine."""
    far: tuple[str, str, Item] | None = None
    """URL of the folder where it is, its name there, and what the store says of it; None: it is on this machine."""

    def near(self, cache: Path) -> Path:
        """Return where it can be read, fetched to ``cache`` where it has to be and is not.

        ValueError where it is another one by now; StorageError also where its store is away.
        """
        if self.far is not None:
            url, name, item = self.far
            return copied(Place(url), {name: item}, cache) / name
        found = Path(self.told).stat()
        if (found.st_size, found.st_mtime_ns) != (self.bytes, self.changed):
            raise ValueError(f"{self.told} was changed since the files were listed; begin again when all are there")
        return Path(self.told)

    def mark(self) -> str:
        """Return a hash of what it holds, or what its store says for one, which is not fetched for that."""
        if self.far is not None:
            return f"{self.told} {self.far[2].mark}"
        with Path(self.told).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def reader(self) -> str | None:
        """The reader of ``datasets`` that its name asks for; None where there is none."""
        *before, last = PurePath(self.told).suffixes or [""]
        if last not in _PACKED:
            return _READERS.get(last)
        return _READERS.get(before[-1]) if before and before[-1] not in _BY_PLACE else None


def files_of(part: StreamedFiles, base: Path, said: str) -> list[File]:
    """Return the files of a category, in the recipe's order and of a glob in that of their names, empty ones left out.

    ``said`` is where the recipe names them. Raises ValueError where there are none, or of several kinds.
    """
    found: dict[str, File] = {}
    for pattern in part.files:
        found |= {file.told: file for file in (_far if is_url(pattern) else _near)(base, pattern, said) if file.bytes}
    if not found:
        raise ValueError(f"{said}: got nothing but empty files, wanted documents")
    kinds = {file.reader for file in found.values()}
    if len(kinds) != 1 or None in kinds:
        paths = (PurePath(told) for told in found)
        got = ", ".join(sorted({"".join(path.suffixes[-2:]) or path.name for path in paths}))
        wanted, packed = ", ".join(_READERS), ", ".join(_PACKED)
        raise ValueError(
            f"{said}: got {got}, wanted files of one kind: {wanted}, plain or, all but {' and '.join(_BY_PLACE)}, "
            f"with {packed}"
        )
    return list(found.values())


def all_files(source: StreamedText, base: Path) -> dict[str, list[File]]:
    """Return the files of each category."""
    return {name: files_of(part, base, said_of(name)) for name, part in source.categories.items()}


def said_of(category: str) -> str:
    """Return where a recipe names a category's files."""
    return f"data.source.categories.{category}.files"


def _near(base: Path, pattern: str, said: str) -> Iterator[File]:
    paths = _matching(base, pattern, said) if any(sign in pattern for sign in "*?[") else [base / pattern]
    if not paths:
        raise ValueError(f"{said}: no file matches {pattern!r}; a relative path starts at the recipe's folder")
    for path in paths:
        found = existing(path, said).stat()
        yield File(str(path), found.st_size, found.st_mtime_ns)


def _matching(base: Path, pattern: str, said: str) -> list[Path]:
    """Return the files that a glob means, in order of their names."""
    top = Path(pattern).anchor
    try:
        found = Path(top).glob(pattern.removeprefix(top)) if top else base.glob(pattern)
        return sorted(path for path in found if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{said}: got {pattern!r}, wanted a path or a glob like '**/*.txt' ({error})") from None


def _far(base: Path, pattern: str, said: str) -> Iterator[File]:
    """Yield what lies at a URL, which may be a glob: ``*`` is any name, ``**`` any folders."""
    del base  # a URL is whole
    scheme, _, rest = checked_url(pattern).partition("://")
    parts = PurePosixPath(rest).parts
    fixed = next((place for place, part in enumerate(parts) if set(part) & set("*[")), None)
    if fixed == 0:
        raise ValueError(f"{said}: got {pattern!r}, wanted the name of a bucket before the first '*'")
    place = Place(f"{scheme}://{'/'.join(parts[: len(parts) - 1 if fixed is None else fixed])}")
    if fixed is None:
        try:
            there = {parts[-1]: place.item(parts[-1])}
        except FileNotFoundError:
            raise ValueError(f"{said}: nothing is at {pattern}; wanted an object, or a glob of some") from None
    else:
        fits = re.compile(_regular("/".join(parts[fixed:])))
        there = {name: item for name, item in place.found().items() if fits.fullmatch(name)}
    if not there:
        raise ValueError(f"{said}: no object matches {pattern!r}")
    for path, item in sorted(there.items()):
        yield File(f"{place.url}/{path}", item.bytes, far=(place.url, path, item))


def _regular(glob: str) -> str:
    from fsspec.utils import glob_translate

    return str(glob_translate(glob))
