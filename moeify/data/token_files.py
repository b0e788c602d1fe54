"""Streams of tokens: how documents become one, and files of them that are written some documents at a time."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self, TypeVar

import numpy as np
import tokenizers
from jaxtyping import UInt16, UInt32

from moeify.data.documents import SPLITS, Document, Split

Stream = UInt16[np.ndarray, " tokens"] | UInt32[np.ndarray, " tokens"]
"""The wide one where a vocabulary has more than 65,536 tokens."""
Kind = np.dtype[np.uint16] | np.dtype[np.uint32]
Known = TypeVar("Known")
_BATCH_BYTES = 4_000_000
"""Of text that is encoded at a time."""


def encode(tokenizer: tokenizers.Tokenizer, end: int, each: Sequence[Document]) -> Stream:
    """Return the documents as one stream, the ``end`` token after each."""
    kind = kind_of(tokenizer, end)
    return np.concatenate([np.array([*ids, end], dtype=kind) for ids in ids_of(tokenizer, each)])


def ids_of(tokenizer: tokenizers.Tokenizer, each: Sequence[Document]) -> list[list[int]]:
    """Return each document's tokens."""
    encoded = tokenizer.encode_batch_fast([document.text for document in each], add_special_tokens=False)
    return [encoding.ids for encoding in encoded]


def kind_of(tokenizer: tokenizers.Tokenizer, end: int) -> Kind:
    """Return how wide a token is in a stream."""
    most = max(end, *tokenizer.get_vocab().values())
    return np.dtype(np.uint16) if most <= np.iinfo(np.uint16).max else np.dtype(np.uint32)


def batches(documents: Iterable[tuple[Known, Document]]) -> Iterator[list[tuple[Known, Document]]]:
    """Yield documents, and what is known of each, as many at a time as are encoded at once."""
    batch, size = [], 0
    for each in documents:
        batch.append(each)
        size += each[1].size
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class StreamFiles:
    """A category's streams of all splits, as ``.npy`` files that grow; what ``np.load`` reads once they are closed."""

    def __init__(self, folder: Path, number: int, kind: Kind) -> None:
        self._kind = kind
        self.sizes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        """Bytes of UTF-8 of the documents."""
        self.lengths: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        """Tokens."""
        self._files: dict[Split, BinaryIO] = {}
        with ExitStack() as stack:
            for split in SPLITS:
                self._files[split] = stack.enter_context((folder / stream_name(split, number)).open("wb"))
                self._head(split)
            self._open = stack.pop_all()

    def add(self, split: Split, stream: Stream, size: int) -> None:
        """Write more documents of ``size`` bytes at the end of a split."""
        self._files[split].write(np.ascontiguousarray(stream, dtype=self._kind).data)
        self.sizes[split] += size
        self.lengths[split] += len(stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._open:
            for split in SPLITS:
                self._head(split)

    def _head(self, split: Split) -> None:
        """Write what an array's file begins with: as many bytes whatever the length (``numpy.lib.format``)."""
        file = self._files[split]
        file.seek(0)
        shape = (self.lengths[split],)
        described = {"descr": np.lib.format.dtype_to_descr(self._kind), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, described)


def stream_name(split: Split, number: int) -> str:
    """Return the name of the file with a category's stream of a split."""
    return f"{split}.{number}.npy"
