import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from moeify.recipe import reference as recipe_reference
from moeify.recipe.load import json_schema
from pipelines.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"


def test_the_page_is_what_the_schema_says():
    result = CliRunner().invoke(main, ["schema", "--markdown"])
    assert result.exit_code == 0, result.output
    assert PAGE.read_text(encoding="utf-8") == result.output, "moeify schema --markdown > docs/recipes.md"


def test_every_field_has_documentation():
    assert recipe_reference.undocumented() == []


def test_a_field_without_documentation_is_found(monkeypatch):
    schema = json_schema()
    del schema["$defs"]["Training"]["properties"]["clip"]["description"]
    monkeypatch.setattr(recipe_reference, "json_schema", lambda: schema)
    assert recipe_reference.undocumented() == ["training.clip"]


def test_every_property_of_every_mapping_has_its_row():
    rows = re.findall(r"^\| `([^`]+)` \|", recipe_reference.markdown(), re.MULTILINE)
    schema = json_schema()
    mappings = [schema, *(node for node in schema["$defs"].values() if "properties" in node)]
    expected = [key for node in mappings for key in node["properties"] if key != "kind"]
    assert sorted(row.rpartition(".")[2] for row in rows) == sorted(expected)


def test_every_row_is_a_whole_one():
    """A bar inside a cell would begin another."""
    for line in recipe_reference.markdown().splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line


def test_every_link_has_its_section():
    page = recipe_reference.markdown()
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert len(links) > 20
    assert links <= anchors


@pytest.mark.parametrize(
    "row",
    [
        "| `training.steps` | a whole number > 0 | **required** |",
        "| `model.ffn` | a whole number > 0 | `384` |",
        "| `budget.per` | one of 'mean', 'category' | `mean` |",
        "| `data.discover` | a mapping, see [its section](#datadiscover) or null | `null` |",
        "| `seed` | a whole number >= 0 and < 2147483648 | `0` |",
        r"| `budget.tax` | a number > 0 or text that matches `^\d+(\.\d+)? ?%$` | **required** |",
    ],
)
def test_rows_say_what_is_wanted_and_what_it_is_otherwise(row):
    assert row in recipe_reference.markdown()
