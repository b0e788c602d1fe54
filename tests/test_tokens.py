import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moeify.data import tokens as tokens_of
from moeify.data.documents import Document
from moeify.data.prepared import Entry, Tokens
from moeify.data.token_files import encode
from moeify.data.tokens import END, prepare, train_tokenizer
from moeify.recipe.data import JsonLines, TextData
from tests.texts import write_texts

TRAINED = train_tokenizer(
    [[Document("the cat sat on the mat. " * 20, "1")], [Document("def f(x): return x\n" * 30, "2")]], 300
)


def data(base: Path, **changes: object) -> TextData:
    source = JsonLines(kind="jsonl", path=write_texts(base))
    settings = {"kind": "text", "source": source, "vocabulary": 300, "length": 8, "validation": 0.1, "test": 0.2}
    return TextData.model_validate({**settings, **changes})


def load_tokenizer(tokens: Tokens, folder: Path) -> PreTrainedTokenizerBase:
    for name, content in tokens.assets.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


def same(one: Tokens, other: Tokens) -> bool:
    streams = [[stream.tobytes() for split in t.streams.values() for stream in split] for t in (one, other)]
    return streams[0] == streams[1] and one.assets == other.assets and one.sizes == other.sizes


@given(st.text())
def test_any_text_has_a_round_trip(text: str) -> None:
    stream = encode(TRAINED, TRAINED.token_to_id(END), [Document(text, "x")])
    assert stream.dtype == np.uint16
    assert TRAINED.decode(stream[:-1].tolist(), skip_special_tokens=False) == text


def test_every_document_ends_with_the_end_token_and_no_text_makes_one() -> None:
    end = TRAINED.token_to_id(END)
    stream = encode(TRAINED, end, [Document("the cat", "1"), Document(f"a {END} b", "2"), Document("mat", "3")])
    assert np.count_nonzero(stream == end) == 3
    assert stream[-1] == end
    assert TRAINED.decode(stream[stream != end].tolist()) == f"the cata {END} bmat"


def test_the_vocabulary_is_no_larger_than_asked_for() -> None:
    documents = [Document("the cat sat on the mat. " * 20, "1")]
    assert train_tokenizer([documents], 257).get_vocab_size() == 257
    assert TRAINED.get_vocab_size() <= 300
    few = train_tokenizer([[Document("abc", "1")]], 5000).get_vocab_size()
    assert 257 <= few < 270


def test_categories_give_the_tokenizer_equal_parts() -> None:
    small, large = [Document("x" * 100, "1")], [Document("ä" * 30, "2"), Document("ö" * 5000, "3")]
    assert tokens_of._sample(small, 100) == ["x" * 100]
    assert tokens_of._sample(large, 101) == ["ä" * 30, "ö" * 20]


def test_streams_hold_the_documents_of_each_split(tmp_path: Path) -> None:
    tokens = prepare(data(tmp_path), tmp_path / "cache", tmp_path)
    assert tokens.categories == ("code", "prose")
    tokenizer = load_tokenizer(tokens, tmp_path)
    seen: list[str] = []
    for split, streams in tokens.streams.items():
        for category, stream in enumerate(streams):
            documents = tokenizer.decode(stream.tolist()).split(END)
            assert documents.pop() == ""
            assert sum(len(text.encode()) for text in documents) == tokens.sizes[split][category]
            assert all(text.startswith("def") == (tokens.categories[category] == "code") for text in documents)
            seen += documents
    assert len(seen) == len(set(seen)) == 60


def test_transformers_reads_the_assets(tmp_path: Path) -> None:
    tokens = prepare(data(tmp_path), tmp_path / "cache", tmp_path)
    tokenizer = load_tokenizer(tokens, tmp_path)
    assert tokenizer.eos_token_id == tokens.end
    assert len(tokenizer) == tokens.vocabulary
    text = "Ünïcode , don 't tidy up  spaces .\n\t"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_second_call_reads_what_the_first_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(data(tmp_path), tmp_path / "cache", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Entry, "publish", None)
        assert same(first, prepare(data(tmp_path), tmp_path / "cache", tmp_path))
        assert same(first, prepare(data(tmp_path, length=32), tmp_path / "cache", tmp_path))
    elsewhere = prepare(data(tmp_path), tmp_path / "other", tmp_path)
    assert same(first, elsewhere)


@pytest.mark.parametrize("change", [{"vocabulary": 290}, {"validation": 0.2}, {"test": 0.3}])
def test_another_setting_is_another_entry(tmp_path: Path, change: dict[str, float]) -> None:
    prepare(data(tmp_path), tmp_path / "cache", tmp_path)
    prepare(data(tmp_path, **change), tmp_path / "cache", tmp_path)
    assert len([path for path in (tmp_path / "cache" / "text").iterdir() if path.is_dir()]) == 2


def test_other_text_is_another_entry(tmp_path: Path) -> None:
    settings = data(tmp_path)
    first = prepare(settings, tmp_path / "cache", tmp_path)
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"text": "def another_function(): return 0", "category": "code"}\n')
    assert not same(first, prepare(settings, tmp_path / "cache", tmp_path))


@pytest.mark.parametrize("name", ["train.0.npy", "tokenizer.json", "index.json"])
def test_a_damaged_entry_is_prepared_anew(tmp_path: Path, name: str) -> None:
    first = prepare(data(tmp_path), tmp_path / "cache", tmp_path)
    (path,) = (tmp_path / "cache" / "text").glob(f"*/{name}")
    whole = path.read_bytes()
    del first
    for damaged in (whole[:-3], b"", whole[:20] + b"\xff" + whole[21:]):
        path.write_bytes(damaged)
        prepare(data(tmp_path), tmp_path / "cache", tmp_path)
        assert path.read_bytes() == whole
    path.unlink()
    prepare(data(tmp_path), tmp_path / "cache", tmp_path)
    assert path.read_bytes() == whole


def test_of_several_that_start_at_once_one_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[Entry] = []
    publish = Entry.publish

    def count(entry: Entry, *arguments: Any) -> Tokens:
        published.append(entry)
        return publish(entry, *arguments)

    monkeypatch.setattr(Entry, "publish", count)
    settings, results = data(tmp_path), []
    threads = [
        threading.Thread(target=lambda: results.append(prepare(settings, tmp_path / "cache", tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(published) == 1
    assert len(results) == 4
    assert all(same(results[0], other) for other in results)


def test_what_a_killed_process_left_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokens_of, "batches", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(data(tmp_path), tmp_path / "cache", tmp_path)
    assert list((tmp_path / "cache" / "text").glob("*.preparing"))
    prepare(data(tmp_path), tmp_path / "cache", tmp_path)
    assert not list((tmp_path / "cache" / "text").glob("*.preparing"))


def test_a_category_of_two_documents_is_named(tmp_path: Path) -> None:
    settings = data(tmp_path)
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"text": "one more", "category": "few"}\n{"text": "and another", "category": "few"}\n')
    with pytest.raises(ValueError, match="category 'few': got 2 distinct documents"):
        prepare(settings, tmp_path / "cache", tmp_path)
