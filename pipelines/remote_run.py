"""A run behind a URL and its working copy: files are fetched, its journal is put together, what was made is sent.

The journal lies there in parts, one for each batch of events, named by the byte at which it begins in the whole:
``journal/000000000004096.jsonl``. A part is written once and only if it is not there, so that of two writers at the
same byte one fails. When a run's driver ends, the parts become one object, ``journal/whole.jsonl``.
"""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from filelock import FileLock

from moeify.place import Item, Place
from moeify.storing import storing

JOURNAL = "journal"
_WHOLE = f"{JOURNAL}/whole.jsonl"
_APART = ("checkpoints", JOURNAL, "claims", "failures", "stop")
"""Folders, and a note, that are not files for people: what is in them is fetched otherwise."""
_INDEX = ".fetched.json"
"""File of a working copy: path -> mark of the object that was fetched or sent last."""


class RemoteRun:
    """One run; any number of processes may read it at a time, also through the same working copy."""

    def __init__(self, place: Place, copy: Path) -> None:
        self.place = place
        self.copy = copy

    @property
    def journal(self) -> Path:
        """The journal's copy, which never holds what is not behind the URL."""
        return self.copy / "journal.jsonl"

    def pull(self) -> None:
        """Fetch the files that changed, and the journal's new parts."""
        with self._locked():
            self._pull_files()
            self._catch_up()

    def catch_up(self) -> None:
        """Fetch the journal's new parts, and before them the files they may speak of."""
        with self._locked():
            self._catch_up(files_too=True)

    def append(self, at: int, part: bytes) -> None:
        """Add a part that was sent to the copy, unless others have fetched it."""
        with self._locked(), storing(self.journal):
            if self._size() == at:
                with self.journal.open("ab") as file:
                    file.write(part)

    def push(self, *paths: Path) -> None:
        """Send files of the copy, and folders of it, of which there goes what is gone here."""
        sent = [file for path in paths for file in files_in(path)]
        for file in sent:
            self.place.upload(self._name(file), file)
        with self._locked():
            index = self._index()
            for file in sent:
                index[self._name(file)] = self.place.item(self._name(file)).mark
            folders = tuple(f"{self._name(path)}/" for path in paths if path.is_dir())
            gone = [name for name in index if name.startswith(folders) and not (self.copy / name).exists()]
            self.place.remove(gone)
            self._save_index({name: mark for name, mark in index.items() if name not in gone})

    def compact(self) -> None:
        """Put the journal's parts together; only the run's driver may, when no worker writes."""
        with self._locked():
            self._catch_up()
            size = self._size()
            parts = [name for name in self.place.found(JOURNAL) if (at := _begin(name)) is not None and at < size]
            if parts:
                self.place.upload(_WHOLE, self.journal)
                self.place.remove(sorted(parts))

    # --- files ----------------------------------------------------------------------------------------

    def _pull_files(self) -> None:
        index, found = self._index(), self.place.found()
        for name in index.keys() - found.keys():
            with storing(self.copy):
                (self.copy / name).unlink(missing_ok=True)
            del index[name]
        for name, item in found.items():
            parts = PurePosixPath(name).parts
            if parts[0] in _APART or any(part.startswith(".") for part in parts):
                continue
            if index.get(name) != item.mark or not (self.copy / name).exists():
                self._fetch(name, self.copy.joinpath(*parts), item)
                index[name] = item.mark
        self._save_index(index)

    def _fetch(self, name: str, target: Path, item: Item) -> None:
        with storing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            self.place.download(name, draft)
            with storing(target):
                os.utime(draft, (item.modified, item.modified))  # of two runs of one second, the later is the newer
                draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.copy).as_posix()

    def _index(self) -> dict[str, str]:
        try:
            known = json.loads((self.copy / _INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _save_index(self, index: dict[str, str]) -> None:
        with storing(self.copy):
            draft = self.copy / f"{_INDEX}.draft"
            draft.write_text(json.dumps(index), encoding="utf-8")
            draft.replace(self.copy / _INDEX)

    # --- journal --------------------------------------------------------------------------------------

    def _catch_up(self, *, files_too: bool = False) -> None:
        for _ in range(3):
            found = self.place.found(JOURNAL)
            size = self._size()
            whole = found.get(_WHOLE)
            if whole and size < whole.bytes:
                self._fetch(_WHOLE, self.journal, whole)
                size = whole.bytes
            begin = whole.bytes if whole else 0
            parts = {at: item.bytes for name, item in found.items() if (at := _begin(name)) is not None and at >= begin}
            ends = {begin, *parts, *(at + length for at, length in parts.items())}
            if size not in ends:  # a kill cut a part short
                size = max(end for end in ends if end <= size)
                with storing(self.journal):
                    os.truncate(self.journal, size)
            if files_too and any(at >= size for at in parts):
                self._pull_files()
            try:
                self._add(size, sorted(parts))
            except FileNotFoundError:  # they became one object since they were listed
                continue
            return

    def _add(self, size: int, parts: list[int]) -> None:
        for at in parts:
            if at == size:
                content = self.place.read(part_name(at))
                with storing(self.journal), self.journal.open("ab") as file:
                    file.write(content)
                size += len(content)

    def _size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with storing(self.copy):
            self.copy.mkdir(parents=True, exist_ok=True)
        with FileLock(self.copy / ".copy.lock", thread_local=False):
            yield


def part_name(at: int) -> str:
    """Return the name of the journal's part that begins at a byte."""
    return f"{JOURNAL}/{at:015d}.jsonl"


def _begin(name: str) -> int | None:
    digits = name.removeprefix(f"{JOURNAL}/").removesuffix(".jsonl")
    return int(digits) if digits.isascii() and digits.isdigit() else None


def files_in(path: Path) -> Iterator[Path]:
    """Yield a file, or the files below a folder; hidden ones are drafts and locks."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    yield from (file for file in found if file.is_file() and not file.name.startswith("."))
