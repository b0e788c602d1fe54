"""What removing a set of units costs after the rest has made up for it, from second moments alone.

The K-FAC Schur residual (Kronecker factors A of the inputs and H of the output gradients, as in Martens and Grosse,
"Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015; removal with re-fitted survivors as in
Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993).

Axes: units U, kept units K, removed units R, output dim D. A = E[a a^T], H = E[g_y g_y^T], y = a W.
"""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

_LEAST_DAMPING = 1e-6


def default_damping(units: int) -> float:
    """Return a damping above the rounding noise of moments of so many units that were added up from float32."""
    return max(_LEAST_DAMPING, 8 * torch.finfo(torch.float32).eps * units**0.5)


def schur_residual(
    inputs: Float[Tensor, "units units"],
    curvature: Float[Tensor, "dim dim"],
    weight: Float[Tensor, "units dim"],
    kept: Bool[Tensor, " units"],
    removed: Bool[Tensor, " units"],
    *,
    damping: float | None = None,
) -> float:
    """Return J = 1/2 tr(H W_R^T (A_RR - A_RK A_KK^-1 A_KR) W_R), in nats if H is in nats^2 per squared output.

    The part of the removed units' output that no linear correction of the kept units' weights gives back, weighed by
    the curvature. Units in neither set are inactive and have no say. A is damped by ``damping`` (not given:
    ``default_damping``, what float32 sums need) times the mean second moment of the kept and removed units on its whole
    diagonal, as if every activation carried a little independent noise; so moving a unit from removed to kept never
    raises J. Computed in float64.
    """
    units_K, units_R = _sets(inputs, curvature, weight, kept, removed, damping)
    factor_UU = _factor(inputs, torch.cat([units_K, units_R]), damping)
    if len(units_R) == 0 or factor_UU is None:
        return 0.0
    # With the removed units last, the Schur complement is the last block of the Cholesky factor times its transpose.
    lost_RD = factor_UU[len(units_K) :, len(units_K) :].T @ weight[units_R].double()
    return max(0.0, float(((lost_RD @ curvature.double()) * lost_RD).sum()) / 2)


def marginals(
    inputs: Float[Tensor, "units units"],
    curvature: Float[Tensor, "dim dim"],
    weight: Float[Tensor, "units dim"],
    kept: Bool[Tensor, " units"],
    removed: Bool[Tensor, " units"],
    *,
    damping: float | None = None,
) -> Float64[Tensor, " units"]:
    """Return how much J would rise if one more kept unit were removed, for each kept unit; 0 for all other units.

    Exact, damping as in ``schur_residual``: 1/2 v_k H v_k^T / (A_KK^-1)_kk, where v_k is the unit's output weight
    after the best correction for the units that are removed already.
    """
    units_K, units_R = _sets(inputs, curvature, weight, kept, removed, damping)
    rises_U = torch.zeros(len(kept), dtype=torch.float64, device=inputs.device)
    scale = _scale(inputs, torch.cat([units_K, units_R]))
    factor_KK = _factor(inputs, units_K, damping, scale)
    if len(units_K) == 0 or factor_KK is None:
        return rises_U
    inverse_KK = torch.cholesky_inverse(factor_KK)
    cross_KR = inputs[units_K][:, units_R].double()
    corrected_KD = weight[units_K].double() + inverse_KK @ (cross_KR @ weight[units_R].double())
    curved_K = ((corrected_KD @ curvature.double()) * corrected_KD).sum(1)
    rises_U[units_K] = curved_K.clamp(min=0) / (2 * inverse_KK.diagonal())
    return rises_U


def _sets(
    inputs: Tensor, curvature: Tensor, weight: Tensor, kept: Tensor, removed: Tensor, damping: float | None
) -> tuple[Tensor, Tensor]:
    units, dim = weight.shape
    if inputs.shape != (units, units) or curvature.shape != (dim, dim) or kept.shape != (units,):
        raise ValueError(
            f"weight [{units} {dim}] needs inputs [{units} {units}], curvature [{dim} {dim}] and sets [{units}], "
            f"got {list(inputs.shape)}, {list(curvature.shape)} and {list(kept.shape)}"
        )
    if damping is not None and not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping}; units that depend on each other need it")
    both = (kept & removed).nonzero().squeeze(1).tolist()
    if both:
        raise ValueError(f"units {both[:5]} are both kept and removed; a unit is one of them or inactive")
    return kept.nonzero().squeeze(1), removed.nonzero().squeeze(1)


def _scale(inputs: Tensor, units: Tensor) -> float:
    return float(inputs.diagonal()[units].double().mean()) if len(units) else 0.0


def _factor(inputs: Tensor, units: Tensor, damping: float | None, scale: float | None = None) -> Tensor | None:
    """Return the Cholesky factor of the damped A over ``units`` in that order; None if they are never active."""
    scale = _scale(inputs, units) if scale is None else scale
    if scale == 0.0:
        return None
    damped = inputs.index_select(0, units).index_select(1, units).double()
    damping = default_damping(len(units)) if damping is None else damping
    damped.diagonal().add_(damping * scale)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) or not bool(factor.isfinite().all()):
        raise ValueError(
            f"the second moment of {len(units)} units is not positive definite with damping {damping:.2g}; "
            f"check that it is finite and symmetric, or raise damping"
        )
    return factor
