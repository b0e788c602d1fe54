"""Tokens that were prepared: an entry of the cache, which is there whole or not at all, and on a shelf for others.

An entry's name is a hash of all that it depends on, so it is never out of date; its index has the hashes of its files.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from moeify.data.documents import SPLITS, Split
from moeify.data.given_tokenizer import GivenTokenizer
from moeify.data.token_files import Stream, StreamFiles, stream_name
from moeify.place import Place, fetch
from moeify.storing import storing

_INDEX = "index.json"


@dataclass(frozen=True)
class Tokens:
    """Each category's documents as one stream of tokens a split, documents ended by the end token."""

    categories: tuple[str, ...]
    streams: Mapping[Split, tuple[Stream, ...]]
    """One a category; memory-mapped."""
    sizes: Mapping[Split, tuple[int, ...]]
    """Bytes of UTF-8 of the documents, one number a category."""
    vocabulary: int
    """Tokens that the tokenizer knows; less than asked for where the text has too few pairs to merge."""
    end: int
    """Id of the end token."""
    assets: Mapping[str, bytes]
    """The tokenizer's files, by name, as ``transformers.AutoTokenizer`` reads them; ``discovered.json`` where
    categories were discovered."""


class Entry:
    """One entry, at ``path``, of which a copy may be below ``shelf``, a URL."""

    def __init__(self, path: Path, shelf: str | None = None) -> None:
        self._path = path
        self._far = Place(f"{shelf}/{path.name}") if shelf else None
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(path.with_suffix(".lock"))
        """Held by who prepares it."""
        self.parts = path.with_suffix(".parts")
        """Folder of what it is joined from."""

    def tokens(self) -> Tokens | None:
        """Return what was prepared here, None where there is nothing or a file of it is not as it was written."""
        return _read(self._path)

    def found(self) -> Tokens | None:
        """Return what was prepared, fetched from the shelf where it has to be; the caller holds the lock."""
        if (tokens := self.tokens()) is not None:
            return tokens
        shutil.rmtree(self._path, ignore_errors=True)  # What is there is damaged.
        if self._far and _INDEX in self._far.names():
            draft = self._path.with_suffix(".fetched")
            shutil.rmtree(draft, ignore_errors=True)  # What a process left that was killed.
            fetch(self._far, draft)
            if _read(draft):
                draft.rename(self._path)
            shutil.rmtree(draft, ignore_errors=True)
        return self.tokens()

    def looked_up(self) -> Tokens | None:
        """Do so without the lock where it is here, and with it where it may have to be fetched."""
        if (tokens := self.tokens()) is not None:
            return tokens
        with self.lock:
            return self.found()

    def send(self) -> None:
        """Put it on the shelf where it is not there, whole or not at all."""
        if self._far and _INDEX not in self._far.names():
            for path in sorted(self._path.iterdir(), key=lambda path: path.name == _INDEX):  # what makes it one is last
                self._far.upload(path.name, path)

    @contextmanager
    def parts_kept(self) -> Iterator[None]:
        """Keep ``parts`` while the body lasts; whoever is the last to need them removes them, if the entry is there."""
        users = self._path.with_suffix(".users")
        mine = FileLock(users / f"{secrets.token_hex(8)}.lock")
        with self.lock:
            users.mkdir(exist_ok=True)
            mine.acquire()
        try:
            yield
        finally:
            with self.lock:
                mine.release()
                Path(mine.lock_file).unlink(missing_ok=True)
                if (self._path / _INDEX).exists() and not any(map(_is_held, users.iterdir())):
                    shutil.rmtree(self.parts, ignore_errors=True)
                    shutil.rmtree(users, ignore_errors=True)

    def publish(
        self,
        categories: Sequence[str],
        chosen: GivenTokenizer,
        assets: Mapping[str, bytes],
        write: Callable[[Path], Sequence[StreamFiles]],
    ) -> Tokens:
        """Have ``write`` write the streams, and return them; the caller holds the lock.

        ValueError where a category has no document in one of the splits.
        """
        work = self._path.with_suffix(".preparing")
        shutil.rmtree(work, ignore_errors=True)  # What a process left that was killed.
        with storing(work):
            work.mkdir()
            for name, content in assets.items():
                (work / name).write_bytes(content)
            written = write(work)
            for name, files in zip(categories, written, strict=True):
                if lacking := [split for split in SPLITS if not files.lengths[split]]:
                    raise ValueError(
                        f"data.source: category {name!r} has no document for the {lacking[0]} split; give it more "
                        f"documents, or a larger share (data.validation, data.test)"
                    )
            hashes = {path.name: _hash(path) for path in sorted(work.iterdir())}
            index = {
                "categories": list(categories),
                "vocabulary": chosen.tokenizer.get_vocab_size(),
                "end": chosen.end,
                "sizes": {split: [files.sizes[split] for files in written] for split in SPLITS},
                "assets": list(assets),
                "files": hashes,
            }
            (work / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
            work.rename(self._path)
        if self._far and _INDEX in self._far.names():
            self._far.remove([_INDEX])  # of an entry that is damaged, or this one would not be in its place
        tokens = self.tokens()
        assert tokens is not None
        return tokens


def _is_held(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(entry: Path) -> Tokens | None:
    try:
        index = json.loads((entry / _INDEX).read_text(encoding="utf-8"))
        files, count = index["files"], len(index["categories"])
        if not all(Path(name).name == name and _hash(entry / name) == digest for name, digest in files.items()):
            return None
        streams = {split: [stream_name(split, number) for number in range(count)] for split in SPLITS}
        if not {*index["assets"], *(name for names in streams.values() for name in names)} <= files.keys():
            return None
        found = {
            split: tuple(np.load(entry / name, mmap_mode="r", allow_pickle=False) for name in names)
            for split, names in streams.items()
        }
        if not all(each.ndim == 1 and each.dtype in (np.uint16, np.uint32) for part in found.values() for each in part):
            return None
        return Tokens(
            categories=tuple(index["categories"]),
            streams=found,
            sizes={split: tuple(index["sizes"][split]) for split in SPLITS},
            vocabulary=int(index["vocabulary"]),
            end=int(index["end"]),
            assets={name: (entry / name).read_bytes() for name in index["assets"]},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
