"""What removing each of many sets of units would cost, all sets out of the same active units.

Axes: inputs A of the active units, R of the removed ones; output dim D.
"""

import torch
from jaxtyping import Bool, Float, Float64, Shaped
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

    @property
    def inverted(self) -> bool:
        """Whether the second moment could be inverted, which ``marginals`` needs."""
        return self._inverse_AA is not None

    def residual(self, removed: Bool[Tensor, " units"]) -> float:
        """Return J of removing these units, nats. Raises ValueError for units that are not active."""
        self._check(removed)
        if self._inverse_AA is None:
            inputs, curvature, weight, damping = self._asked
            return schur_residual(inputs, curvature, weight, self._active & ~removed, removed, damping=damping)
        gone_R = removed[self._active].repeat_interleave(self._width).nonzero().squeeze(1)
        inverse_RR = self._inverse_AA.index_select(0, gone_R).index_select(1, gone_R)
        lost_RD = torch.linalg.solve_triangular(
            torch.linalg.cholesky(inverse_RR), self._written_AD.index_select(0, gone_R), upper=False
        )
        return float(lost_RD.square().sum()) / 2

    def marginals(self, removed: Bool[Tensor, " units"]) -> Float64[Tensor, " units"]:
        """Return J's fall if a removed unit were kept, and its rise if a kept one were removed too, unit by unit; nats.

        Exact; 0 for units that are not active. With M = (P_RR)^-1, J = 1/2 tr(W_R^T M W_R). Leaving unit v out of R
        takes 1/2 tr(M_vv^-1 B_v B_v^T) off, B = M W_R; adding unit u puts 1/2 tr(S_uu^-1 V_u V_u^T) on, where
        S = P_KK - P_KR M P_RK and V = W_K - P_KR M W_R. Raises ValueError for a set with units that are not active,
        and where the second moment was not inverted.
        """
        self._check(removed)
        if self._inverse_AA is None:
            raise ValueError("marginals need the inverse of a second moment that is sketched, empty or not positive")
        gone_A = removed[self._active].repeat_interleave(self._width)
        rows_R, rows_K = gone_A.nonzero().squeeze(1), (~gone_A).nonzero().squeeze(1)
        inverse_RA = self._inverse_AA.index_select(0, rows_R)
        across_KR = inverse_RA.index_select(1, rows_K).t()
        within_RR = torch.cholesky_inverse(torch.linalg.cholesky(inverse_RA.index_select(1, rows_R)))
        through_KR = across_KR @ within_RR
        taken_nww = self._by_unit(through_KR) @ self._by_unit(across_KR).transpose(1, 2)
        left_nww = self._blocks(self._inverse_AA, rows_K) - taken_nww
        written_RD = self._written_AD.index_select(0, rows_R)
        changed_KD = self._written_AD.index_select(0, rows_K) - through_KR @ written_RD
        gone, marginal_U = removed[self._active], torch.zeros(self.units, dtype=torch.float64)
        found = torch.zeros(len(gone), dtype=torch.float64)
        found[gone] = _weighed(self._blocks(within_RR), self._by_unit(within_RR @ written_RD))
        found[~gone] = _weighed(left_nww, self._by_unit(changed_KD))
        marginal_U[self._active] = found
        return marginal_U

    def _check(self, removed: Bool[Tensor, " units"]) -> None:
        if bool((removed & ~self._active).any()):
            raise ValueError("only active units can be removed; the set names others as well")

    def _by_unit(self, rows_XY: Shaped[Tensor, "x y"]) -> Shaped[Tensor, "n width y"]:
        """Return the rows of each unit together."""
        return rows_XY.unflatten(0, (len(rows_XY) // self._width, self._width))

    def _blocks(self, matrix_XX: Tensor, rows: Tensor | None = None) -> Float64[Tensor, "n width width"]:
        """Return each unit's diagonal block of a matrix; ``rows``: those of whole units, all where None."""
        rows = torch.arange(len(matrix_XX)) if rows is None else rows
        rows_nw = self._by_unit(rows[:, None])[:, :, 0]
        return matrix_XX[rows_nw[:, :, None], rows_nw[:, None, :]]


def _weighed(blocks_nww: Float64[Tensor, "n w w"], rows_nwD: Float64[Tensor, "n w d"]) -> Float64[Tensor, " n"]:
    """Return 1/2 tr(block^-1 x x^T) for each unit's rows x."""
    lost_nwD = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks_nww), rows_nwD, upper=False)
    return lost_nwD.square().sum((1, 2)) / 2


def _root(curvature: Second) -> Float64[Tensor, "dim columns"]:
    """Return a matrix that times its transpose is the curvature."""
    if isinstance(curvature, LowRank):
        return torch.cat([curvature.factor, curvature.diagonal.sqrt().diag()], dim=1)
    values_D, vectors_DD = torch.linalg.eigh(curvature.double())
    return vectors_DD * values_D.clamp(min=0).sqrt()
