"""A streamed corpus as tokens, each part of it read by one of the workers, and all parts joined on every machine.

A worker packs its parts one at a time: the tokens of every document, and in a table each one's hash, tokens and bytes.
A part that is there is not packed again, so that a preparation which was killed goes on where it was. Machines that do
not share a cache hand each other what they packed. Then the parts are joined in the corpus's order, of equal documents
the first one: what comes out is the same bytes however many workers packed it.
"""

import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from jaxtyping import UInt64

from moeify.data.documents import SPLITS
from moeify.data.given_tokenizer import GivenTokenizer
from moeify.data.streamed import Corpus
from moeify.data.token_files import Kind, StreamFiles, batches, ids_of, kind_of
from moeify.storing import storing
from moeify.world import World

_SENT_BYTES = 16_000_000
"""That a worker hands over at a time."""
_SILENCE = 5.0
"""Seconds between two signs of life."""
T = TypeVar("T")
_TOKENS = 4_000_000
"""That are joined at a time."""
Table = UInt64[np.ndarray, "documents 3"]
"""Hash, tokens (the end token among them) and bytes of UTF-8 of each document."""


def pack(corpus: Corpus, chosen: GivenTokenizer, folder: Path, world: World) -> bool:
    """Have all parts below ``folder``, on every machine; every worker calls this. Return whether it is to join them."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = world.gather(_first_beside(folder, world))
    kind = kind_of(chosen.tokenizer, chosen.end)
    for first in range(0, len(corpus.parts), world.size):
        these = range(first, min(first + world.size, len(corpus.parts)))
        held = world.gather({number for number in these if _is_whole(folder, number, kind)})
        giver = {n: next((rank for rank, each in enumerate(held) if n in each), n - first) for n in these}
        given = [n for n in these if giver[n] == world.rank]
        in_step(world, partial(_pack_parts, corpus, [n for n in given if n not in held[world.rank]], chosen, folder))
        wanted = [  # by each worker: what it had not, nor sees where it was packed
            {n for n in these if n not in had and mine != beside[giver[n]]}
            for mine, had in zip(beside, held, strict=True)
        ]
        if sent := set().union(*wanted):
            written = wanted[world.rank] if beside[world.rank] == world.rank else set()
            _hand_over(sorted(sent.intersection(given)), written, folder, world)
    world.gather(None)
    return beside[world.rank] == world.rank


def in_step(world: World, work: Callable[[], T]) -> T:
    """Do a worker's own work, however long it takes; every worker calls this.

    None goes on before all are done. Meanwhile they tell each other every few seconds that they are there: a group's
    collectives give up on who is silent for long.
    """
    if world.size == 1:
        return work()
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(work)
        while not all(world.gather(bool(wait([doing], _SILENCE).done) and not doing.exception())):
            if doing.done():
                doing.result()  # what it raised leaves here
        return doing.result()


def join(corpus: Corpus, kind: Kind, folder: Path, target: Path) -> list[StreamFiles]:
    """Write the streams of all categories to ``target`` from the parts in ``folder``; return them, closed."""
    first_seen = _first_seen([_table(folder, number)[:, 0].copy() for number in range(len(corpus.parts))])
    joined = []
    for category in range(len(corpus.categories)):
        with StreamFiles(target, category, kind) as files:
            for number, part in enumerate(corpus.parts):
                if part.category == category:
                    table = _table(folder, number)
                    splits = np.where(first_seen[number], corpus.splits(table[:, 0]), len(SPLITS))
                    _add(files, table, splits, _files(folder, number)[0], kind)
        joined.append(files)
    return joined


# --- a part -------------------------------------------------------------------------------------------


def _pack_parts(corpus: Corpus, numbers: Sequence[int], chosen: GivenTokenizer, folder: Path) -> None:
    for number in numbers:
        _pack_part(corpus, number, chosen, folder)


def _pack_part(corpus: Corpus, number: int, chosen: GivenTokenizer, folder: Path) -> None:
    kind = kind_of(chosen.tokenizer, chosen.end)
    tables = [np.empty((0, 3), dtype=np.uint64)]
    tokens, table = _files(folder, number)
    with _written(tokens) as file:
        for batch in batches(corpus.documents(corpus.parts[number])):
            encoded = ids_of(chosen.tokenizer, [document for _, document in batch])
            rows = [(hashed, len(ids) + 1, each.size) for (hashed, each), ids in zip(batch, encoded, strict=True)]
            tables.append(np.array(rows, dtype=np.uint64))
            for ids in encoded:
                file.write(np.array([*ids, chosen.end], dtype=kind).data)
    with _written(table) as file:
        np.save(file, np.concatenate(tables), allow_pickle=False)


def _is_whole(folder: Path, number: int, kind: Kind) -> bool:
    try:
        return int(_table(folder, number)[:, 1].sum()) * kind.itemsize == _files(folder, number)[0].stat().st_size
    except (OSError, ValueError, IndexError):
        return False


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    """Return the files of a part: its tokens, and the table of its documents."""
    return folder / f"{number:06d}.tokens", folder / f"{number:06d}.npy"


def _table(folder: Path, number: int) -> Table:
    return np.load(_files(folder, number)[1], allow_pickle=False)


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write, which is at ``path`` once it is whole."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with storing(path), draft.open("wb") as file:
            yield file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


# --- between machines ---------------------------------------------------------------------------------


def _first_beside(folder: Path, world: World) -> int:
    """Return the first worker that sees the same folder as this one."""
    sign = folder / f".{secrets.token_hex(8)}"
    with storing(sign):
        sign.touch()
    signs = world.gather(sign.name)
    first = next(rank for rank, name in enumerate(signs) if (folder / name).exists())
    world.gather(None)
    sign.unlink()
    return first


def _hand_over(mine: Collection[int], wanted: Collection[int], folder: Path, world: World) -> None:
    """Send the others these parts, some megabytes at a time, and write what is wanted of theirs."""
    sent = ((path.name, piece) for number in mine for path in _files(folder, number) for piece in _pieces(path))
    names = {path.name for number in wanted for path in _files(folder, number)}
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        while any(pieces := world.gather(next(sent, None))):
            for name, piece in filter(None, pieces):
                if name in names:
                    if name not in files:
                        files[name] = stack.enter_context(_written(folder / name))
                    files[name].write(piece)


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield a file's content in pieces, one at least."""
    with path.open("rb") as file:
        yield file.read(_SENT_BYTES)
        while piece := file.read(_SENT_BYTES):
            yield piece


# --- joining ------------------------------------------------------------------------------------------


def _first_seen(hashes: Sequence[UInt64[np.ndarray, " documents"]]) -> list[np.ndarray]:
    """Return which documents are the first of their hash, part by part."""
    whole = np.concatenate(hashes)
    first = np.zeros(len(whole), dtype=bool)
    first[np.unique(whole, return_index=True)[1]] = True
    return np.split(first, np.cumsum([len(each) for each in hashes])[:-1])


def _add(files: StreamFiles, table: Table, splits: np.ndarray, path: Path, kind: Kind) -> None:
    """Write a part's documents to the streams of their splits, in order; those of no split are left out."""
    lengths = table[:, 1].astype(np.int64)
    ends = np.cumsum(lengths)
    first = start = 0
    with path.open("rb") as tokens:
        while first < len(table):
            last = max(first + 1, int(np.searchsorted(ends, start + _TOKENS)))
            lot, whose = slice(first, last), np.repeat(splits[first:last], lengths[first:last])
            some = np.fromfile(tokens, dtype=kind, count=len(whose))
            for place, split in enumerate(SPLITS):
                files.add(split, some[whose == place], int(table[lot, 2][splits[lot] == place].sum()))
            first, start = last, start + len(whose)
