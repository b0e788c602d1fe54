from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from moeify.control import (
    Depth,
    NoStepLeftError,
    Standing,
    budget_error,
    budget_used,
    check_step,
    deepest,
    expected_tax,
    expected_use,
    why_stopped,
)
from moeify.events import MemoryTracker, Phase, RoundEnded
from moeify.loop import run
from moeify.recipe.rounds import Budget
from moeify.splitting.grouping import NothingToSplitError
from moeify.splitting.propose import Menu, Proposal
from tests.toy import ToyTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

TWIN = {"a": 2.0, "b": 4.0}


def ended(**facts: object) -> RoundEnded:
    known: dict[str, object] = {
        "id": "round/1",
        "time": 0.0,
        "round": 1,
        "step": 10,
        "separation": 0.3,
        "asked": 0.3,
        "tax": 0.02,
        "tax_by_category": {"a": 0.02, "b": 0.02},
        "tax_random": None,
        "predicted": 0.01,
        "predicted_random": None,
        "accepted": True,
        "seconds": 1.0,
        "tree": {"name": "core", "categories": ["a", "b"], "units": 4, "children": []},
    }
    return RoundEnded.model_validate(known | facts)


@pytest.mark.parametrize(
    ("budget", "taxes", "used"),
    [
        ({"tax": 0.1}, {"a": 0.0, "b": 0.1}, 0.5),
        ({"tax": 0.1, "per": "category"}, {"a": 0.0, "b": 0.1}, 1.0),
        ({"tax": "1 %"}, {"a": 0.0, "b": 0.03}, 0.5),  # .015 of .01 x 3
        ({"tax": "1%", "per": "category"}, {"a": 0.02, "b": 0.02}, 1.0),  # of .02 and .04
        ({"tax": "2.5 %", "per": "category"}, {"a": -0.02, "b": 0.05}, 0.5),
    ],
)
def test_the_part_of_the_budget_that_a_tax_takes(
    budget: dict[str, object], taxes: dict[str, float], used: float
) -> None:
    taxes = {**taxes, "mean": sum(taxes.values()) / 2}
    assert budget_used(Budget.model_validate(budget), taxes, TWIN) == pytest.approx(used)


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        ({"tax": 0.1}, 0.25),  # of the mean: .05 / 2 of .1
        ({"tax": 0.1, "per": "category"}, 0.4),  # of b, which uses most
        ({"tax": "1 %", "per": "category"}, 1.0),  # .04 of .01 x 4
    ],
)
def test_the_budget_that_is_used_is_as_sure_as_the_tax(budget: dict[str, object], error: float) -> None:
    taxes, errors = {"a": 0.01, "b": 0.05, "mean": 0.03}, {"a": 0.03, "b": 0.04}
    found = budget_error(Budget.model_validate(budget), taxes, TWIN, errors)
    assert found == pytest.approx(error)
    assert budget_error(None, taxes, TWIN, errors) is None
    known = {"b": 0.04}
    some = budget_error(Budget.model_validate(budget), taxes, TWIN, known)
    assert some == (found if "per" in budget else None)


def test_all_of_the_rise_at_a_cut_is_expected_to_stay_until_a_round_was_judged() -> None:
    before, after = Standing(tax=0.01, used=0.25), Standing(tax=0.03, used=0.75)
    assert expected_tax(before, after, []) == pytest.approx(0.03)
    assert expected_use(before, after, []) == pytest.approx(0.75)


def test_what_recoveries_have_left_so_far_is_expected_again_kept_or_not() -> None:
    rounds = [
        ended(tax_before=0.0, tax_cut=0.3, tax=0.05, budget_used_before=0.0, budget_used_cut=3.0, budget_used=0.5),
        ended(
            tax_before=0.03,
            tax_cut=0.13,
            tax=0.10,
            budget_used_before=0.4,
            budget_used_cut=2.4,
            budget_used=1.9,
            accepted=False,
        ),
        ended(tax=0.30, predicted=0.0, tax_before=None, uncut="no step left", budget_used=3.0),
    ]
    before, after = Standing(tax=0.02, used=0.2), Standing(tax=0.22, used=1.2)
    assert expected_tax(before, after, rounds) == pytest.approx(0.02 + 0.2 * (0.05 + 0.07) / (0.3 + 0.1))
    assert expected_use(before, after, rounds) == pytest.approx(0.2 + 1.0 * (0.5 + 1.5) / (3.0 + 2.0))


def test_rounds_that_cost_nothing_in_the_end_foresee_no_cost_and_never_a_gain() -> None:
    cheap = ended(tax_before=0.0, tax_cut=0.3, tax=-0.02)
    assert expected_tax(Standing(-0.02, None), Standing(0.5, None), [cheap]) == -0.02
    free = ended(tax_before=0.0, tax_cut=-0.01, tax=0.02)  # no rise to have left anything of
    assert expected_tax(Standing(0.0, None), Standing(0.5, None), [free]) == 0.5


def test_a_step_that_is_too_small_or_a_budget_used_up_before_it_is_refused() -> None:
    budget = Budget(tax=0.1, least_step=0.05)
    check_step(budget, 0.05, Standing(0.1, 1.0))
    with pytest.raises(NoStepLeftError, match=r"0\.049 of separation is below budget\.least_step"):
        check_step(budget, 0.049, Standing(0.0, 0.0))
    with pytest.raises(NoStepLeftError, match=r"before the cut, 0\.2000, is beyond the budget already"):
        check_step(budget, 0.3, Standing(0.2, 2.0))


def a_cut(separation: float) -> Proposal:
    """Stand for a cut whose J is the square of its separation, in steps of a hundredth."""
    rounded = round(separation, 2)
    return cast(Proposal, SimpleNamespace(partition=SimpleNamespace(separation=rounded), predicted=rounded**2))


def within(limit: float) -> Callable[[Proposal], bool]:
    return lambda cut: cut.predicted <= limit


def test_the_deepest_cut_that_fits_is_found() -> None:
    for limit in (0.09, 0.16):
        found = deepest(a_cut, 0.05, 0.5, within(limit))
        fitting = [a_cut(each / 100) for each in range(5, 51) if (each / 100) ** 2 <= limit]
        assert found.partition.separation == fitting[-1].partition.separation


def test_no_step_is_left_where_not_even_the_smallest_fits() -> None:
    with pytest.raises(NoStepLeftError, match=r"even a separation of 0\.050 is expected"):
        deepest(a_cut, 0.05, 0.5, within(0.001))


@pytest.mark.parametrize(
    ("got", "handed", "note", "judged"),
    [
        (0.3, False, None, 0.3),
        (0.34, False, None, 0.3),  # not half a multiple more
        (0.35, False, "separation 0.350, more than the 0.300 asked: widths can be no narrower", 0.35),
        (0.6, True, "separation 0.600, more than the 0.300 asked: units that are handed over widen every expert", 0.6),
        (0.21, False, "separation 0.210 of 0.300: no more room", 0.3),  # less than a multiple
        (0.19, False, "separation 0.190 of 0.300: no more room", 0.19),
    ],
)
def test_a_cut_counts_as_what_was_asked_as_near_as_widths_allow(
    got: float, handed: bool, note: str | None, judged: float
) -> None:
    depth = Depth(before=0.1, asked=0.3, got=got, rounding=0.1, slack=0.1)
    depth.check_gain()
    assert depth.note("no more room", handed=handed) == note
    assert depth.judged == judged


def test_a_cut_that_gains_nothing_is_none() -> None:
    with pytest.raises(NothingToSplitError, match=r"separation 0\.100 of 0\.300: widths leave no room for a cut"):
        Depth(before=0.1, asked=0.3, got=0.1, rounding=0.5, slack=0.5).check_gain()
    with pytest.raises(NothingToSplitError, match=r"separation 0\.400 of 0\.300: it is as deep already"):
        Depth(before=0.4, asked=0.3, got=0.4, rounding=0.5, slack=0.5).check_gain()


def test_a_round_that_is_as_deep_already_cuts_nothing_and_the_target_is_reached() -> None:
    """Experts of 8 of 32 units of one of two sites are an eighth of all apart, which is more than both rounds ask."""
    steps = [{"train": 4, "recover": 2, "separation": separation} for separation in (0.06, 0.09)]
    training = {"steps": 12, "rows": 16}
    partition = {"multiple": 8, "min_units": 0, "frozen": ["decoder.*"]}
    config = toy_config(rounds=steps, training=training, partition=partition, controls=[])
    tracker = MemoryTracker()
    result = run(config, ToyTask(config), tracker=tracker)
    assert [each.outcome for each in result.rounds] == ["kept", "not cut"]
    assert result.stopped == "target reached"
    assert "more than the 0.060 asked: widths can be no narrower" in notes(tracker)
    assert "of 0.090: it is as deep already" in notes(tracker)


def test_a_target_that_widths_keep_out_of_reach_is_not_called_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [{"train": 4, "recover": 2, "separation": 0.45}]
    config = toy_config(rounds=steps, training={"steps": 8, "rows": 16}, controls=[])
    monkeypatch.setattr(Menu, "cut", lambda menu, asked, cut=Menu.cut: cut(menu, asked / 2))
    result = run(config, ToyTask(config))
    assert (result.rounds[0].outcome, result.stopped) == ("kept", "rounds used up")
    assert result.rounds[0].asked == result.rounds[0].separation == 0.25
    monkeypatch.setattr(Menu, "cut", lambda menu, asked, cut=Menu.cut: cut(menu, 0.0))
    partition = {"multiple": 2, "min_units": 0}
    none = toy_config(rounds=steps, training={"steps": 8, "rows": 16}, controls=[], partition=partition)
    result = run(none, ToyTask(none))
    assert (result.rounds[0].outcome, result.stopped) == ("not cut", "nothing to split")


def test_why_a_run_stopped_has_a_name() -> None:
    assert why_stopped([ended()], 0.3) == "target reached"
    assert why_stopped([ended(asked=0.2)], 0.3) == "rounds used up"
    assert why_stopped([ended(accepted=False)], 0.3) == "rounds used up"
    assert why_stopped([ended(asked=0.2), ended(uncut="nothing to split")], 0.3) == "nothing to split"
    assert why_stopped([ended(accepted=False), ended(uncut="no step left")], 0.3) == "no step left"
    assert why_stopped([ended(), ended(uncut="no step left")], 0.3) == "target reached"


# --- in the loop ----------------------------------------------------------------------------------------


def notes(tracker: MemoryTracker) -> str:
    return "\n".join(e.note for e in tracker.events.values() if isinstance(e, Phase))


def test_a_round_goes_as_far_as_the_budget_is_expected_to_allow() -> None:
    free = run(toy_config(), ToyTask(toy_config())).rounds[0]
    assert free.tax_cut is not None
    assert free.tax_cut > 0.0
    limit = 0.6 * free.tax_cut
    tight, tracker = toy_config(budget={"tax": limit}), MemoryTracker()
    first = run(tight, ToyTask(tight), tracker=tracker).rounds[0]
    assert 0.02 <= first.separation < free.separation
    assert first.tax_before == first.budget_used_before == 0.0  # the arms are one and the same before the first cut
    assert first.expected == first.tax_cut
    assert 0.0 < first.tax_cut <= limit
    assert first.budget_used == pytest.approx(first.tax / limit)
    assert first.budget_used_cut == pytest.approx(first.tax_cut / limit)
    assert "of 0.300: the budget allows no more" in notes(tracker)


def test_a_target_that_the_budget_kept_out_of_reach_is_not_called_reached() -> None:
    last = [{"train": 15, "recover": 10, "separation": 0.3}]
    free = run(toy_config(rounds=last), ToyTask(toy_config(rounds=last)))
    assert (free.stopped, free.rounds[0].asked) == ("target reached", 0.3)
    tight = toy_config(rounds=last, budget={"tax": 0.2 * (free.rounds[0].tax_cut or 0.0)})
    result = run(tight, ToyTask(tight))
    assert result.rounds[0].outcome == "kept"
    assert result.rounds[0].asked == result.rounds[0].separation < 0.28
    assert result.stopped == "rounds used up"


def test_a_budget_that_is_never_in_the_way_changes_nothing() -> None:
    free, wide = toy_config(), toy_config(budget={"tax": "99 %", "per": "category"})
    one, other = (run(config, ToyTask(config)) for config in (free, wide))
    assert one.test_loss == other.test_loss
    assert one.tree == other.tree
    assert one.stopped == other.stopped == "target reached"


def test_where_every_cut_would_cost_too_much_the_run_says_so_and_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeify.loop.expected_use", lambda before, after, rounds: 1.01)
    tiny = toy_config(budget={"tax": 0.1})
    tracker = MemoryTracker()
    result = run(tiny, ToyTask(tiny), tracker=tracker)
    assert result.stopped == "no step left"
    assert [r.outcome for r in result.rounds] == ["not cut", "not cut"]
    assert result.active_fraction["mean"] == 1.0
    assert result.tax["mean"] == 0.0
    assert "no step left: even a separation of" in notes(tracker)


def test_a_step_below_the_least_is_not_even_measured() -> None:
    coarse = toy_config(budget={"tax": 1.0, "least_step": 0.2})
    tracker = MemoryTracker()
    result = run(coarse, ToyTask(coarse), tracker=tracker)
    assert [r.outcome for r in result.rounds] == ["kept", "not cut"]
    assert result.stopped == "no step left"
    attributed = [e for e in tracker.events.values() if isinstance(e, Phase) and e.phase == "attribute"]
    assert [e.round for e in attributed] == [1]


def test_a_round_with_nothing_to_split_says_so_and_is_still_held_against_the_twin() -> None:
    never = {"multiple": 2, "min_units": 2, "null_test": {"permutations": 3, "level": 1e-12}}
    config = toy_config(partition=never)
    result = run(config, ToyTask(config))
    assert [r.outcome for r in result.rounds] == ["not cut", "not cut"]
    assert {r.uncut for r in result.rounds} == {result.stopped} == {"nothing to split"}
    for each in result.rounds:
        assert each.accepted
        assert each.separation == each.tax == each.predicted == 0.0
        assert each.expected is each.tax_before is None
