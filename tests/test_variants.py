from typing import Any

import pytest

from moeify.loop import run
from moeify.recipe.variants import methods, rivals, scaled, variant
from tests.toy import ToyTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


@pytest.mark.parametrize("method", methods())
def test_every_method_is_a_recipe_of_equal_tokens_that_ends_at_the_same_tree_and_separation(method: str) -> None:
    config = toy_config(controls=[])
    rival = variant(config, method, 4)
    assert rival.training == config.training
    result = run(rival, ToyTask(rival))
    # Equal widths in a site of 32 units come in steps of eight, a fifth of what is to be saved.
    assert result.active_fraction["mean"] == pytest.approx(0.55, abs=0.12 if method == "init" else 0.03)
    leaves = {node["name"] for node in _nodes(result.tree) if not node["children"]}
    assert leaves == set("abcd")
    assert len(result.rounds) == (1 if method in {"oneshot", "init"} else 2)


def _nodes(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [tree, *(node for child in tree["children"] for node in _nodes(child))]


def test_fixed_at_init_is_cut_before_the_first_step() -> None:
    (round_,) = variant(toy_config(), "init", 4).rounds
    assert (round_.train, round_.recover, round_.branching) == (0, 40, 4)


def test_a_switch_is_thrown_and_what_stands_so_already_is_no_rival() -> None:
    config = toy_config(partition={"refine": True, "compensation": {"ridge": 0.1, "follow": True}})
    closed = variant(config, "closed_form", 4).partition
    assert closed.compensation is not None
    assert (closed.compensation.ridge, closed.compensation.follow, closed.refine) == (0.1, False, True)
    assert {*methods()} - {*rivals(config)} == {"loop", "following", "refined"}
    assert {*methods()} - {*rivals(toy_config())} == {"loop", "closed_form", "unrefined"}
    bare = toy_config(partition={"compensation": None})
    assert {*methods()} - {*rivals(bare)} == {"loop", "uncompensated", "closed_form", "following", "unrefined"}
    following = variant(bare, "following", 4).partition.compensation
    assert following is not None
    assert following.follow


def test_a_switch_that_the_recipe_forbids_is_told() -> None:
    apart = {"gradients": "parameters", "experts": [{"categories": ["a"], "units": 0.25}], "apart": ["a"]}
    config = toy_config(partition={"compensation": None}, routing=apart)
    with pytest.raises(ValueError, match=r"beside routing\.apart"):
        variant(config, "following", 4)
    assert "following" not in rivals(config)


def test_other_owners_are_left_as_they_were_found() -> None:
    config = toy_config(partition={"refine": True})
    assert [variant(config, method, 4).partition.refine for method in ("random", "cmoe", "init")] == [False] * 3
    assert variant(config, "oneshot", 4).partition.refine


def test_an_unknown_method_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"method: got 'lop', wanted one of loop, oneshot, init"):
        variant(toy_config(), "lop", 4)


def test_all_rounds_scale_with_the_last() -> None:
    assert [r.separation for r in scaled(toy_config(), 0.225).rounds] == pytest.approx([0.15, 0.225])
