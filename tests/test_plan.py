import itertools

import pytest

from moeify.recipe.plan import check_categories, plan, training_work
from moeify.recipe.reach import Stake, check_reachable
from moeify.result import MEAN
from moeify.splitting.terms import SiteTerms, stakes
from moeify.splitting.tree import ROOT
from tests.toy import toy_config

NAMES = tuple("abcdefghij")


def test_few_heads_count_whole() -> None:
    """Of four heads two children get one each, which they cannot divide: later rounds live on the neurons alone."""
    stakes = [Stake(0.5, 0.1), Stake(0.5, 0.1, 0.25)]
    check_reachable(toy_config(rounds=rounds((0.35, 2))), NAMES[:4], stakes)  # .45 / 2 + .25 / 2
    with pytest.raises(ValueError, match=r"rounds.0.separation: got 0.36, at most 0.350"):
        check_reachable(toy_config(rounds=rounds((0.36, 2))), NAMES[:4], stakes)
    check_reachable(toy_config(rounds=rounds((0.225, 2), (0.337, 2))), NAMES[:4], stakes)  # neurons first
    with pytest.raises(ValueError, match=r"rounds.1.separation: got 0.34, at most 0.338"):
        check_reachable(toy_config(rounds=rounds((0.225, 2), (0.34, 2))), NAMES[:4], stakes)
    with pytest.raises(ValueError, match=r"rounds.1.separation: got 0.47, at most 0.462"):
        check_reachable(toy_config(rounds=rounds((0.35, 2), (0.47, 2))), NAMES[:4], stakes)


def test_widths_are_whole_multiples() -> None:
    """Of 48 units in multiples of 16 four experts of 43 get none, two get 16 each, which cannot be divided again."""
    third = [Stake(1.0, 0.1, 1 / 3)]
    check_reachable(toy_config(rounds=rounds((0.3, 2))), NAMES[:4], third)
    with pytest.raises(ValueError, match=r"rounds.0.separation: got 0.6, at most 0.0.*, or lower partition.multiple$"):
        check_reachable(toy_config(rounds=rounds((0.6, 4))), NAMES[:4], third)
    with pytest.raises(ValueError, match=r"rounds.1.separation: got 0.4, at most 0.333"):
        check_reachable(toy_config(rounds=rounds((0.3, 2), (0.4, 2))), NAMES[:4], third)
    fine = [Stake(1.0, 0.1, 16 / 11008)]  # 4953 units for each of two experts, in multiples of 16 so 4944
    check_reachable(toy_config(rounds=rounds((0.45, 2))), NAMES[:4], fine)
    with pytest.raises(ValueError, match=r"got 0.451, at most 0.449"):
        check_reachable(toy_config(rounds=rounds((0.451, 2))), NAMES[:4], fine)


@pytest.mark.parametrize(("units", "multiple"), [((12, 16), 2), ((12, 12), 3), ((16, 9), 1)])
def test_what_some_cut_reaches_is_not_refused(units: tuple[int, int], multiple: int) -> None:
    """Against all widths of the experts of two rounds, which may differ from site to site."""
    total, core = sum(units), 0.1
    terms = {str(i): SiteTerms(multiple, 0, core) for i in range(2)}
    known = stakes(terms, {str(i): each for i, each in enumerate(units)})
    widest = [each.widest(width, 2, root=True) for each, width in zip(terms.values(), units, strict=True)]
    for first in itertools.product(*(range(0, most + 1, multiple) for most in widest)):
        reached = sum(first) / total  # each category leaves out one of two experts
        then = reached + sum(each // 2 // multiple * multiple for each in first) / total
        if then > reached > 0:
            check_reachable(toy_config(rounds=rounds((reached, 2), (then, 2))), NAMES[:4], known)


def test_what_is_frozen_lies_out_of_reach() -> None:
    """Of two equal sites one is frozen: two groups of the other reach half of .9 / 2, and two leaves each as much."""
    frozen = {"min_core": 0.1, "frozen": ["x"]}
    stakes = [Stake(0.5, 1.0), Stake(0.5, 0.1)]
    config = toy_config(rounds=rounds((0.225, 2)), partition=frozen)
    check_reachable(config, NAMES[:4], stakes)
    with pytest.raises(ValueError, match=r"rounds.0.separation: got 0.23, at most 0.225 .*or freeze less") as caught:
        check_reachable(toy_config(rounds=rounds((0.23, 2)), partition=frozen), NAMES[:4], stakes)
    assert "\n" not in str(caught.value)
    check_reachable(toy_config(rounds=rounds((0.225, 2), (0.335, 2)), partition=frozen), NAMES[:4], stakes)
    with pytest.raises(ValueError, match=r"rounds.1.separation: got 0.35, at most 0.338"):
        check_reachable(toy_config(rounds=rounds((0.225, 2), (0.35, 2)), partition=frozen), NAMES[:4], stakes)
    with pytest.raises(ValueError, match=r"at most 0.000"):
        check_reachable(config, NAMES[:4], [Stake(1.0, 1.0)])


def test_the_plan_lists_every_phase_once_and_ends_with_all_steps() -> None:
    phases = plan(toy_config())
    assert [(p.kind, p.round, p.until) for p in phases] == [
        ("train", 1, 15),
        ("cut", 1, 15),
        ("recover", 1, 25),
        ("judge", 1, 25),
        ("train", 2, 30),
        ("cut", 2, 30),
        ("recover", 2, 40),
        ("judge", 2, 40),
        ("finish", 2, 60),
    ]


def test_work_counts_the_common_trunk_once() -> None:
    assert training_work(toy_config()) == 15 + 3 * 45
    assert training_work(toy_config(controls=[])) == 15 + 2 * 45
    assert training_work(toy_config(controls=["random", "told"])) == 2 * 15 + 4 * 45


def rounds(*steps: tuple[float, int]) -> list[dict[str, float]]:
    return [{"train": 1, "recover": 1, "separation": s, "branching": b} for s, b in steps]


@pytest.mark.parametrize(
    ("steps", "categories"),
    [
        ([(0.45, 2), (0.675, 2)], 4),  # .9 of a site: children of .45, theirs of .225
        ([(0.675, 4)], 4),  # .9 in four experts: three of them off
        ([(0.4, 2), (0.5, 2), (0.55, 2)], 10),
    ],
)
def test_separations_within_reach_pass(steps: list[tuple[float, int]], categories: int) -> None:
    check_categories(toy_config(rounds=rounds(*steps), partition={"min_core": 0.1}), NAMES[:categories])


@pytest.mark.parametrize(
    ("steps", "most"), [([(0.46, 2)], "0.450"), ([(0.3, 2), (0.451, 2)], "0.450"), ([(0.68, 4)], "0.675")]
)
def test_separations_out_of_reach_say_what_can_be_reached(steps: list[tuple[float, int]], most: str) -> None:
    with pytest.raises(ValueError, match=f"at most {most} can be reached"):
        check_categories(toy_config(rounds=rounds(*steps), partition={"min_core": 0.1}), NAMES[:4])


def test_a_round_with_nothing_left_to_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rounds.1.separation: got 0.6, at most 0.500"):
        check_categories(toy_config(rounds=rounds((0.5, 4), (0.6, 2))), NAMES[:4])


def test_given_groups_count_in_what_can_be_reached() -> None:
    """Of ten categories nine stay together, so only the tenth's children are without grandchildren."""
    tree = [["a", "b", "c", "d", "e", "f", "g", "h", "i"], "j"]
    config = toy_config(rounds=rounds((0.1, 2), (0.5, 2)), tree=tree, partition={"min_core": 0.0})
    with pytest.raises(ValueError, match=r"rounds.1.separation: got 0.5, at most 0.145"):
        check_categories(config, NAMES)  # .1 + 9 x .05 / 10
    k_way = toy_config(rounds=rounds((0.675, 2)), tree=[["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]])
    check_categories(k_way, NAMES[:8])  # four given groups although two were asked for
    with pytest.raises(ValueError, match=r"rounds.0.separation: got 0.675, at most 0.450"):
        check_categories(toy_config(rounds=rounds((0.675, 2))), NAMES[:8])


def test_names_that_are_no_categories_are_all_told() -> None:
    with pytest.raises(ValueError, match=r"(?s)tree: got 'x'.*\ntree: got 'y'"):
        check_categories(toy_config(tree=[["a", "x"], ["b", "y"]]), NAMES[:4])
    check_categories(toy_config(tree=[["a", "x"], ["b", "y"]]), None)


@pytest.mark.parametrize("name", [ROOT, MEAN])
def test_a_category_with_a_name_of_the_projects_own_is_refused_before_anything_is_trained(name: str) -> None:
    with pytest.raises(ValueError, match=f"^data: the category name '{name}' is reserved for .*; rename the category$"):
        check_categories(toy_config(), ("a", name))


def test_unrouted_categories_count_in_what_can_be_reached() -> None:
    """One category with an expert of .9 spares that to the three others."""
    alone = {"unrouted": ["b", "c", "d"], "min_core": 0.1}
    check_categories(toy_config(rounds=rounds((0.675, 2)), partition=alone), NAMES[:4])
    with pytest.raises(ValueError, match=r"rounds.0.separation: got 0.68, at most 0.675"):
        check_categories(toy_config(rounds=rounds((0.68, 2)), partition=alone), NAMES[:4])
    # Two pairs of .45 each, and two that run neither: (4 x .45 + 2 x .9) / 6; then the pairs part: 4 x .225 / 6.
    two = {"unrouted": ["e", "f"], "min_core": 0.1}
    check_categories(toy_config(rounds=rounds((0.6, 2), (0.75, 2)), partition=two), NAMES[:6])
    for steps, most in (((0.61, 2),), "0.600"), (((0.6, 2), (0.76, 2)), "0.750"):
        with pytest.raises(ValueError, match=f"at most {most} can be reached"):
            check_categories(toy_config(rounds=rounds(*steps), partition=two), NAMES[:6])


def test_unrouted_names_must_be_categories_but_not_all_of_them() -> None:
    for names, told in ((["a", "bb"], "partition.unrouted: got 'bb', which is no"), (list(NAMES[:4]), "got all cat")):
        with pytest.raises(ValueError, match=told):
            check_categories(toy_config(partition={"unrouted": names}), NAMES[:4])
