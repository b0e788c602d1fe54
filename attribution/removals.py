"""What removing each of many sets of units would cost, all sets out of the same active units.

Axes: inputs A of the active units, R of the removed ones; output dim D.
"""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from attribution.moments import LowRank, Second, default_damping, schur_residual


class Removals:
    """J (``attribution.moments.schur_residual``) of sets removed out of one set of active units, the rest kept.

    With P the inverse of the damped second moment of all active inputs, the Schur complement of a removed set is the
    inverse of P_RR. So P is made once, for inputs^3, and a set then costs |R|^3 instead of inputs^3. A second moment in
    low-rank form is not inverted (it comes from sites with too many units): there a set costs inputs x rank^2.
    """

    def __init__(
        self,
        inputs: Second,
        curvature: Second,
        weight: Float[Tensor, "inputs dim"],
        active: Bool[Tensor, " units"],
        *,
        damping: float | None = None,
    ) -> None:
        self._asked = (inputs, curvature, weight, damping)
        self._active = active
        self._inverse_AA: Float64[Tensor, "active active"] | None = None
        if isinstance(inputs, LowRank):
            return
        self._width = len(weight) // len(active)
        rows_A = active.repeat_interleave(self._width).nonzero().squeeze(1)
        damped_AA = inputs.index_select(0, rows_A).index_select(1, rows_A).double()
        squares = float(damped_AA.diagonal().mean()) if len(rows_A) else 0.0
        damped_AA.diagonal().add_(squares * (default_damping(len(rows_A)) if damping is None else damping))
        factor_AA, info = torch.linalg.cholesky_ex(damped_AA)
        if squares > 0.0 and not int(info):
            self._inverse_AA = torch.cholesky_inverse(factor_AA)
            self._written_AD = weight[rows_A].double() @ _root(curvature)

    @property
    def units(self) -> int:
        """Units of the site, active or not."""
        return len(self._active)

    def residual(self, removed: Bool[Tensor, " units"]) -> float:
        """Return J of removing these units, nats. Raises ValueError for units that are not active."""
        if bool((removed & ~self._active).any()):
            raise ValueError("only active units can be removed; the set names others as well")
        if self._inverse_AA is None:
            inputs, curvature, weight, damping = self._asked
            return schur_residual(inputs, curvature, weight, self._active & ~removed, removed, damping=damping)
        gone_R = removed[self._active].repeat_interleave(self._width).nonzero().squeeze(1)
        inverse_RR = self._inverse_AA.index_select(0, gone_R).index_select(1, gone_R)
        lost_RD = torch.linalg.solve_triangular(
            torch.linalg.cholesky(inverse_RR), self._written_AD.index_select(0, gone_R), upper=False
        )
        return float(lost_RD.square().sum()) / 2


def _root(curvature: Second) -> Float64[Tensor, "dim columns"]:
    """Return a matrix that times its transpose is the curvature."""
    if isinstance(curvature, LowRank):
        return torch.cat([curvature.factor, curvature.diagonal.sqrt().diag()], dim=1)
    values_D, vectors_DD = torch.linalg.eigh(curvature.double())
    return vectors_DD * values_D.clamp(min=0).sqrt()
