"""Which units of a site work together: the heaviest neighbours of every unit, found in one pass and in memory O(units).

Two statistics, both sums over tokens of a product of two non-negative strengths: co-activation, abs(a_u) abs(a_v), and
pairwise attribution, abs(z_u) abs(z_v) with z = g a. a: a unit's activation; g: gradient of the row's loss with respect
to it, true labels. A unit of several features (a channel over its map) has the norm of a, and z summed over them.

Axes: rows R, positions P of a row, tokens T (all positions of all rows of a batch), units U, units of a block B, slots
M of a unit, candidates N for them, features W of a unit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64, Int64
from scipy.sparse import csr_array
from torch import Tensor, nn

from attribution.reading import Kept, apart, at_readers, wide
from attribution.sites import Site
from attribution.subject import Probe, Subject, segments

Interaction = Literal["coactivation", "attribution"]
"""``coactivation``: sum of abs(a_u) abs(a_v), in squared activations; ``attribution``: sum of abs(z_u) abs(z_v), in
nats^2."""

_ELEMENTS = 2**21
"""Elements of a temporary block: 16 MB of float64."""


@dataclass(frozen=True)
class Neighbours:
    """The heaviest neighbours of each unit of a site, and how much can have been missed.

    The true sum of a pair (u, v) lies in ``lower`` to ``upper`` of v's slot with u, and in 0 to ``bound[u]`` where v
    has none; ``bound[u]`` is at most ``totals[u] / (slots + 1)``, and 0 if every other unit has a slot: then all is
    exact. There are more slots than the ``k`` neighbours asked for, so that batches and shards add up well.

    One summary of Misra and Gries (1982) a unit, in the mergeable form of Agarwal et al., "Mergeable summaries" (2012);
    its counter is ``upper - bound``. ``lower``, the sum since the pair got its slot, is the closer bound from below.
    """

    kind: Interaction
    """What is summed."""
    k: int
    """Neighbours asked for, a unit."""
    index: Int64[Tensor, "units slots"]
    """Number of the neighbour in each slot, in no order; an empty slot holds the unit itself."""
    lower: Float64[Tensor, "units slots"]
    """The pair's sum is at least this; 0 in an empty slot; nats^2 or squared activations."""
    upper: Float64[Tensor, "units slots"]
    """The pair's sum is at most this, and this at most ``lower + bound``; 0 in an empty slot; same unit."""
    totals: Float64[Tensor, " units"]
    """Sum over all other units, with a slot or not; same unit. Exact."""
    bound: Float64[Tensor, " units"]
    """No pair without a slot has a larger sum; same unit."""
    tokens: int
    """Tokens summed over."""
    rows: int
    """Rows summed over."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}; ask for more neighbours")
        shapes = [tuple(tensor.shape) for tensor in (self.index, self.lower, self.upper)]
        units = {len(tensor) for tensor in (self.index, self.totals, self.bound)}
        if len(set(shapes)) > 1 or len(units) > 1:
            raise ValueError(f"slots must be [units slots] for the same units, got {shapes} for {sorted(units)} units")

    @property
    def units(self) -> int:
        """Units of the site."""
        return len(self.totals)

    @property
    def exact(self) -> bool:
        """Whether no pair was ever left out: every ``lower`` is the true sum, and absent pairs have none."""
        return not bool(self.bound.any())

    def __add__(self, other: "Neighbours") -> "Neighbours":
        """Merge two shards; bounds add up, and grow by what finds no slot."""
        mine, theirs = ((n.kind, n.k, tuple(n.index.shape)) for n in (self, other))
        if mine != theirs:
            raise ValueError(
                f"cannot add neighbours of different (kind, k, (units, slots)): {mine} and {theirs}; "
                f"measure the shards with the same settings"
            )
        index_UN, order_UN = torch.cat([self.index, other.index], 1).sort(1)
        again_UN = index_UN[:, 1:] == index_UN[:, :-1]
        columns = []
        for one_UM, other_UM in ((self.lower, other.lower), (self._excess(), other._excess())):
            sums_UN = torch.cat([one_UM, other_UM], 1).gather(1, order_UN)
            sums_UN[:, :-1] += sums_UN[:, 1:] * again_UN
            sums_UN[:, 1:] *= ~again_UN
            columns.append(sums_UN)
        at_UM, lower_UM, excess_UM, edge_U = _heaviest(*columns, slots=self.index.shape[1])
        own_U1 = torch.arange(self.units).unsqueeze(1)
        return _neighbours(
            self.kind,
            self.k,
            torch.where(lower_UM > 0, index_UN.gather(1, at_UM), own_U1),
            lower_UM,
            excess_UM,
            self.totals + other.totals,
            self.bound + other.bound + edge_U,
            self.tokens + other.tokens,
            self.rows + other.rows,
        )

    def top(self, k: int | None = None) -> csr_array:
        """Return each unit's ``k`` heaviest neighbours (not given: as many as were asked for), [units units].

        Entries are ``lower``, and so is what makes a neighbour heavy: on random clustered units it found more of the
        true heaviest than ``upper``, .74 against .67 where the clusters were faint.
        """
        k = self.k if k is None else k
        if k < 1 or k > max(self.k, self.index.shape[1]):
            raise ValueError(
                f"k must be 1 to {self.index.shape[1]}, the neighbours kept, got {k}; measure with a larger k"
            )
        lower_UM, at_UM = self.lower.topk(min(k, self.index.shape[1]))
        index_UM = self.index.gather(1, at_UM)
        full_UM = lower_UM > 0
        entries = lower_UM[full_UM].numpy(), (full_UM.nonzero()[:, 0].numpy(), index_UM[full_UM].numpy())
        return csr_array(entries, shape=(self.units, self.units))

    def symmetric(self, how: Literal["max", "sum"] = "max", k: int | None = None) -> csr_array:
        """Return ``top`` as weights of an undirected graph, for partitioners: the larger of both ways, or their sum.

        ``max`` is again a lower bound of the pair's sum; ``sum`` counts what is among the heaviest of both units twice.
        """
        if how not in ("max", "sum"):
            raise ValueError(f"no way {how!r} to make neighbours symmetric; ask for 'max' or 'sum'")
        one = self.top(k)
        made = csr_array(one.maximum(one.T) if how == "max" else one + one.T)
        made.sort_indices()
        return made

    def _excess(self) -> Float64[Tensor, "units slots"]:
        return (self.upper - self.bound.unsqueeze(1)).clamp(min=0)


def measure_interactions(
    subject: Subject,
    batches: Iterable[Probe],
    *,
    sites: Sequence[str] | None = None,
    k: int = 32,
    oversample: int = 4,
    kind: Interaction = "coactivation",
) -> dict[str, Neighbours]:
    """Find the heaviest neighbours of every unit, of all ``sites`` (not given: every one) in the same pass.

    A batch costs one forward pass, for attribution one backward pass without weight gradients, and units^2 * tokens
    multiplications a site, in blocks of bounded memory; a unit has ``oversample * k`` slots. All positions count as
    tokens, padding included. Products of a batch are summed in the activations' precision (half precision is widened
    to float32), batches in float64: all bounds are up to that rounding. Few large batches leave tighter bounds
    than many small ones. Results of shards add up with ``+``. Raises ValueError for settings, rows or values that make
    no sense, by name.

    >>> found = measure_interactions(asked, rows, sites=["first"], k=1)["first"]
    >>> found.exact, found.totals.tolist()  # no row has both units active
    (True, [0.0, 0.0])
    """
    if k < 1 or oversample < 1:
        raise ValueError(f"k and oversample must be at least 1, got {k} and {oversample}; ask for more neighbours")
    if kind not in get_args(Interaction):
        raise ValueError(f"no interaction {kind!r}; there are {', '.join(get_args(Interaction))}")
    chosen = subject.sites if sites is None else tuple(subject.site(name) for name in dict.fromkeys(sites))
    if not chosen:
        raise ValueError("no sites to measure; name at least one, or leave sites out for all")
    taps = [_Tap(site, subject.reader(site), kind, k, oversample, subject.categories) for site in chosen]
    with subject.still(), torch.set_grad_enabled(kind == "attribution"):
        for batch in batches:
            if len(batch.categories):
                _one_batch(subject, batch, taps)
    if not taps[0].sums.rows:
        raise ValueError("no batches to measure; give at least one row")
    return {tap.site.name: tap.sums.result(kind, k) for tap in taps}


def _one_batch(subject: Subject, batch: Probe, taps: Sequence["_Tap"]) -> None:
    segments(batch, subject.categories)
    for tap in taps:
        tap.begin(batch.categories)
    with at_readers(subject, len(batch.categories), {tap.site.name: tap.read for tap in taps}):
        outputs = subject.forward(batch.inputs.detach(), batch.categories)
    if taps[0].kind == "attribution":
        loss_R = subject.row_nats(outputs, batch.targets)
        if loss_R.requires_grad:
            torch.autograd.backward(loss_R.sum())
        for tap in taps:
            assert tap.kept is not None
            tap.kept.check(tap.arrived)


class _Tap:
    """Turns one site's activations (and gradients) into strengths the moment they arrive."""

    def __init__(
        self, site: Site, reader: nn.Module, kind: Interaction, k: int, oversample: int, names: Sequence[str]
    ) -> None:
        self.site = site
        self.kind = kind
        self.names = names
        self.sums = _Sums(site.units, k * oversample, next(reader.parameters(), torch.empty(0)).device)
        self.begin(torch.empty(0, dtype=torch.int64))

    def begin(self, categories: Tensor) -> None:
        """Forget the last batch; ``categories`` are those of the next one's rows."""
        self._categories = categories
        self.kept: Kept | None = None
        self.arrived = False

    def read(self, activation: Tensor) -> Tensor:
        """Take the reader's input."""
        if self.kind == "coactivation":
            a_RPUW = wide(self.site.arrange(activation))
            self._absorb((a_RPUW.norm(dim=3) if a_RPUW.shape[3] > 1 else a_RPUW[..., 0].abs()), "activation")
            return activation
        activation = apart(activation)
        kept = self.kept = Kept(self.site, activation)
        activation.register_hook(lambda gradient: self._gradient(kept.value, gradient.detach()))
        return activation

    def _gradient(self, activation: Tensor, gradient: Tensor) -> None:
        z_RPU = (wide(self.site.arrange(gradient)) * self.site.arrange(activation)).sum(3)
        self._absorb(z_RPU.abs_(), "activation or gradient")

    def _absorb(self, strength_RPU: Float[Tensor, "rows positions units"], what: str) -> None:
        finite_R = strength_RPU.isfinite().flatten(1).all(1)
        if not bool(finite_R.all()):
            category = self.names[int(self._categories.to(finite_R.device)[~finite_R][0])]
            raise ValueError(
                f"site {self.site.name!r} has a NaN or infinite {what} on category {category!r}; "
                f"look at the network's weights and the inputs of that category"
            )
        self.arrived = True
        self.sums.absorb(strength_RPU.flatten(0, 1), len(strength_RPU))


class _Sums:
    """Neighbours in the making; as in ``Neighbours``, with the counters in place of ``upper``."""

    def __init__(self, units: int, slots: int, device: torch.device) -> None:
        slots = max(1, min(slots, units - 1))
        self.index_UM = torch.arange(units, device=device).unsqueeze(1).repeat(1, slots)
        self.lower_UM = torch.zeros(units, slots, dtype=torch.float64, device=device)
        self.excess_UM = torch.zeros_like(self.lower_UM)
        self.total_U = torch.zeros(units, dtype=torch.float64, device=device)
        self.bound_U = torch.zeros_like(self.total_U)
        self.tokens = 0
        self.rows = 0

    def absorb(self, strength_TU: Float[Tensor, "tokens units"], rows: int) -> None:
        """Add a batch, a block of units at a time."""
        self.tokens += len(strength_TU)
        self.rows += rows
        units = len(self.total_U)
        step = max(1, _ELEMENTS // units)
        for start in range(0, units, step):
            self._block(strength_TU, slice(start, min(start + step, units)))

    def _block(self, strength_TU: Float[Tensor, "tokens units"], mine: slice) -> None:
        index_BM = self.index_UM[mine]
        sums_BU = (strength_TU[:, mine].T @ strength_TU).double()
        sums_BU[:, mine].fill_diagonal_(0)
        self.total_U[mine] += sums_BU.sum(1)
        lower_BU = sums_BU.scatter_add(1, index_BM, self.lower_UM[mine])
        excess_BU = sums_BU.scatter_add_(1, index_BM, self.excess_UM[mine])
        at_BM, lower_BM, excess_BM, edge_B = _heaviest(lower_BU, excess_BU, slots=index_BM.shape[1])
        own_B1 = torch.arange(mine.start, mine.stop, device=at_BM.device).unsqueeze(1)
        self.index_UM[mine] = torch.where(lower_BM > 0, at_BM, own_B1)
        self.lower_UM[mine] = lower_BM
        self.excess_UM[mine] = excess_BM
        self.bound_U[mine] += edge_B

    def result(self, kind: Interaction, k: int) -> Neighbours:
        """Return what was found, on the CPU."""
        return _neighbours(
            kind,
            k,
            self.index_UM.cpu(),
            self.lower_UM.cpu(),
            self.excess_UM.cpu(),
            self.total_U.cpu(),
            self.bound_U.cpu(),
            self.tokens,
            self.rows,
        )


def _heaviest(
    lower_UN: Float64[Tensor, "u n"], excess_UN: Float64[Tensor, "u n"], *, slots: int
) -> tuple[Int64[Tensor, "u m"], Float64[Tensor, "u m"], Float64[Tensor, "u m"], Float64[Tensor, " u"]]:
    """Give the slots to the largest counters, and take the largest that gets none from all of them.

    Returns which candidates got a slot, their lower bounds and counters, and what was taken: it goes to the bound.
    """
    best_UM, at_UM = excess_UN.topk(min(slots + 1, excess_UN.shape[1]))
    edge_U = best_UM[:, slots:].sum(1)
    at_UM = at_UM[:, :slots]
    return at_UM, lower_UN.gather(1, at_UM), best_UM[:, :slots] - edge_U.unsqueeze(1), edge_U


def _neighbours(
    kind: Interaction,
    k: int,
    index_UM: Tensor,
    lower_UM: Tensor,
    excess_UM: Tensor,
    total_U: Tensor,
    bound_U: Tensor,
    tokens: int,
    rows: int,
) -> Neighbours:
    upper_UM = torch.where(lower_UM > 0, torch.maximum(lower_UM, excess_UM + bound_U.unsqueeze(1)), 0.0)
    return Neighbours(kind, k, index_UM, lower_UM, upper_UM, total_U, bound_U, tokens, rows)
