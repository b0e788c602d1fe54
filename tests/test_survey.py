import re
from pathlib import Path

import pytest

from moeify.data.survey import look
from moeify.recipe.data import JsonLines, TextFolders
from tests.surveyed import entries, text, write_folders, write_lines

# --- folders --------------------------------------------------------------------------------------------


def test_folders_are_categories_with_their_amounts(tmp_path: Path):
    found = look(write_folders(tmp_path / "texts", law=4, letters=5))
    assert isinstance(found.source, TextFolders)
    assert {name: amount.documents for name, amount in found.amounts.items()} == {"law": 4, "letters": 5}
    size = sum(file.stat().st_size for file in (tmp_path / "texts" / "law").iterdir())
    assert found.amounts["law"].size == size
    assert found.source.pattern == "**/*"
    assert found.labelled
    assert found.notes == ()


def test_a_folder_whose_name_is_no_name_of_a_category_gets_one(tmp_path: Path):
    base = write_folders(tmp_path, **{"Old Books!": 3, "Old-Books": 3, "mean": 3})
    found = look(base)
    assert isinstance(found.source, TextFolders)
    assert {name: path.name for name, path in found.source.categories.items()} == {
        "Old-Books": "Old Books!",
        "Old-Books-2": "Old-Books",
        "mean-1": "mean",
    }
    assert "category 'Old-Books' stands for the folder 'Old Books!'" in found.notes


def test_what_is_no_text_is_left_out_by_suffix(tmp_path: Path):
    base = write_folders(tmp_path, a=3, b=3)
    (base / "a" / "picture.png").write_bytes(b"\x89PNG\0\0")
    (base / "b" / "old.doc").write_bytes("é".encode("latin-1"))
    (base / "readme.md").write_text("loose")
    found = look(base)
    assert isinstance(found.source, TextFolders)
    assert found.source.pattern == "**/*.txt"
    assert {name: amount.documents for name, amount in found.amounts.items()} == {"a": 3, "b": 3}
    assert any("pattern '**/*.txt': leaves out 2 files" in note for note in found.notes)
    assert any("1 file beside the folders, such as readme.md" in note for note in found.notes)


def test_empty_and_hidden_folders_are_no_categories(tmp_path: Path):
    base = write_folders(tmp_path, a=3, b=3, **{".git": 3})
    (base / "empty").mkdir()
    found = look(base)
    assert set(found.amounts) == {"a", "b"}
    assert found.notes == ("left out: empty, which has no files",)


def spoil_one_folder(base: Path) -> None:
    write_folders(base, a=3)


def spoil_empty_files(base: Path) -> None:
    write_folders(base, a=3, b=3)
    for file in (base / "b").iterdir():
        file.write_text(" \n")


def spoil_binary(base: Path) -> None:
    write_folders(base, a=3, b=3)
    (base / "b" / "0.txt").write_bytes(b"\0\1\2")


def spoil_more_binary(base: Path) -> None:
    spoil_binary(base)
    (base / "a" / "0.txt").write_bytes(b"\0")


def spoil_two_documents(base: Path) -> None:
    write_folders(base, a=3, b=2)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_one_folder, "1 folders with files in them, wanted at least 2"),
        (spoil_empty_files, "category 'b' has no text"),
        (spoil_binary, "it holds null bytes), and no suffix"),
        (spoil_more_binary, "it holds null bytes), nor is 1 file more, and no suffix"),
        (spoil_two_documents, "category 'b' has 2 distinct documents, wanted at least 3"),
    ],
)
def test_folders_that_no_run_can_use_are_refused_in_one_line(tmp_path: Path, spoil, words):
    spoil(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        look(tmp_path)
    assert "\n" not in str(error.value)


# --- JSON lines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.xz"])
def test_the_longest_field_is_the_text_and_few_values_are_the_category(tmp_path: Path, name):
    found = look(write_lines(tmp_path / name, entries()))
    assert found.source == JsonLines(kind="jsonl", path=tmp_path / name, text="body", category="label")
    assert {key: amount.documents for key, amount in found.amounts.items()} == {"x": 15, "y": 15}
    assert "id (not text)" in found.notes[0]
    assert "label (2 values)" in found.notes[0]
    assert found.notes[1] == "text: 'body', category: 'label'"


def test_another_field_that_may_be_the_category_is_offered(tmp_path: Path):
    lines = [{**entry, "part": "pqr"[n % 3]} for n, entry in enumerate(entries())]
    path = write_lines(tmp_path / "d.jsonl", lines)
    assert look(path).notes[1] == "text: 'body', category: 'label'; or --category part"
    assert set(look(path, category="part").amounts) == {"p", "q", "r"}


def test_fields_may_be_named(tmp_path: Path):
    lines = [{**entry, "note": f"{n} {entry['body']} and more"} for n, entry in enumerate(entries())]
    path = write_lines(tmp_path / "d.jsonl", lines)
    assert look(path).source == JsonLines(kind="jsonl", path=path, text="note", category="label")
    assert look(path, text="body").source == JsonLines(kind="jsonl", path=path, text="body", category="label")


@pytest.mark.parametrize("discover", [True, False])
def test_without_a_category_discover_is_suggested(tmp_path: Path, discover):
    drop = {"lang"} if discover else {"lang", "label"}
    lines = [{key: value for key, value in entry.items() if key not in drop} for entry in entries()]
    found = look(write_lines(tmp_path / "d.jsonl", lines), discover=discover)
    assert isinstance(found.source, JsonLines)
    assert found.source.category is None
    assert not found.labelled
    assert "data.discover" in found.notes[-1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\0\1", "not UTF-8 (byte 0 of the line), wanted JSON lines; is it binary data?"),
        (b'{"t": "x"}\nno\n[1]\n[2]\n', "has 3 bad lines: line 2: not JSON: "),
        (b"text\n", "line 1: not JSON"),
        (b"[1]\n", "got list, wanted an object"),
        (b'{"a": 1}\n', "no field is text in every line"),
        (b'{"t": "x y"}\n{"t": "z w"}\n', "the file has 2 distinct documents, wanted at least 3"),
    ],
)
def test_lines_that_no_run_can_use_are_refused_in_one_line(tmp_path: Path, content, words):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        look(tmp_path / "d.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": "bodi"}, "got --text 'bodi', wanted a field that is text in every line: 'title', 'body'"),
        ({"category": "id"}, "category '0' has 1 distinct documents, wanted at least 3"),
        (
            {"category": "none"},
            "got --category 'none', wanted a field that is text or a whole number in every line: 'id'",
        ),
        ({"text": "body", "category": "body"}, "one field cannot be text and category at once"),
        ({"category": "lang"}, "has 1 categories (en), wanted at least 2"),
    ],
)
def test_fields_that_will_not_do_are_refused(tmp_path: Path, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        look(write_lines(tmp_path / "d.jsonl", entries()), **options)


def test_lines_are_judged_by_all_of_them(tmp_path: Path):
    lines: list[dict[str, object]] = [{"text": text(n, 12), "category": "abc"[n // 900]} for n in range(2700)]
    found = look(write_lines(tmp_path / "d.jsonl", lines))
    assert isinstance(found.source, JsonLines)
    assert found.source.category == "category"
    assert set(found.amounts) == {"a", "b", "c"}


def test_labels_that_are_numbers_or_no_names_are_categories(tmp_path: Path):
    lines: list[dict[str, object]] = [
        {"text": text(n), "label": n % 3, "topic": ["Öl", "core"][n % 2]} for n in range(30)
    ]
    path = write_lines(tmp_path / "d.jsonl", lines)
    assert set(look(path).amounts) == {"0", "1", "2"}
    found = look(path, category="topic")
    assert set(found.amounts) == {"l", "core-1"}
    assert found.notes[-2:] == ("category 'l' stands for 'Öl'", "category 'core-1' stands for 'core'")


@pytest.mark.parametrize(
    ("category", "words"),
    [
        (lambda n: "ab"[n % 2] if n % 3 else None, "10 bad lines: line 1 and 9 more: field 'category' holds nothing"),
        (lambda n: float(n % 2), "30 bad lines: line 1 and 29 more: field 'category' holds float"),
        (lambda n: "a", "has 1 categories (a), wanted at least 2 in the field 'category'"),
    ],
)
def test_a_usual_field_that_tells_no_category_is_refused_rather_than_clustered(tmp_path: Path, category, words):
    lines: list[dict[str, object]] = [{"text": text(n), "category": category(n)} for n in range(30)]
    path = write_lines(tmp_path / "d.jsonl", lines)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        look(path)
    assert "\n" not in str(error.value)
    assert not look(path, discover=True).labelled
    told = [{**line, "other": "xyz"[n % 3]} for n, line in enumerate(lines)]
    assert set(look(write_lines(path, told), category="other").amounts) == {"x", "y", "z"}


def test_what_is_left_out_is_said(tmp_path: Path):
    lines = [*entries(), *entries(4), {**entries(1)[0], "body": " "}]
    assert look(write_lines(tmp_path / "d.jsonl", lines)).notes[-1] == "left out: 4 duplicates, 1 line without text"
    base = write_folders(tmp_path / "texts", a=3, b=3)
    (base / "a" / "empty.txt").write_text("")
    (base / "b" / "more.txt").write_text((base / "a" / "0.txt").read_text())
    assert look(base).notes == ("left out: 1 duplicate, 1 empty file",)


def test_other_files_and_none_at_all_are_refused(tmp_path: Path):
    (tmp_path / "d.docx").write_text("a,b\n")
    with pytest.raises(ValueError, match="neither a folder nor one of"):
        look(tmp_path / "d.docx")
    with pytest.raises(ValueError, match="is not there"):
        look(tmp_path / "nothing")
