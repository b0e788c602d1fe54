"""What a recipe asks of each site: what its units cost, and how they may be dealt out."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import assert_never

from torch import nn

from moeify.models.units import UnitSpace, flops
from moeify.recipe.config import RunConfig
from moeify.recipe.given_tree import Nested, foreseen
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.partition import UnitKind
from moeify.recipe.reach import Stake, check_reachable, experts_to_come
from moeify.recipe.rounds import Round
from moeify.splitting.tree import ROOT


@dataclass(frozen=True)
class SiteTerms:
    """One site's."""

    multiple: int
    """Every expert's width is a multiple of this many units."""
    min_units: int
    """Fewest units an expert owns."""
    core: float
    """Least fraction of the units that stays with the root; 1: the site is never split."""
    cost: int = 1
    """What one active unit spends: 1, or its FLOPs a token (example)."""
    where: str = "partition"
    """The recipe's key above ``multiple`` and ``min_units``."""

    @property
    def frozen(self) -> bool:
        """Whether the root owns every unit for good."""
        return self.core >= 1.0

    @property
    def least(self) -> int:
        """Narrowest expert."""
        return 0 if self.frozen else -(-self.min_units // self.multiple) * self.multiple

    def given(self, width: int, *, root: bool) -> int:
        """Return how many of its ``width`` units a leaf may give to children."""
        return width - (math.ceil(self.core * width) if root or self.frozen else 0)

    def widest(self, width: int, children: int, *, root: bool) -> int:
        """Return how many of its ``width`` units a leaf may give to each of its children, which get equally many."""
        return self.given(width, root=root) // children // self.multiple * self.multiple


Terms = Mapping[str, SiteTerms]
"""Site -> its terms."""


def plain_terms(config: PartitionConfig, sites: Iterable[str]) -> Terms:
    """Return the terms of sites that are all alike: feed-forward units, each of cost 1."""
    return {site: SiteTerms(config.multiple, config.min_units, config.min_core) for site in sites}


def site_terms(config: PartitionConfig, network: nn.Module, space: UnitSpace, length: int) -> Terms:
    """Return every site's terms; ``length``: tokens of a row, which say what attention costs.

    Raises ValueError, a line each, for names in the recipe that match no site.
    """
    names = [site.name for site in space.sites]
    if problems := [
        *_strangers("partition.frozen", config.frozen, names),
        *_strangers("partition.floors", config.floors, names),
    ]:
        raise ValueError("\n".join(problems))
    found = {}
    for site in space.sites:
        frozen = any(fnmatchcase(site.name, pattern) for pattern in config.frozen)
        floors = [floor for pattern, floor in config.floors.items() if fnmatchcase(site.name, pattern)]
        core = 1.0 if frozen else max([config.min_core, *floors])
        cost = flops(network, site, length) if config.cost == "flops" else 1
        found[site.name] = SiteTerms(*_limits(config, site.kind), core=core, cost=cost, where=_where(site.kind))
    return found


def terms_in_reach(
    config: RunConfig, categories: Sequence[str], network: nn.Module, space: UnitSpace, length: int
) -> Terms:
    """Return every site's terms, with which all rounds can be reached; ``network`` is the dense twin's.

    Raises ValueError for a round that is out of reach, for a site without room for the experts of the first cut and
    those of later ones, and what ``site_terms`` raises.
    """
    terms = site_terms(config.partition, network, space, length)
    units = {site.name: site.units + config.routing.added(site.name) for site in space.sites}
    check_reachable(config, categories, stakes(terms, units))
    first, *later = config.rounds
    parts = foreseen(config.tree, [c for c in categories if c not in config.partition.unrouted], first.branching)
    for site, width in units.items():
        room(terms[site], site, ROOT, width, parts, later, config.tree)
    return terms


def stakes(terms: Terms, units: Mapping[str, int]) -> list[Stake]:
    """Return the sites (with their units) as ``moeify.recipe.reach`` counts them, those that are alike together."""
    total = sum(terms[site].cost * width for site, width in units.items())
    found: dict[tuple[float, float], float] = {}
    for site, width in units.items():
        each = terms[site]
        alike = each.core, each.multiple / width
        found[alike] = found.get(alike, 0.0) + each.cost * width / total
    return [Stake(share, *alike) for alike, share in found.items()]


def room(
    terms: SiteTerms,
    site: str,
    expert: str,
    width: int,
    parts: Sequence[Sequence[str]],
    later: Sequence[Round],
    tree: Nested | None,
) -> tuple[int, int]:
    """Return the narrowest and the widest that the children of an expert with ``width`` units of a site may be.

    ``parts``: the categories of each child that gets units; ``later``: the rounds after the cut, whose experts need
    room as well. Raises ValueError where there is none.
    """
    widest = terms.widest(width, len(parts), root=expert == ROOT)
    need = terms.least * max(experts_to_come(part, later, tree) for part in parts)
    if widest < need:
        raise ValueError(
            f"expert {expert!r} owns {width} units of site {site!r}, too few for {len(parts)} children of {need} "
            f"({terms.where}.min_units, room for later rounds); lower {terms.where}.min_units, {terms.where}.multiple "
            f"or the separation of earlier rounds"
        )
    return need, widest


def costs(terms: Terms) -> dict[str, int]:
    """Return site -> what one active unit spends."""
    return {site: each.cost for site, each in terms.items()}


def _limits(config: PartitionConfig, kind: UnitKind) -> tuple[int, int]:
    match kind:
        case "ffn":
            return config.multiple, config.min_units
        case "heads":
            return config.heads.multiple, config.heads.min_units
        case _:
            assert_never(kind)


def _where(kind: UnitKind) -> str:
    return "partition" if kind == "ffn" else f"partition.{kind}"


def _strangers(where: str, patterns: Iterable[str], names: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, 1, cutoff=0.0)
            yield (
                f"{where}: got {pattern!r}, which matches none of {len(names)} sites, wanted names or patterns such as "
                f"{names[0]!r} or '*.{names[0].rpartition('.')[2]}'; nearest: {close[0]!r}"
            )
