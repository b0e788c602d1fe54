"""Changes to a network at a cut: units move into tree order, and kept output weights make up for what is cut.

A permutation changes no function value, and moves the optimizer's state with the parameters. The compensation does
change the weights: it is the least-squares answer of ``moeify.splitting.compensation``, a site at a time. Where workers
share a network out, they gather one tensor at a time, come to the same answer and keep their shares of it.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Optimizer

from attribution.table import AttributionTable
from moeify.models.units import UnitSpace, as_output, tensor_of
from moeify.shares import assign, whole
from moeify.splitting.compensation import compensate
from moeify.splitting.propose import Proposal


@torch.no_grad()
def permute(
    network: nn.Module, optimizer: Optimizer | None, space: UnitSpace, order: Mapping[str, Int[Tensor, " units"]]
) -> None:
    """Put the units of each site into a new order, in place, optimizer state included.

    ``order[site][i]`` is the present place of the unit that comes to place i.
    """
    for site in space.sites:
        index = order[site.name]
        if not torch.equal(torch.sort(index).values, torch.arange(site.units)):
            raise ValueError(f"site {site.name!r}: an order must name each of {site.units} units once")
        for part in site.slices:
            parameter = tensor_of(network, part.parameter)
            state = optimizer.state.get(parameter, {}) if optimizer else {}
            for tensor in (
                parameter,
                *(v for v in state.values() if torch.is_tensor(v) and v.shape == parameter.shape),
            ):
                assign(tensor, whole(tensor).index_select(part.axis, part.entries(index).to(tensor.device)))


@torch.no_grad()
def compensate_sites(
    network: nn.Module, space: UnitSpace, table: AttributionTable, proposal: Proposal, ridge: float
) -> None:
    """Give each site's output weights the least-squares correction for a cut that is about to be made, in place.

    ``table`` was measured on the network as it is; its units are in the order from before the cut.
    """
    for site in space.sites:
        present_U = torch.argsort(proposal.order[site.name])
        active_CU = torch.stack([proposal.partition.active(site.name, c)[present_U] for c in table.categories])
        parameter = network.get_parameter(site.output)
        weight = whole(parameter)
        weight_DU = as_output(weight, site)
        moments = (table.second_moment(site.name, category) for category in table.categories)
        corrected_UD = compensate(moments, weight_DU.t().double(), active_CU, table.shares, ridge)
        weight_DU.copy_(corrected_UD.t())
        if weight is not parameter:
            assign(parameter, weight)
