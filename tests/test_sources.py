import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from moeify.data.sources import fingerprint, read
from moeify.recipe.data import InstalledText, JsonLines, MixedText, Table, TextFolders


def write_folders(base: Path, **files: dict[str, str]) -> TextFolders:
    for category, each in files.items():
        for name, text in each.items():
            path = base / category / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return TextFolders(kind="folders", categories={category: Path(category) for category in files})


def write_lines(base: Path, *entries: object, raw: bytes = b"") -> JsonLines:
    (base / "data.jsonl").write_bytes("".join(json.dumps(entry) + "\n" for entry in entries).encode() + raw)
    return JsonLines(kind="jsonl", path=Path("data.jsonl"))


def entry(category: str, text: str) -> dict[str, str]:
    return {"category": category, "text": text}


# --- folders ------------------------------------------------------------------------------------------


def test_each_file_is_a_document_of_its_folder_and_hidden_ones_are_none(tmp_path: Path) -> None:
    source = write_folders(
        tmp_path,
        b={"one.txt": "One, é.", "sub/two.txt": "Two.", ".hidden": "No.", ".git/config": "No.", "empty.txt": " \n"},
        a={"three.txt": "\ufeffThree."},
    )
    found = read(source, tmp_path)
    assert list(found) == ["b", "a"]
    assert [(d.group, d.text) for d in found["b"]] == [("one.txt", "One, é."), ("sub/two.txt", "Two.")]
    assert [d.text for d in found["a"]] == ["Three."]


def test_a_pattern_chooses_files(tmp_path: Path) -> None:
    write_folders(tmp_path, a={"x.txt": "Ay.", "x.md": "Bee."}, b={"sub/y.txt": "Sea."})
    source = TextFolders(kind="folders", categories={"a": Path("a"), "b": Path("b")}, pattern="**/*.txt")
    assert [d.text for each in read(source, tmp_path).values() for d in each] == ["Ay.", "Sea."]


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    source = write_folders(tmp_path, a={"x.txt": "Ay."}, b={"y.txt": "Bee."})
    (tmp_path / "b" / "photo.png").write_bytes(b"ok \xff\xd8")
    with pytest.raises(ValueError, match=r"photo\.png is not UTF-8 text \(byte 3\).*data\.source\.pattern"):
        read(source, tmp_path)


@pytest.mark.parametrize("pattern", ["/absolute/*", "", "**x"])
def test_a_pattern_that_is_no_glob_is_refused(tmp_path: Path, pattern: str) -> None:
    write_folders(tmp_path, a={"x.txt": "Ay."}, b={"y.txt": "Bee."})
    source = TextFolders(kind="folders", categories={"a": Path("a"), "b": Path("b")}, pattern=pattern)
    with pytest.raises(ValueError, match=r"data\.source\.pattern"):
        read(source, tmp_path)


def test_missing_empty_and_blank_folders_are_refused(tmp_path: Path) -> None:
    write_folders(tmp_path, a={"x.txt": "Ay."}, blank={"y.txt": " \n"})
    (tmp_path / "empty").mkdir()
    for other, message in (
        ("missing", "is not a folder"),
        ("empty", "no file below"),
        ("blank", "category 'b' has no text"),
    ):
        source = TextFolders(kind="folders", categories={"a": Path("a"), "b": Path(other)})
        with pytest.raises(ValueError, match=message):
            read(source, tmp_path)


@pytest.mark.parametrize("name", ["mean", "core"])
def test_a_reserved_name_is_refused_in_a_recipe_and_changed_where_a_label_has_it(tmp_path: Path, name: str) -> None:
    source = write_folders(tmp_path, a={"x.txt": "Ay."}, **{name: {"y.txt": "Bee."}})
    with pytest.raises(ValueError, match=f"'{name}' is reserved"):
        read(source, tmp_path)
    assert set(read(write_lines(tmp_path, entry("a", "Ay."), entry(name, "Bee.")), tmp_path)) == {"a", f"{name}-1"}


# --- JSON lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_lines_are_read_plain_and_compressed(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    source = write_lines(tmp_path, entry("b", "One, é."), entry("a", "Two."), entry("b", "Three."), raw=b"\n")
    (tmp_path / "data.jsonl").write_bytes(pack((tmp_path / "data.jsonl").read_bytes()))
    found = read(source, tmp_path)
    assert {category: [d.text for d in each] for category, each in found.items()} == {
        "a": ["Two."],
        "b": ["One, é.", "Three."],
    }
    assert list(found) == ["a", "b"]


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    write_lines(tmp_path, {"body": "One.", "topic": "a"}, {"body": "Two.", "topic": "b"})
    source = JsonLines(kind="jsonl", path=Path("data.jsonl"), text="body", category="topic")
    assert [d.text for each in read(source, tmp_path).values() for d in each] == ["One.", "Two."]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": "x", "category": "a"', r"line 3: not JSON: .*column"),
        (b"\xff{}", r"line 3: not UTF-8 \(byte 0 of the line\)"),
        (b'["a", "b"]', r"line 3: got list, wanted an object"),
        (b'{"category": "a", "body": "x"}', r"line 3: no field 'text', got 'category', 'body'"),
        (b'{"text": "x"}', r"line 3: no field 'category', got 'text'"),
        (b'{"text": 3, "category": "a"}', r"line 3: field 'text' is int, wanted a string"),
        (
            b'{"text": "x", "category": null}',
            r"line 3: field 'category' holds nothing, wanted a category; .*--discover",
        ),
        (b'{"text": "x", "category": " "}', r"line 3: field 'category' holds nothing, wanted a category; .*--category"),
        (b'{"text": "x", "category": ["a"]}', r"line 3: field 'category' holds list, wanted a category$"),
        (b'{"text": "\\ud800", "category": "a"}', r"line 3: field 'text' holds half a surrogate pair"),
        (b"[" * 100_000, r"line 3: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes, message: str) -> None:
    source = write_lines(tmp_path, entry("a", "One."), entry("b", "Two."), raw=bad)
    with pytest.raises(ValueError, match=message):
        read(source, tmp_path)


def test_of_thousands_of_bad_lines_each_problem_is_told_once_and_the_rest_counted(tmp_path: Path) -> None:
    others = b"".join(b'{"field %s": 1}\n' % (b"x" * number) for number in range(1, 7))
    source = write_lines(tmp_path, entry("a", "One."), entry("b", "Two."), raw=b"{}\n" * 3000 + b"[1]\n" + others)
    with pytest.raises(ValueError, match="3,007 bad lines") as caught:
        read(source, tmp_path)
    told = str(caught.value)
    assert "\n" not in told
    assert (
        "line 3 and 2,999 more: no field 'text', got no fields; line 3003: got list, wanted an object a line; " in told
    )
    assert told.endswith("line 3006: no field 'text', got 'field xxx'; and 3 more lines")


def test_labels_of_lines_and_rows_follow_one_rule(tmp_path: Path) -> None:
    labels = ["köche & Öl", "c_", "v" * 64, "c/_", "core"]
    texts = [f"Text number {place} is about {place**9}." for place in range(len(labels))]
    lines = write_lines(tmp_path, *map(entry, labels, texts))
    pyarrow.parquet.write_table(pa.table({"text": texts, "label": labels}), tmp_path / "rows.parquet")
    table = Table(kind="table", path=Path("rows.parquet"))
    assert read(lines, tmp_path) == read(table, tmp_path)
    assert set(read(lines, tmp_path)) == {"k-che-l", "c_", "v" * 64, "c", "core-1"}
    numbers = [0, 1, 0, True, "1"]
    lines = write_lines(tmp_path, *({"text": text, "category": n} for text, n in zip(texts, numbers, strict=True)))
    assert {name: len(found) for name, found in read(lines, tmp_path).items()} == {"0": 2, "1": 2, "true": 1}


def test_one_category_is_too_few(tmp_path: Path) -> None:
    for entries, message in (([entry("a", "One.")], r"1 categories \(a\)"), ([], r"0 categories \(no document\)")):
        with pytest.raises(ValueError, match=message):
            read(write_lines(tmp_path, *entries), tmp_path)


def test_a_category_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="category 'b' has no text"):
        read(write_lines(tmp_path, entry("a", "One."), entry("b", " ")), tmp_path)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_damaged_file_is_refused(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    source = write_lines(tmp_path, *(entry("ab"[i % 2], f"Text {i}.") for i in range(100)))
    packed = pack((tmp_path / "data.jsonl").read_bytes())
    for damaged in (packed[: len(packed) // 2], packed[:40] + bytes(20) + packed[60:]):
        (tmp_path / "data.jsonl").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or cut short"):
            read(source, tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for ask in (read, fingerprint):
        with pytest.raises(ValueError, match="is not a file"):
            ask(JsonLines(kind="jsonl", path=Path("missing.jsonl")), tmp_path)


# --- fingerprints and installed text ------------------------------------------------------------------


def test_a_fingerprint_follows_the_content(tmp_path: Path) -> None:
    folders = write_folders(tmp_path, a={"x.txt": "Ay."}, b={"y.txt": "Bee."})
    lines = write_lines(tmp_path, entry("a", "One."), entry("b", "Two."))
    before = [fingerprint(source, tmp_path) for source in (folders, lines)]
    assert before == [fingerprint(source, tmp_path) for source in (folders, lines)]
    (tmp_path / "b" / "y.txt").write_text("Sea.")
    write_lines(tmp_path, entry("a", "One."), entry("b", "Three."))
    after = [fingerprint(source, tmp_path) for source in (folders, lines)]
    assert not set(before) & set(after)


def test_installed_text_is_the_same_each_time_and_within_its_bound() -> None:
    source = InstalledText(kind="installed", sources=("c", "web"), megabytes=0.3)
    one, other = read(source, Path()), read(source, Path())
    assert one == other
    assert all(0.27e6 <= sum(d.size for d in each) <= 0.3e6 for each in one.values())


def test_too_little_installed_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeify.data.corpora._record", lambda distribution: "")
    with pytest.raises(ValueError, match=r"got 0\.00 MB of 'c' on this machine, wanted at least 2 MB.*torch, pyarrow"):
        read(InstalledText(kind="installed", sources=("c", "web")), Path())


# --- mixed --------------------------------------------------------------------------------------------


def mixed(base: Path, *entries: object, **more: object) -> MixedText:
    (base / "notes").mkdir(exist_ok=True)
    (base / "notes" / "one.txt").write_text("A note that is long enough to count as text.", encoding="utf-8")
    write_lines(base, *entries)
    lines = {"kind": "jsonl", "path": "data.jsonl", "where": {"label": ["horror", "detective"]}, "group": "author"}
    parts = {"notes": {"kind": "folder", "path": "notes"}, "books": lines}
    return MixedText.model_validate({"kind": "mixed", "root": ".", "categories": parts, **more})


def book(author: str, label: object, text: str) -> dict[str, object]:
    return {"author": author, "label": label, "text": text}


def test_parts_come_from_their_places_and_authors_stay_together(tmp_path: Path) -> None:
    source = mixed(
        tmp_path,
        book("A", "horror", "The door was open all night."),
        book("B", "children", "The cat sat on the warm mat."),
        book("A", ["essay", "detective"], "It was the gardener, of course."),
        book("C", "detective", "Nobody had seen the butler since."),
        {"text": "A line without a label, and it is left out."},
    )
    found = read(source, tmp_path)
    assert list(found) == ["notes", "books"]
    assert sorted(d.text[:6] for d in found["books"]) == ["It was", "Nobody", "The do"]
    groups = [d.group for d in found["books"]]
    assert len(set(groups)) == 2
    assert groups == sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest())


def test_megabytes_bound_each_part(tmp_path: Path) -> None:
    entries = [book(f"author {number}", "horror", f"{number} {number**7} {number**9} " * 20) for number in range(30)]
    whole = read(mixed(tmp_path, *entries), tmp_path)["books"]
    part = read(mixed(tmp_path, *entries, megabytes=0.003), tmp_path)["books"]
    assert len(whole) == 30
    assert 0 < sum(d.size for d in part) <= 3_000
    assert part == [d for d in whole if d in part]


def test_mixed_paths_start_at_the_environments_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = mixed(tmp_path, book("A", "horror", "The door was open all night."), root=None)
    monkeypatch.delenv("MOEIFY_DATA", raising=False)
    for reads in (read, fingerprint):
        with pytest.raises(ValueError, match=r"^data\.root: got null, and MOEIFY_DATA is not set"):
            reads(source, tmp_path)
    monkeypatch.setenv("MOEIFY_DATA", str(tmp_path))
    assert len(read(source, Path("/nowhere"))["books"]) == 1
    before = fingerprint(source, Path("/nowhere"))
    (tmp_path / "notes" / "one.txt").write_text("Another note.", encoding="utf-8")
    assert fingerprint(source, Path("/nowhere")) != before


def test_a_bad_part_is_named_by_its_place_in_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^data\.source\.categories\.books\.path: .*has 1 bad line: line 1: no field 'auth"
    ):
        read(mixed(tmp_path, {"label": "horror", "text": "Who wrote this?"}), tmp_path)
    with pytest.raises(ValueError, match="category 'books' has no text"):
        read(mixed(tmp_path, book("B", "children", "The cat sat on the warm mat.")), tmp_path)
    source = mixed(tmp_path)
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(ValueError, match=r"^data\.source\.categories\.books\.path: .*data\.jsonl is not a file"):
        fingerprint(source, tmp_path)
