"""Streamed sources: files of all kinds, read by `datasets` some documents at a time, become the right tokens."""

import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from click.testing import CliRunner

from moeify.data import token_files
from moeify.data.documents import SPLITS
from moeify.data.prepared import Tokens
from moeify.data.streamed import Corpus
from moeify.data.streamed_files import File, all_files, files_of
from moeify.data.tokens import prepare
from moeify.recipe.data import StreamedFiles, StreamedText, TextData
from pipelines.cli import main
from tests.surveyed import text


def write(file: Path, texts: list[str], column: str = "text") -> None:
    """Write a document a row, as the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table({"number": list(range(len(texts))), column: texts}), file)
        return
    content = "".join(json.dumps({column: each}) + "\n" for each in texts).encode()
    match file.suffix:
        case ".gz":
            content = gzip.compress(content)
        case ".xz":
            content = lzma.compress(content)
        case ".zst":
            content = zstandard.ZstdCompressor().compress(content)
    file.write_bytes(content)


def data(categories: object, **changes: object) -> TextData:
    source = {"kind": "streamed", "categories": categories}
    settings = {"kind": "text", "source": source, "vocabulary": 300, "length": 8, "validation": 0.2, "test": 0.2}
    return TextData.model_validate({**settings, **changes})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two categories of forty documents each, in two files and in one."""
    write(tmp_path / "law" / "a.jsonl", [text(number) for number in range(20)])
    write(tmp_path / "law" / "b.jsonl", [text(number) for number in range(20, 40)])
    write(tmp_path / "letters.parquet", [text(number) for number in range(100, 140)], "body")
    return tmp_path


BOTH = {"law": {"files": ["law/*.jsonl"]}, "letters": {"files": ["letters.parquet"], "text": "body"}}


def documents_of(found: Tokens, category: int) -> dict[str, set[str]]:
    """Return split -> the documents in a category's stream."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(found.assets["tokenizer.json"].decode())
    parts: dict[str, set[str]] = {}
    for split in SPLITS:
        stream = found.streams[split][category]
        ends = np.flatnonzero(stream == found.end)
        starts = [0, *(ends[:-1] + 1)]
        parts[split] = {tokenizer.decode(stream[a:b].tolist()) for a, b in zip(starts, ends, strict=True)}
    return parts


def test_every_document_is_in_one_split_and_whole(base: Path) -> None:
    found = prepare(data(BOTH), base / "cache", base)
    assert found.categories == ("law", "letters")
    for category, first in ((0, 0), (1, 100)):
        parts = documents_of(found, category)
        assert sum(map(len, parts.values())) == 40
        assert set.union(*parts.values()) == {text(number) for number in range(first, first + 40)}
        assert all(parts.values())
        assert [found.sizes[split][category] for split in SPLITS] == [
            sum(len(each.encode()) for each in parts[split]) for split in SPLITS
        ]


def test_how_files_are_cut_and_packed_and_how_much_is_encoded_at_a_time_changes_no_token(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = prepare(data(BOTH), base / "cache", base)
    write(base / "law" / "all.jsonl.gz", [text(number) for number in range(30)])
    write(base / "law" / "rest.jsonl.xz", [text(number) for number in range(30, 35)])
    write(base / "law" / "last.jsonl.zst", [text(number) for number in range(35, 40)])
    (base / "law" / "nothing.jsonl").touch()
    monkeypatch.setattr(token_files, "_BATCH_BYTES", 500)
    packed = {
        **BOTH,
        "law": {"files": ["law/all.jsonl.gz", "law/rest.jsonl.xz", "law/last.jsonl.zst", "law/nothing.jsonl"]},
    }
    again = prepare(data(packed), base / "cache", base)
    assert again.assets == once.assets
    for split in SPLITS:
        for one, other in zip(once.streams[split], again.streams[split], strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_documents_split_stays_when_others_come_and_equal_ones_are_read_once(base: Path) -> None:
    before = documents_of(prepare(data(BOTH), base / "cache", base), 0)
    write(base / "law" / "c.jsonl", [text(3).replace(" ", "  "), *(text(number) for number in range(200, 210))])
    write(base / "letters.parquet", [text(number) for number in (3, *range(100, 140))], "body")
    found = prepare(data(BOTH), base / "cache", base)
    after, letters = documents_of(found, 0), documents_of(found, 1)
    assert sum(map(len, after.values())) == 50
    assert sum(map(len, letters.values())) == 40
    for split in SPLITS:
        assert before[split] <= after[split]


def test_text_files_are_a_document_each(tmp_path: Path) -> None:
    for number in range(40):
        for kind in ("law", "letters"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{number}.txt").write_text(f"{kind}\n\n{text(number)}\n", encoding="utf-8")
    both = {kind: {"files": [f"{kind}/*.txt"]} for kind in ("law", "letters")}
    found = prepare(data(both), tmp_path / "cache", tmp_path)
    assert sum(map(len, documents_of(found, 0).values())) == 40


def test_what_the_tokenizer_is_trained_on_are_the_first_documents_of_the_train_split(base: Path) -> None:
    source = data(BOTH).source
    assert isinstance(source, StreamedText)
    corpus = Corpus(source, all_files(source, base), base / "cache", validation=0.2, test=0.2)
    found = [document for part in corpus.parts if part.category == 0 for _, document in corpus.documents(part)]
    train = documents_of(prepare(data(BOTH), base / "cache", base), 0)["train"]
    assert len(corpus.head(0, 1)) == 1
    assert [each.text for each in corpus.head(0, 10**9)] == [each.text for each in found if each.text in train]


def test_globs_mean_files_wherever_the_recipe_lies(base: Path) -> None:
    inside = base / "odd [1]"
    write(inside / "deep" / "a.jsonl", ["one"])
    write(inside / "deep" / "deeper" / "b.jsonl", ["two"])
    for pattern in ("deep/**/*", str(base / "odd ?1?" / "**" / "*.jsonl")):
        part = StreamedFiles(files=(pattern,))
        assert [Path(file.told).name for file in files_of(part, inside, "files")] == ["a.jsonl", "b.jsonl"]


def entries(base: Path) -> int:
    return len(list((base / "cache" / "text").glob("*/index.json")))


def test_changed_files_are_other_data_and_so_are_other_readers(base: Path) -> None:
    prepare(data(BOTH), base / "cache", base)
    write(base / "letters.parquet", [text(number) for number in range(100, 141)], "body")
    prepare(data(BOTH), base / "cache", base)
    assert entries(base) == 2
    for kind in ("law", "letters"):
        (base / "rows" / kind).mkdir(parents=True)
        lines = "\n".join(["text", *(f"{kind} row {number}" for number in range(40))])
        for part in range(20):
            (base / "rows" / kind / f"{part}.csv").write_text(f"{lines}\n{kind} {part}\n")
    both = {kind: {"files": [f"rows/{kind}/*"]} for kind in ("law", "letters")}
    rows = prepare(data(both), base / "cache", base)
    for path in list((base / "rows").glob("*/*.csv")):
        path.rename(path.with_suffix(".txt"))
    whole = prepare(data(both), base / "cache", base)
    assert sum(map(len, documents_of(rows, 0).values())) == 60
    assert sum(map(len, documents_of(whole, 0).values())) == 20
    assert entries(base) == 4


def test_names_that_look_like_globs_are_names(tmp_path: Path) -> None:
    base = tmp_path / "h [2024]"
    for kind in ("law", "letters"):
        (base / kind).mkdir(parents=True)
        for number in range(40):
            (base / kind / f"a{number}.txt").write_text(f"{kind} {text(number)}")
        (base / kind / "a[1].txt").write_text(f"{kind}: what no glob finds")
    both = {kind: {"files": [f"{kind}/*.txt"]} for kind in ("law", "letters")}
    found = set.union(*documents_of(prepare(data(both), tmp_path / "cache", base), 0).values())
    assert len(found) == 41
    assert "law: what no glob finds" in found


def test_a_file_that_changes_while_it_is_read_is_told(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = File.mark

    def marked(file: File) -> str:
        found = real(file)
        if file.told.endswith("b.jsonl"):
            write(Path(file.told), [text(number) for number in range(20, 41)])
        return found

    monkeypatch.setattr(File, "mark", marked)
    with pytest.raises(ValueError, match=r"b\.jsonl was changed since the files were listed"):
        prepare(data(BOTH), base / "cache", base)


def broken(base: Path, kind: str) -> dict[str, object]:
    """Return categories whose second one is no good."""
    part: dict[str, object] = {"files": ["bad.jsonl"]}
    match kind:
        case "damaged":
            (base / "bad.jsonl").write_text('{"text": "one"}\nnothing\n', encoding="utf-8")
        case "cut short":
            (base / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 99)[:-20])
            part["files"] = ["bad.jsonl.gz"]
        case "damaged, packed":
            content = bytearray(lzma.compress("".join(map(text, range(40))).encode()))
            content[len(content) // 2] ^= 255
            (base / "bad.jsonl.xz").write_bytes(bytes(content))
            part["files"] = ["bad.jsonl.xz"]
        case "damaged, zstd":
            (base / "bad.jsonl.zst").write_bytes(b"no frame" * 9)
            part["files"] = ["bad.jsonl.zst"]
        case "too deep":
            (base / "bad.jsonl").write_text(f'{{"text": {"[" * 5000}{"]" * 5000}}}\n', encoding="utf-8")
        case "empty":
            (base / "bad.jsonl").touch()
        case "empty, packed":
            (base / "bad.jsonl.gz").write_bytes(gzip.compress(b""))
            part["files"] = ["bad.jsonl.gz"]
        case "no glob":
            part["files"] = ["law/a**b"]
        case "no text":
            write(base / "bad.jsonl", ["one"] * 9, "title")
        case "numbers":
            (base / "bad.jsonl").write_text('{"text": 1}\n{"text": 2}\n', encoding="utf-8")
        case "few":
            write(base / "bad.jsonl", ["one", "one", " one"])
        case "none":
            part["files"] = ["none/*.jsonl"]
        case "kinds":
            part["files"] = ["law/*.jsonl", "letters.parquet"]
        case "unknown":
            (base / "bad.pdf").write_bytes(b"%PDF")
            part["files"] = ["bad.pdf"]
        case "packed table":
            (base / "bad.parquet.gz").write_bytes(gzip.compress((base / "letters.parquet").read_bytes()))
            part["files"] = ["bad.parquet.gz"]
    return {"law": BOTH["law"], "bad": part}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("damaged", "bad.jsonl cannot be read"),
        ("cut short", "bad.jsonl.gz cannot be read"),
        ("damaged, packed", "bad.jsonl.xz cannot be read"),
        ("damaged, zstd", "bad.jsonl.zst cannot be read"),
        ("too deep", "bad.jsonl cannot be read"),
        ("empty", "got nothing but empty files"),
        ("empty, packed", "bad.jsonl.gz cannot be read: it packs nothing"),
        ("no glob", "got 'law/a**b', wanted a path or a glob"),
        ("no text", "row 1 has no 'text', got 'title'"),
        ("numbers", "'text' is int, wanted text"),
        ("few", "category 'bad' has no document for the"),
        ("none", "no file matches 'none/*.jsonl'"),
        ("missing", "bad.jsonl is not a file"),
        ("kinds", "wanted files of one kind"),
        ("unknown", "got .pdf, wanted files of one kind"),
        ("packed table", "got .parquet.gz, wanted files of one kind"),
    ],
)
def test_bad_input_is_told_in_one_line(base: Path, kind: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("*", r"\*").replace(".", r"\.")) as raised:
        prepare(data(broken(base, kind)), base / "cache", base)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("data.source")
    left = [path for path in (base / "cache").glob("text/*") if path.is_dir()]
    assert all(path.suffix in (".preparing", ".parts", ".users") for path in left), (
        "nothing half prepared counts as prepared"
    )


def test_what_is_missing_or_does_not_go_together_is_said(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="streamed source, whose documents are not kept"):
        data(BOTH, discover={"number": 2})
    monkeypatch.setattr("moeify.data.streamed.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'moeify\[streamed\]'"):
        prepare(data(BOTH), base / "cache", base)


def test_a_run_reads_it(base: Path) -> None:
    recipe = {
        "name": "streamed",
        "data": data(BOTH).model_dump(mode="json"),
        "model": {"kind": "llama", "hidden": 16, "layers": 1, "heads": 2, "ffn": 32},
        "training": {"steps": 4, "rows": 4},
        "attribution": {"rows": 4, "rows_at_once": 4},
        "partition": {"multiple": 4, "min_units": 4},
        "rounds": [{"train": 1, "recover": 1, "separation": 0.3}],
        "evaluation": {"validation_rows": 4, "test_rows": 4},
    }
    (base / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    asked = ["run", str(base / "recipe.json"), "--local"]
    found = CliRunner().invoke(main, asked, env={"MOEIFY_HOME": str(base / "home"), "COLUMNS": "120"})
    assert found.exit_code == 0, found.output
    assert "letters" in found.output


_PEAK = """
import json, resource, sys
from pathlib import Path
from moeify.data.tokens import prepare
from moeify.recipe.data import TextData
import datasets, tokenizers
base = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare(TextData.model_validate(json.loads(sys.argv[2])), base / "cache", base)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for times in (1, 6):
        folder = tmp_path / str(times)
        for place, kind in enumerate(("law", "letters")):
            for part in range(times):
                first = (100 * place + part) * 10_000
                texts = [" ".join([text(first + number)] * 8) for number in range(4000)]
                write(folder / kind / f"{part}.jsonl", texts)
        both = {kind: {"files": [f"{kind}/*.jsonl"]} for kind in ("law", "letters")}
        asked = [sys.executable, "-c", _PEAK, str(folder), data(both).model_dump_json()]
        peaks.append(int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[-1]))
        sizes.append(sum(path.stat().st_size for path in folder.glob("l*/*.jsonl")) // 1024)
    assert peaks[1] - peaks[0] < 0.2 * (sizes[1] - sizes[0]), (peaks, sizes)
