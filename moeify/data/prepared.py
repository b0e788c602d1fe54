"""Tokens that were prepared: an entry of the cache, which is there whole or not at all, and on a shelf for others.

An entry's name is a hash of all that it depends on, so it is never out of date; its index has the hashes of its files.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

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
            with tempfile.TemporaryDirectory(dir=self._path.parent, prefix=".fetched-") as draft:
                fetch(self._far, Path(draft, "entry"))
                if _read(Path(draft, "entry")):
                    Path(draft, "entry").rename(self._path)
        return self.tokens()

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
        if self._far:
            for name in (*hashes, _INDEX):  # what makes it one comes last
                self._far.upload(name, self._path / name)
        tokens = self.tokens()
        assert tokens is not None
        return tokens


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
        return Tokens(
            categories=tuple(index["categories"]),
            streams={
                split: tuple(np.load(entry / name, mmap_mode="r", allow_pickle=False) for name in names)
                for split, names in streams.items()
            },
            sizes={split: tuple(index["sizes"][split]) for split in SPLITS},
            vocabulary=index["vocabulary"],
            end=index["end"],
            assets={name: (entry / name).read_bytes() for name in index["assets"]},
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
