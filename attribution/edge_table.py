"""What a pass over edges knows: float64 sums that add up over batches, shards and workers, and their means.

An edge u -> v is the direct path from unit u of a source site to unit v of a target site: what u alone adds to v's
pre-activations at the same position, through no other unit (``attribution.edges`` says exactly what). Ends of edges are
blocks of units (experts, say); a site that was given no blocks has one block a unit.

Axes: categories C, source blocks U, target blocks V.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

Pair = tuple[str, str]
"""Names of a source and a target site."""


@dataclass(frozen=True)
class EdgeSums:
    """Sums over all tokens seen, for the edges between two sites."""

    taylor: Float64[Tensor, "categories sources targets"]
    """Sum of -g x over tokens, true labels; x: what the source adds to the target's pre-activations, g: gradient of the
    row's loss with respect to those. The first-order rise of the loss if this edge alone were cut; nats, signed."""
    squares: Float64[Tensor, "categories sources targets"] | None = None
    """Sum over rows of the square of the row's ``taylor``, nats^2; None where no standard errors were asked for."""

    def __post_init__(self) -> None:
        for tensor in self.tensors():
            if tensor.ndim != 3 or tensor.shape != self.taylor.shape or tensor.dtype != torch.float64:
                raise ValueError(
                    f"sums of edges must be float64 [categories sources targets], all of one shape, "
                    f"got {tensor.dtype} {list(tensor.shape)} beside {list(self.taylor.shape)}"
                )

    @classmethod
    def zeros(
        cls, categories: int, sources: int, targets: int, errors: bool, device: torch.device | None = None
    ) -> "EdgeSums":
        """Return the sums over nothing."""
        shape = (categories, sources, targets)
        taylor = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(taylor, torch.zeros_like(taylor) if errors else None)

    def __add__(self, other: "EdgeSums") -> "EdgeSums":
        mine, theirs = ([tuple(t.shape) for t in sums.tensors()] for sums in (self, other))
        if mine != theirs:
            raise ValueError(
                f"cannot add sums of different blocks or categories, or with and without squares: "
                f"shapes {mine} and {theirs}"
            )
        return self.like([a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)])

    def add(self, category: int, contributions: Float64[Tensor, "rows sources targets"]) -> None:
        """Count in place the rows' first-order contributions g x of one category."""
        self.taylor[category] -= contributions.sum(0)
        if self.squares is not None:
            self.squares[category] += contributions.square().sum(0)

    def tensors(self) -> list[Tensor]:
        """Return all sums, not copies of them."""
        return [self.taylor] if self.squares is None else [self.taylor, self.squares]

    def like(self, tensors: Sequence[Tensor]) -> "EdgeSums":
        """Return sums of the same kind, in the order of ``tensors``."""
        return EdgeSums(*tensors)

    def to(self, device: torch.device) -> "EdgeSums":
        """Return the sums on another device."""
        return self.like([tensor.to(device) for tensor in self.tensors()])


@dataclass(frozen=True)
class EdgeTable:
    """How much each edge between two sites matters to each category. Tables of disjoint data add up.

    8 bytes an edge and category, 16 with standard errors. A category may be without rows in a table, since a shard need
    not hold all of them; its means are refused.
    """

    categories: tuple[str, ...]
    counts: Float64[Tensor, " categories"]
    """Tokens (examples) of each category."""
    rows: Float64[Tensor, " categories"]
    """Rows of each category."""
    blocks: dict[str, Int[Tensor, " units"]]
    """Block of each unit, of every site that has edges."""
    pairs: dict[Pair, EdgeSums]

    def __post_init__(self) -> None:
        number = len(self.categories)
        if number == 0 or len(set(self.categories)) != number:
            raise ValueError(f"categories must be distinct names, at least one, got {list(self.categories)}")
        for name, tensor in (("counts", self.counts), ("rows", self.rows)):
            if tuple(tensor.shape) != (number,) or tensor.dtype != torch.float64:
                raise ValueError(f"{name} must be float64 [{number}], got {tensor.dtype} {list(tensor.shape)}")
            if not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise ValueError(f"{name} must be finite and not negative, got {tensor.tolist()}")
        if not self.pairs:
            raise ValueError("a table of edges needs at least one pair of sites")
        for pair, sums in self.pairs.items():
            if not set(pair) <= set(self.blocks):
                raise ValueError(
                    f"edges {_named(pair)} need the blocks of both sites, got those of {list(self.blocks)}"
                )
            wanted = (number, *(self.size(site) for site in pair))
            if tuple(sums.taylor.shape) != wanted:
                raise ValueError(f"edges {_named(pair)} must be {list(wanted)}, got {list(sums.taylor.shape)}")

    @classmethod
    def empty(
        cls, categories: Sequence[str], blocks: Mapping[str, Tensor], pairs: Mapping[Pair, EdgeSums]
    ) -> "EdgeTable":
        """Return the table of no data, to count in place; ``pairs`` are empty sums."""
        counts, rows = torch.zeros(2, len(categories), dtype=torch.float64)
        return cls(tuple(categories), counts, rows, dict(blocks), dict(pairs))

    def __add__(self, other: "EdgeTable") -> "EdgeTable":
        if self.categories != other.categories or list(self.pairs) != list(other.pairs):
            raise ValueError(
                f"cannot add tables of different kinds: categories {list(self.categories)} and "
                f"{list(other.categories)}, edges {[*map(_named, self.pairs)]} and {[*map(_named, other.pairs)]}"
            )
        for site, block_U in self.blocks.items():
            if not torch.equal(block_U, other.blocks[site]):
                raise ValueError(f"cannot add tables that divide the units of site {site!r} into different blocks")
        return EdgeTable(
            self.categories,
            self.counts + other.counts,
            self.rows + other.rows,
            self.blocks,
            {pair: sums + other.pairs[pair] for pair, sums in self.pairs.items()},
        )

    def tensors(self) -> list[Tensor]:
        """Return every sum and count, not copies of them, in an order that depends on the pairs' order alone.

        Made for an all-reduce in place: afterwards the table is the one of all workers' data.
        """
        return [self.counts, self.rows, *(tensor for sums in self.pairs.values() for tensor in sums.tensors())]

    def size(self, site: str) -> int:
        """Return the number of blocks of a site."""
        return int(self.blocks[site].max()) + 1

    def taylor(self, source: str, target: str) -> Float64[Tensor, "categories sources targets"]:
        """Return the mean attribution of the edges between two sites, in nats per token, signed."""
        return self._sums((source, target)).taylor / self._counts()[:, None, None]

    def standard_error(self, source: str, target: str) -> Float64[Tensor, "categories sources targets"]:
        """Return the standard error of ``taylor`` over rows, in nats per token; infinite for one row."""
        sums, counts_C11 = self._sums((source, target)), self._counts()[:, None, None]
        if sums.squares is None:
            raise ValueError("edges were measured without squares of rows; give measure_edges() errors=True")
        rows_C11 = self.rows[:, None, None]
        variance = (sums.squares - sums.taylor.square() / rows_C11).clamp(min=0) * rows_C11 / (rows_C11 - 1)
        return torch.where(rows_C11 > 1, variance.sqrt() / counts_C11, torch.inf)

    def _sums(self, pair: Pair) -> EdgeSums:
        if pair not in self.pairs:
            raise ValueError(f"no edges {_named(pair)} in the table; it has {', '.join(map(_named, self.pairs))}")
        return self.pairs[pair]

    def _counts(self) -> Tensor:
        empty = [name for name, count in zip(self.categories, self.counts.tolist(), strict=True) if count == 0]
        if empty:
            raise ValueError(
                f"no examples of categor{'y' if len(empty) == 1 else 'ies'} {', '.join(map(repr, empty))}; "
                f"measure rows of every category (and add up the shards) before taking means"
            )
        return self.counts


def _named(pair: Pair) -> str:
    return f"{pair[0]} -> {pair[1]}"
