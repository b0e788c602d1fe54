import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float64
from torch import Tensor

from attribution.moments import default_damping, marginals, schur_residual


def problem(
    seed: int, units: int = 8, dim: int = 4, samples: int = 40
) -> tuple[Float64[Tensor, "samples units"], Float64[Tensor, "dim dim"], Float64[Tensor, "units dim"]]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(units, units, generator=generator, dtype=torch.float64)
    samples_SU = torch.randn(samples, units, generator=generator, dtype=torch.float64) @ mix
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return samples_SU, root @ root.T, torch.randn(units, dim, generator=generator, dtype=torch.float64)


def sets(codes: list[int]) -> tuple[Bool[Tensor, " units"], Bool[Tensor, " units"]]:
    """0: inactive, 1: kept, 2: removed."""
    code = torch.tensor(codes)
    return code == 1, code == 2


def least_squares(
    samples_SU: Tensor, curvature: Tensor, weight: Tensor, kept: Tensor, removed: Tensor, damping: float
) -> float:
    """Fit the removed units' output on the kept units' activations; damping is one more sample for each unit."""
    samples, units = samples_SU.shape
    active = kept | removed
    if not active.any():
        return 0.0
    noise = damping * samples_SU[:, active].square().mean()
    rows = torch.cat([samples_SU / samples**0.5, torch.eye(units, dtype=torch.float64) * noise.sqrt()])
    target = rows[:, removed] @ weight[removed]
    fit = torch.linalg.lstsq(rows[:, kept], target).solution if kept.any() else target.new_zeros(0, target.shape[1])
    error = target - rows[:, kept] @ fit
    return float(torch.trace(curvature @ error.T @ error)) / 2


codes_of_8 = st.lists(st.sampled_from([0, 1, 2]), min_size=8, max_size=8)


@given(seed=st.integers(0, 1000), codes=codes_of_8, damping=st.sampled_from([1e-6, 1e-2, 1.0]))
@settings(max_examples=60, deadline=None)
def test_the_residual_equals_an_explicit_least_squares_fit_on_samples(
    seed: int, codes: list[int], damping: float
) -> None:
    samples_SU, curvature, weight = problem(seed)
    kept, removed = sets(codes)
    inputs = samples_SU.T @ samples_SU / len(samples_SU)
    got = schur_residual(inputs, curvature, weight, kept, removed, damping=damping)
    assert got == pytest.approx(least_squares(samples_SU, curvature, weight, kept, removed, damping), rel=1e-6)


@given(seed=st.integers(0, 1000), codes=codes_of_8, samples=st.integers(2, 20), damping=st.sampled_from([1e-6, 1e-1]))
@settings(max_examples=60, deadline=None)
def test_keeping_one_more_unit_never_raises_the_residual(
    seed: int, codes: list[int], samples: int, damping: float
) -> None:
    samples_SU, curvature, weight = problem(seed, samples=samples)
    inputs = samples_SU.T @ samples_SU / samples
    kept, removed = sets(codes)
    before = schur_residual(inputs, curvature, weight, kept, removed, damping=damping)
    for unit in removed.nonzero().squeeze(1).tolist():
        more, less = kept.clone(), removed.clone()
        more[unit], less[unit] = True, False
        after = schur_residual(inputs, curvature, weight, more, less, damping=damping)
        assert after <= before * (1 + 1e-9) + 1e-12


@given(seed=st.integers(0, 1000), codes=codes_of_8)
@settings(max_examples=40, deadline=None)
def test_marginals_equal_the_rise_of_the_residual_unit_by_unit(seed: int, codes: list[int]) -> None:
    samples_SU, curvature, weight = problem(seed)
    inputs = samples_SU.T @ samples_SU / len(samples_SU)
    kept, removed = sets(codes)
    got = marginals(inputs, curvature, weight, kept, removed, damping=1e-3)
    before = schur_residual(inputs, curvature, weight, kept, removed, damping=1e-3)
    for unit in range(8):
        wanted = 0.0
        if kept[unit]:
            less, more = kept.clone(), removed.clone()
            less[unit], more[unit] = False, True
            wanted = schur_residual(inputs, curvature, weight, less, more, damping=1e-3) - before
        assert float(got[unit]) == pytest.approx(wanted, rel=1e-6, abs=1e-8 * (1 + before))


def test_two_units_worked_out_by_hand() -> None:
    inputs = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    curvature = torch.tensor([[5.0]], dtype=torch.float64)
    kept, removed = sets([1, 2])
    # 3 - 2 * 2 / 4 = 2 is left of the second unit's moment; 1/2 * 5 * 2 * 2 * 2 = 20.
    assert schur_residual(inputs, curvature, weight, kept, removed, damping=1e-12) == pytest.approx(20)
    assert schur_residual(inputs, curvature, weight, ~(kept | removed), removed, damping=1e-12) == pytest.approx(30)


def test_a_copy_of_a_kept_unit_is_removed_for_nothing_and_so_is_a_dead_one() -> None:
    samples_SU, curvature, weight = problem(0)
    samples_SU[:, 3] = 2 * samples_SU[:, 1]
    samples_SU[:, 4] = 0
    inputs = samples_SU.T @ samples_SU / len(samples_SU)
    kept, removed = sets([1, 1, 1, 2, 2, 0, 0, 0])
    whole = schur_residual(inputs, curvature, weight, ~(kept | removed), removed)
    assert schur_residual(inputs, curvature, weight, kept, removed) < 1e-4 * whole
    assert schur_residual(torch.zeros_like(inputs), curvature, weight, kept, removed) == 0
    assert marginals(torch.zeros_like(inputs), curvature, weight, kept, removed).tolist() == [0] * 8


def test_nothing_removed_costs_nothing() -> None:
    samples_SU, curvature, weight = problem(0)
    kept, removed = sets([1] * 8)
    assert schur_residual(samples_SU.T @ samples_SU, curvature, weight, kept, removed) == 0
    assert schur_residual(samples_SU.T @ samples_SU, curvature, weight, removed, removed) == 0


def test_bad_input_is_refused() -> None:
    samples_SU, curvature, weight = problem(0)
    inputs = samples_SU.T @ samples_SU
    kept, removed = sets([1, 2] * 4)
    with pytest.raises(ValueError, match=r"units \[0, 2, 4, 6\] are both kept and removed"):
        schur_residual(inputs, curvature, weight, kept, kept)
    with pytest.raises(ValueError, match="damping must be above 0, got 0"):
        schur_residual(inputs, curvature, weight, kept, removed, damping=0.0)
    inputs[0, 1] = inputs[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not positive definite with damping 2\.7"):
        schur_residual(inputs, curvature, weight, kept, removed)


def test_inputs_that_rise_and_fall_together_are_damped_above_the_rounding_of_their_sums() -> None:
    units = 500
    apart_U = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(units // 2) / units**0.5
    rounding = 4e-5  # above the default damping, below the trace times what float32 resolves
    assert default_damping(units) < rounding < units * torch.finfo(torch.float32).eps
    inputs = torch.ones(units, units, dtype=torch.float64) - rounding * apart_U[:, None] * apart_U
    curvature, weight = torch.eye(2, dtype=torch.float64), torch.ones(units, 2, dtype=torch.float64)
    removed, none = torch.arange(units) < units // 2, torch.zeros(units, dtype=torch.bool)
    alone = schur_residual(inputs, curvature, weight, none, removed)
    assert 0.0 <= schur_residual(inputs, curvature, weight, ~removed, removed) < 1e-3 * alone
    assert marginals(inputs, curvature, weight, ~none, none).max() < 1e-3 * alone
    with pytest.raises(ValueError, match="not positive definite with damping 1e-05"):
        marginals(inputs, curvature, weight, ~none, none, damping=1e-5)
