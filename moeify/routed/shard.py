"""A split model of which every worker holds a share: torch's FSDP2, layer by layer."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from moeify.models.families import layers
from moeify.routed.split_model import SplitModel


def shard(model: SplitModel, device: torch.device) -> None:
    """Leave each worker of the default group its share of a model's parameters, in place; all have the same model.

    ``device``: where this worker's is.

    A layer's parameters travel together, and so do those outside of layers. An optimizer is made afterwards.
    """
    network = model.network
    told = {id(parameter) for parameter in model.told}
    names = [name for name, parameter in network.named_parameters() if id(parameter) in told]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*layers(network), network):
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)  # or an evaluation leaves the root's whole
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)  # gradients are sums over all workers' rows
        sharded.set_force_sum_reduction_for_comms(True)
    model.told = tuple(network.get_parameter(name) for name in names)
