"""The closed-form correction of the kept units' output weights at a cut.

Axes: categories C, features U of units (one each, or several side by side), output dim D. m_c: 0/1, which are active
for category c; M_c = diag(m_c).
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attribution.moments import LowRank, Second


def compensate(
    moments: Iterable[Second],
    weight: Float[Tensor, "features dim"],
    active: Bool[Tensor, "categories units"],
    shares: Float[Tensor, " categories"],
    ridge: float,
) -> Float[Tensor, "features dim"]:
    """Return argmin over W' of sum_c p_c E_c ||(m_c o a) W' - a W||^2 + l ||W' - W||^2, in ``weight``'s dtype.

    ``moments``: E_c[a a^T] of each category, one at a time; ``shares`` p_c add up to 1; l = ``ridge`` times the mean
    over features of the pooled second moment. One float64 solve, whatever the number of categories. Since W' = W is
    among the candidates, the squared error of the output on the measured data never rises. A unit that no category
    keeps has its weight left alone.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}; units that depend on each other need it")
    if not bool((shares >= 0).all()) or abs(float(shares.sum()) - 1) > 1e-6:
        raise ValueError(f"shares must not be negative and add up to 1, got {shares.tolist()}")
    features, units = weight.shape[0], active.shape[1]
    if features % units:
        raise ValueError(f"{units} units do not divide the {features} rows of the weight")
    active = active.to(weight.device).repeat_interleave(features // units, dim=1)
    left_UU = torch.zeros(features, features, dtype=torch.float64, device=weight.device)
    missing_UU = torch.zeros_like(left_UU)
    scale = 0.0
    for moment, active_U, share in zip(moments, active, shares.tolist(), strict=True):
        moment_UU = (moment.dense() if isinstance(moment, LowRank) else moment).to(weight.device)
        pooled_UU = moment_UU.double() * (share * active_U.double())[:, None]
        kept_UU = pooled_UU * active_U
        left_UU += kept_UU
        missing_UU += pooled_UU - kept_UU
        scale += share * float(moment_UU.diagonal().double().mean())
    if scale == 0.0:
        return weight.clone()
    # Solved for the change of W: (S + l I) (W' - W) = (sum_c p_c M_c A_c (1 - M_c)) W, exactly 0 without a cut.
    left_UU.diagonal().add_(ridge * scale)
    factor_UU, info = torch.linalg.cholesky_ex(left_UU)
    change_UD = torch.cholesky_solve(missing_UU @ weight.double(), factor_UU)
    if int(info) or not bool(change_UD.isfinite().all()):
        raise ValueError(
            f"the second moments are not positive definite with ridge {ridge}; "
            f"check that they are finite and symmetric, or raise ridge"
        )
    return (weight.double() + change_UD).to(weight.dtype)
