"""From attribution to a cut: which categories part, how wide each expert is in each site, which unit goes where.

For each leaf with several categories: group them (``grouping``); for each site the curve J(expert width) from the
owners at each width (``owners``); a knapsack over all sites spends the round's separation where it costs least.
Everything is deterministic in the reduced table and the weights, so every rank gets the same answer.

Axes: U units of a site, L units that a leaf owns in it, B bins (the K children, then the leaf itself), C categories.
Unrouted categories are a child without units.
"""

import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attribution.table import AttributionTable, Unsigned
from moeify.recipe.given_tree import Nested
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.rounds import Round
from moeify.splitting.grouping import Groups, choose_groups, is_routed
from moeify.splitting.knapsack import Curve, cheapest
from moeify.splitting.owners import Given, LeafUnits, owners
from moeify.splitting.partition import Partition
from moeify.splitting.refine import Exchange
from moeify.splitting.terms import SiteTerms, Terms, costs, plain_terms, room

Owned = Mapping[tuple[str, int], Int[np.ndarray, " leaf_units"]]
"""(site, leaf) -> bin of each unit the leaf owned: child k, or K for the leaf itself."""


@dataclass(frozen=True)
class Proposal:
    """A cut: the partition it leads to, and the new order of each site's units."""

    partition: Partition
    order: Mapping[str, Int[Tensor, " units"]]
    """``order[site][i]`` is the present place of the unit that comes to place i."""
    groups: Groups
    owned: Owned
    predicted: float
    """J of the cut, nats per unit (token or example) averaged over categories by their share of the data."""
    gap: float | None = None
    """The most that a dual bound leaves open in any site and leaf, as a share of its value; None where owners are not
    assigned by value, or have changed places since."""


@dataclass(frozen=True)
class _Choice:
    """One leaf in one site at one expert width."""

    width: int
    owner_L: Int[np.ndarray, " leaf_units"]
    """Bin of each unit the leaf owned: child k, or K for the leaf itself."""
    predicted: float
    gap: float | None
    """What the dual bound of the assignment leaves open; see ``Proposal.gap``."""


@dataclass(frozen=True)
class Menu:
    """What a round may choose from: who parts, and for each site and leaf what every expert width costs."""

    partition: Partition
    """The one that is to be cut."""
    config: PartitionConfig
    terms: Terms
    groups: Groups
    choices: Mapping[tuple[str, int], list[_Choice]]
    """(site, leaf) -> from the narrowest expert allowed to the widest there is room for."""
    exchanges: Mapping[tuple[str, int], Exchange]
    """(site, leaf) -> exchanges of units that lower J; none where ``config.refine`` is off."""

    @property
    def rounding(self) -> float:
        """What experts that are one multiple wider everywhere add to the separation: less than that is rounding."""
        spared = sum(
            _experts_spared(self.groups[leaf], self.config) * self.terms[site].multiple * self.terms[site].cost
            for site, leaf in self.choices
            if not self.terms[site].frozen
        )
        total = sum(self.partition.units(site) * self.terms[site].cost for site in self.partition.widths)
        return spared / (len(self.partition.tree.categories) * total)

    def cut(self, separation: float) -> Proposal:
        """Return the cut to a separation (of what units cost) that costs the least J.

        Where rounding to whole multiples leaves too little room for it, the cut goes as far as there is room.
        """
        chosen = _spend(self.partition, self.config, self.terms, separation, self.groups, self.choices)
        owned = {key: choice.owner_L for key, choice in chosen.items()}
        predicted, gaps = (sum(c.predicted for c in chosen.values()), [c.gap for c in chosen.values()])
        known = [gap for gap in gaps if gap is not None]
        return _proposal(self.partition, self.groups, owned, predicted, max(known) if len(known) == len(gaps) else None)

    def refined(self, cut: Proposal) -> Proposal:
        """Return one of this menu's cuts with its units exchanged for as long as that lowers J, at the same widths.

        The cut itself where ``config.refine`` is off. Dear where sites are wide, so for the cut that is made alone.
        """
        if not self.exchanges:
            return cut
        owned, predicted = dict(cut.owned), cut.predicted
        for key, exchange in self.exchanges.items():
            owned[key] = exchange.settle(cut.owned[key])
            predicted += exchange.residual(owned[key]) - exchange.residual(cut.owned[key])
        return _proposal(self.partition, self.groups, owned, predicted)


def menu(
    partition: Partition,
    table: AttributionTable,
    weights: Mapping[str, Float[Tensor, "dim _"]],
    config: PartitionConfig,
    rounds: Sequence[Round],
    score: Unsigned,
    tree: Nested | None = None,
    only: Collection[int] | None = None,
    reads: Callable[[str], Float[Tensor, "units inputs"]] | None = None,
    seed: int = 0,
    terms: Terms | None = None,
    given: Mapping[str, Sequence[Given]] | None = None,
) -> Menu:
    """Return what the first of ``rounds`` to come may choose from, to split every leaf that has several categories.

    ``rounds`` are this round and those after it, whose experts need room as well; ``weights`` holds each site's output
    weights [dim features], ``reads`` returns its input weights, for those ``config.owners`` that ask; ``tree`` is the
    recipe's; ``only`` are the leaves that may be split, ``None`` for all; ``seed`` is what ways to find owners draw
    from; ``terms``: not given, those of ``config`` for every site, each unit of cost 1; ``given``: the units of each
    site that are handed over to categories, in a network that is not divided yet. Raises NothingToSplitError where no
    leaf can be split, ValueError where an expert has too few units for its children.
    """
    terms = terms or plain_terms(config, partition.widths)
    groups = choose_groups(partition, table, weights, config, rounds[0], score, tree, only, terms)
    choices, exchanges = {}, {}
    for site in partition.widths:
        for leaf, parts in groups.items():
            start, own = partition.starts(site)[leaf], partition.widths[site][leaf]
            handed = (given or {}).get(site, ()) if not terms[site].frozen else ()
            units = LeafUnits(table, site, start, own, parts, score, weights[site], reads, seed, handed)
            choices[site, leaf] = _choices(partition, config, terms[site], rounds, units, leaf, tree)
            if config.refine and not terms[site].frozen:
                exchanges[site, leaf] = Exchange(partition, table, weights[site].double(), site, leaf, parts)
    return Menu(partition, config, terms, groups, choices, exchanges)


def check_handed_over(
    partition: Partition,
    given: Mapping[str, Sequence[Given]],
    config: PartitionConfig,
    terms: Terms,
    parts: Sequence[Sequence[str]],
) -> None:
    """Raise ValueError where units that are handed over have no room in the experts of a first cut into such parts.

    Said before anything is trained. Which categories will part is not known then: where an expert takes over from
    several, the cut itself may find too little room.
    """
    children = sum(is_routed(part, config) for part in parts)
    for site, each in given.items():
        width, mine = partition.units(site), terms[site]
        handed = max((units.stop - units.start for units, _ in each), default=0)
        if not mine.frozen and handed > (widest := mine.widest(width, children, root=True)):
            raise _too_many(site, handed, width, widest, children)


def _too_many(site: str, handed: int, width: int, widest: int, children: int) -> ValueError:
    return ValueError(
        f"routing.experts: got {handed} of the {width} units of site {site!r} for one expert, wanted at most {widest}, "
        f"which {children} experts of equal width leave room for; give it fewer, or set partition.owners.hand_over to "
        f"false"
    )


def shuffled(
    partition: Partition,
    proposal: Proposal,
    table: AttributionTable,
    weights: Mapping[str, Float[Tensor, "dim _"]],
    seed: int,
) -> Proposal:
    """Return a cut to the proposal's tree and widths with owners drawn at random: the control of every result.

    ``partition`` (same tree and widths as the one the proposal cuts), ``table`` and ``weights`` are those of the
    network that is to be cut at random.
    """
    generator = np.random.default_rng([seed, len(partition.tree.nodes)])
    new = proposal.partition
    drawn: dict[tuple[str, int], np.ndarray] = {}
    for site in partition.widths:
        for leaf in proposal.groups:
            place = new.tree.index(partition.tree.nodes[leaf].name)
            nodes = [*new.tree.children(place), place]
            bins = np.repeat(np.arange(len(nodes)), [new.widths[site][node] for node in nodes])
            drawn[site, leaf] = generator.permutation(bins)
    return with_owners(partition, proposal, drawn, table, weights)


def with_owners(
    partition: Partition,
    proposal: Proposal,
    owned: Owned,
    table: AttributionTable,
    weights: Mapping[str, Float[Tensor, "dim _"]],
) -> Proposal:
    """Return a cut to the proposal's tree with other owners; ``partition`` is the one that is cut."""
    predicted = 0.0
    for (site, leaf), owner_L in owned.items():
        predicted += _residual(partition, table, weights[site], site, leaf, proposal.groups[leaf], owner_L)
    return _proposal(partition, proposal.groups, owned, predicted)


def _choices(
    partition: Partition,
    config: PartitionConfig,
    terms: SiteTerms,
    rounds: Sequence[Round],
    units: LeafUnits,
    leaf: int,
    tree: Nested | None,
) -> list[_Choice]:
    """Return what each expert width would cost, from the narrowest allowed to the widest there is room for."""
    site, width, parts = units.site, units.number, units.parts
    routed = [part for part in parts if is_routed(part, config)]
    children = len(routed)
    need, widest = room(terms, site, partition.tree.nodes[leaf].name, width, routed, rounds[1:], tree)
    deal, home_L = owners(config.owners, units), units.homes()
    handed = max(int((home_L == bin_).sum()) for bin_, part in enumerate(parts) if is_routed(part, config))
    if handed > widest:
        raise _too_many(site, handed, width, widest, children)
    need = max(need, -(-handed // terms.multiple) * terms.multiple)
    found = []
    for each in sorted({need, *range(max(need, terms.multiple), widest + 1, terms.multiple)}):
        capacity = np.array([*[each * is_routed(part, config) for part in parts], width - each * children])
        owner_L, gap = deal(capacity)
        predicted = _residual(partition, units.table, units.output_DF, site, leaf, parts, owner_L)
        found.append(_Choice(each, owner_L, predicted, gap))
    return found


def _residual(
    partition: Partition,
    table: AttributionTable,
    weight_DU: Tensor,
    site: str,
    leaf: int,
    parts: Sequence[Sequence[str]],
    owner_L: np.ndarray,
) -> float:
    """Return the Schur residual J of one leaf's split in one site, nats per unit over all data."""
    start = partition.starts(site)[leaf]
    owner = torch.from_numpy(owner_L)
    total = 0.0
    for bin_, part in enumerate(parts):
        for category in part:
            removed_U: Bool[Tensor, " units"] = torch.zeros(partition.units(site), dtype=torch.bool)
            removed_U[start : start + len(owner)] = (owner != bin_) & (owner != len(parts))
            kept_U = partition.active(site, category) & ~removed_U
            share = table.shares[table.categories.index(category)].item()
            total += share * table.residual(site, category, weight_DU.t().double(), kept_U, removed_U)
    return total


def _spend(
    partition: Partition,
    config: PartitionConfig,
    terms: Terms,
    separation: float,
    groups: Groups,
    choices: Mapping[tuple[str, int], list[_Choice]],
) -> dict[tuple[str, int], _Choice]:
    """Choose one width for each site and leaf so that the separation is reached, if there is room, at the least J."""
    asked = partition.surplus(separation, costs(terms))
    saved = {  # active units' cost, added up over categories, that each choice spares
        (site, leaf): [_experts_spared(groups[leaf], config) * o.width * terms[site].cost for o in options]
        for (site, leaf), options in choices.items()
    }
    wanted = min(asked, sum(savings[-1] for savings in saved.values()))
    match config.budget:
        case "knapsack":
            curves = [
                Curve(tuple(s - savings[0] for s in savings), tuple(o.predicted for o in choices[key]))
                for key, savings in saved.items()
            ]
            picks = cheapest(curves, max(0, wanted - sum(savings[0] for savings in saved.values())))
        case "equal":
            picks = _same_share(partition, wanted, saved, choices)
    return {key: options[pick] for (key, options), pick in zip(choices.items(), picks, strict=True)}


def _experts_spared(parts: Sequence[Sequence[str]], config: PartitionConfig) -> int:
    """Return how many new experts a category does not run, added up over categories; an unrouted one runs none."""
    routed = [is_routed(part, config) for part in parts]
    return sum(len(part) * (sum(routed) - own) for part, own in zip(parts, routed, strict=True))


def _same_share(
    partition: Partition,
    wanted: int,
    saved: Mapping[tuple[str, int], list[int]],
    choices: Mapping[tuple[str, int], list[_Choice]],
) -> list[int]:
    """Return the choices of the smallest expert share of a site, the same in all sites, that spares enough."""
    shares = {key: [o.width / partition.units(key[0]) for o in options] for key, options in choices.items()}
    picks: list[int] = []
    for least in sorted({share for options in shares.values() for share in options}):
        picks = [min(bisect.bisect_left(options, least), len(options) - 1) for options in shares.values()]
        if sum(savings[pick] for savings, pick in zip(saved.values(), picks, strict=True)) >= wanted:
            break
    return picks


def _proposal(
    partition: Partition,
    groups: Groups,
    owned: Owned,
    predicted: float,
    gap: float | None = None,
) -> Proposal:
    """Put the units of every split leaf into tree order: those it keeps, then each child's, each in present order."""
    widths, order = {}, {}
    for site in partition.widths:
        places: list[np.ndarray] = []
        for old, (start, width) in enumerate(zip(partition.starts(site), partition.widths[site], strict=True)):
            present = np.arange(start, start + width)
            if old in groups:
                bins = [len(groups[old]), *range(len(groups[old]))]
                places += [present[owned[site, old] == bin_] for bin_ in bins]
            else:
                places.append(present)
        widths[site] = tuple(len(place) for place in places)
        order[site] = torch.from_numpy(np.concatenate(places))
    return Proposal(Partition(partition.tree.split(groups), widths), order, groups, owned, predicted, gap)
