"""Corpora that memory does not hold: files read through Hugging Face ``datasets``, some documents at a time.

Nothing is downloaded but what the recipe names by URL, and files are read by the readers that ``datasets`` itself
comes with. Since documents are not kept, what can be known of each is a hash: it says the document's split, and that
it was there before.
"""

import glob
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from moeify.data.documents import SPLITS, Document, Split, misnamed
from moeify.data.streamed_files import File, said_of
from moeify.recipe.data import StreamedText

_PART_BYTES = 4_000_000
"""Of text files, a document each, that are read at a time; files of other kinds are read one at a time."""
_SPACE = 2.0**64
"""Of the hashes of documents."""


@dataclass(frozen=True)
class Part:
    """Some files of a category, one after the other: what one worker reads at a time."""

    category: int
    files: tuple[File, ...]


class Corpus:
    """The documents of a source's files, in the order of categories and files, in parts that are read on their own.

    Raises ValueError, one line, where ``datasets`` is missing, or a category has a bad name.
    """

    def __init__(
        self,
        source: StreamedText,
        files: Mapping[str, Sequence[File]],
        cache: Path,
        *,
        validation: float,
        test: float,
    ) -> None:
        if find_spec("datasets") is None:
            raise ValueError(
                "data.source.kind: streamed needs the datasets package, which is not here: "
                "pip install 'moeify[streamed]'; or take jsonl or table, which memory must hold"
            )
        for category in source.categories:
            if problem := misnamed(category):
                raise ValueError(f"data.source.categories: {problem}")
        self.categories = tuple(source.categories)
        """In the recipe's order."""
        self._columns = [part.text for part in source.categories.values()]
        self._cache = cache
        self._held_out = test, test + validation
        lots = ((number, lot) for number, name in enumerate(self.categories) for lot in _cut(files[name]))
        self.parts = tuple(Part(*each) for each in lots)
        """All files, each in one part."""

    def documents(self, part: Part) -> Iterator[tuple[int, Document]]:
        """Yield the documents of a part, each with its hash: the same for texts that differ in white space alone.

        ValueError where a file is damaged, or a row has no text.
        """
        column, said = self._columns[part.category], said_of(self.categories[part.category])
        for file, number, row in _rows(part.files, self._cache, said):
            text = row.get(column)
            if not isinstance(text, str):
                where = f"{said}: {file.told}: row {number}"
                if column not in row:
                    raise ValueError(f"{where} has no {column!r}, got {', '.join(map(repr, list(row)[:8]))}")
                raise ValueError(f"{where}: {column!r} is {type(text).__name__}, wanted text")
            if words := " ".join(text.split()):
                hashed = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest())
                yield hashed, Document(text, f"{hashed:016x}")

    def head(self, category: int, size: int) -> list[Document]:
        """Return a category's first distinct documents of the train split, until they hold ``size`` bytes."""
        found, held = dict[int, Document](), 0
        parts = (part for part in self.parts if part.category == category)
        for hashed, document in chain.from_iterable(map(self.documents, parts)):
            if hashed not in found and SPLITS[self.splits(np.array([hashed], dtype=np.uint64))[0]] == "train":
                found[hashed] = document
                held += document.size
            if held >= size:
                break
        return list(found.values())

    def splits(self, hashes: UInt64[np.ndarray, " documents"]) -> np.ndarray:
        """Return which of ``SPLITS`` each document falls into."""
        test, both = self._held_out
        shares = hashes / _SPACE
        order: tuple[Split, ...] = ("test", "validation", "train")
        places = np.array([SPLITS.index(split) for split in order])
        return places[(shares >= test).astype(int) + (shares >= both)]


def _cut(files: Sequence[File]) -> Iterator[tuple[File, ...]]:
    """Yield files in lots that have nothing to do with who reads them, which says how a reader takes their columns."""
    lot, size = list[File](), 0
    for file in files:
        if lot and (file.reader != "text" or size + file.bytes > _PART_BYTES):
            yield tuple(lot)
            lot, size = [], 0
        lot.append(file)
        size += file.bytes
    yield tuple(lot)


def _rows(files: Sequence[File], cache: Path, said: str) -> Iterator[tuple[File, int, dict[str, Any]]]:
    """Yield the rows of files, one after the other, with their numbers in each.

    Readers raise errors of their own over damaged files, each library's other ones, and StopIteration where one packs
    nothing; nobody else's come this way, since what takes the rows runs elsewhere.
    """
    import datasets

    more = {"sample_by": "document"} if files[0].reader == "text" else {}
    paths = [glob.escape(str(file.near(cache))) for file in files]  # which datasets takes for globs
    asked = {"data_files": paths, "split": "train", "streaming": True, **more}
    file = files[0]  # whose first rows say what columns there are
    with tempfile.TemporaryDirectory() as scratch:
        try:
            whole = datasets.load_dataset(str(file.reader), cache_dir=scratch, **asked)
            for place in range(len(files)):
                file = files[place]
                for number, row in enumerate(whole.shard(len(files), place), 1):
                    yield file, number, row
        except Exception as error:
            said_so = "it packs nothing" if isinstance(error, StopIteration) else str(error).strip()
            reason = (said_so or type(error).__name__).splitlines()[0]
            raise ValueError(f"{said}: {file.told} cannot be read: {reason}") from error
