"""Which categories pull the weights the same way: cosines of their loss gradients, from a sketch of fixed size.

A count-sketch (Charikar, Chen and Farach-Colton 2002) adds every element of a gradient, with a random sign, into one of
``size`` buckets; both come from a hash of the parameter's name and the element's place, so no categories x parameters
are ever held, and the sketch of a sum is the sum of the sketches: batches and shards add up. Inner products survive in
expectation; a cosine r of gradients without noise is off by a standard deviation of at most (1 - r^2) / sqrt(size), for
a large size, and more rows do not lessen that. Noise is hashed too, and adds to it what more rows do lessen.

A gradient over few rows is mostly noise, and noise makes norms longer and cosines smaller. Rows are therefore put into
folds by a hash of their ids, and only products of different folds are used: their noise is independent.

Axes: folds F, categories C, sketch size S.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from scipy.special import stdtrit
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from attribution.hashing import mixed, row_seed, shifted
from attribution.subject import Probe, Subject, segments

_CHUNK = 2**18
"""Elements hashed at a time: a scratch of 2 MB that stays in the cache."""


@dataclass(frozen=True)
class GradientSketch:
    """Sums of the gradients of row losses with respect to the trained parameters, sketched, by fold and category."""

    categories: tuple[str, ...]
    sums: Float64[Tensor, "folds categories size"]
    """Sum over rows of the sketched gradient of the row's loss; nats per unit of the parameter."""
    counts: Float64[Tensor, "folds categories"]
    """Rows summed over."""
    seed: int
    """Of the hashes of elements and of rows."""
    parameters: int
    """Elements of all parameters that were sketched."""

    def __post_init__(self) -> None:
        folds, categories, size = self.sums.shape
        if folds < 2 or size < 1 or categories != len(self.categories):
            raise ValueError(
                f"a sketch needs two folds, size 1 and {len(self.categories)} categories at least, got "
                f"{list(self.sums.shape)}; ask for more folds or a larger size"
            )

    def __add__(self, other: "GradientSketch") -> "GradientSketch":
        mine, theirs = ((s.categories, tuple(s.sums.shape), s.seed, s.parameters) for s in (self, other))
        if mine != theirs:
            raise ValueError(
                f"cannot add sketches of different (categories, shape, seed, parameters): {mine} and {theirs}; "
                f"measure the shards with the same settings"
            )
        sums, counts = (a + b for a, b in zip(self.tensors(), other.tensors(), strict=True))
        return GradientSketch(self.categories, sums, counts, self.seed, self.parameters)

    def tensors(self) -> list[Tensor]:
        """Return all sums, not copies of them, to be added up in place over workers."""
        return [self.sums, self.counts]

    def squared_norms(self) -> Float64[Tensor, " categories"]:
        """Return the squared norm of each category's mean gradient a row, free of noise on average (may be below 0)."""
        self._check()
        products_FFCC, weights_FFCC = self._products()
        return (_across(products_FFCC) / _across(weights_FFCC)).diagonal()

    def cosines(self) -> Float64[Tensor, "categories categories"]:
        """Return the cosines of the categories' mean gradients, from -1 to 1, the diagonal 1.

        <g_c, g_d> / (|g_c| |g_d|), each product the mean over all pairs of rows of different folds. Raises ValueError
        for a category without rows in two folds, or whose gradient cannot be told from noise.
        """
        self._check()
        cosine_CC = _cosine(*self._products())
        bad = (~cosine_CC.isfinite().any(1)).nonzero()
        if len(bad):
            name, rows = self.categories[int(bad[0])], int(self.counts[:, int(bad[0])].sum())
            raise ValueError(
                f"the gradient of category {name!r} cannot be told from noise over {rows} rows (its squared norm is "
                f"estimated at 0 or less); measure more rows"
            )
        return _tidy(cosine_CC)

    def interval(self, level: float = 0.95) -> tuple[Float64[Tensor, "c c"], Float64[Tensor, "c c"]]:
        """Return the lower and upper ends of confidence intervals for ``cosines`` of all rows that could be drawn.

        Jackknife over folds, Student's t with a degree of freedom less than there are folds, and the sketch's own error
        added in squares: the interval is for the cosine of the gradients themselves. In simulations with 8 folds and
        level .95, .96 to .99 of the intervals held it. From -1 to 1 where the gradient without one of the folds cannot
        be told from noise.
        """
        if not 0 < level < 1:
            raise ValueError(f"a level must be between 0 and 1, got {level}; ask for 0.95")
        cosine_CC = self.cosines()
        products_FFCC, weights_FFCC = self._products()
        folds = len(self.sums)
        without = []
        for fold in range(folds):
            rest = [other for other in range(folds) if other != fold]
            without.append(_cosine(products_FFCC[rest][:, rest], weights_FFCC[rest][:, rest]))
        without_FCC = torch.stack(without)
        spread_CC = (without_FCC - without_FCC.mean(0)).square().sum(0) * (folds - 1) / folds
        error_CC = (spread_CC + (1 - cosine_CC.square()).square() / self.sums.shape[2]).sqrt()
        half_CC = error_CC.nan_to_num(nan=torch.inf) * float(stdtrit(folds - 1, (1 + level) / 2))
        return _tidy(cosine_CC - half_CC), _tidy(cosine_CC + half_CC)

    def _products(self) -> tuple[Tensor, Tensor]:
        """Return inner products, and numbers of pairs of rows, of all pairs of folds and of categories."""
        folds, categories, _ = self.sums.shape
        shape = (folds, categories, folds, categories)
        flat_XS, rows_X = self.sums.flatten(0, 1), self.counts.flatten()
        products, weights = (flat_XS @ flat_XS.T).view(shape), torch.outer(rows_X, rows_X).view(shape)
        return products.transpose(1, 2), weights.transpose(1, 2)

    def _check(self) -> None:
        for name, counts_F in zip(self.categories, self.counts.T, strict=True):
            if int((counts_F > 0).sum()) < 2:
                raise ValueError(
                    f"category {name!r} has {int(counts_F.sum())} rows in {int((counts_F > 0).sum())} folds, and at "
                    f"least two folds must have some; measure more rows of it"
                )


def measure_gradients(
    subject: Subject, batches: Iterable[Probe], *, size: int = 2**14, folds: int = 8, seed: int = 0
) -> GradientSketch:
    """Sketch the gradient of every category's loss with respect to the parameters that have ``requires_grad``.

    True labels. Every group of rows of a batch of the same category and fold costs a forward and a backward pass of its
    own and hashes every parameter once: large batches in category order are cheapest. ``.grad`` and ``requires_grad``
    stay as they were. Memory: a gradient and ``folds * categories * size`` numbers. Sketches of shards add up. Raises
    ValueError for settings, rows or gradients that make no sense, by name.

    >>> measure_gradients(asked, rows, folds=2).cosines().diagonal().tolist()
    [1.0, 1.0]
    """
    if size < 1 or folds < 2:
        raise ValueError(f"size must be at least 1 and folds at least 2, got {size} and {folds}; raise them")
    trained = {name: p for name, p in subject.inner.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter has requires_grad; switch it on for those whose gradients are to be compared")
    if any(isinstance(module, FSDPModule) for module in subject.network.modules()) or any(
        isinstance(parameter, DTensor) for parameter in trained.values()
    ):
        raise ValueError("the network's parameters are sharded over workers; gather them and measure a whole network")
    sums_FCS = torch.zeros(folds, len(subject.categories), size, dtype=torch.float64)
    sums_FCS = sums_FCS.to(next(iter(trained.values())).device)
    counts_FC = torch.zeros(folds, len(subject.categories), dtype=torch.float64)
    with subject.still():
        for parameter in trained.values():
            parameter.requires_grad_(True)  # Stillness puts it back as it was.
        for batch in batches:
            for rows, fold, category in _groups(batch, subject.categories, folds, seed):
                gradients = _gradients(subject, batch, rows, trained, subject.categories[category])
                for name, gradient in gradients.items():
                    _add(sums_FCS[fold, category], gradient, _key(seed, name))
                counts_FC[fold, category] += len(rows)
    if not bool(counts_FC.any()):
        raise ValueError("no batches to measure; give at least one row")
    elements = sum(parameter.numel() for parameter in trained.values())
    return GradientSketch(subject.categories, sums_FCS.cpu(), counts_FC, seed, elements)


def _groups(batch: Probe, names: Sequence[str], folds: int, seed: int) -> Iterable[tuple[Tensor, int, int]]:
    """Divide a batch's rows by category and fold."""
    if not len(batch.categories):
        return
    fold_R = torch.tensor([row_seed(seed, row) % folds for row in batch.ids.tolist()])
    for part in segments(batch, names):
        rows = torch.arange(len(fold_R))[part.where if isinstance(part.where, slice) else part.where.cpu()]
        for fold in fold_R[rows].unique().tolist():
            yield rows[fold_R[rows] == fold], fold, part.category


def _gradients(
    subject: Subject, batch: Probe, rows: Tensor, trained: dict[str, nn.Parameter], category: str
) -> dict[str, Tensor]:
    inputs, targets, categories = (
        tensor[rows.to(tensor.device)] for tensor in (batch.inputs.detach(), batch.targets, batch.categories)
    )
    loss_R = subject.row_nats(subject.forward(inputs, categories), targets)
    if not loss_R.requires_grad:
        raise ValueError("the loss does not depend on any parameter that has requires_grad; switch it on for others")
    found = torch.autograd.grad(loss_R.sum(), list(trained.values()), allow_unused=True)
    gradients = {name: g.detach() for name, g in zip(trained, found, strict=True) if g is not None}
    for name, gradient in gradients.items():
        if not bool(gradient.isfinite().all()):
            raise ValueError(
                f"parameter {name!r} has a NaN or infinite gradient on category {category!r}; "
                f"look at the network's weights and the inputs of that category"
            )
    return gradients


def _add(sums_S: Float64[Tensor, " size"], gradient: Float[Tensor, "*shape"], key: int) -> None:
    """Add a gradient's elements into their buckets, with their signs."""
    flat = gradient.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        some = flat[start : start + _CHUNK].double()
        bits = shifted(mixed(torch.arange(start, start + len(some), device=flat.device), key), 2)
        buckets = (bits >> 1).remainder_(len(sums_S))
        sums_S.index_add_(0, buckets, some * (1 - 2 * (bits & 1)))


def _key(seed: int, name: str) -> int:
    """Return a parameter's own 64 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "big", signed=True)


def _across(products_FFCC: Tensor) -> Tensor:
    """Sum over all pairs of different folds."""
    return products_FFCC.sum((0, 1)) - products_FFCC.diagonal(dim1=0, dim2=1).sum(-1)


def _cosine(products_FFCC: Tensor, weights_FFCC: Tensor) -> Tensor:
    """Return cosines that may leave -1 to 1; NaN for gradients that cannot be told from noise."""
    inner_CC = _across(products_FFCC) / _across(weights_FFCC)
    squares_C = inner_CC.diagonal()
    norms_C = torch.where(squares_C > 0, squares_C, torch.nan).sqrt()
    return inner_CC / torch.outer(norms_C, norms_C)


def _tidy(cosine_CC: Tensor) -> Tensor:
    cosine_CC = cosine_CC.clamp(-1, 1)
    cosine_CC.fill_diagonal_(1.0)
    return cosine_CC
