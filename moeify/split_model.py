"""The split model: a network whose rows run along their category's route only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.families import unit_space
from moeify.models import logits
from moeify.partition import Partition
from moeify.routed import Routes, install
from moeify.told import tell
from moeify.units import UnitSpace, input_weight, output_weight


class SplitModel(nn.Module):
    """A network, its unit space and the partition that routes it. Undivided, it is the dense network itself.

    ``network`` keeps the stock architecture's parameter names; its units lie in tree order. ``told``: the network also
    learns to use each row's category, see ``moeify.told``; undivided, that is the told twin.
    """

    def __init__(
        self,
        network: nn.Module,
        categories: Sequence[str],
        partition: Partition | None = None,
        *,
        told: bool = False,
    ) -> None:
        super().__init__()
        self.space = unit_space(network)
        self.categories = tuple(categories)
        """In the order that category indices count."""
        self.routes = Routes(partition or Partition.undivided(categories, self.space.readers))
        if set(self.partition.tree.categories) != set(categories):
            raise ValueError(f"the tree serves {self.partition.tree.categories}, the model has categories {categories}")
        for site in self.space.sites:
            if site.name not in self.partition.widths or self.partition.units(site.name) != site.units:
                raise ValueError(f"the partition does not cover the {site.units} units of site {site.name!r}")
        install(network, self.space.sites, self.routes)
        self.told = tell(network, len(self.categories)) if told else ()
        """Biases of each category [categories units] that the network learns, where it is told; by block."""
        if told:
            self.space = UnitSpace(tuple(replace(site, told=True) for site in self.space.sites))
        self.network = network

    @property
    def partition(self) -> Partition:
        """Who owns which unit."""
        return self.routes.partition

    @property
    def output_weights(self) -> dict[str, Float[Tensor, "dim units"]]:
        """Site -> the weights through which its units write."""
        return {site.name: output_weight(self.network, site).detach() for site in self.space.sites}

    def input_weight(self, site: str) -> Float[Tensor, "units inputs"]:
        """Return a copy of the weights through which a site's units read."""
        return input_weight(self.network, self.space[site]).detach()

    def repartition(self, partition: Partition) -> None:
        """Route by another partition. The caller has put the units into its order."""
        self.routes.partition = partition

    def positions(self, categories: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Return each row's leaf position, the order in which rows must lie."""
        order = self.partition.tree.categories
        return torch.tensor([order.index(c) for c in self.categories], device=categories.device)[categories]

    def order(self, categories: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Return the order of rows in which ``forward`` moves none: sorted by leaf, otherwise as they are."""
        return torch.argsort(self.positions(categories), stable=True)

    def forward(self, inputs: Tensor, categories: Int[Tensor, " rows"]) -> Tensor:
        """Return the network's outputs, rows in the order given; each row runs along its category's route.

        Rows that lie in leaf order already (``order``) are not moved.
        """
        positions = self.positions(categories)
        in_order = bool((positions[1:] >= positions[:-1]).all())
        order = None if in_order else torch.argsort(positions, stable=True)
        if order is not None:
            inputs, positions, categories = inputs[order], positions[order], categories[order]
        self.routes.categories = categories
        counts = torch.bincount(positions, minlength=len(self.categories))
        self.routes.bounds = (0, *counts.cumsum(0).tolist())
        outputs = logits(self.network, inputs)
        return outputs if order is None else outputs[torch.argsort(order)]

    @contextmanager
    def ablated(self, *experts: str) -> Iterator[None]:
        """Zero what these experts, and all experts below them, own while the context lasts."""
        tree = self.partition.tree
        nodes = [node for name in experts for node in range(tree.index(name), tree.end(tree.index(name)))]
        with self.routes.ablating(nodes):
            yield

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Run every unit and zero those off the route: the slow oracle, which attribution reads."""
        with self.routes.masking():
            yield
