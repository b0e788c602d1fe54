import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.splitting.knapsack import Curve, cheapest


@st.composite
def curve(draw: st.DrawFn) -> Curve:
    unit = draw(st.sampled_from([1, 3, 8]))
    rest = draw(st.sets(st.integers(1, 12), max_size=4))
    savings = (0, *(unit * s for s in sorted(rest)))
    # Dyadic costs add up exactly, so that ties are ties.
    costs = tuple(draw(st.integers(-8, 40)) / 8 for _ in savings)
    return Curve(savings, costs)


@given(curves=st.lists(curve(), max_size=4), part=st.floats(-0.2, 1.0))
@settings(max_examples=200, deadline=None)
def test_the_choice_equals_the_best_of_all_combinations(curves: list[Curve], part: float) -> None:
    most = sum(c.savings[-1] for c in curves)
    wanted = int(part * most)
    ways = []
    for picks in itertools.product(*(range(len(c.savings)) for c in curves)):
        saved = sum(c.savings[p] for c, p in zip(curves, picks, strict=True))
        cost = sum(c.costs[p] for c, p in zip(curves, picks, strict=True))
        if saved >= wanted:
            ways.append((cost, saved, picks[::-1]))
    assert cheapest(curves, wanted) == list(min(ways)[2][::-1])


def test_of_equally_cheap_ways_the_smallest_saving_is_taken() -> None:
    flat = Curve((0, 4, 8), (1.0, 1.0, 1.0))
    assert cheapest([flat, flat], 3) == [1, 0]
    assert cheapest([flat, flat], 12) == [2, 1]


def test_a_saving_between_the_steps_is_rounded_up() -> None:
    assert cheapest([Curve((0, 8, 16), (0.0, 1.0, 5.0))], 9) == [2]


def test_no_curves_save_nothing() -> None:
    assert cheapest([], 0) == []
    assert cheapest([Curve((0,), (3.0,))], 0) == [0]


def test_more_than_there_is_to_save_is_refused_with_the_most_that_can_be_saved() -> None:
    with pytest.raises(ValueError, match="cannot save 21: all 2 curves together save at most 20"):
        cheapest([Curve((0, 10), (0.0, 1.0))] * 2, 21)


def test_a_curve_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="must rise from 0, got 0, 4, 4"):
        Curve((0, 4, 4), (0.0, 1.0, 2.0))
    with pytest.raises(ValueError, match="must rise from 0, got 2, 4"):
        Curve((2, 4), (0.0, 1.0))
    with pytest.raises(ValueError, match="one cost for each saving"):
        Curve((0, 4), (0.0,))
    with pytest.raises(ValueError, match="must be finite"):
        Curve((0, 4), (0.0, float("nan")))
    with pytest.raises(ValueError, match="round the savings"):
        cheapest([Curve((0, 1, 10**9), (0.0, 1.0, 2.0))] * 2, 5)


def test_the_layers_of_a_large_model_take_seconds() -> None:
    generator = np.random.default_rng(0)
    savings = tuple(range(0, 14_336, 128))
    curves = [Curve(savings, tuple(np.sort(generator.random(len(savings)) ** 3).tolist())) for _ in range(32)]
    start = time.perf_counter()
    picks = cheapest(curves, 200_000)
    assert time.perf_counter() - start < 2
    assert sum(savings[p] for p in picks) >= 200_000
