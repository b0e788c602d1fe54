import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float64
from torch import Tensor

from moeify.splitting.compensation import compensate

UNITS, DIM = 6, 3


def problem(
    seed: int, categories: int = 3
) -> tuple[
    list[Float64[Tensor, "samples units"]], Float64[Tensor, "units dim"], Bool[Tensor, "categories units"], Tensor
]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(categories):
        mix = torch.randn(UNITS, UNITS, generator=generator, dtype=torch.float64)
        samples.append((torch.randn(30, UNITS, generator=generator, dtype=torch.float64) @ mix).relu())
    weight = torch.randn(UNITS, DIM, generator=generator, dtype=torch.float64)
    active = torch.rand(categories, UNITS, generator=generator) < 0.6
    shares = torch.rand(categories, generator=generator, dtype=torch.float64)
    return samples, weight, active, shares / shares.sum()


def moments(samples: list[Tensor]) -> Float64[Tensor, "categories units units"]:
    return torch.stack([a.T @ a / len(a) for a in samples])


def error(samples: list[Tensor], weight: Tensor, active: Tensor, shares: Tensor, corrected: Tensor) -> float:
    return sum(
        float(share) * float(((a * on) @ corrected - a @ weight).square().sum(1).mean())
        for a, on, share in zip(samples, active.double(), shares, strict=True)
    )


@given(seed=st.integers(0, 10_000), ridge=st.sampled_from([1e-4, 0.01, 1.0]))
@settings(max_examples=50, deadline=None)
def test_the_correction_equals_a_direct_least_squares_fit_on_samples(seed: int, ridge: float) -> None:
    samples, weight, active, shares = problem(seed)
    pull = ridge * float(torch.einsum("cuu,c->", moments(samples), shares)) / UNITS
    rows, targets = [torch.eye(UNITS, dtype=torch.float64) * pull**0.5], [weight * pull**0.5]
    for a, on, share in zip(samples, active.double(), shares, strict=True):
        root = (share / len(a)).sqrt()
        rows.append(a * on * root)
        targets.append(a @ weight * root)
    wanted = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution
    torch.testing.assert_close(
        compensate(moments(samples), weight, active, shares, ridge), wanted, rtol=1e-7, atol=1e-9
    )


@given(seed=st.integers(0, 10_000), ridge=st.sampled_from([1e-6, 0.01, 10.0]))
@settings(max_examples=50, deadline=None)
def test_the_squared_output_error_never_rises(seed: int, ridge: float) -> None:
    samples, weight, active, shares = problem(seed)
    corrected = compensate(moments(samples), weight, active, shares, ridge)
    before = error(samples, weight, active, shares, weight)
    assert error(samples, weight, active, shares, corrected) <= before * (1 + 1e-9) + 1e-12


def test_full_masks_leave_the_weights_bit_for_bit() -> None:
    samples, weight, active, shares = problem(0)
    corrected = compensate(moments(samples), weight, torch.ones_like(active), shares, 0.01)
    assert torch.equal(corrected, weight)
    single = weight.float()
    assert torch.equal(compensate(moments(samples), single, torch.ones_like(active), shares, 0.01), single)


def test_a_unit_that_no_category_keeps_and_units_that_never_fire_keep_their_weights() -> None:
    samples, weight, active, shares = problem(1)
    active[:, 2] = False
    corrected = compensate(moments(samples), weight, active, shares, 0.01)
    assert torch.equal(corrected[2], weight[2])
    assert not torch.allclose(corrected, weight)
    silent = torch.zeros_like(moments(samples))
    assert torch.equal(compensate(silent, weight, active, shares, 0.01), weight)


def test_a_kept_copy_takes_over_the_weight_of_its_removed_twin() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    a[:, 1] = a[:, 0]
    weight = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    active = torch.tensor([[True, False]])
    corrected = compensate((a.T @ a / 200)[None], weight, active, torch.ones(1, dtype=torch.float64), 1e-9)
    assert corrected.flatten().tolist() == pytest.approx([3, 2], rel=1e-6)


def test_units_of_several_features_leave_with_all_of_them() -> None:
    samples, weight, _, shares = problem(3)
    groups = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])
    wide = compensate(moments(samples), weight, groups, shares, 0.01)
    narrow = compensate(moments(samples), weight, groups.repeat_interleave(2, 1), shares, 0.01)
    assert torch.equal(wide, narrow)
    with pytest.raises(ValueError, match="4 units do not divide the 6 rows"):
        compensate(moments(samples), weight, torch.ones(3, 4, dtype=torch.bool), shares, 0.01)


def test_bad_input_is_refused() -> None:
    samples, weight, active, shares = problem(0)
    with pytest.raises(ValueError, match="ridge must be above 0, got 0"):
        compensate(moments(samples), weight, active, shares, 0.0)
    with pytest.raises(ValueError, match="add up to 1"):
        compensate(moments(samples), weight, active, 2 * shares, 0.01)
    with pytest.raises(ValueError, match="not positive definite"):
        compensate(-moments(samples), weight, active, shares, 0.01)
    broken = moments(samples)
    broken[0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="check that they are finite"):
        compensate(broken, weight, active, shares, 0.01)
