"""What a measuring pass knows: float64 sums that add up over batches, shards and workers, and their means.

Axes: units U of a site, features F of its units (``width`` side by side a unit), categories C. "Token" stands for
whatever the counts count: tokens of text, or whole examples where a row has one position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from attribution.moments import Moment, Second, schur_residual

Unsigned = Literal["fisher", "empirical", "absolute"]
"""Scores by which sets of units may be chosen; signed terms would cancel in a set."""
Score = Literal["fisher", "empirical", "absolute", "taylor", "report", "rate"]
"""``fisher``: 1/2 E[(g a)^2], labels the model's own; ``empirical``: the same with true labels; ``absolute``: E|g a|;
``taylor``: -E[g a], signed; ``report``: the estimated rise of the loss if the unit were zeroed, taylor + fisher, or
where outputs are few ``measure``'s ``exact_outputs`` (all in nats per token); ``rate``: the fraction of tokens at which
the unit is not 0."""


@dataclass(frozen=True)
class SiteSums:
    """Sums over all tokens seen at one site. a: a unit's activation; g: gradient of the row's loss with respect to it.

    For a unit of several features g a is their inner product; for a channel also over the whole map. Standard errors
    take the row for the independent draw, since tokens of one row are correlated: the ``*_squares`` add up the squares
    of per-row sums.
    """

    fisher: Float64[Tensor, "units categories"]
    """Sum of 1/2 (g a)^2 over tokens, labels the model's own; nats."""
    empirical: Float64[Tensor, "units categories"]
    """Sum of 1/2 (g a)^2 over tokens, true labels; nats."""
    absolute: Float64[Tensor, "units categories"]
    """Sum of abs(g a) over tokens, true labels; nats."""
    taylor: Float64[Tensor, "units categories"]
    """Sum of -g a over tokens, true labels: the first-order rise of the loss if the unit were zeroed; nats, signed."""
    report: Float64[Tensor, "units categories"]
    """Sum over tokens of the estimated rise of the loss if the unit were zeroed; nats, signed."""
    fisher_squares: Float64[Tensor, "units categories"]
    """Sum over rows of the square of the row's ``fisher``; nats^2."""
    empirical_squares: Float64[Tensor, "units categories"]
    """Sum over rows of the square of the row's ``empirical``; nats^2."""
    absolute_squares: Float64[Tensor, "units categories"]
    """Sum over rows of the square of the row's ``absolute``; nats^2."""
    taylor_squares: Float64[Tensor, "units categories"]
    """Sum over rows of the square of the row's ``taylor``; nats^2."""
    report_squares: Float64[Tensor, "units categories"]
    """Sum over rows of the square of the row's ``report``; nats^2."""
    rate: Float64[Tensor, "units categories"]
    """Tokens at which the unit is not 0."""
    total: Float64[Tensor, "features categories"]
    """Sum of a over tokens; for a channel the mean over its map."""
    power: Float64[Tensor, "features categories"]
    """Sum of a^2 over tokens; for a channel the mean over its map."""
    inputs: Moment | None = None
    """Sum of a a^T over tokens (for a convolution over its patches); None where it was not asked for."""
    outputs: Moment | None = None
    """Sum of g_y g_y^T over tokens, labels the model's own; y: the reader's output. For a convolution g_y is the sum
    over the places of its output, and g_y g_y^T is divided by their number (``attribution.moments``)."""

    def __post_init__(self) -> None:
        if self.fisher.ndim != 2 or self.power.ndim != 2 or len(self.power) % max(1, len(self.fisher)):
            raise ValueError(
                f"fisher must be [units categories] and power [features categories], a whole number of features a "
                f"unit, got {list(self.fisher.shape)} and {list(self.power.shape)}"
            )
        for name, tensor in self._sums().items():
            shape = self.power.shape if name in ("total", "power") else self.fisher.shape
            if tensor.shape != shape or tensor.dtype != torch.float64:
                raise ValueError(
                    f"{name} must be float64 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}; "
                    f"all sums of a site speak of the same units and categories"
                )
        for moment in self.moments:
            if any(tensor.shape[0] != self.categories for tensor in moment.tensors()):
                raise ValueError(f"second moments must have {self.categories} categories, as the other sums have")

    @classmethod
    def zeros(
        cls,
        units: int,
        features: int,
        categories: int,
        device: torch.device | None = None,
        moments: tuple[Moment, Moment] | None = None,
    ) -> "SiteSums":
        """Return the sums over nothing; ``moments`` are those of inputs and outputs, empty ones."""
        inputs, outputs = moments or (None, None)
        sums = {
            field.name: torch.zeros(
                features if field.name in ("total", "power") else units, categories, dtype=torch.float64, device=device
            )
            for field in fields(cls)
            if field.name not in ("inputs", "outputs")
        }
        return cls(**sums, inputs=inputs, outputs=outputs)

    @property
    def units(self) -> int:
        """Units of the site."""
        return self.fisher.shape[0]

    @property
    def categories(self) -> int:
        """Categories of the table."""
        return self.fisher.shape[1]

    @property
    def moments(self) -> list[Moment]:
        """The second moments that there are."""
        return [moment for moment in (self.inputs, self.outputs) if moment is not None]

    def __add__(self, other: "SiteSums") -> "SiteSums":
        mine, theirs = ([tuple(t.shape) for t in sums.tensors()] for sums in (self, other))
        if mine != theirs:
            raise ValueError(f"cannot add sums of different units, categories or moments: shapes {mine} and {theirs}")
        return self.like([a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)])

    def tensors(self) -> list[Tensor]:
        """Return all sums, not copies of them, in the order of the fields."""
        return [*self._sums().values(), *(tensor for moment in self.moments for tensor in moment.tensors())]

    def to(self, device: torch.device) -> "SiteSums":
        """Return the sums on another device."""
        return self.like([tensor.to(device) for tensor in self.tensors()])

    def _sums(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("inputs", "outputs")}

    def like(self, tensors: list[Tensor]) -> "SiteSums":
        """Return sums of the same kind, in the order of ``tensors``."""
        names = list(self._sums())
        rest = tensors[len(names) :]
        found: list[Moment | None] = []
        for moment in (self.inputs, self.outputs):
            size = 0 if moment is None else len(moment.tensors())
            found.append(None if moment is None else moment.like(rest[:size]))
            rest = rest[size:]
        return SiteSums(**dict(zip(names, tensors, strict=False)), inputs=found[0], outputs=found[1])


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
    sampled: Float64[Tensor, " categories"]
    """Those of ``counts`` that were also measured with labels of the model's own distribution."""
    sites: dict[str, SiteSums]

    def __post_init__(self) -> None:
        number = len(self.categories)
        if number == 0 or len(set(self.categories)) != number:
            raise ValueError(f"categories must be distinct names, at least one, got {list(self.categories)}")
        for name, tensor in (("counts", self.counts), ("rows", self.rows), ("sampled", self.sampled)):
            if tuple(tensor.shape) != (number,) or tensor.dtype != torch.float64:
                raise ValueError(f"{name} must be float64 [{number}], got {tensor.dtype} {list(tensor.shape)}")
            if not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise ValueError(f"{name} must be finite and not negative, got {tensor.tolist()}")
        if not self.sites:
            raise ValueError("a table needs at least one site")
        for site, sums in self.sites.items():
            if sums.categories != number:
                raise ValueError(f"site {site!r} has {sums.categories} categories, the table {number}")

    @classmethod
    def empty(cls, categories: Sequence[str], sites: Mapping[str, SiteSums]) -> "AttributionTable":
        """Return the table of no data, to count in place; ``sites`` are empty sums."""
        counts, rows, sampled = torch.zeros(3, len(categories), dtype=torch.float64)
        return cls(tuple(categories), counts, rows, sampled, dict(sites))

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
            self.sampled + other.sampled,
            {name: sums + other.sites[name] for name, sums in self.sites.items()},
        )

    def to(self, device: torch.device) -> "AttributionTable":
        """Return the table with its sites' sums on another device."""
        return replace(self, sites={name: sums.to(device) for name, sums in self.sites.items()})

    def tensors(self) -> list[Tensor]:
        """Return every sum and count, not copies of them, in an order that depends on the sites' order alone.

        Made for an all-reduce in place: afterwards the table is the one of all workers' data.
        """
        own = [self.counts, self.rows, self.sampled]
        return [*own, *(tensor for sums in self.sites.values() for tensor in sums.tensors())]

    @property
    def shares(self) -> Float64[Tensor, " categories"]:
        """Each category's share of all tokens."""
        return self.counts / self.counts.sum()

    def score(self, site: str, kind: Score) -> Float64[Tensor, "units categories"]:
        """Return the mean attribution of that kind (see ``Score``) over tokens, in nats per token."""
        total_UC = self._total(site, kind)
        return total_UC / self._counts(kind)

    def report(self, site: str) -> Float64[Tensor, "units categories"]:
        """Return the estimated rise of the loss if the unit were zeroed, in nats per token.

        Second-order Taylor expansion with the Fisher information for the Hessian, signed Taylor + 1/2 Fisher; or the
        loss itself at outputs moved in a straight line (``measure``'s ``exact_outputs``). For reporting single units,
        not for choosing sets.
        """
        return self.score(site, "report")

    def standard_error(self, site: str, kind: Score) -> Float64[Tensor, "units categories"]:
        """Return the standard error of the mean of that kind over rows, in nats per token; infinite for one row."""
        if kind == "rate":
            raise ValueError("a rate carries no squares of rows; ask for the standard error of another score")
        total, counts = self._total(site, kind), self._counts(kind)
        squares = cast(Tensor, getattr(self._site(site), f"{kind}_squares"))
        variance = (squares - total.square() / self.rows).clamp(min=0) * self.rows / (self.rows - 1)
        return torch.where(self.rows > 1, variance.sqrt() / counts, torch.inf)

    def mean(self, site: str) -> Float64[Tensor, "features categories"]:
        """Return E[a] of every feature over the tokens of each category."""
        return self._site(site).total / self._counts("taylor")

    def power(self, site: str) -> Float64[Tensor, "features categories"]:
        """Return E[a^2] of every feature over the tokens of each category."""
        return self._site(site).power / self._counts("taylor")

    def second_moment(self, site: str, category: str) -> Second:
        """Return A_c = E[a a^T] over the tokens of a category."""
        return self._moment(site, category, "inputs")

    def curvature(self, site: str, category: str) -> Second:
        """Return H_c = E[g_y g_y^T] over the tokens of a category, in nats^2 per squared output."""
        return self._moment(site, category, "outputs")

    def residual(
        self,
        site: str,
        category: str,
        weight: Float[Tensor, "inputs dim"],
        kept: Bool[Tensor, " units"],
        removed: Bool[Tensor, " units"],
    ) -> float:
        """Return the Schur residual J of removing units for a category, in nats per token (``attribution.moments``).

        ``weight``: the reader's, as ``attribution.sites.output_weight`` gives it.
        """
        inputs, outputs = self.second_moment(site, category), self.curvature(site, category)
        return schur_residual(inputs, outputs, weight, kept, removed)

    def dead(self, site: str) -> Bool[Tensor, " units"]:
        """Return which units had activation 0 at every token of every category."""
        sums = self._site(site)
        return (sums.power.view(sums.units, -1, sums.categories) == 0).all(1).all(1)

    def without_gradient(self, site: str) -> Bool[Tensor, " units"]:
        """Return which units were active, but no loss of any category depended on them (g a = 0 at every token)."""
        return (self._site(site).absolute == 0).all(1) & ~self.dead(site)

    def _site(self, site: str) -> SiteSums:
        if site not in self.sites:
            raise ValueError(f"no site {site!r} in the table; it has {', '.join(self.sites)}")
        return self.sites[site]

    def _total(self, site: str, kind: Score) -> Tensor:
        if kind not in get_args(Score):
            raise ValueError(f"no score {kind!r}; there are {', '.join(get_args(Score))}")
        return cast(Tensor, getattr(self._site(site), kind))

    def _moment(self, site: str, category: str, which: Literal["inputs", "outputs"]) -> Second:
        if category not in self.categories:
            raise ValueError(f"no category {category!r} in the table; it has {', '.join(self.categories)}")
        index = self.categories.index(category)
        moment: Moment | None = getattr(self._site(site), which)
        if moment is None:
            raise ValueError(f"site {site!r} was measured without second moments; give measure() moments=Moments()")
        counts = self._counts("taylor" if which == "inputs" else "fisher")
        return moment.mean(index, float(counts[index]))

    def _counts(self, kind: Score) -> Tensor:
        empty = [name for name, count in zip(self.categories, self.counts.tolist(), strict=True) if count == 0]
        if empty:
            raise ValueError(
                f"no examples of categor{'y' if len(empty) == 1 else 'ies'} {', '.join(map(repr, empty))}; "
                f"measure rows of every category (and add up the shards) before taking means"
            )
        if kind in ("fisher", "report"):
            if not torch.equal(self.sampled, self.counts):
                raise ValueError(f"{kind!r} needs labels of the model's own; give the subject 'root' or 'sample'")
            return self.sampled
        return self.counts
