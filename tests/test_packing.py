"""A streamed corpus that workers pack, on one machine and on two: each reads its share, and no bit changes."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
import pytest

from benchmarks.gloo import run_together
from moeify.data import packing, streamed, token_files, tokens
from moeify.data.documents import SPLITS
from moeify.data.prepared import Entry, Tokens
from moeify.data.tokens import prepare
from moeify.place import Place
from moeify.recipe.data import TextData
from moeify.world import Group, Solo
from tests.test_streamed import data, text, write
from tests.texts import write_texts

T = TypeVar("T")
BOTH = {"law": {"files": ["law/*.jsonl"]}, "letters": {"files": ["letters/*.parquet"], "text": "body"}}
FILES = [*(f"{number}.jsonl" for number in range(5)), "all.parquet"]


class Beside(Solo):
    """A worker's world where the others are threads of this process."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank = rank  # type: ignore[misc]
        self.size = len(board)  # type: ignore[misc]
        self._board, self._barrier = board, barrier

    def gather(self, value: T) -> list[T]:
        self._board[self.rank] = value
        self._barrier.wait()
        found = list(self._board)
        self._barrier.wait()
        return found

    def share(self, value: T) -> T:
        return self.gather(value)[0]


def together(size: int, settings: TextData, base: Path, caches: list[Path], shelf: str | None = None) -> list[Tokens]:
    """Return what each of so many workers prepared."""
    board, barrier = [None] * size, threading.Barrier(size, timeout=60)

    def one(rank: int) -> Tokens:
        try:
            return prepare(settings, caches[rank], base, world=Beside(rank, board, barrier), shelf=shelf)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [each.result() for each in [pool.submit(one, rank) for rank in range(size)]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two categories in five files and in one, with documents that are in several."""
    for number in range(5):
        again = [text(3).replace(" ", "  ")] * 2
        write(tmp_path / "law" / f"{number}.jsonl", [*again, *map(text, range(20 * number, 20 * number + 20))])
    write(tmp_path / "letters" / "all.parquet", [text(number) for number in (7, *range(200, 240))], "body")
    return tmp_path


def same(one: Tokens, other: Tokens) -> bool:
    plain = [(each.categories, each.sizes, each.vocabulary, each.end, each.assets) for each in (one, other)]
    pairs = [pair for split in SPLITS for pair in zip(one.streams[split], other.streams[split], strict=True)]
    return plain[0] == plain[1] and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def packed(patch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that are packed from now on."""
    known: list[str] = []
    real = packing._pack_part

    def counted(corpus: streamed.Corpus, number: int, *more: Any) -> None:
        known.extend(Path(file.told).name for file in corpus.parts[number].files)
        real(corpus, number, *more)

    patch.setattr(packing, "_pack_part", counted)
    return known


def worker(rank: int, folder: Path, settings: str, caches: list[str]) -> None:
    asked, cache = TextData.model_validate_json(settings), folder / caches[rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_SENT_BYTES", 100)
        known = packed(patch)
        found = prepare(asked, cache, folder, world=Group())
        assert same(found, prepare(asked, cache, folder, world=Group()))
    assert same(found, prepare(asked, folder / f"alone {rank}", folder))
    (folder / f"read.{rank}.json").write_text(json.dumps(known))


@pytest.mark.parametrize("caches", [["cache", "cache"], ["one", "other"]])
def test_two_workers_read_a_share_each_and_have_what_one_has(base: Path, caches: list[str]) -> None:
    run_together(worker, base, told=(data(BOTH).model_dump_json(), caches))
    first, second = (json.loads((base / f"read.{rank}.json").read_text()) for rank in range(2))
    assert first == ["0.jsonl", "2.jsonl", "4.jsonl"]
    assert second == ["1.jsonl", "3.jsonl", "all.parquet"]
    for cache in set(caches):
        left = [path for path in (base / cache / "text").iterdir() if path.suffix != ".lock"]
        assert [(path / "index.json").is_file() for path in left] == [True], "nothing of the parts is left"


@pytest.mark.parametrize("size", [3, 8])
def test_any_number_of_workers_comes_to_the_same(base: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    once = prepare(data(BOTH), base / "alone", base)
    monkeypatch.setattr(packing, "_TOKENS", 50)
    monkeypatch.setattr(token_files, "_BATCH_BYTES", 300)
    caches = [base / f"cache {rank % 2}" for rank in range(size)]  # two machines
    assert all(same(once, each) for each in together(size, data(BOTH), base, caches))


def test_a_preparation_that_was_killed_goes_on_with_the_parts_that_are_whole(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, real = packed(monkeypatch), packing._pack_part

    def dies(corpus: streamed.Corpus, number: int, *more: Any) -> None:
        if len(known) == 3:
            raise KeyboardInterrupt
        real(corpus, number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_pack_part", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(data(BOTH), base / "cache", base)
    assert known == FILES[:3]
    (torn,) = (base / "cache" / "text").glob("*.parts/000001.tokens")
    torn.write_bytes(torn.read_bytes()[:-1])
    found = prepare(data(BOTH), base / "cache", base)
    assert known[3:] == ["1.jsonl", *FILES[3:]]
    assert same(found, prepare(data(BOTH), base / "other", base))


def test_a_worker_that_finds_bad_input_says_so_and_leaves_nothing_that_counts(base: Path) -> None:
    (base / "law" / "3.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises((ValueError, threading.BrokenBarrierError)):
        together(2, data(BOTH), base, [base / "cache"] * 2)
    with pytest.raises(ValueError, match=r"law/3\.jsonl.*row 1: 'text' is int"):
        prepare(data(BOTH), base / "cache", base)
    assert not list((base / "cache").glob("text/*/index.json"))


def test_parts_stay_while_anybody_needs_them(tmp_path: Path) -> None:
    one, other = Entry(tmp_path / "text" / "a"), Entry(tmp_path / "text" / "a")
    (tmp_path / "text" / "a").mkdir()
    (tmp_path / "text" / "a" / "index.json").write_text("{}")
    with one.parts_kept():
        one.parts.mkdir()
        with other.parts_kept():
            pass
        assert one.parts.is_dir()
        (one.parts.with_suffix(".users") / "killed.lock").touch()  # nobody holds it
    assert not one.parts.exists()
    assert not one.parts.with_suffix(".users").exists()


def test_workers_hear_of_each_other_while_one_works_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_SILENCE", 0.01)
    board, barrier, heard = [None] * 2, threading.Barrier(2, timeout=60), list[int]()

    class Counted(Beside):
        def gather(self, value: T) -> list[T]:
            heard.append(self.rank)
            return super().gather(value)

    def one(rank: int) -> int:
        return packing.in_step(Counted(rank, board, barrier), lambda: time.sleep(0.5 * rank) or rank)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, range(2))) == [0, 1]
    assert heard.count(0) == heard.count(1) > 5


def test_workers_go_by_one_list_of_the_files(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once, listed = prepare(data(BOTH), base / "alone", base), list[int]()
    real = tokens.all_files

    def more_by_the_minute(*arguments: Any) -> Any:
        found = real(*arguments)
        listed.append(len(found["law"]))
        write(base / "law" / f"{5 + len(listed)}.jsonl", [text(300)])
        return found

    monkeypatch.setattr(tokens, "all_files", more_by_the_minute)
    assert all(same(once, each) for each in together(2, data(BOTH), base, [base / "one", base / "other"]))
    assert listed == [5]


def test_what_another_machine_has_is_not_packed_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches, known = [base / "one", base / "other"], packed(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "join", _dies)
        with pytest.raises((KeyboardInterrupt, threading.BrokenBarrierError)):
            together(2, data(BOTH), base, caches)
    assert sorted(known) == FILES
    shutil.rmtree(caches[1])
    found = together(2, data(BOTH), base, caches)
    assert sorted(known) == FILES
    assert all(same(prepare(data(BOTH), base / "alone", base), each) for each in found)


def _dies(*_: object) -> None:
    raise KeyboardInterrupt


# --- behind URLs --------------------------------------------------------------------------------------


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    memory, lock, download = fsspec.filesystem("memory"), threading.Lock(), Place.download

    def one_at_a_time(place: Place, path: str, target: Path) -> None:
        with lock:  # who reads a file of this store moves the place where the next one reads
            download(place, path, target)

    monkeypatch.setattr(Place, "download", one_at_a_time)
    memory.store.clear()
    yield Place("memory://far")
    memory.store.clear()


def test_a_machine_fetches_no_files_but_its_share(base: Path, far: Place) -> None:
    for path in (*(base / "law").iterdir(), *(base / "letters").iterdir()):
        far.upload(path.relative_to(base).as_posix(), path)
    far.write("law/nothing.jsonl", b"")
    urls = {
        "law": {"files": [f"{far.url}/law/*.jsonl"]},
        "letters": {"files": [f"{far.url}/letters/all.parquet"], "text": "body"},
    }
    caches = [base / "one", base / "other"]
    found = together(2, data(urls), base, caches)
    once = prepare(data(BOTH), base / "alone", base)
    assert all(same(once, each) for each in found)
    first, second = (sorted(path.name for path in cache.glob("far/*/*")) for cache in caches)
    assert second == ["1.jsonl", "3.jsonl", "all.parquet"]
    assert first == FILES, "the first worker trains the tokenizer, on what comes first of each category"
    assert all(same(once, each) for each in together(2, data(urls), base, caches))


def test_what_one_machine_prepared_others_find_on_the_shelf(
    base: Path, far: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = prepare(data(BOTH), base / "one", base, shelf=far.url)
    with monkeypatch.context() as patch:
        patch.setattr(Entry, "publish", None)
        patch.setattr(packing, "pack", None)
        assert same(once, prepare(data(BOTH), base / "other", base, shelf=far.url))
        assert all(same(once, each) for each in together(2, data(BOTH), base, [base / "a", base / "b"], far.url))
    (name,) = (name for name in far.found() if name.endswith("train.0.npy"))
    index = name.replace("train.0.npy", "index.json")
    far.remove([index])  # as it would be, had the process been killed that sent it
    assert same(once, prepare(data(BOTH), base / "one", base, shelf=far.url))
    assert index in far.found()
    whole = far.read(name)
    far.write(name, whole[:-1])
    assert same(once, prepare(data(BOTH), base / "third", base, shelf=far.url)), "what is damaged is prepared anew"
    assert far.read(name) == whole
    known = json.loads(far.read(index))
    known["files"] = {**known["files"], "../../secret": known["files"]["train.0.npy"]}
    for number, spoilt in enumerate([known, {"files": [], "categories": []}, {**known, "vocabulary": "many"}, []]):
        far.write(index, json.dumps(spoilt).encode())
        assert same(once, prepare(data(BOTH), base / f"later {number}", base, shelf=far.url))


def test_text_that_is_not_streamed_is_shared_too(tmp_path: Path, far: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"kind": "jsonl", "path": str(write_texts(tmp_path))}
    settings = TextData.model_validate({"kind": "text", "source": source, "vocabulary": 300, "length": 8, "test": 0.2})
    once = prepare(settings, tmp_path / "one", tmp_path, shelf=far.url)
    monkeypatch.setattr(Entry, "publish", None)
    assert same(once, prepare(settings, tmp_path / "other", tmp_path, shelf=far.url))
