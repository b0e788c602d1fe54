import math
import statistics

import pytest
from fake_results import CONFIG, DENSE, SPLIT, TOLD, result, results
from scipy.stats import ttest_1samp

from moeify.comparison import Interval, Job, Row, job_recipe, jobs, losses, mean_interval, rows, seeded
from moeify.recipe.variants import methods


def only(found: list[Row], method: str) -> Row:
    (row,) = [row for row in found if row.method == method]
    return row


def test_the_loop_is_always_a_job_and_each_job_is_there_once() -> None:
    asked = jobs(["random", "init", "random"], [0.4, 0.6, 0.4], range(2))
    assert len(asked) == len(set(asked)) == 3 * 2 * 2
    assert asked[:2] == (Job("loop", 0.4, 0), Job("loop", 0.4, 1))
    assert [str(job) for job in asked[-2:]] == ["init-0.6-0", "init-0.6-1"]


@pytest.mark.parametrize(
    ("methods", "separation", "said"),
    [(["rnadom"], 0.5, "method: got 'rnadom', wanted some of loop"), ([], 1.5, "separation: got 1.5, wanted a frac")],
)
def test_what_cannot_be_compared_is_refused_by_name(methods: list[str], separation: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        jobs(methods, [separation], [0])


@pytest.mark.parametrize("method", methods())
def test_a_jobs_recipe_has_its_seed_and_separation_and_one_worker(method: str) -> None:
    recipe = job_recipe(CONFIG, Job(method, 0.3, 7), 10)
    assert (recipe.seed, recipe.rounds[-1].separation) == (7, pytest.approx(0.3))
    assert (recipe.cluster.workers, recipe.cluster.threads) == (1, 1)
    assert recipe.controls == (("told",) if method == "loop" else ())
    before = seeded(CONFIG, Job(method, 0.3, 7))
    for part in ("seed", "data", "model", "training", "attribution", "evaluation"):
        assert getattr(before, part) == getattr(recipe, part)  # all that a task is made of


def test_differences_are_taken_seed_by_seed() -> None:
    found = list(rows(results()))
    assert [row.method for row in found] == ["loop", "random", "dense twin", "told twin"]
    loop, random, dense, told = found
    assert loop.above_loop is dense.tax is told.tax_told is None
    assert loop.loss.mean == pytest.approx(statistics.fmean(SPLIT["loop"].values()))
    for row, mine, other in (
        (loop.tax, SPLIT["loop"], DENSE),
        (loop.tax_told, SPLIT["loop"], TOLD),
        (random.tax_told, SPLIT["random"], TOLD),  # which the loop's run alone has
        (random.above_loop, SPLIT["random"], SPLIT["loop"]),
        (dense.tax_told, DENSE, TOLD),
        (told.above_loop, TOLD, SPLIT["loop"]),
    ):
        oracle = ttest_1samp([mine[seed] - other[seed] for seed in mine], 0.0).confidence_interval()
        assert row is not None
        assert (row.low, row.high) == pytest.approx((oracle.low, oracle.high))
    assert (told.active.mean, loop.active.mean) == (1.0, 0.5)


def test_seeds_without_a_partner_are_left_out_of_the_pairs_alone() -> None:
    found = results({"loop": {0: 3.01, 1: 3.20}, "random": {0: 3.05, 1: 3.30, 2: 3.15}})
    random = only(list(rows(found)), "random")
    assert random.seeds == 3
    assert random.above_loop is not None
    assert random.above_loop.mean == pytest.approx((0.04 + 0.10) / 2)
    assert random.tax is not None
    assert random.tax.mean == pytest.approx((0.05 + 0.10 + 0.05) / 3)


def test_without_any_loop_the_others_still_have_their_tax() -> None:
    found = list(rows(results({"random": {0: 3.05}})))
    assert [row.method for row in found] == ["random", "dense twin"]
    assert found[0].tax == Interval(pytest.approx(0.05), pytest.approx(math.nan, nan_ok=True))
    assert found[0].tax_told is found[0].above_loop is None
    assert list(rows({})) == []


def test_a_separation_is_compared_with_the_loop_of_its_own_and_the_seeds_twins() -> None:
    found = results() | {Job("random", 0.7, 0): result(3.4, DENSE[0]), Job("loop", 0.7, 1): result(3.3, DENSE[1])}
    deep = [row for row in rows(found) if row.separation == 0.7]
    random = only(deep, "random")
    assert random.above_loop is None  # the loop of seed 0 has not ended there
    assert random.tax_told is not None
    assert random.tax_told.mean == pytest.approx(3.4 - TOLD[0])
    assert only(deep, "told twin").seeds == 2
    assert losses(found, "told") == pytest.approx(TOLD)


def test_an_interval_is_students_t() -> None:
    mean, half = mean_interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * statistics.stdev([1, 2, 4]) / 3**0.5)
    assert math.isnan(mean_interval([1.0]).half)
