"""Advice: planted pairs are found and kept together, and the command gives a tree that a recipe takes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from attribution.sites import Site
from attribution.table import AttributionTable
from moeify.recipe.load import parse_recipe
from moeify.splitting.advice import Advice, advise
from moeify.splitting.null_test import Relabel
from moeify.splitting.partition import Partition
from moeify.splitting.terms import plain_terms
from moeify.splitting.trials import Trials, even_cut
from moeify.task import Batch
from pipelines.advise import snippet
from tests.checkpoints import save_checkpoint
from tests.finished_runs import call
from tests.test_null_test import CATEGORIES, DIM, UNITS, table_of
from tests.texts import write_texts
from tests.toy import toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

SITES = [Site("s", "x", UNITS)]
WEIGHTS = {"s": torch.ones(DIM, UNITS) + torch.eye(DIM, UNITS)}
DIGITS = """name: small
data: {kind: digits}
model: {kind: autoencoder, hidden: 16, code: 4}
training: {steps: 4, rows: 20}
attribution: {rows: 8, rows_at_once: 80}
partition:
  {multiple: 1, min_units: 1, unrouted: ['4', '5', '6', '7', '8', '9'], grouping: {kind: affinity, balanced: false}}
rounds: [{train: 1, recover: 1, branching: 2, separation: 0.4}]
"""


def rows(homes: Sequence[int]) -> Batch:
    """Activations of four categories, each of which works its home, a quarter of the units, harder."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(480) % 4
    strong_RU = torch.tensor(homes)[labels][:, None] == torch.arange(UNITS) * 4 // UNITS
    inputs = torch.randn(480, UNITS, generator=random, dtype=torch.float64) * (1 + 1.5 * strong_RU.double())
    return Batch(inputs, inputs, labels, torch.arange(480)).take(labels.argsort(stable=True))


def advice(homes: Sequence[int], *, separation: float = 0.3, permutations: int = 8, **partition: object) -> Advice:
    """Ask about the four categories."""

    def measure(relabel: Relabel) -> AttributionTable:
        return table_of(relabel([rows(homes)]))

    config = toy_config(partition={"multiple": 1, "min_units": 1, **partition})
    return advise(SITES, WEIGHTS, config, measure, separation=separation, permutations=permutations)


def test_planted_pairs_part_and_each_is_kept_together() -> None:
    found = advice([0, 1, 0, 1])
    assert found.tree == (("a", "c"), ("b", "d"))
    assert found.together == (("a", "c"), ("b", "d"))
    assert found.rounds == 1
    assert [each.worth for each in found.divisions] == [True, False, False]
    assert [merge.joined for merge in found.merges] == [(("b",), ("d",)), (("a",), ("c",))]
    assert found.merges[-1].predicted == pytest.approx(found.divisions[0].predicted)
    assert found.affinity[0, 2] > 0.8 > 0.0 > found.affinity[0, 1]
    assert bool((found.lower <= found.upper).all())


def test_categories_of_their_own_are_divided_to_the_last_and_noise_is_not() -> None:
    found = advice([0, 1, 2, 3])
    assert found.rounds == 2
    assert not found.together
    assert sorted(len(each.categories) for each in found.divisions) == [2, 2, 4]
    noise = advice([9, 9, 9, 9])
    assert noise.tree is None
    assert noise.together == (CATEGORIES,)
    assert noise.rounds == 0
    assert len(advice([9, 9, 9, 9], permutations=0).divisions) == 3  # untested, all is divided


def test_merges_cost_what_trials_at_one_budget_say() -> None:
    homes = [0, 1, 0, 2]
    found = advice(homes, permutations=0)
    config = toy_config(partition={"multiple": 1, "min_units": 1}).partition
    table = table_of([rows(homes)])
    partition = Partition.undivided(CATEGORIES, SITES)
    cut = even_cut(partition, [0], 0.3, plain_terms(config, ["s"]))
    trials = Trials(partition, table, WEIGHTS, config, "fisher", 0, cut)
    groups: list[tuple[str, ...]] = [(c,) for c in CATEGORIES]
    before = trials.cost(groups)
    assert found.apart == pytest.approx(before)
    for merge in found.merges:
        groups = [group for group in groups if group not in merge.joined] + [tuple(sorted(sum(merge.joined, ())))]
        assert merge.groups == len(groups)
        assert merge.predicted == pytest.approx(trials.cost(groups))
        assert merge.cost == pytest.approx(merge.predicted - before)
        before = merge.predicted


def test_unrouted_categories_get_no_advice_and_what_is_out_of_reach_is_refused() -> None:
    found = advice([0, 1, 2, 3], permutations=0, unrouted=["d"])
    assert found.categories == ("a", "b", "c")
    assert found.affinity.shape == (3, 3)
    with pytest.raises(ValueError, match=r"separation: got 0.5, at most 0.4\d+ can be reached with 2 groups"):
        advice([0, 1, 2, 3], separation=0.5)


def test_a_recipes_network_is_looked_at_and_said_to_be_untrained(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(DIGITS)
    done = call(tmp_path, "advise", str(tmp_path / "small.yaml"), "--permutations", "3", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["categories"] == list("0123")
    assert not told["trained"]
    assert "untrained" in told["notes"][0]
    assert len(told["divisions"][0]["null"]) == 3
    done = call(tmp_path, "advise", str(tmp_path / "small.yaml"), "--permutations", "0")
    assert done.exit_code == 0, done.output
    assert max(len(line.rstrip()) for line in done.stdout.splitlines() if not line.startswith(("tree", "#"))) <= 80
    assert "Merges that the tree makes" in done.stdout
    assert re.search(r"It takes \d rounds, the recipe has 1", done.stdout)
    (tree,) = [line for line in done.stdout.splitlines() if line.startswith("tree: ")]
    assert parse_recipe(DIGITS + tree, where="pasted").tree is not None


def test_what_is_recommended_is_part_of_a_recipe_line_by_line() -> None:
    found = snippet(advice([0, 1, 0, 1]))
    assert found is not None
    assert found.splitlines() == [
        "tree: [[a, c], [b, d]]",
        "# stay whole for as long as nothing tells them apart: a+c, b+d",
        "partition: {null_test: {}}",
    ]
    assert snippet(advice([9, 9, 9, 9])) is None


def test_a_checkpoint_is_looked_at_with_texts_or_a_recipes_data(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", "llama", max_position_embeddings=32)
    write_texts(tmp_path)
    recipe = (
        "name: mine\ndata: {kind: text, source: {kind: jsonl, path: texts.jsonl}, length: 16}\n"
        "model: {kind: llama}\ntraining: {steps: 4, rows: 4}\nattribution: {rows: 8}\n"
        "rounds: [{train: 1, recover: 1, separation: 0.25}]\n"
    )
    (tmp_path / "mine.yaml").write_text(recipe)
    for data in ("texts.jsonl", "mine.yaml"):
        asked = ("--data", str(tmp_path / data), "--permutations", "3", "--rows", "8", "--json")
        done = call(tmp_path, "advise", str(tmp_path / "model"), *asked)
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert (told["of"], told["trained"], told["categories"]) == ("model", True, ["code", "prose"])
        assert told["tree"] is None  # two categories need none
        assert told["divisions"][0]["groups"] == [["code"], ["prose"]]


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    cases = {
        ("advise", "nothing"): "no runs in",
        ("advise", "digits", "--data", "texts"): "--data: got 'texts', and 'digits' is no checkpoint",
        ("advise", "digits", "--permutations", "2"): "--permutations: got 2, wanted 0 (no null test), or 3 or more",
        ("advise", str(tmp_path / "model")): "--data: got none, wanted texts in categories or a recipe",
        ("advise", "digits", "--separation", "0.9", "--permutations", "0"): "at most 0.4",
    }
    for asked, told in cases.items():
        done = call(tmp_path, *asked)
        assert done.exit_code == 2, asked
        assert told in done.output.replace("\n", " ")
