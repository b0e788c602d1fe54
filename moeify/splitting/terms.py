"""What a recipe asks of each site: what its units cost, and how they may be dealt out."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import assert_never

from torch import nn

from moeify.models.units import ConvUnits, HeadUnits, UnitSpace, flops
from moeify.recipe.config import RunConfig
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.partition import UnitKind
from moeify.recipe.reach import Stake, check_reachable


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
    """Return every site's terms, with which all rounds can be reached.

    Raises ValueError for a round that is out of reach, and what ``site_terms`` raises.
    """
    terms = site_terms(config.partition, network, space, length)
    check_reachable(config, categories, stakes(terms, space))
    return terms


def stakes(terms: Terms, space: UnitSpace) -> list[Stake]:
    """Return the sites as ``moeify.recipe.reach`` counts them, those that are alike together."""
    total = sum(terms[site.name].cost * site.units for site in space.sites)
    found: dict[tuple[float, float], float] = {}
    for site in space.sites:
        each = terms[site.name]
        few = isinstance(site, HeadUnits | ConvUnits)
        alike = each.core, each.multiple / site.units if few else 0.0
        found[alike] = found.get(alike, 0.0) + each.cost * site.units / total
    return [Stake(share, *alike) for alike, share in found.items()]


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
