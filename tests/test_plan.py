import pytest

from moeify.plan import check_reachable, plan, training_work
from tests.toy import toy_config


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
    check_reachable(toy_config(rounds=rounds(*steps), partition={"min_core": 0.1}), categories)


@pytest.mark.parametrize(
    ("steps", "most"), [([(0.46, 2)], "0.450"), ([(0.3, 2), (0.451, 2)], "0.450"), ([(0.68, 4)], "0.675")]
)
def test_separations_out_of_reach_say_what_can_be_reached(steps: list[tuple[float, int]], most: str) -> None:
    with pytest.raises(ValueError, match=f"at most {most} can be reached"):
        check_reachable(toy_config(rounds=rounds(*steps), partition={"min_core": 0.1}), 4)


def test_a_round_with_nothing_left_to_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rounds.1.separation: got 0.6, at most 0.500"):
        check_reachable(toy_config(rounds=rounds((0.5, 4), (0.6, 2))), 4)
