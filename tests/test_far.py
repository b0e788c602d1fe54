"""Data and checkpoints that a recipe names by URL: fetched once, whole, and read as files of this machine are."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner

from moeify.data.streamed_files import files_of
from moeify.far import near
from moeify.place import Place
from moeify.recipe.config import RunConfig
from moeify.recipe.data import StreamedFiles
from moeify.recipe.load import RecipeError, parse_recipe, to_yaml
from moeify.recipe.where import url_of
from moeify.storing import StorageError
from moeify.tasks.build import build_task
from pipelines.cli import main
from pipelines.package import pack
from tests.stores import BUCKET, credentials, s3_server
from tests.texts import write_texts

RUN = "far-20260101-000000-abcd"
ROOT = "memory://shelf/data"
REST: dict[str, Any] = {
    "name": "far",
    "model": {"kind": "llama", "hidden": 16, "layers": 1, "heads": 2, "ffn": 16},
    "training": {"steps": 6, "rows": 8},
    "attribution": {"rows": 8, "rows_at_once": 8},
    "partition": {"multiple": 2, "min_units": 2},
    "rounds": [{"train": 2, "recover": 2, "separation": 0.2}],
    "evaluation": {"validation_rows": 4, "test_rows": 4, "rows_at_once": 8},
}


def recipe(source: dict[str, Any], **changes: Any) -> RunConfig:
    data = {"kind": "text", "source": source, "vocabulary": 300, "length": 12, "test": 0.2}
    return RunConfig.model_validate_json(json.dumps({**REST, "data": data, **changes}))


def source_of(config: RunConfig) -> Any:
    return config.model_dump()["data"]["source"]


@pytest.fixture
def shelf() -> Iterator[Place]:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield Place(ROOT)
    memory.store.clear()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is downloaded, by its path there."""
    known: list[str] = []
    real = Place.download

    def download(place: Place, path: str, target: Path) -> None:
        known.append(path)
        real(place, path, target)

    monkeypatch.setattr(Place, "download", download)
    return known


def test_a_url_in_a_recipe_stays_one_and_a_bad_one_is_told_where_it_is() -> None:
    config = recipe({"kind": "jsonl", "path": "s3://shelf/texts.jsonl"})
    assert url_of(source_of(config)["path"]) == "s3://shelf/texts.jsonl"
    assert "path: 's3://shelf/texts.jsonl'" in to_yaml(config)
    assert parse_recipe(to_yaml(config), where="again") == config
    for bad, told in (
        ("http://there/texts.jsonl", "data.source.path: http:// is no storage that moeify knows; wanted a path"),
        ("s3://me:secret@shelf/x", "data.source.path: a s3:// URL with a password was given"),
    ):
        with pytest.raises(RecipeError, match=told) as caught:
            parse_recipe(to_yaml(config).replace("s3://shelf/texts.jsonl", bad), where="bad")
        assert "secret" not in str(caught.value)


def test_a_file_is_fetched_once_and_again_when_it_was_written_anew(
    shelf: Place, fetched: list[str], tmp_path: Path
) -> None:
    config = recipe({"kind": "jsonl", "path": f"{ROOT}/texts.jsonl"})
    shelf.write("texts.jsonl", b"one")
    first, again = (source_of(near(config, tmp_path))["path"] for _ in range(2))
    assert first == again
    assert (first.name, first.read_bytes(), fetched) == ("texts.jsonl", b"one", ["texts.jsonl"])
    shelf.write("texts.jsonl", b"another")
    assert source_of(near(config, tmp_path))["path"].read_bytes() == b"another"
    assert first.read_bytes() == b"one"  # a run that goes on may be reading it
    assert len(fetched) == 2


def test_half_of_a_folder_is_never_taken_for_it(shelf: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("law/a.txt", "law/b.txt", "art/c.txt"):
        shelf.write(name, name.encode())
    config = recipe({"kind": "folders", "categories": {"law": f"{ROOT}/law", "art": f"{ROOT}/art"}})
    real, left = Place.download, [1]

    def download(place: Place, path: str, target: Path) -> None:
        if not left.pop():
            raise StorageError("the store is away")
        left.append(0)
        real(place, path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "download", download)
        with pytest.raises(StorageError, match="away"):
            near(config, tmp_path)
    assert [path for path in (tmp_path / "far").iterdir() if path.is_dir() and path.name[0] != "."] == []
    law = source_of(near(config, tmp_path))["categories"]["law"]
    assert sorted(path.name for path in law.iterdir()) == ["a.txt", "b.txt"]
    assert [path.name for path in (tmp_path / "far").iterdir() if path.name[0] == "."] == []


def test_an_object_that_is_written_while_it_is_fetched_is_not_kept(
    shelf: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = recipe({"kind": "jsonl", "path": f"{ROOT}/texts.jsonl"}), Place.download
    shelf.write("texts.jsonl", b"one")

    def download(place: Place, path: str, target: Path) -> None:
        shelf.write("texts.jsonl", b"another")
        real(place, path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "download", download)
        with pytest.raises(StorageError, match=r"texts\.jsonl was written anew while it was fetched"):
            near(config, tmp_path)
    assert source_of(near(config, tmp_path))["path"].read_bytes() == b"another"


def test_every_kind_of_source_may_name_urls(shelf: Place, fetched: list[str], tmp_path: Path) -> None:
    for name in (
        "parts/x.csv",
        "deep/one/a.jsonl",
        "deep/two/b.jsonl",
        "deep/two/c.csv",
        "lines.jsonl",
        "model/config.json",
    ):
        shelf.write(name, name.encode())
    table = near(recipe({"kind": "table", "path": f"{ROOT}/parts"}), tmp_path)
    assert (source_of(table)["path"] / "x.csv").read_text() == "parts/x.csv"
    files = [f"{ROOT}/deep/**/*.jsonl", f"{ROOT}/lines.jsonl", "here/*.jsonl"]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "d.jsonl").write_text("here/d.jsonl")
    found = files_of(StreamedFiles.model_validate({"files": files}), tmp_path, "said")
    assert "lines.jsonl" not in fetched  # by who reads it
    texts = [file.near(tmp_path).read_text() for file in found]
    assert texts == ["deep/one/a.jsonl", "deep/two/b.jsonl", "lines.jsonl", "here/d.jsonl"]
    assert "deep/two/c.csv" not in "".join(fetched)
    parts = {
        "below": {"kind": "jsonl", "path": "lines.jsonl"},
        "else": {"kind": "folder", "path": f"{ROOT}/parts"},
        "own": {"kind": "installed", "source": "python"},
    }
    mixed = source_of(near(recipe({"kind": "mixed", "root": ROOT, "categories": parts}), tmp_path))
    assert mixed["root"] is None
    assert mixed["categories"]["below"]["path"].read_text() == "lines.jsonl"
    assert (mixed["categories"]["else"]["path"] / "x.csv").is_file()
    model = near(recipe({"kind": "installed"}, model={"kind": "pretrained", "path": f"{ROOT}/model"}), tmp_path).model
    assert (model.path / "config.json").read_text() == "model/config.json"  # type: ignore[union-attr]
    images = {"kind": "images", "source": "mnist", "root": ROOT, "categories": {"a": [0, 1], "b": [2, 3]}}
    pictures = near(RunConfig.model_validate({**REST, "data": images, "model": {"kind": "resnet"}}), tmp_path)
    assert (pictures.data.root / "lines.jsonl").is_file()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            {"kind": "jsonl", "path": f"{ROOT}/none.jsonl"},
            "data.source.path: nothing is at memory://shelf/data/none.jsonl",
        ),
        (
            {"kind": "streamed", "categories": {"a": {"files": ["s3://*/a.csv"]}, "b": {"files": ["b.csv"]}}},
            "data.source.categories.a.files: got 's3://*/a.csv', wanted the name of a bucket before the first '*'",
        ),
        (
            {"kind": "streamed", "categories": {"a": {"files": [f"{ROOT}/*.csv"]}, "b": {"files": ["b.csv"]}}},
            "data.source.categories.a.files: no object matches 'memory://shelf/data/",
        ),
    ],
)
def test_what_is_not_there_is_told_by_where_the_recipe_names_it(
    shelf: Place, source: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"data\.source") as caught:
        build_task(recipe(source), cache=tmp_path, base=tmp_path)
    assert str(caught.value).startswith(told)


def test_what_is_near_is_left_alone(tmp_path: Path) -> None:
    config = recipe({"kind": "folders", "categories": {"a": "a", "b": "/data/b"}})
    assert near(config, tmp_path) == config
    assert list(tmp_path.iterdir()) == []


def test_urls_do_not_go_with_a_recipe(tmp_path: Path) -> None:
    parts = {"a": {"kind": "jsonl", "path": "s3://shelf/a.jsonl"}, "b": {"kind": "jsonl", "path": "b.jsonl"}}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "b.jsonl").write_text("{}")
    for source in (
        {"kind": "jsonl", "path": "s3://shelf/texts.jsonl"},
        {"kind": "table", "path": "s3://shelf/parts"},
        {"kind": "folders", "categories": {"a": "s3://shelf/a", "b": "s3://shelf/b"}},
        {
            "kind": "streamed",
            "categories": {"a": {"files": ["s3://shelf/*.csv"]}, "b": {"files": ["gs://shelf/b.csv"]}},
        },
        {"kind": "mixed", "root": ".", "categories": parts},
    ):
        config = recipe(source, model={"kind": "pretrained", "path": "s3://shelf/model"})
        assert pack(config, tmp_path / "base", tmp_path / "to") == []
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["b.jsonl"]
    shutil.rmtree(tmp_path / "to")


def test_a_run_reads_an_object_store_as_it_reads_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / write_texts(tmp_path)
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with s3_server() as endpoint:
        for name, value in credentials(endpoint).items():
            monkeypatch.setenv(name, value)
        Place(f"s3://{BUCKET}/data").upload("texts.jsonl", path)
        config = recipe({"kind": "jsonl", "path": f"s3://{BUCKET}/data/texts.jsonl"})
        (tmp_path / "far.yaml").write_text(to_yaml(config))
        done = CliRunner().invoke(main, ["run", str(tmp_path / "far.yaml"), "--local", "--quiet", "--id", RUN])
        assert done.exit_code == 0, done.output
    near_by = recipe({"kind": "jsonl", "path": "texts.jsonl"})
    task = build_task(near_by, cache=tmp_path / "cache", base=tmp_path)
    from moeify.loop import run

    found = json.loads((tmp_path / "runs" / RUN / "result.json").read_text())
    assert found["test_loss"] == run(near_by, task).test_loss


def test_what_a_run_prepared_is_on_the_shelf_where_the_cache_is_a_url(
    shelf: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe({"kind": "jsonl", "path": "texts.jsonl"})))
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("MOEIFY_CACHE", f"{ROOT}/cache")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    done = CliRunner().invoke(main, ["run", str(tmp_path / "recipe.yaml"), "--local", "--quiet", "--id", RUN])
    assert done.exit_code == 0, done.output
    (index,) = (name for name in shelf.found() if name.endswith("index.json"))
    (here,) = (tmp_path / "me" / ".cache" / "moeify" / "text").glob("*/index.json")
    assert shelf.read(index) == here.read_bytes()
    assert index == f"cache/text/{here.parent.name}/index.json"
