"""The split model: a network whose rows run along their category's route only."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, assert_never, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attribution.table import AttributionTable
from moeify.models.build import logits
from moeify.models.families import outside_flops, unit_space
from moeify.models.resnet import Block
from moeify.models.units import ConvUnits, FfnUnits, HeadUnits, UnitSite, UnitSpace, flops, input_weight, output_weight
from moeify.recipe.partition import PLAIN, Compensation, UnitKind
from moeify.routed.attention import RoutedAttention
from moeify.routed.conv import RoutedBlock
from moeify.routed.ffn import RoutedFfn, Routes, uncompiled
from moeify.routed.inline import InlineAttention, InlineFfn
from moeify.routed.learning import Learning
from moeify.routed.told import tell
from moeify.shares import Gathered
from moeify.splitting.partition import Partition
from moeify.splitting.propose import Proposal
from moeify.splitting.surgery import compensate_sites, permute


class SplitModel(nn.Module):
    """A network, its unit space and the partition that routes it. Undivided, it is the dense network itself.

    ``network`` keeps the stock architecture's parameter names; its units lie in tree order. ``told``: the network also
    learns to use each row's category, see ``moeify.routed.told``; undivided, that is the told twin. ``kinds``: the
    units that have owners, where no partition says so.
    """

    def __init__(
        self,
        network: nn.Module,
        categories: Sequence[str],
        partition: Partition | None = None,
        *,
        told: bool = False,
        kinds: Collection[UnitKind] = PLAIN,
    ) -> None:
        super().__init__()
        self.space = unit_space(network, _kinds(network, partition) if partition else kinds)
        self.categories = tuple(categories)
        """In the order that category indices count."""
        self.routes = Routes(partition or Partition.undivided(categories, self.space.readers))
        if set(self.partition.tree.categories) != set(categories):
            raise ValueError(f"the tree serves {self.partition.tree.categories}, the model has categories {categories}")
        for site in self.space.sites:
            if site.name not in self.partition.widths or self.partition.units(site.name) != site.units:
                raise ValueError(f"the partition does not cover the {site.units} units of site {site.name!r}")
        _install(network, self.space.sites, self.routes)
        self.told = tell(network, len(self.categories)) if told else ()
        """Biases of each category [categories units] that the network learns, where it is told; by block."""
        if told:
            sites = (
                replace(site, told=True) if isinstance(site, FfnUnits | ConvUnits) else site
                for site in self.space.sites
            )
            self.space = UnitSpace(tuple(sites))
        self.network = network
        self.autocast: torch.dtype | None = None
        """What the network's products are computed in, see ``moeify.models.build.logits``; None: its own precision."""

    @property
    def partition(self) -> Partition:
        """Who owns which unit."""
        return self.routes.partition

    @property
    def output_weights(self) -> Mapping[str, Float[Tensor, "dim _"]]:
        """Site -> the weights [dim features] through which its units write, on the CPU.

        Gathered where workers share them out.
        """
        return Gathered({site.name: partial(self._output_weight, site) for site in self.space.sites})

    def _output_weight(self, site: UnitSite) -> Tensor:
        return output_weight(self.network, site).detach().cpu()

    def active_flops(self, length: int) -> dict[str, float]:
        """Return category -> share of the whole network's floating-point operations that a token of it runs, 0..1.

        Forward, in rows of ``length`` tokens: linear maps, convolutions and attention, what is never split among them.
        """
        sites = unit_space(self.network, get_args(UnitKind)).sites
        costs = {site.name: flops(self.network, site, length) for site in sites}
        total = sum(outside_flops(self.network).values()) + sum(site.units * costs[site.name] for site in sites)
        split = sum(site.units * costs[site.name] for site in self.space.sites)
        return {
            c: 1.0 - (split - self.partition.active_units(c, costs)) / total for c in self.partition.tree.categories
        }

    def input_weight(self, site: str) -> Float[Tensor, "units inputs"]:
        """Return a copy, on the CPU, of the weights through which a site's units read."""
        return input_weight(self.network, self.space[site]).detach().cpu()

    def repartition(self, partition: Partition) -> None:
        """Route by another partition. The caller has put the units into its order."""
        self.routes.partition = partition

    def cut(
        self,
        proposal: Proposal,
        table: AttributionTable,
        compensation: Compensation | None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Make a cut, in place: correct the kept output weights, put units into tree order, route by the new partition.

        ``table``: what the proposal was made from; ``optimizer``: whose state follows the units.
        """
        if compensation:
            compensate_sites(self.network, self.space, table, proposal, compensation.ridge)
        permute(self.network, optimizer, self.space, proposal.order)
        self.repartition(proposal.partition)

    def positions(self, categories: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return each row's (or token's) leaf position, the order in which they must lie."""
        order = self.partition.tree.categories
        return torch.tensor([order.index(c) for c in self.categories], device=categories.device)[categories]

    def order(self, categories: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Return the order of rows in which ``forward`` moves none: sorted by leaf, otherwise as they are."""
        return torch.argsort(self.positions(categories), stable=True)

    @property
    def whole_rows(self) -> bool:
        """Whether a row has one route: heads look over all of it, so where heads are split, tokens have none alone."""
        return any(isinstance(site, HeadUnits) for site in self.space.sites)

    def forward(self, inputs: Tensor, categories: Int[Tensor, "rows ..."], **more: Any) -> Tensor:
        """Return the network's outputs, rows in the order given; each row runs along its category's route.

        Rows that lie in leaf order already (``order``) are not moved. ``categories`` [rows positions] gives each token
        a route of its own through the split blocks, and moves no row; what is between the blocks stays dense. ``more``
        (a cache, a mask) goes to the network as it is, so rows must not have to move for it. ValueError for categories
        that do not fit the rows, or are none of the model's.
        """
        uncompiled(self._check)(inputs, categories)
        if categories.dim() > 1:
            return self._by_token(inputs, categories, more)
        positions = self.positions(categories)
        in_order = uncompiled(_ascending)(positions)
        if (more or self.routes.learning) and not in_order:
            needs = ", ".join(more) or "gradient routing"
            raise ValueError(f"{needs} needs rows in leaf order, got others; see SplitModel.order")
        order = None if in_order else torch.argsort(positions, stable=True)
        if order is not None:
            inputs, positions, categories = inputs[order], positions[order], categories[order]
        uncompiled(self._set_routes)(positions, categories.to(inputs.device), None)
        outputs = logits(self.network, inputs, autocast=self.autocast, **more)
        return outputs if order is None else outputs[torch.argsort(order)]

    def _check(self, inputs: Tensor, categories: Int[Tensor, "rows ..."]) -> None:
        if categories.dim() == 1 and len(categories) != len(inputs):
            raise ValueError(f"got {len(categories)} categories for {len(inputs)} rows; give one a row")
        least, most = torch.stack(torch.aminmax(categories)).tolist() if categories.numel() else (0, 0)
        if least < 0 or most >= len(self.categories):
            known = ", ".join(f"{place} ({name})" for place, name in enumerate(self.categories))
            raise ValueError(f"got category {least if least < 0 else most}, wanted one of {known}")

    def _by_token(self, inputs: Tensor, categories: Int[Tensor, "rows positions"], more: Mapping[str, Any]) -> Tensor:
        if self.whole_rows:
            raise ValueError("heads are split, and a head looks over a whole row; give one category a row")
        if categories.shape != inputs.shape or inputs.is_floating_point():
            raise ValueError(
                f"categories {tuple(categories.shape)} do not fit inputs {tuple(inputs.shape)}; routes of tokens "
                f"need tokens [rows positions], other inputs take one category a row"
            )
        positions = self.positions(categories).flatten()
        order = torch.argsort(positions, stable=True)
        found = categories.flatten()[order].to(inputs.device), order.to(inputs.device)
        uncompiled(self._set_routes)(positions[order], *found)
        return logits(self.network, inputs, autocast=self.autocast, **more)

    def by_layer(self, inputs: Tensor, routers: Mapping[str, Float[Tensor, "leaves dim"]], **more: Any) -> Tensor:
        """Return the network's outputs where every split block chooses each token's leaf from what it reads.

        ``routers``: site -> what scores the leaves, in the tree's order; the highest score wins. No label is read.
        ``more`` goes to the network as it is. ValueError where a row has one route, is told its category, or where
        routers do not fit the sites.
        """
        if self.whole_rows or self.told:
            what = "heads are split, and a head looks over a whole row" if self.whole_rows else "blocks are told labels"
            raise ValueError(f"{what}, so its blocks cannot route tokens by themselves; route by row")
        if not all(isinstance(site, FfnUnits) for site in self.space.sites):
            raise ValueError("inner channels are split, and a channel looks over a whole image; route by row")
        leaves = len(self.partition.tree.leaves)
        if {name: len(weight) for name, weight in routers.items()} != {s.name: leaves for s in self.space.sites}:
            raise ValueError(f"got routers of {', '.join(routers) or 'no site'}, wanted one of {leaves} leaves a site")
        with self.routes.routing(routers):
            return logits(self.network, inputs, autocast=self.autocast, **more)

    def _set_routes(self, positions: Tensor, categories: Tensor, order: Tensor | None) -> None:
        counts = torch.bincount(positions, minlength=len(self.categories))
        self.routes.bounds = (0, *counts.cumsum(0).tolist())
        self.routes.categories, self.routes.order = categories, order
        self.routes.places = None if order is None else torch.argsort(order)

    @contextmanager
    def ablated(self, *experts: str) -> Iterator[None]:
        """Zero what these experts, and all experts below them, own while the context lasts."""
        tree = self.partition.tree
        nodes = [node for name in experts for node in range(tree.index(name), tree.end(tree.index(name)))]
        with self.routes.ablating(nodes):
            yield

    @contextmanager
    def learns(self, learning: Learning | None) -> Iterator[None]:
        """Route gradients while the context lasts: in rows that lie as ``learning`` says, units run and learn as it
        says. None: as ever."""
        with self.routes.learns(learning):
            yield

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Run every unit and zero those off the route: the slow oracle, which attribution reads."""
        with self.routes.masking():
            yield


def _ascending(positions: Int[Tensor, " rows"]) -> bool:
    return bool((positions[1:] >= positions[:-1]).all())


def _kinds(network: nn.Module, partition: Partition) -> set[UnitKind]:
    """Return the kinds of units that the partition names; feed-forward units always have owners."""
    sites = unit_space(network, get_args(UnitKind)).sites
    return {*PLAIN, *(site.kind for site in sites if site.name in partition.widths)}


def _install(network: nn.Module, sites: Sequence[UnitSite], routes: Routes) -> None:
    """Replace each site's block by its routed form, in place."""
    for site in sites:
        dense = network.get_submodule(site.module)
        parent, _, name = site.module.rpartition(".")
        match site:
            case FfnUnits(inline=str()):
                InlineFfn.install(dense, site, routes)
                continue
            case FfnUnits():
                routed: nn.Module = RoutedFfn(dense, site, routes)
            case HeadUnits(inline=str()):
                InlineAttention.install(dense, site, routes)
                continue
            case HeadUnits():
                routed = RoutedAttention(dense, site, routes)
            case ConvUnits():
                assert isinstance(dense, Block)
                routed = RoutedBlock(dense, site, routes)
            case _:
                assert_never(site)
        setattr(network.get_submodule(parent), name, routed)
