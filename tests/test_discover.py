import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from moeify.data.discover import Clusters, TooSmallError, cluster, report
from moeify.data.documents import SPLITS, Split
from moeify.data.prepared import Tokens
from moeify.data.tokens import prepare, read
from moeify.recipe.config import RunConfig
from moeify.recipe.data import Discover, TextData
from moeify.recipe.load import RecipeError, parse_recipe, to_yaml
from moeify.tasks.build import build_task
from tests.texts import write_texts

VOCABULARY = 60


def planted(count: int, kinds: int = 2, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Return documents of tokens that all share some, 0..19, and have others, ten a kind; and their kinds."""
    draw = random.Random(seed)
    of = [number % kinds for number in range(count)]
    own = [range(20 + 10 * kind, 30 + 10 * kind) for kind in of]
    return [[draw.choice(range(20)) for _ in range(30)] + [draw.choice(mine) for _ in range(10)] for mine in own], of


def splits(kinds: int = 2) -> tuple[dict[Split, list[list[int]]], dict[Split, list[str]]]:
    found = {
        split: planted(count, kinds, seed) for seed, (split, count) in enumerate(zip(SPLITS, (90, 12, 12), strict=True))
    }
    return {s: ids for s, (ids, _) in found.items()}, {s: [str(kind) for kind in of] for s, (_, of) in found.items()}


def told(clusters: Clusters, labels: dict[Split, list[str]] | None) -> dict[str, Any]:
    sizes = {split: [1] * len(clusters.of[split]) for split in SPLITS}
    return report(clusters, sizes, labels, [[str(token) for token in each] for each in clusters.telling])


def data(base: Path, discover: dict[str, Any] | None, category: str | None = "category", **more: object) -> TextData:
    source = {"kind": "jsonl", "path": write_texts(base), "category": category}
    settings = {"kind": "text", "source": source, "discover": discover, "vocabulary": 300, "length": 8}
    return TextData.model_validate({**settings, "validation": 0.1, "test": 0.2, **more})


def discovered(tokens: Tokens) -> dict[str, Any]:
    return json.loads(tokens.assets["discovered.json"])


def recipe(discover: object, **changes: Any) -> str:
    source = {"kind": "jsonl", "path": "texts.jsonl", "category": None}
    text = {"kind": "text", "source": source, "discover": discover, "vocabulary": 300, "length": 8}
    return yaml.safe_dump(
        {
            "name": "found",
            "data": {**text, "validation": 0.1, "test": 0.2},
            "model": {"kind": "llama", "hidden": 8, "layers": 1, "heads": 2, "ffn": 16},
            "training": {"steps": 4, "rows": 2},
            "rounds": [{"train": 2, "recover": 1, "separation": 0.2}],
            **changes,
        }
    )


# --- clusters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, None])
def test_two_planted_vocabularies_are_recovered(number: int | None) -> None:
    ids, labels = splits()
    clusters = cluster(Discover(number=number, most=5), ids, VOCABULARY)
    found = told(clusters, labels)
    assert clusters.names == ("cluster-0", "cluster-1")
    assert found["purity"] > 0.95
    assert found["normalised_mutual_information"] > 0.8
    assert set(found["silhouettes"]) == (set() if number else {"2", "3", "4", "5"})
    own = [{token // 10 for token in each} for each in clusters.telling]
    assert sorted(own, key=min) == [{2}, {3}]


def test_the_number_of_planted_vocabularies_is_found() -> None:
    ids, labels = splits(kinds=4)
    clusters = cluster(Discover(), ids, VOCABULARY)
    assert len(clusters.names) == 4
    assert told(clusters, labels)["purity"] > 0.95


def test_clusters_are_the_same_each_time_and_the_largest_comes_first() -> None:
    ids, labels = splits()
    more, _ = planted(60, kinds=2, seed=7)
    ids["train"] += more[1::2]  # all of kind 1
    labels["train"] += ["1"] * 30
    one, other = (cluster(Discover(number=2), ids, VOCABULARY) for _ in range(2))
    for split in SPLITS:
        assert np.array_equal(one.of[split], other.of[split])
    assert one.telling == other.telling
    sizes = np.bincount(one.of["train"])
    assert sizes[0] > sizes[1]
    assert told(one, labels)["confusion"]["cluster-0"]["1"] > 60


def test_held_out_documents_move_no_train_document_and_go_where_train_documents_like_them_are() -> None:
    ids, _ = splits()
    before = cluster(Discover(number=2), ids, VOCABULARY)
    others: dict[Split, list[list[int]]] = {**ids, "test": ids["train"] + [[55] * 50] * 300}
    after = cluster(Discover(number=2), others, VOCABULARY)
    assert np.array_equal(before.of["train"], after.of["train"])
    assert np.array_equal(before.of["validation"], after.of["validation"])
    assert before.telling == after.telling
    assert np.array_equal(after.of["test"][: len(ids["train"])], after.of["train"])
    alone: dict[Split, list[list[int]]] = {**ids, "test": [ids["test"][0], ids["test"][1]]}
    assert np.array_equal(cluster(Discover(number=2), alone, VOCABULARY).of["test"], before.of["test"][:2])


def test_purity_information_and_sizes_worked_by_hand() -> None:
    of: dict[Split, np.ndarray] = {
        "train": np.array([0, 0, 0, 1]),
        "validation": np.array([0, 1]),
        "test": np.array([1, 0]),
    }
    labels: dict[Split, list[str]] = {"train": ["a", "a", "b", "b"], "validation": ["a", "b"], "test": ["b", "a"]}
    sizes: dict[Split, list[int]] = {"train": [1, 2, 4, 8], "validation": [16, 32], "test": [64, 128]}
    found = report(Clusters(of, ((3,), (4,)), {}), sizes, labels, [["x"], ["y"]])
    assert found["purity"] == 7 / 8
    assert found["confusion"] == {"cluster-0": {"a": 4, "b": 1}, "cluster-1": {"a": 0, "b": 3}}
    assert found["clusters"]["cluster-0"] == {
        "documents": {"train": 3, "validation": 1, "test": 1},
        "bytes": {"train": 7, "validation": 16, "test": 128},
        "telling": ["x"],
    }
    joint, cluster_share, label_share = np.array([4, 1, 3]) / 8, np.array([5, 5, 3]) / 8, np.array([4, 4, 4]) / 8
    mutual = np.sum(joint * np.log(joint / (cluster_share * label_share)))
    entropies = [-(5 / 8) * np.log(5 / 8) - (3 / 8) * np.log(3 / 8), np.log(2)]
    assert found["normalised_mutual_information"] == pytest.approx(mutual / np.mean(entropies))


def test_too_few_documents_are_refused() -> None:
    ids, _ = splits()
    ids["train"] = ids["train"][:7]
    with pytest.raises(ValueError, match=r"^data\.discover: got 7 documents to train on, wanted at least 8.*$"):
        cluster(Discover(number=4), ids, VOCABULARY)


def test_a_cluster_without_held_out_documents_is_refused() -> None:
    ids, _ = splits()
    ids["test"] = ids["test"][::2]  # all of kind 0
    with pytest.raises(
        TooSmallError,
        match=r"^data\.discover: cluster-\d of 2, with 45 documents.* none in the test split; raise data\.test.*$",
    ):
        cluster(Discover(number=2), ids, VOCABULARY)


def test_documents_that_are_alike_have_no_clusters() -> None:
    ids: dict[Split, list[list[int]]] = {"train": [[1, 2, 3]] * 20, "validation": [[1, 2]], "test": [[1]]}
    with pytest.raises(ValueError, match="all train documents are alike"):
        cluster(Discover(), ids, VOCABULARY)
    with pytest.raises(ValueError, match=r"^data\.discover\.number: got 2, and the train documents are so alike"):
        cluster(Discover(number=2), ids, VOCABULARY)


# --- text ---------------------------------------------------------------------------------------------


def test_labels_are_compared_with_and_not_used(tmp_path: Path) -> None:
    with_labels = prepare(data(tmp_path, {"number": 2}), tmp_path / "cache", tmp_path)
    without = prepare(data(tmp_path, {"number": 2}, category=None), tmp_path / "cache", tmp_path)
    assert with_labels.categories == without.categories == ("cluster-0", "cluster-1")
    for split in SPLITS:
        for one, other in zip(with_labels.streams[split], without.streams[split], strict=True):
            assert np.array_equal(one, other)
    found = discovered(with_labels)
    assert found["purity"] > 0.95
    assert sum(sum(row.values()) for row in found["confusion"].values()) == 60
    hidden = discovered(without)
    assert (hidden["purity"], hidden["normalised_mutual_information"], hidden["confusion"]) == (None, None, None)
    for name, each in found["clusters"].items():
        place = with_labels.categories.index(name)
        assert each["bytes"] == {split: with_labels.sizes[split][place] for split in SPLITS}
        assert len(each["telling"]) == 10


def test_a_second_call_reads_what_the_first_wrote_and_other_settings_are_another_entry(tmp_path: Path) -> None:
    first = prepare(data(tmp_path, {"number": 2}), tmp_path / "cache", tmp_path)
    elsewhere = prepare(data(tmp_path, {"number": 2}), tmp_path / "other", tmp_path)
    assert first.assets == elsewhere.assets
    for split in SPLITS:
        for one, other in zip(first.streams[split], elsewhere.streams[split], strict=True):
            assert np.array_equal(one, other)
    prepare(data(tmp_path, {"number": 2}), tmp_path / "cache", tmp_path)
    prepare(data(tmp_path, {"number": 2, "seed": 1}), tmp_path / "cache", tmp_path)
    labelled = prepare(data(tmp_path, None), tmp_path / "cache", tmp_path)
    assert labelled.categories == ("code", "prose")
    assert "discovered.json" not in labelled.assets
    assert len([path for path in (tmp_path / "cache" / "text").iterdir() if path.is_dir()]) == 3


def test_a_task_is_built_from_lines_without_labels(tmp_path: Path) -> None:
    write_texts(tmp_path)
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    bare = [json.dumps({"text": json.loads(line)["text"]}) + "\n" for line in lines]
    (tmp_path / "texts.jsonl").write_text("".join(bare))
    config = parse_recipe(recipe({"number": None, "most": 3}), where="my.yaml")
    task = build_task(config, cache=tmp_path / "cache", base=tmp_path)
    found = json.loads(task.assets()["discovered.json"])
    assert list(found["clusters"]) == list(task.categories) == ["cluster-0", "cluster-1"]
    batch = task.train_batch(0)
    assert batch.inputs.shape == (2, 8)
    assert next(task.held_out_batches("test", 2, 4)).categories.tolist() == [0, 0, 1, 1]


def test_all_documents_can_be_read_by_cluster(tmp_path: Path) -> None:
    found = read(data(tmp_path, {"number": 2}), tmp_path)
    assert list(found) == ["cluster-0", "cluster-1"]
    assert {d.text[:3] for d in found["cluster-0"]} != {d.text[:3] for d in found["cluster-1"]}
    assert sum(map(len, found.values())) == 60
    assert list(read(data(tmp_path, None), tmp_path)) == ["code", "prose"]


def test_too_few_lines_are_refused(tmp_path: Path) -> None:
    config = parse_recipe(recipe({"number": 2}), where="my.yaml")
    for lines, message in (
        ("", "has no text"),
        ('{"text": "one"}\n{"text": "two"}\n', r"^data\.source: got 2 distinct documents"),
        ('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n', r"^data\.discover: got 1 documents to train on"),
        ('{"body": "one"}\n', "line 1: no field 'text'"),
    ):
        (tmp_path / "texts.jsonl").write_text(lines)
        with pytest.raises(ValueError, match=message):
            build_task(config, cache=tmp_path / "cache", base=tmp_path)


# --- recipes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discover", [{}, {"number": 4, "seed": 3}, {"embedding": {"kind": "tfidf", "dimensions": 8}}])
def test_a_recipe_has_a_round_trip(discover: dict[str, Any]) -> None:
    config = parse_recipe(recipe(discover), where="my.yaml")
    assert parse_recipe(to_yaml(config), where="again") == config


def test_names_are_known_where_their_number_is_and_trees_are_checked_against_them() -> None:
    def parsed(number: int | None, **changes: Any) -> RunConfig:
        return parse_recipe(recipe({"number": number}, **changes), where="my.yaml")

    assert parsed(None).category_names is None
    assert parsed(3).category_names == ("cluster-0", "cluster-1", "cluster-2")
    parsed(3, tree=["cluster-0", ["cluster-1", "cluster-2"]], partition={"unrouted": []})
    parsed(3, partition={"unrouted": ["cluster-2"]})
    for changes in ({"tree": [["cluster-0", "cluster-1"], "cluster-3"]}, {"partition": {"unrouted": ["cluster-3"]}}):
        with pytest.raises(RecipeError, match="'cluster-3'"):
            parsed(3, **changes)
        parsed(None, **changes)


@pytest.mark.parametrize(
    ("discover", "message"),
    [
        (None, "data.source.category: got null, wanted a field; name one, or set data.discover"),
        ({"number": 1}, "data.discover.number: got 1, wanted a whole number >= 2 or null"),
        ({"embedding": {"kind": "words"}}, "data.discover.embedding.kind: got 'words', wanted 'tfidf'"),
    ],
)
def test_a_bad_setting_is_told_in_one_line(discover: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe(discover), where="my.yaml")
    assert caught.value.problems == (message,)


def test_no_labels_and_no_clusters_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="got null, wanted a field"):
        data(tmp_path, None, category=None)
