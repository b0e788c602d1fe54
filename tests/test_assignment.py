import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float64, Int
from scipy.optimize import linear_sum_assignment, linprog

from moeify.splitting.assignment import Assignment, assign


def replicated_slots(value: np.ndarray, capacity: np.ndarray) -> float:
    slots = np.repeat(np.arange(len(capacity)), capacity)
    units, chosen = linear_sum_assignment(value[:, slots], maximize=True)
    return float(value[units, slots[chosen]].sum())


def linear_programme(value: np.ndarray, capacity: np.ndarray) -> float:
    units, bins = value.shape
    rows = np.kron(np.eye(units), np.ones((1, bins)))
    columns = np.kron(np.ones((1, units)), np.eye(bins))
    solved = linprog(
        -value.ravel(),
        A_eq=np.vstack([rows, columns]),
        b_eq=np.concatenate([np.ones(units), capacity]),
        bounds=(0, None),
        method="highs",
    )
    return -float(solved.fun)


def check(value: np.ndarray, capacity: np.ndarray) -> Assignment:
    result = assign(value, capacity)
    assert np.bincount(result.owner, minlength=len(capacity)).tolist() == capacity.tolist()
    chosen = value[np.arange(len(value)), result.owner]
    scale = float(np.abs(value).max(1).sum()) if len(value) else 0.0
    assert result.value == pytest.approx(float(chosen.sum()), rel=1e-12, abs=1e-14 * scale)
    assert abs(result.bound - result.value) <= 1e-11 * scale
    return result


VALUES = {
    "uniform": lambda r, shape: r.random(shape),
    "signed": lambda r, shape: r.standard_normal(shape),
    "ties": lambda r, shape: r.integers(-2, 3, shape).astype(float),
    "equal rows": lambda r, shape: np.repeat(r.random((1, shape[1])), shape[0], axis=0),
    "equal columns": lambda r, shape: np.repeat(r.random((shape[0], 1)), shape[1], axis=1),
    "constant": lambda r, shape: np.full(shape, -3.25),
    "zero": lambda r, shape: np.zeros(shape),
    "dead": lambda r, shape: r.random(shape) * (r.random((shape[0], 1)) < 0.5),
    "huge range": lambda r, shape: np.exp(60 * r.standard_normal(shape)),
    "huge": lambda r, shape: 1e300 * r.standard_normal(shape),
    "tiny": lambda r, shape: 1e-300 * r.standard_normal(shape),
    "offset": lambda r, shape: 1e6 + r.random(shape),
}


def problem(kind: str, seed: int, units: int, bins: int) -> tuple[Float64[np.ndarray, "u b"], Int[np.ndarray, " b"]]:
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(bins, generator.choice([0.1, 1.0, 100.0])))
    return VALUES[kind](generator, (units, bins)), generator.multinomial(units, shares)


@given(kind=st.sampled_from(list(VALUES)), seed=st.integers(0, 10**6), units=st.integers(0, 60), bins=st.integers(1, 7))
@settings(max_examples=300, deadline=None)
def test_the_value_is_that_of_a_matching_with_replicated_slots(kind: str, seed: int, units: int, bins: int) -> None:
    value, capacity = problem(kind, seed, units, bins)
    result = check(value, capacity)
    scale = float(np.abs(value).max(1).sum()) if units else 0.0
    assert result.value == pytest.approx(replicated_slots(value, capacity), rel=1e-12, abs=1e-12 * scale)


@given(kind=st.sampled_from(["uniform", "signed", "ties", "dead"]), seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_value_is_that_of_the_linear_programme(kind: str, seed: int) -> None:
    value, capacity = problem(kind, seed, 30, 4)
    assert check(value, capacity).value == pytest.approx(linear_programme(value, capacity), abs=1e-6)


@pytest.mark.parametrize("kind", list(VALUES))
def test_large_problems_meet_their_bound_whatever_the_values(kind: str) -> None:
    check(*problem(kind, 1, 3000, 6))


def test_the_same_problem_gives_the_same_owners() -> None:
    value, capacity = problem("ties", 3, 500, 5)
    assert np.array_equal(assign(value, capacity).owner, assign(value.copy(), capacity.copy()).owner)


def test_a_bin_without_room_stays_empty_however_much_it_is_worth() -> None:
    value = np.array([[1.0, 9.0, 0.0], [2.0, 9.0, 0.0]])
    assert assign(value, np.array([1, 0, 1])).owner.tolist() == [2, 0]


def test_constant_values_fill_the_bins_in_order_of_units() -> None:
    assert sorted(assign(np.ones((6, 3)), np.array([1, 2, 3])).owner.tolist()) == [0, 1, 1, 2, 2, 2]


def test_arguments_are_left_alone() -> None:
    value, capacity = problem("uniform", 0, 50, 4)
    before = value.copy(), capacity.copy()
    assign(value, capacity)
    assert np.array_equal(value, before[0])
    assert np.array_equal(capacity, before[1])


def test_a_site_of_a_large_model_takes_about_a_second() -> None:
    generator = np.random.default_rng(0)
    value = np.exp(2 * generator.standard_normal((14_336, 1)) + generator.standard_normal((14_336, 32)))
    start = time.perf_counter()
    check(value, np.full(32, 448))
    assert time.perf_counter() - start < 3


def test_bad_input_is_refused() -> None:
    value = np.ones((4, 2))
    with pytest.raises(ValueError, match=r"add up to the 4 units, got \[2, 1\], in all 3"):
        assign(value, np.array([2, 1]))
    with pytest.raises(ValueError, match="must not be negative"):
        assign(value, np.array([5, -1]))
    with pytest.raises(ValueError, match=r"\[4, 2\] and \[3\]"):
        assign(value, np.array([2, 1, 1]))
    value[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"the value of unit 2 in bin 1 is nan; .* \(1 are not\)"):
        assign(value, np.array([2, 2]))
