"""Stock forms of a split model: what one is, what it costs in padding and copies, and the dense one of one route."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from moeify.export.untold import untold
from moeify.models.families import describe, rebuild, transformer_of, with_units
from moeify.models.fused import closed
from moeify.models.resizing import copy_units, shaped
from moeify.models.units import ConvUnits, FfnUnits
from moeify.recipe.partition import UnitKind
from moeify.routed.split_model import SplitModel
from moeify.routers.by_layer import LayerRouters

Form = Literal["glm4_moe", "granitemoeshared"]
"""Stock mixtures of experts that hold shared and routed slices of a dense FFN exactly."""


@dataclass(frozen=True)
class Price:
    """Units of all layers (FFN neurons, or inner channels) that a stock form has, held against the split model's."""

    own: int
    """Units of the split model that it holds, each counted once."""
    copied: int
    """Further copies of them: an expert between core and leaf stands in every leaf's slice below it."""
    padded: int
    """Zeros, up to the one width that all layers or experts must have."""
    runs: int
    """Units that every token runs, zeros included."""
    routes: Mapping[str, int]
    """Category -> units of the split model on its route: what its tokens must run."""

    @property
    def stored(self) -> int:
        """Units in the file."""
        return self.own + self.copied + self.padded


@dataclass(frozen=True)
class Stock:
    """A network of a stock ``transformers`` class, in eval mode, that gives a split model's outputs."""

    network: nn.Module
    price: Price
    form: Form | None = None
    """None for a dense network."""
    forced: str | None = None
    """The category along whose route a mixture sends every token, where it does so whatever the token."""
    experts: Mapping[str, int] = field(default_factory=dict)
    """Category -> the expert of a mixture that serves it."""
    routers: LayerRouters | None = None
    """What chooses a mixture's experts where no category is forced."""


def to_dense(split: SplitModel, categories: Sequence[str], *, padded: bool = True) -> Stock:
    """Return the dense network of the one route that these categories share; narrower sites are zero-padded.

    ``padded=False`` keeps each site as wide as it is, for formats that allow it.

    Raises ValueError for categories of different routes: a dense network that held the units of both would run for each
    of them units that the split model does not, and give other outputs.
    """
    first, *others = categories
    if split.told:
        if others:
            raise ValueError(
                f"the split model is told the category (partition.told), so no dense model equals it for both "
                f"{first!r} and {others[0]!r}; export them with --split, or one at a time"
            )
        split = untold(split, first)
    for other in others:
        if not _same_route(split, first, other):
            raise ValueError(
                f"{first!r} and {other!r} run different units, so no dense model equals the split model for both; "
                f"export them with --split or --moe, or one at a time"
            )
    active = {site.name: int(split.partition.active(site.name, first).sum()) for site in counted_sites(split)}
    own = sum(active.values())
    if padded:
        network, stored = extract(split, first), max(active.values()) * len(active)
    else:
        network, stored = _narrow(split, first), own
    return Stock(network, Price(own, 0, stored - own, stored, dict.fromkeys(categories, own)))


@contextmanager
def without_bars() -> Iterator[None]:
    """Let ``transformers`` draw no progress bars while the context lasts."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def ffn_sites(split: SplitModel) -> list[FfnUnits]:
    """Return the feed-forward sites."""
    return [site for site in split.space.sites if isinstance(site, FfnUnits)]


def counted_sites(split: SplitModel) -> list[FfnUnits | ConvUnits]:
    """Return the sites whose units a price counts: all but attention heads."""
    return [site for site in split.space.sites if isinstance(site, FfnUnits | ConvUnits)]


def extract(split: SplitModel, category: str) -> nn.Module:
    """Return a dense network of the units on one category's route; narrower sites are zero-padded to the widest.

    Its modules are those of the stock architecture.
    """
    if category not in split.categories:
        raise ValueError(f"no category {category!r}; the model has {', '.join(split.categories)}")
    split = untold(split, category) if split.told else split
    sites = split.space.sites
    active = {site.name: split.partition.active(site.name, category).nonzero()[:, 0] for site in sites}
    widest: dict[UnitKind, int] = {}
    for site in sites:
        widest[site.kind] = max(widest.get(site.kind, 0), len(active[site.name]))
    dense = rebuild(with_units(describe(split.network), widest["ffn"], widest.get("heads")))
    copy_units(split.network, split.space, active, dense)
    return closed(dense).eval()


def _narrow(split: SplitModel, category: str) -> nn.Module:
    """Return the same with each site as wide as it is; heads of one width where the stock block counts on that."""
    active = {site.name: split.partition.active(site.name, category).nonzero()[:, 0] for site in split.space.sites}
    description, widths = describe(split.network), {site: len(units) for site, units in active.items()}
    family = transformer_of(split.network)
    heads = [site.name for site in split.space.sites if site.kind == "heads"]
    if (
        family and family.fused and heads
    ):  # what its blocks cut up, they cut by the number of heads in the configuration
        most = max(widths.pop(name) for name in heads)
        description = with_units(description, max(widths.values()), most)
    dense = shaped(description, widths)
    copy_units(split.network, split.space, active, dense)
    return dense.eval()


def _same_route(split: SplitModel, one: str, other: str) -> bool:
    return all(
        torch.equal(split.partition.active(site.name, one), split.partition.active(site.name, other))
        for site in split.space.sites
    )
