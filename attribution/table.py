"""What a measuring pass knows: float64 sums that add up over batches, shards and workers, and their means.

Axes: units U of a site, categories C, ``dim`` D of what the site's reader writes. "Token" stands for whatever the
counts count: tokens of text, or whole examples where a row has one position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

Score = Literal["fisher", "absolute"]
"""The unsigned scores, by which sets of units are chosen; signed terms would cancel in a set."""


@dataclass(frozen=True)
class SiteSums:
    """Sums over all tokens seen at one site. a: a unit's activation; g: gradient of the row's loss with respect to it.

    Standard errors take the row for the independent draw, since tokens of one row are correlated: the ``*_squares``
    add up the squares of per-row sums.
    """

    fisher: Float64[Tensor, "units categories"]
    """Sum of 1/2 (g a)^2 over tokens, labels sampled from the model; nats."""
    absolute: Float64[Tensor, "units categories"]
    """Sum of abs(g a) over tokens, true labels; nats."""
    taylor: Float64[Tensor, "units categories"]
    """Sum of -g a over tokens, true labels: the first-order rise of the loss if the unit were zeroed; nats, signed."""
    fisher_squares: Float64[Tensor, "units categories"]
    """Sum over rows of the square of the row's ``fisher``; nats^2."""
    absolute_squares: Float64[Tensor, "units categories"]
    """Sum over rows of the square of the row's ``absolute``; nats^2."""
    report_squares: Float64[Tensor, "units categories"]
    """Sum over rows of the square of the row's ``taylor + fisher``; nats^2."""
    inputs: Float64[Tensor, "categories units units"]
    """Sum of a a^T over tokens."""
    outputs: Float64[Tensor, "categories dim dim"]
    """Sum of g_y g_y^T over tokens, labels sampled from the model; y: the reader's output."""

    def __post_init__(self) -> None:
        if self.fisher.ndim != 2 or self.outputs.ndim != 3:
            raise ValueError(
                f"fisher must be [units categories] and outputs [categories dim dim], "
                f"got {list(self.fisher.shape)} and {list(self.outputs.shape)}"
            )
        units, categories = self.fisher.shape
        dim = self.outputs.shape[-1]
        wanted = {"inputs": (categories, units, units), "outputs": (categories, dim, dim)}
        for field in fields(self):
            tensor = getattr(self, field.name)
            shape = wanted.get(field.name, (units, categories))
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
                raise ValueError(
                    f"{field.name} must be float64 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}; "
                    f"all sums of a site speak of the same units and categories"
                )

    @classmethod
    def zeros(cls, units: int, dim: int, categories: int, device: torch.device | None = None) -> "SiteSums":
        """Return the sums over nothing."""
        shapes = {"inputs": (categories, units, units), "outputs": (categories, dim, dim)}
        return cls(
            **{
                field.name: torch.zeros(shapes.get(field.name, (units, categories)), dtype=torch.float64, device=device)
                for field in fields(cls)
            }
        )

    def __add__(self, other: "SiteSums") -> "SiteSums":
        mine, theirs = ([*sums.fisher.shape, sums.outputs.shape[-1]] for sums in (self, other))
        if mine != theirs:
            raise ValueError(f"cannot add sums of [units, categories, dim] {mine} and {theirs}")
        return type(self)(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def tensors(self) -> list[Tensor]:
        """Return all sums, not copies of them, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def to(self, device: torch.device) -> "SiteSums":
        """Return the sums on another device."""
        return type(self)(*(tensor.to(device) for tensor in self.tensors()))


@dataclass(frozen=True)
class AttributionTable:
    """How much each unit of each site matters to each category. Tables of disjoint data add up.

    A category may be without rows in a table, since a shard need not hold all of them; its means are refused.
    """

    categories: tuple[str, ...]
    counts: Float64[Tensor, " categories"]
    """Tokens (examples) of each category."""
    rows: Float64[Tensor, " categories"]
    """Rows of each category."""
    sites: dict[str, SiteSums]

    def __post_init__(self) -> None:
        number = len(self.categories)
        if number == 0 or len(set(self.categories)) != number:
            raise ValueError(f"categories must be distinct names, at least one, got {list(self.categories)}")
        for name, tensor in (("counts", self.counts), ("rows", self.rows)):
            if tuple(tensor.shape) != (number,) or tensor.dtype != torch.float64:
                raise ValueError(f"{name} must be float64 [{number}], got {tensor.dtype} {list(tensor.shape)}")
            if not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise ValueError(f"{name} must be finite and not negative, got {tensor.tolist()}")
        if not self.sites:
            raise ValueError("a table needs at least one site")
        for site, sums in self.sites.items():
            if sums.fisher.shape[1] != number:
                raise ValueError(f"site {site!r} has {sums.fisher.shape[1]} categories, the table {number}")

    @classmethod
    def zeros(cls, categories: Sequence[str], sites: Mapping[str, tuple[int, int]]) -> "AttributionTable":
        """Return the table of no data; ``sites`` maps a site's name to (units, dim)."""
        number = len(categories)
        return cls(
            tuple(categories),
            torch.zeros(number, dtype=torch.float64),
            torch.zeros(number, dtype=torch.float64),
            {name: SiteSums.zeros(units, dim, number) for name, (units, dim) in sites.items()},
        )

    def __add__(self, other: "AttributionTable") -> "AttributionTable":
        if self.categories != other.categories or list(self.sites) != list(other.sites):
            raise ValueError(
                f"cannot add tables of different kinds: categories {list(self.categories)} and "
                f"{list(other.categories)}, sites {list(self.sites)} and {list(other.sites)}"
            )
        return type(self)(
            self.categories,
            self.counts + other.counts,
            self.rows + other.rows,
            {name: sums + other.sites[name] for name, sums in self.sites.items()},
        )

    def tensors(self) -> list[Tensor]:
        """Return every sum and count, not copies of them, in an order that depends on the sites' order alone.

        Made for an all-reduce in place: afterwards the table is the one of all workers' data.
        """
        return [self.counts, self.rows, *(tensor for sums in self.sites.values() for tensor in sums.tensors())]

    def score(self, site: str, kind: Score) -> Float64[Tensor, "units categories"]:
        """Return the mean unsigned attribution, in nats per token: for choosing sets of units."""
        sums = self._site(site)
        return (sums.fisher if kind == "fisher" else sums.absolute) / self._counts()

    def report(self, site: str) -> Float64[Tensor, "units categories"]:
        """Return the estimated rise of the loss if the unit were zeroed, in nats per token.

        Second-order Taylor expansion with the Fisher information for the Hessian: signed Taylor + 1/2 Fisher. For
        reporting single units, not for choosing sets.
        """
        sums = self._site(site)
        return (sums.taylor + sums.fisher) / self._counts()

    def standard_error(
        self, site: str, kind: Literal["fisher", "absolute", "report"]
    ) -> Float64[Tensor, "units categories"]:
        """Return the standard error of the mean of that kind over rows, in nats per token; infinite for one row."""
        sums, counts = self._site(site), self._counts()
        total, squares = {
            "fisher": (sums.fisher, sums.fisher_squares),
            "absolute": (sums.absolute, sums.absolute_squares),
            "report": (sums.taylor + sums.fisher, sums.report_squares),
        }[kind]
        variance = (squares - total.square() / self.rows).clamp(min=0) * self.rows / (self.rows - 1)
        return torch.where(self.rows > 1, variance.sqrt() / counts, torch.inf)

    def second_moment(self, site: str) -> Float64[Tensor, "categories units units"]:
        """Return A_c = E[a a^T] over the tokens of each category."""
        return self._site(site).inputs / self._counts()[:, None, None]

    def curvature(self, site: str) -> Float64[Tensor, "categories dim dim"]:
        """Return H_c = E[g_y g_y^T] over the tokens of each category, in nats^2 per squared output."""
        return self._site(site).outputs / self._counts()[:, None, None]

    def dead(self, site: str) -> Bool[Tensor, " units"]:
        """Return which units had activation 0 at every token of every category."""
        return self._site(site).inputs.diagonal(dim1=1, dim2=2).sum(0) == 0

    def _site(self, site: str) -> SiteSums:
        if site not in self.sites:
            raise ValueError(f"no site {site!r} in the table; it has {', '.join(self.sites)}")
        return self.sites[site]

    def _counts(self) -> Tensor:
        empty = [name for name, count in zip(self.categories, self.counts.tolist(), strict=True) if count == 0]
        if empty:
            raise ValueError(
                f"no examples of categor{'y' if len(empty) == 1 else 'ies'} {', '.join(map(repr, empty))}; "
                f"measure rows of every category (and add up the shards) before taking means"
            )
        return self.counts
