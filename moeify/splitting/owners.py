"""Ways to find owners: which of a leaf's units each new expert gets and which stay, at given widths.

Attribution, and what others do instead; the recipe's ``partition.owners`` says which, and ``moeify.recipe.partition``
whose way it is. What is the same at all widths is done once. Everything is deterministic in table, weights and seed.

Axes: U units of a site, L units that a leaf owns in it, B bins (K parts, then the leaf itself), C categories, X
coordinates of a unit. A part without an expert, of unrouted categories, is a bin of capacity 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, assert_never

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from attribution.moments import LowRank
from attribution.table import AttributionTable, Unsigned
from moeify.recipe.partition import (
    AttributionOwners,
    CmoeOwners,
    CoactivationOwners,
    LearnedOwners,
    LlamaMoeOwners,
    MagnitudeOwners,
    MoeficationOwners,
    Owners,
    RandomOwners,
)
from moeify.splitting.assignment import assign
from moeify.splitting.clusters import filled, k_means, spectral, unit_rows

Capacity = Int[np.ndarray, " bins"]
Owner = Int[np.ndarray, " leaf_units"]
_STARTS = 4
"""Starts of k-means, of which the best is taken."""


class Given(NamedTuple):
    """Units of one site that some categories have been given before there is a cut."""

    units: slice
    """Their places."""
    categories: Sequence[str]


class Dealt(NamedTuple):
    """Who owns the leaf's units at some widths."""

    owner_L: Owner
    """Bin of each unit, as many units in each bin as its capacity says."""
    gap: float | None = None
    """What the dual bound leaves open (``Assignment.gap``); None where no value is maximized."""


Deal = Callable[[Capacity], Dealt]
"""Finds the owners for given capacities."""


@dataclass(frozen=True)
class LeafUnits:
    """What may be known of the units that a leaf owns in one site."""

    table: AttributionTable
    site: str
    start: int
    """Place of the first; the others follow."""
    number: int
    parts: Sequence[Sequence[str]]
    """The groups of categories that part, one a bin."""
    score: Unsigned
    output_DF: Float[Tensor, "dim features"]
    """Weights through which the site's units write; a unit's features side by side."""
    reads: Callable[[str], Float[Tensor, "units inputs"]] | None = None
    """Returns the weights through which a site's units read."""
    seed: int = 0
    given: Sequence[Given] = ()
    """Units that go to the part which has all of their categories, where one has; of no leaf but the undivided root."""

    def mine(self, values_U: Tensor) -> Tensor:
        """Return the leaf's part of what is known of all units."""
        return values_U[self.start : self.start + self.number]

    @property
    def width(self) -> int:
        """Features a unit writes through: of a channel the places of the kernel."""
        return self.output_DF.shape[1] // self.table.sites[self.site].units

    @property
    def features(self) -> slice:
        """Places of the features of the leaf's units."""
        return slice(self.start * self.width, (self.start + self.number) * self.width)

    def per_unit(self, values_F: Tensor, units: int) -> Tensor:
        """Return sums over each unit's features, which lie on the first axis."""
        return values_F.unflatten(0, (units, -1)).sum(1)

    def by_part(self, values_UC: Float64[Tensor, "units categories"]) -> Float64[Tensor, "parts leaf_units"]:
        """Return the sums over each part's categories."""
        mine_LC, index = self.mine(values_UC), self.table.categories.index
        return torch.stack([mine_LC[:, [index(c) for c in part]].sum(1) for part in self.parts])

    def mass(self, score: Unsigned) -> Float64[np.ndarray, "leaf_units bins"]:
        """Return the attribution mass that stays active if a unit goes to a bin; nats."""
        part_KL = self.by_part(self.table.score(self.site, score) * self.table.shares)
        return torch.cat([part_KL, part_KL.sum(0, keepdim=True)]).t().contiguous().numpy()

    def homes(self) -> Int[np.ndarray, " leaf_units"]:
        """Return the bin of each unit that was given to categories of one part; -1 for the others."""
        home_L = np.full(self.number, -1)
        for units, categories in self.given:
            for bin_, part in enumerate(self.parts):
                if set(categories) <= set(part):
                    home_L[units] = bin_
        return home_L

    def inputs(self) -> Float64[np.ndarray, "leaf_units inputs"]:
        """Return the leaf's input weights."""
        if self.reads is None:
            raise ValueError(f"site {self.site!r}: got no input weights, wanted [units inputs]; give menu() reads")
        return self.mine(self.reads(self.site)).double().cpu().numpy()

    def random(self) -> np.random.Generator:
        """Return the seed's random numbers for this leaf and site."""
        sites = list(self.table.sites)
        return np.random.default_rng([self.seed, sites.index(self.site), self.start, self.number])


def owners(way: Owners, units: LeafUnits) -> Deal:
    """Return what finds the owners of a leaf's units in one site, the recipe's way."""
    if units.number == 0:
        return lambda _: Dealt(np.zeros(0, dtype=np.int64))
    match way:
        case AttributionOwners() | LearnedOwners():  # which learning starts from
            value_LB = _bound(units.mass(units.score), units.homes())
            return lambda capacity_B: _assigned(value_LB, capacity_B)
        case RandomOwners():
            drawn_L = units.random().permutation(units.number)
            return lambda capacity_B: Dealt(_in_turn(drawn_L, capacity_B))
        case MagnitudeOwners():
            return _magnitude(units)
        case MoeficationOwners():
            return _clustered(units, unit_rows(units.inputs()))
        case CoactivationOwners():
            return _clustered(units, spectral(_coactivation(units), len(units.parts) + 1))
        case CmoeOwners():
            return _cmoe(units)
        case LlamaMoeOwners():
            return _llama_moe(units)
        case _:
            assert_never(way)


def _bound(
    value_LB: Float64[np.ndarray, "leaf_units bins"], home_L: Int[np.ndarray, " leaf_units"]
) -> Float64[np.ndarray, "leaf_units bins"]:
    """Take so much from the value of units with a home in any other bin that it is never worth it to go there."""
    away_LB = (home_L[:, None] >= 0) & (home_L[:, None] != np.arange(value_LB.shape[1]))
    return value_LB - away_LB * 2 * value_LB.max(1).sum()


def _assigned(value_LB: Float64[np.ndarray, "leaf_units bins"], capacity_B: Capacity) -> Dealt:
    found = assign(value_LB, capacity_B)
    return Dealt(found.owner, found.gap)


def _in_turn(order_L: Int[np.ndarray, " leaf_units"], capacity_B: Capacity) -> Owner:
    """Fill the bins one after the other, the leaf's own first, with the units in this order."""
    bins = np.roll(np.arange(len(capacity_B)), 1)
    owner_L = np.empty(len(order_L), dtype=np.int64)
    owner_L[order_L] = np.repeat(bins, capacity_B[bins])
    return owner_L


def _magnitude(units: LeafUnits) -> Deal:
    """The units with the largest weights stay; the others are dealt at random."""
    written_f = units.output_DF.t()[units.features].double().cpu().square().sum(1)
    square_L = units.per_unit(written_f, units.number).numpy() + np.square(units.inputs()).sum(1)
    falling_L = np.argsort(-square_L, kind="stable")
    drawn_L = units.random().permutation(units.number)

    def deal(capacity_B: Capacity) -> Dealt:
        strongest = falling_L[: capacity_B[-1]]
        return Dealt(_in_turn(np.concatenate([strongest, drawn_L[~np.isin(drawn_L, strongest)]]), capacity_B))

    return deal


def _clustered(units: LeafUnits, point_LX: Float64[np.ndarray, "leaf_units x"]) -> Deal:
    """One cluster a bin: those go together whose units have the most attribution there on average, matched exactly.

    Clusters are found without capacities, once; each width then starts from their centres.
    """
    value_LB = units.mass(units.score)

    @cache
    def centres(bins: tuple[int, ...]) -> Float64[np.ndarray, "open x"]:
        seed = int(units.random().integers(2**31))
        centre_KX, nearest_L = k_means(point_LX, len(bins), starts=_STARTS, seed=seed)
        mean_KB = np.zeros((len(bins), len(bins)))
        for k in np.unique(nearest_L):
            mean_KB[k] = value_LB[nearest_L == k][:, bins].mean(0)
        return centre_KX[np.argsort(assign(mean_KB, np.ones(len(bins), dtype=np.int64)).owner)]

    def deal(capacity_B: Capacity) -> Dealt:
        bins = np.flatnonzero(capacity_B)
        return Dealt(bins[filled(point_LX, centres(tuple(bins.tolist())), capacity_B[bins])])

    return deal


def _coactivation(units: LeafUnits) -> Float64[np.ndarray, "leaf_units leaf_units"]:
    """Return how much two units are active together: |E[a a^T]| over the leaf's categories, 1 for one with itself."""
    table, number, width = units.table, units.number, units.width
    places = torch.arange(units.features.start, units.features.stop)
    together: Tensor = torch.zeros(len(places), len(places), dtype=torch.float64)
    for category in (c for part in units.parts for c in part):
        moment, share = table.second_moment(units.site, category), table.shares[table.categories.index(category)]
        own = moment.take(places).dense() if isinstance(moment, LowRank) else moment[places][:, places]
        together += share * own
    if width > 1:  # of units of several features: the norm over all pairs of their features
        together = together.view(number, width, number, width).square().sum((1, 3)).sqrt()
    size = together.diagonal().sqrt()
    return (together.abs() / (size[:, None] * size)).nan_to_num(0.0, 0.0).numpy()


def _cmoe(units: LeafUnits) -> Deal:
    """The most active units stay; the others go where their profile of activity over categories fits, exactly."""
    power_UC = units.per_unit(units.table.power(units.site), units.table.sites[units.site].units)
    activity_LK = units.by_part(power_UC.sqrt() * units.table.shares).t().numpy()
    falling_L = np.argsort(-activity_LK.sum(1), kind="stable")
    profile_LK = activity_LK / np.maximum(activity_LK.sum(1, keepdims=True), np.finfo(np.float64).tiny)

    def deal(capacity_B: Capacity) -> Dealt:
        owner_L = np.full(units.number, len(capacity_B) - 1)
        routed = falling_L[capacity_B[-1] :]
        owner_L[routed] = assign(profile_LK[routed], capacity_B[:-1]).owner
        return Dealt(owner_L)

    return deal


def _llama_moe(units: LeafUnits) -> Deal:
    """Units that most parts would choose stay; then experts take turns at their most important unit that is left.

    A part would choose the units of greatest importance, as many as it will run: its expert's and the leaf's own.
    """
    mass_LK = units.mass("absolute")[:, :-1]
    falling_LK = np.argsort(-mass_LK, axis=0, kind="stable")
    rank_LK = np.argsort(falling_LK, axis=0, kind="stable")
    importance_L = (mass_LK / np.maximum(mass_LK.sum(0), np.finfo(np.float64).tiny)).sum(1)

    def deal(capacity_B: Capacity) -> Dealt:
        own = capacity_B[-1]
        chosen_L = (rank_LK < capacity_B[:-1] + own).sum(1)
        owner_L = np.full(units.number, -1)
        owner_L[np.lexsort((-importance_L, -chosen_L))[:own]] = len(capacity_B) - 1
        wishes = [iter(falling_L.tolist()) for falling_L in falling_LK.T]
        for turn in range(capacity_B[:-1].max()):
            for k in np.flatnonzero(capacity_B[:-1] > turn):
                owner_L[next(unit for unit in wishes[k] if owner_L[unit] < 0)] = k
        return Dealt(owner_L)

    return deal
