import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.moments import LowRank, Second, schur_residual
from attribution.removals import Removals


@given(
    seed=st.integers(0, 1000),
    codes=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=7),
    width=st.integers(1, 3),
    form=st.sampled_from(["exact", "low-rank curvature", "low rank"]),
    damping=st.sampled_from([None, 1e-3]),
)
@settings(max_examples=60, deadline=None)
def test_a_set_costs_what_the_schur_residual_says(
    seed: int, codes: list[int], width: int, form: str, damping: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, dim = width * len(codes), 3
    root = torch.randn(rows, rows, generator=generator, dtype=torch.float64)
    out = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    inputs: Second = LowRank(root, torch.ones(rows, dtype=torch.float64)) if form == "low rank" else root @ root.T
    curvature: Second = out @ out.T if form == "exact" else LowRank(out, torch.ones(dim, dtype=torch.float64))
    weight = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    active, removed = (torch.tensor(codes) != 0), (torch.tensor(codes) == 2)
    got = Removals(inputs, curvature, weight, active, damping=damping).residual(removed)
    wanted = schur_residual(inputs, curvature, weight, active & ~removed, removed, damping=damping)
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-9)


def test_units_that_are_never_active_cost_nothing_and_inactive_ones_cannot_be_removed() -> None:
    removals = Removals(torch.zeros(2, 2), torch.eye(3), torch.ones(2, 3), torch.tensor([True, False]))
    assert removals.residual(torch.tensor([True, False])) == 0.0
    with pytest.raises(ValueError, match="only active units"):
        removals.residual(torch.tensor([True, True]))


@given(
    seed=st.integers(0, 1000),
    codes=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=7),
    width=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_marginals_are_differences_of_j(seed: int, codes: list[int], width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, dim = width * len(codes), 3
    root, out = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (rows, dim))
    weight = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    active, removed = (torch.tensor(codes) != 0), (torch.tensor(codes) == 2)
    removals = Removals(root @ root.T, out @ out.T, weight, active, damping=1e-2)
    if not active.any():
        assert not removals.inverted
        return
    got = removals.marginals(removed)
    for unit in range(len(codes)):
        other = removed.clone()
        other[unit] = ~other[unit]
        wanted = abs(removals.residual(other) - removals.residual(removed)) if active[unit] else 0.0
        assert got[unit].item() == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_marginals_need_an_inverse() -> None:
    low = LowRank(torch.ones(2, 1, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    removals = Removals(low, torch.eye(3), torch.ones(2, 3), torch.tensor([True, True]))
    assert not removals.inverted
    with pytest.raises(ValueError, match="sketched"):
        removals.marginals(torch.tensor([True, False]))
