import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moeify.data.discover import TooSmallError
from moeify.data.survey import look
from moeify.recipe.data import Discover, TextData, TextFolders
from moeify.recipe.load import load_recipe
from moeify.starter import Machine, _shape, starter
from pipelines.cli import main
from tests.surveyed import entries, text, write_folders, write_lines


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))


def init(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["init", *arguments])


def test_a_folder_of_folders_becomes_a_recipe_that_a_run_takes(tmp_path: Path):
    write_folders(tmp_path / "texts", law=12, letters=12, **{"old books": 12})
    said = init("texts")
    assert said.exit_code == 0, said.output
    config = load_recipe(tmp_path / "recipe.yaml")
    assert config.category_names == ("law", "letters", "old-books")
    assert isinstance(config.data.source, TextFolders)
    assert config.data.source.categories["old-books"] == Path("texts/old books")
    assert config.name == "texts"
    assert set(config.controls) == {"random", "told"}
    assert "run it:  moeify run recipe.yaml" in said.output
    assert [line.split()[:2] for line in said.output.splitlines() if line.startswith("la")] == [["law", "12"]]


def test_every_part_of_a_recipe_is_in_it(tmp_path: Path):
    write_folders(tmp_path / "texts", a=12, b=12)
    assert init("texts", "-o", "mine.yaml").exit_code == 0
    written = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    for part in type(load_recipe(tmp_path / "mine.yaml")).model_fields:
        assert f"\n{part}:" in written, part
    (line,) = [line for line in written.splitlines() if line.startswith("routing: ")]
    none, other = "{gradients: none}", "{gradients: both, core: frozen}"
    assert line.startswith(f"routing: {none}  # {other}: ")
    (tmp_path / "mine.yaml").write_text(written.replace(f"routing: {none}", f"routing: {other}"), encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml").routing.core == "frozen"


def test_nothing_is_written_over_without_force(tmp_path: Path):
    write_folders(tmp_path / "texts", a=12, b=12)
    (tmp_path / "recipe.yaml").write_text("mine")
    said = init("texts")
    assert said.exit_code == 2
    assert "recipe.yaml is there already" in said.output
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    assert init("texts", "--force").exit_code == 0
    assert load_recipe(tmp_path / "recipe.yaml").category_names == ("a", "b")
    assert not list(tmp_path.glob(".recipe*"))


def test_what_will_not_work_is_told_in_one_line_and_writes_nothing(tmp_path: Path):
    write_folders(tmp_path / "texts", a=12)
    said = init("texts")
    assert said.exit_code == 2
    assert len(said.output.splitlines()) == 1
    assert not (tmp_path / "recipe.yaml").exists()


def test_too_little_text_is_told_by_its_split(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "texts" / name / f"{number}.txt").write_text(f"{name} {number} few words")
    said = init("texts")
    assert said.exit_code == 2
    assert "split of category 'a' has" in said.output


def test_json_lines_say_their_fields_and_keep_an_odd_name(tmp_path: Path):
    write_lines(tmp_path / "2024.jsonl.gz", entries(40))
    said = init("2024.jsonl.gz")
    assert said.exit_code == 0, said.output
    assert "text: 'body', category: 'label'" in said.output
    config = load_recipe(tmp_path / "recipe.yaml")
    assert config.name == "2024"
    assert config.category_names is None


def test_lines_without_categories_are_clustered(tmp_path: Path):
    lines: list[dict[str, object]] = [{"text": text(number)} for number in range(60)]
    lines += [
        {"text": "".join(f"def f{number}_{n}(x): return {n * number}\n" for n in range(12))} for number in range(60)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = init("d.jsonl")
    assert said.exit_code == 0, said.output
    assert "cluster-0" in said.output
    config = load_recipe(tmp_path / "recipe.yaml")
    assert config.data.discover is not None
    assert config.data.source.category is None


@pytest.mark.parametrize(("error", "tries"), [(TooSmallError("too small"), 5), (ValueError("too large"), 1)])
def test_fewer_clusters_are_tried_only_where_clusters_are_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: ValueError, tries: int
):
    asked: list[Discover] = []

    def prepare(data: TextData, *_: object) -> None:
        assert data.discover
        asked.append(data.discover)
        raise error

    monkeypatch.setattr("moeify.data.tokens.prepare", prepare)
    found = look(write_lines(tmp_path / "d.jsonl", entries()), discover=True)
    with pytest.raises(ValueError, match=str(error)):
        starter(found, "d", Machine(1, 1.0), tmp_path / "cache", tmp_path)
    assert len(asked) == tries


@pytest.mark.parametrize(("number", "rounds"), [(2, 1), (3, 1), (4, 2), (9, 2), (11, 3), (20, 3), (60, 3)])
def test_rounds_reach_a_leaf_for_each_category(tmp_path: Path, number: int, rounds: int):
    write_folders(tmp_path / "texts", **{f"c{place}": 6 for place in range(number)})
    made = starter(look(tmp_path / "texts"), "many", Machine(8, 32.0), tmp_path / "cache", tmp_path)
    assert len(made.config.rounds) == rounds
    leaves = 1
    for each in made.config.rounds:
        leaves *= each.branching
    assert leaves >= number
    assert made.config.training.rows >= number
    assert made.config.cluster.workers == 8


@pytest.mark.parametrize(
    ("size", "cores", "hidden"), [(10**5, 64, 64), (10**8, 1, 64), (10**8, 16, 128), (10**8, 256, 256)]
)
def test_the_network_grows_with_data_and_cores(size: int, cores: int, hidden: int):
    shape, a_minute = _shape(size, 8192, 16 * 128, cores)
    assert shape[0] == hidden
    assert a_minute > 0


def test_a_small_machine_gets_one_worker(tmp_path: Path):
    write_folders(tmp_path / "texts", a=12, b=12)
    made = starter(look(tmp_path / "texts"), "small", Machine(1, 1.0), tmp_path / "cache", tmp_path)
    assert (made.config.cluster.workers, made.config.cluster.threads) == (1, 1)
