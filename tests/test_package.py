"""What goes with a recipe: what it names by relative paths, and nothing outside of its folder."""

import json
from pathlib import Path

import pytest

from moeify.recipe.config import RunConfig
from moeify.recipe.model import PretrainedModel
from pipelines import package
from pipelines.package import pack


def recipe(source: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate_json(
        json.dumps(
            {
                "name": "tiny",
                "data": {"kind": "text", "source": source},
                "model": {"kind": "llama"},
                "training": {"steps": 10},
                "rounds": [{"train": 1, "recover": 2, "separation": 0.4}],
            }
        )
    )


def test_a_folder_of_images_stays_where_it_is(base: Path, tmp_path: Path) -> None:
    def images(root: str | None) -> RunConfig:
        data = {"kind": "images", "source": "mnist", "root": root, "categories": {"a": [0, 1], "b": [2, 3]}}
        return RunConfig.model_validate({**text, "data": data, "model": {"kind": "resnet"}})

    text = recipe({"kind": "jsonl", "path": "other.txt"}).model_dump(mode="json")
    assert pack(images("/data"), base, tmp_path / "to") == [Path("/data")]
    assert pack(images(None), base, tmp_path / "to") == []
    with pytest.raises(ValueError, match=r"^data.root: got 'law', which does not go with the recipe; give an absolute"):
        pack(images("law"), base, tmp_path / "to")


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    for name in ("law/a.txt", "law/deep/b.txt", "law/c.md", "law/.hidden/d.txt", "law/.gitignore", "other.txt"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    (tmp_path / "outside.jsonl").write_text("{}")
    return base


def test_folders_go_with_the_files_that_the_recipe_reads(base: Path, tmp_path: Path) -> None:
    config = recipe({"kind": "folders", "categories": {"law": "law", "far": "/data/far"}, "pattern": "**/*.txt"})
    assert pack(config, base, tmp_path / "to") == [Path("/data/far")]
    assert listed(tmp_path / "to") == ["law/a.txt", "law/deep/b.txt"]


def test_a_checkpoint_goes_without_its_pickles_and_an_absolute_one_stays(base: Path, tmp_path: Path) -> None:
    (base / "model").mkdir()
    for name in ("config.json", "model.safetensors", "merges.txt", "pytorch_model.bin", ".gitattributes"):
        (base / "model" / name).write_text("x")
    config = recipe({"kind": "jsonl", "path": "other.txt"})

    def beginning_with(path: str) -> RunConfig:
        return config.model_copy(update={"model": PretrainedModel(kind="pretrained", path=Path(path))})

    assert pack(beginning_with("model"), base, tmp_path / "to") == []
    assert listed(tmp_path / "to") == ["model/config.json", "model/merges.txt", "model/model.safetensors", "other.txt"]
    assert pack(beginning_with("/far/model"), base, tmp_path / "to") == [Path("/far/model")]
    with pytest.raises(ValueError, match=r"model\.path: got '\.\./model', which lies outside"):
        pack(beginning_with("../model"), base, tmp_path / "to")


def test_a_file_goes_and_an_absolute_one_stays(base: Path, tmp_path: Path) -> None:
    assert pack(recipe({"kind": "jsonl", "path": "other.txt"}), base, tmp_path / "to") == []
    assert listed(tmp_path / "to") == ["other.txt"]
    there = str(tmp_path / "outside.jsonl")
    assert pack(recipe({"kind": "jsonl", "path": there}), base, tmp_path / "none") == [Path(there)]
    assert listed(tmp_path / "none") == []


def test_a_path_out_of_the_recipes_folder_is_refused_dots_and_links_alike(base: Path, tmp_path: Path) -> None:
    (base / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    for path in ("../outside.jsonl", "law/../../outside.jsonl", "link.jsonl"):
        with pytest.raises(ValueError, match=r"data.source.path: got .* lies outside of the recipe's folder"):
            pack(recipe({"kind": "jsonl", "path": path}), base, tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("up", ["../base/law", "law/../law", "law/deep/.."])
def test_dots_that_come_back_are_refused_and_nothing_is_written_beside_the_package(
    base: Path, tmp_path: Path, up: str
) -> None:
    to = tmp_path / "deep" / "to"
    config = recipe({"kind": "folders", "categories": {"law": up, "far": "/data/far"}, "pattern": "**/*.txt"})
    with pytest.raises(
        ValueError, match=r"^data.source.categories.law: got '.*', wanted a path without .* write 'law'"
    ):
        pack(config, base, to)
    assert not to.parent.exists()


def test_too_much_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MOST_MEGABYTES", 1e-6)
    with pytest.raises(ValueError, match=r"more than 1e-06 MB by relative paths.*where all nodes see it"):
        pack(recipe({"kind": "jsonl", "path": "other.txt"}), base, tmp_path / "to")


def test_a_file_that_is_not_there_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing.jsonl"):
        pack(recipe({"kind": "jsonl", "path": "missing.jsonl"}), base, tmp_path / "to")


def test_what_carries_no_files_packs_none(tmp_path: Path) -> None:
    assert pack(recipe({"kind": "installed", "sources": ["python", "c"]}), tmp_path, tmp_path / "to") == []


def test_mixed_parts_go_from_their_root_and_data_of_the_nodes_own_stays(base: Path, tmp_path: Path) -> None:
    parts = {
        "code": {"kind": "installed", "source": "python"},
        "law": {"kind": "folder", "path": "law", "pattern": "**/*.txt"},
        "other": {"kind": "jsonl", "path": "other.txt"},
    }
    source = {"kind": "mixed", "categories": parts}
    config = recipe({**source, "root": "."})
    assert pack(config, base, tmp_path / "to") == []
    assert listed(tmp_path / "to") == ["law/a.txt", "law/deep/b.txt", "other.txt"]
    assert pack(recipe(source), base, tmp_path / "none") == []
    assert listed(tmp_path / "none") == []
    with pytest.raises(ValueError, match=r"data.source.root: got '\.\.', which lies outside of the recipe's folder"):
        pack(recipe({**source, "root": ".."}), base, tmp_path / "out")


def test_streamed_files_go_by_their_globs_and_absolute_ones_stay(base: Path, tmp_path: Path) -> None:
    parts = {"law": {"files": ["law/**/*.txt"]}, "other": {"files": ["other.txt", str(tmp_path / "far" / "*.txt")]}}
    config = recipe({"kind": "streamed", "categories": parts})
    assert pack(config, base, tmp_path / "to") == [tmp_path / "far" / "*.txt"]
    assert listed(tmp_path / "to") == ["law/.hidden/d.txt", "law/a.txt", "law/deep/b.txt", "other.txt"]
    for pattern in ("../*.jsonl", "law/../../outside.jsonl"):
        outside = {**parts, "law": {"files": [pattern]}}
        with pytest.raises(ValueError, match=r"data.source.categories.law.files: got .* lies outside of the recipe's"):
            pack(recipe({"kind": "streamed", "categories": outside}), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
