"""Tables as data: what `datasets` saves, Parquet, Arrow, CSV, read by column and looked at by `moeify init`."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest
from click.testing import CliRunner

from moeify.data import sources, tables
from moeify.data.survey import look
from moeify.recipe.data import Table
from moeify.recipe.load import load_recipe
from pipelines import package
from pipelines.cli import main
from tests.surveyed import text

NAMES = ["World", "Sci/Tech"]
FEATURES = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": NAMES, "_type": "ClassLabel"}}


def table(*labels: Any, first: int = 0) -> pa.Table:
    """A document a label, as a table whose schema says what numbers stand for, as `datasets` writes it."""
    texts = [text(100 * first + place) for place in range(len(labels))]
    made = pa.table({"text": texts, "label": list(labels), "id": list(range(first, first + len(labels)))})
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})


def save_to_disk(folder: Path, **splits: pa.Table) -> None:
    """What `datasets.DatasetDict.save_to_disk` leaves, and a cache that a map left beside it."""
    for name, rows in splits.items():
        (folder / name).mkdir(parents=True)
        halves = (rows.slice(0, len(rows) // 2), rows.slice(len(rows) // 2))
        files = [f"data-{place:05}-of-00002.arrow" for place in range(2)]
        for file, half in zip(files, halves, strict=True):
            write_stream(folder / name / file, half)
        write_stream(folder / name / "cache-0123.arrow", rows)
        state = {"_data_files": [{"filename": file} for file in files], "_split": name}
        (folder / name / "state.json").write_text(json.dumps(state))
        (folder / name / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def write_stream(file: Path, rows: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)


def write(file: Path, rows: pa.Table) -> Path:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(rows, file)
    elif file.suffix == ".arrow":
        with pa.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, rows.schema) as writer:
            writer.write_table(rows)
    else:
        delimiter = "\t" if file.suffix == ".tsv" else ","
        pyarrow.csv.write_csv(rows, file, pyarrow.csv.WriteOptions(delimiter=delimiter))
    return file


def counts(path: Path, category: str | None = "label") -> dict[str, int]:
    return {name: len(found) for name, found in tables.read_table(path, "text", category).items()}


def test_a_saved_data_set_is_its_splits_without_caches_and_its_numbers_are_names(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "news", train=table(0, 0, 1, 1, 1, 0), test=table(1, 1, first=90))
    assert tables.is_table(tmp_path / "news")
    assert counts(tmp_path / "news") == {"World": 3, "Sci-Tech": 5}
    assert counts(tmp_path / "news" / "test") == {"Sci-Tech": 2}
    assert len(tables.parts_of(tmp_path / "news")) == 4 + 3


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    rows = table("a", "b", "b", "a")
    found = tables.read_table(write(tmp_path / f"rows{suffix}", rows), "text", "label")
    assert {name: [document.text for document in each] for name, each in found.items()} == {
        "a": [rows["text"][0].as_py(), rows["text"][3].as_py()],
        "b": [rows["text"][1].as_py(), rows["text"][2].as_py()],
    }
    assert counts(tmp_path / f"rows{suffix}", None) == {"": 4}


def test_numbers_and_booleans_without_names_are_categories_by_themselves(tmp_path: Path) -> None:
    assert counts(write(tmp_path / "rows.parquet", table(7, 8, 7).replace_schema_metadata())) == {"7": 2, "8": 1}
    assert counts(write(tmp_path / "more.csv", table(True, False, True).replace_schema_metadata())) == {
        "true": 2,
        "false": 1,
    }


def test_init_looks_at_a_saved_data_set_and_its_recipe_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    save_to_disk(tmp_path / "news", train=table(*[0] * 12, *[1] * 12), test=table(*[0] * 6, *[1] * 6, first=90))
    said = CliRunner().invoke(main, ["init", "news"])
    assert said.exit_code == 0, said.output
    for words in ("text: 'text', category: 'label'", "category 'Sci-Tech' stands for 'Sci/Tech'", "4 files"):
        assert words in said.output, words
    config = load_recipe(tmp_path / "recipe.yaml")
    assert config.data.source == Table(kind="table", path=Path("news"), text="text", category="label")
    assert {name: len(found) for name, found in sources.read(config.data.source, tmp_path).items()} == {
        "Sci-Tech": 18,
        "World": 18,
    }
    told = json.loads(CliRunner().invoke(main, ["init", "news", "-o", "again.yaml", "--json"]).output)
    assert {name: each["documents"] for name, each in told["categories"].items()} == {"Sci-Tech": 18, "World": 18}
    assert told["recipe"] == "again.yaml"
    before = sources.fingerprint(config.data.source, tmp_path)
    package.pack(config, tmp_path, tmp_path / "packed")
    assert sources.fingerprint(config.data.source, tmp_path / "packed") == before
    with (tmp_path / "news" / "train" / "data-00000-of-00002.arrow").open("ab") as file:
        file.write(b" ")
    assert sources.fingerprint(config.data.source, tmp_path) != before


def test_a_table_that_is_sorted_by_category_shows_all_of_them(tmp_path: Path) -> None:
    found = look(write(tmp_path / "rows.parquet", table(*["a"] * 1500, *["b"] * 1500)))
    assert isinstance(found.source, Table)
    assert (found.source.text, found.source.category) == ("text", "label")
    assert found.amounts.keys() == {"a", "b"}


def test_rows_without_text_or_anything_need_no_label(tmp_path: Path) -> None:
    rows = table(*"abab" * 6).append_column("note", pa.array(["n"] * 24))
    more = pa.table({"text": [None, ""], "label": [None, ""], "id": [None, 9], "note": [None, ""]})
    found = look(write(tmp_path / "rows.parquet", pa.concat_tables([rows, more], promote_options="default")))
    assert isinstance(found.source, Table)
    assert (found.source.text, found.source.category) == ("text", "label")
    assert {name: amount.documents for name, amount in found.amounts.items()} == {"a": 12, "b": 12}
    assert found.notes[-1] == "left out: 2 rows without text"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.csv", "text;label\nOne, two;a\n", "got ';' and no ',', wanted columns divided by ',' in a .csv file"),
        ("rows.tsv", "text,label\nOne,a\n", r"got ',' and no '\t', wanted columns divided by '\t' in a .tsv file"),
        ("rows.csv", f"{'One two. ' * 9},a\nThree.,b\n", "of 81 characters, wanted the names of columns; put a row"),
    ],
)
def test_a_first_row_that_names_no_columns_is_refused(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        look(tmp_path / name)
    assert "\n" not in str(error.value)


def test_folders_of_text_stay_folders_of_text(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.csv").write_text("x")
    assert not tables.is_table(tmp_path)
    assert tables.is_table(tmp_path / "a")


def test_what_cannot_be_read_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table")
    write(tmp_path / "good.csv", table("a", "b"))
    save_to_disk(tmp_path / "away", train=table(0, 1))
    (tmp_path / "away" / "dataset_dict.json").write_text('{"splits": ["../../etc"]}')
    write(tmp_path / "numbers.parquet", pa.table({"text": [1.5, 2.5], "label": ["a", "b"]}))
    write(tmp_path / "nothing.parquet", pa.table({"text": ["x", "y"], "label": ["a", None]}))
    write(tmp_path / "blank.csv", pa.table({"text": ["x", "y", "", "z"], "label": ["a", " ", "", ""]}))
    for name, category, told in (
        ("bad.parquet", "label", "cannot be read as parquet"),
        ("good.csv", "kind", "no column 'kind', got text, label, id"),
        ("away", "label", "wanted a name in that folder"),
        ("numbers.parquet", "label", "holds float, wanted text"),
        ("nothing.parquet", "label", "has 1 bad row: row 2: column 'label' holds nothing"),
        (
            "blank.csv",
            "label",
            "has 2 bad rows: row 2 and 1 more: column 'label' holds nothing, wanted a category; give",
        ),
        ("missing.parquet", "label", "is not there"),
    ):
        with pytest.raises(ValueError, match=told) as error:
            tables.read_table(tmp_path / name, "text", category)
        assert "\n" not in str(error.value), name
