"""Second moments, and what removing a set of units costs after the rest has made up for it.

Moments are sums of x x^T by category, exact or as a random sketch, and add up over batches, shards and workers.
The cost is the K-FAC Schur residual (Kronecker factors A of the inputs and H of the output gradients, as in Martens and
Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015; removal with re-fitted
survivors as in Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993).

A convolution reads patches: each kernel place of a channel is an input. What a change of its output costs is
1/2 E[(sum_p g_p . dy_p)^2] over the places p of the map, and the two factors can hold but part of it. Here A = E[sum_p
a_p a_p^T], so that the least-squares fit of the kept to the removed patches is exact, and H = E[G G^T] / places with
G = sum_p g_p, as if dy were the same all over the map: H of "KFAC-reduce", with A of "KFAC-expand" (Eschenhagen et al.,
"Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures", 2023). Had the gradients of places
nothing to do with each other, H = E[sum_p g_p g_p^T] / places (Grosse and Martens, "A Kronecker-factored approximate
Fisher matrix for convolution layers", 2016) would be right; behind a mean over the map they have one sign, and on a
ResNet that form told 21 to 44 times too little, this one 1.3 to 2.7 times too much, and on a trained ResNet-20 8 times
(benchmarks/LOG.md).

Axes: categories C, terms T, features X of a moment, sketch columns S; inputs U of a weight (``width`` side by side
belong to one unit), kept inputs K, removed inputs R, output dim D. A = E[a a^T], H = E[g_y g_y^T], y = a W.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

_LEAST_DAMPING = 1e-6


@dataclass(frozen=True)
class LowRank:
    """A positive semi-definite matrix ``factor factor^T + diag(diagonal)``."""

    factor: Float64[Tensor, "x rank"]
    diagonal: Float64[Tensor, " x"]

    def dense(self) -> Float64[Tensor, "x x"]:
        """Return the matrix itself."""
        return self.factor @ self.factor.T + self.diagonal.diag()

    def take(self, index: Tensor) -> "LowRank":
        """Return the rows and columns of ``index``, in that order."""
        return LowRank(self.factor[index], self.diagonal[index])


Second = Tensor | LowRank
"""A mean second moment: the matrix, or its low-rank form."""


@dataclass(frozen=True)
class ExactMoment:
    """Sums of x x^T: features^2 float64 numbers a category."""

    sums: Float64[Tensor, "categories x x"]

    @classmethod
    def zeros(cls, categories: int, features: int, device: torch.device | None = None) -> "ExactMoment":
        """Return the sums over nothing."""
        return cls(torch.zeros(categories, features, features, dtype=torch.float64, device=device))

    @property
    def features(self) -> int:
        """Length of x."""
        return self.sums.shape[-1]

    def add(self, category: int, terms_TX: Float[Tensor, "terms x"]) -> None:
        """Add terms of one category: a matrix product in their own precision, added up in float64."""
        self.sums[category] += terms_TX.T @ terms_TX

    def trace(self) -> Float64[Tensor, " categories"]:
        """Return the sum of squares of all features."""
        return self.sums.diagonal(dim1=1, dim2=2).sum(1)

    def mean(self, category: int, count: float) -> Float64[Tensor, "x x"]:
        """Return E[x x^T] over ``count`` terms."""
        return self.sums[category] / count

    def tensors(self) -> list[Tensor]:
        """Return the sums, not copies of them."""
        return [self.sums]

    def like(self, tensors: list[Tensor]) -> "ExactMoment":
        """Return a moment of the same kind with other sums."""
        return ExactMoment(*tensors)


@dataclass(frozen=True)
class SketchedMoment:
    """Sums of x (x^T Omega) and of x^2: features x (columns + 1) float64 numbers a category.

    Omega is random and orthonormal, the same for every shard, so sketches add up. The mean is the Nystroem
    approximation (Tropp et al., "Fixed-rank approximation of a positive-semidefinite matrix from streaming data",
    2017) with the exact diagonal put back: exact where the moment's rank is at most ``columns``.
    """

    products: Float64[Tensor, "categories x columns"]
    squares: Float64[Tensor, "categories x"]

    @classmethod
    def zeros(
        cls, categories: int, features: int, columns: int, device: torch.device | None = None
    ) -> "SketchedMoment":
        """Return the sums over nothing; ``columns`` is cut to the number of features."""
        columns = min(columns, features)
        return cls(
            torch.zeros(categories, features, columns, dtype=torch.float64, device=device),
            torch.zeros(categories, features, dtype=torch.float64, device=device),
        )

    @property
    def features(self) -> int:
        """Length of x."""
        return self.squares.shape[-1]

    def add(self, category: int, terms_TX: Float[Tensor, "terms x"]) -> None:
        """Add terms of one category: matrix products in their own precision, added up in float64."""
        omega_XS = _omega(self.features, self.products.shape[-1]).to(terms_TX)
        self.products[category] += terms_TX.T @ (terms_TX @ omega_XS)
        self.squares[category] += terms_TX.square().sum(0, dtype=torch.float64)

    def trace(self) -> Float64[Tensor, " categories"]:
        """Return the sum of squares of all features."""
        return self.squares.sum(1)

    def mean(self, category: int, count: float) -> LowRank:
        """Return E[x x^T] over ``count`` terms."""
        products_XS, squares_X = self.products[category] / count, self.squares[category] / count
        omega_XS = _omega(*products_XS.shape).to(products_XS)
        shift = torch.finfo(torch.float32).eps * float(squares_X.sum())
        if shift == 0.0:
            return LowRank(products_XS, squares_X)
        shifted_XS = products_XS + shift * omega_XS
        core_SS = omega_XS.T @ shifted_XS
        values_S, vectors_SS = torch.linalg.eigh((core_SS + core_SS.T) / 2)
        kept = values_S > shift / 2
        factor_XS = shifted_XS @ (vectors_SS[:, kept] * values_S[kept].rsqrt())
        return LowRank(factor_XS, (squares_X - factor_XS.square().sum(1)).clamp(min=0))

    def tensors(self) -> list[Tensor]:
        """Return the sums, not copies of them."""
        return [self.products, self.squares]

    def like(self, tensors: list[Tensor]) -> "SketchedMoment":
        """Return a moment of the same kind with other sums."""
        return SketchedMoment(*tensors)


Moment = ExactMoment | SketchedMoment


@lru_cache(maxsize=2)
def _omega(features: int, columns: int) -> Float64[Tensor, "x columns"]:
    generator = torch.Generator().manual_seed(features * 1_000_003 + columns)
    return torch.linalg.qr(torch.randn(features, columns, generator=generator, dtype=torch.float64)).Q


def default_damping(units: int) -> float:
    """Return a damping above the rounding noise of moments of so many units that were added up from float32.

    >>> default_damping(4) <= default_damping(4096)
    True
    """
    return max(_LEAST_DAMPING, 8 * torch.finfo(torch.float32).eps * units**0.5)


def schur_residual(
    inputs: Second,
    curvature: Second,
    weight: Float[Tensor, "inputs dim"],
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
    raises J. Computed in float64. Where A has the low-rank form, by Woodbury's identity in O(inputs rank^2).

    Two units that are always active alike: either makes up for the other, but nothing for both.

    >>> inputs, curvature, weight = torch.ones(2, 2), torch.eye(1), torch.ones(2, 1)
    >>> first, none = torch.tensor([True, False]), torch.tensor([False, False])
    >>> round(schur_residual(inputs, curvature, weight, kept=~first, removed=first), 4)
    0.0
    >>> round(schur_residual(inputs, curvature, weight, kept=none, removed=~none), 4)
    2.0
    """
    inputs_K, inputs_R = _sets(inputs, curvature, weight, kept, removed, damping)
    both = torch.cat([inputs_K, inputs_R])
    noise = _noise(inputs, both, damping)
    if len(inputs_R) == 0 or noise == 0.0:
        return 0.0
    if isinstance(inputs, LowRank):
        kept_KS, noise_K = inputs.factor[inputs_K], inputs.diagonal[inputs_K] + noise
        factor_SS = _cholesky(_woodbury(kept_KS, noise_K), len(both), damping)
        # The Schur complement is D_R + L_R M L_R^T, with M the inverse of what Woodbury factors.
        weight_RD = weight[inputs_R].double()
        lost_RD = (inputs.diagonal[inputs_R] + noise).sqrt()[:, None] * weight_RD
        seen_SD = inputs.factor[inputs_R].T @ weight_RD
        through_SD = torch.linalg.solve_triangular(factor_SS, seen_SD, upper=False)
        lost_RD = torch.cat([lost_RD, through_SD])
    else:
        factor_UU = _factor(inputs, both, noise, damping)
        # With the removed units last, the Schur complement is the factor's last block times its transpose.
        lost_RD = factor_UU[len(inputs_K) :, len(inputs_K) :].T @ weight[inputs_R].double()
    return max(0.0, float(_quadratic(lost_RD, curvature).sum()) / 2)


def marginals(
    inputs: Second,
    curvature: Second,
    weight: Float[Tensor, "inputs dim"],
    kept: Bool[Tensor, " units"],
    removed: Bool[Tensor, " units"],
    *,
    damping: float | None = None,
) -> Float64[Tensor, " units"]:
    """Return how much J would rise if one more kept unit were removed, for each kept unit; 0 for all other units.

    Exact, damping as in ``schur_residual``: 1/2 tr(H V_k^T ((A_KK^-1)_kk)^-1 V_k), where V_k are the unit's output
    weights after the best correction for the units that are removed already; for a unit of one input this is
    1/2 v_k H v_k^T / (A_KK^-1)_kk.

    >>> inputs, curvature, weight = torch.eye(2), torch.eye(1), torch.tensor([[2.0], [1.0]])
    >>> both, none = torch.tensor([True, True]), torch.tensor([False, False])
    >>> [round(value, 3) for value in marginals(inputs, curvature, weight, kept=both, removed=none).tolist()]
    [2.0, 0.5]
    """
    inputs_K, inputs_R = _sets(inputs, curvature, weight, kept, removed, damping)
    rises_U = torch.zeros(len(kept), dtype=torch.float64, device=weight.device)
    noise = _noise(inputs, torch.cat([inputs_K, inputs_R]), damping)
    if len(inputs_K) == 0 or noise == 0.0:
        return rises_U
    width = len(weight) // len(kept)
    if isinstance(inputs, LowRank):
        kept_KS, noise_K = inputs.factor[inputs_K], inputs.diagonal[inputs_K] + noise
        factor_SS = _cholesky(_woodbury(kept_KS, noise_K), len(inputs_K), damping)
        # A_KK^-1 = D^-1 - B^T B with B = factor^-1 L_K^T D^-1.
        scaled_SK = torch.linalg.solve_triangular(factor_SS, (kept_KS / noise_K[:, None]).T, upper=False)
        through_KD = kept_KS @ (inputs.factor[inputs_R].T @ weight[inputs_R].double())
        corrected_KD = through_KD / noise_K[:, None] - scaled_SK.T @ (scaled_SK @ through_KD)
        columns_nSw = scaled_SK.T.reshape(-1, width, scaled_SK.shape[0]).transpose(1, 2)
        blocks_nww = torch.diag_embed((1 / noise_K).view(-1, width)) - columns_nSw.transpose(1, 2) @ columns_nSw
    else:
        inverse_KK = torch.cholesky_inverse(_factor(inputs, inputs_K, noise, damping))
        cross_KR = inputs[inputs_K][:, inputs_R].double()
        corrected_KD = inverse_KK @ (cross_KR @ weight[inputs_R].double())
        units = len(inputs_K) // width
        blocks_nww = inverse_KK.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    corrected_nwD = (weight[inputs_K].double() + corrected_KD).view(-1, width, weight.shape[1])
    lost_nwD = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks_nww), corrected_nwD, upper=False)
    curved_n = _quadratic(lost_nwD.flatten(0, 1), curvature).view(-1, width).sum(1)
    rises_U[kept.nonzero().squeeze(1)] = curved_n.clamp(min=0) / 2
    return rises_U


def _quadratic(rows_RD: Tensor, curvature: Second) -> Float64[Tensor, " rows"]:
    """Return x H x^T for each row x."""
    if isinstance(curvature, LowRank):
        return (rows_RD @ curvature.factor).square().sum(1) + rows_RD.square() @ curvature.diagonal
    return ((rows_RD @ curvature.double()) * rows_RD).sum(1)


def _sets(
    inputs: Second, curvature: Second, weight: Tensor, kept: Tensor, removed: Tensor, damping: float | None
) -> tuple[Tensor, Tensor]:
    """Check everything and return the weight's rows of the kept and of the removed units."""
    rows, dim = weight.shape
    shapes = [[len(m.diagonal)] * 2 if isinstance(m, LowRank) else list(m.shape) for m in (inputs, curvature)]
    units = len(kept)
    if shapes != [[rows, rows], [dim, dim]] or kept.shape != removed.shape or units == 0 or rows % units:
        raise ValueError(
            f"weight [{rows} {dim}] needs inputs [{rows} {rows}], curvature [{dim} {dim}] and two sets of units that "
            f"divide {rows}, got {shapes[0]}, {shapes[1]}, {list(kept.shape)} and {list(removed.shape)}"
        )
    if damping is not None and not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping}; units that depend on each other need it")
    both = (kept & removed).nonzero().squeeze(1).tolist()
    if both:
        raise ValueError(f"units {both[:5]} are both kept and removed; a unit is one of them or inactive")
    wide = [units_U.repeat_interleave(rows // units).nonzero().squeeze(1) for units_U in (kept, removed)]
    return wide[0], wide[1]


def _noise(inputs: Second, rows: Tensor, damping: float | None) -> float:
    """Return what is added to A's diagonal; 0 if the units are never active."""
    if len(rows) == 0:
        return 0.0
    if isinstance(inputs, LowRank):
        squares = inputs.factor[rows].square().sum(1) + inputs.diagonal[rows]
    else:
        squares = inputs.diagonal()[rows].double()
    return float(squares.mean()) * (default_damping(len(rows)) if damping is None else damping)


def _factor(inputs: Tensor, rows: Tensor, noise: float, damping: float | None) -> Tensor:
    """Return the Cholesky factor of the damped A over ``rows`` in that order."""
    damped = inputs.index_select(0, rows).index_select(1, rows).double()
    damped.diagonal().add_(noise)
    if damping is None and int(torch.linalg.cholesky_ex(damped).info):
        # Inputs that rise and fall together have nearly all of the trace in one direction, and rounding goes by that.
        damped.diagonal().add_(float(damped.diagonal().sum()) * torch.finfo(torch.float32).eps)
    return _cholesky(damped, len(rows), damping)


def _woodbury(kept_KS: Tensor, noise_K: Tensor) -> Tensor:
    """Return I + L_K^T D_K^-1 L_K."""
    core_SS = kept_KS.T @ (kept_KS / noise_K[:, None])
    core_SS.diagonal().add_(1.0)
    return core_SS


def _cholesky(matrix: Tensor, units: int, damping: float | None) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not bool(factor.isfinite().all()):
        damping = default_damping(units) if damping is None else damping
        raise ValueError(
            f"the second moment of {units} units is not positive definite with damping {damping:.2g}; "
            f"check that it is finite and symmetric, or raise damping"
        )
    return factor
