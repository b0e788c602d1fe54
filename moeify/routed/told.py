"""How a told twin is given the category: every hidden unit learns a bias for each category, zero to begin with.

Routing by label tells a split model what a row is, so a dense twin that is not told is no fair rival. A told twin must
know the category where routes act, which is at the units of every feed-forward block, or at the inner channels of every
residual one. Other places were tried and made weaker rivals (benchmarks/LOG.md): told at the encoder alone, an
autoencoder has to bring the category through its code; a vector of each category added to the input embedding left a
small Llama behind the dense twin.

Adding zero changes no bit, so a told twin begins as the dense twin itself.
"""

import torch
from torch import nn

from moeify.routed.conv import RoutedBlock
from moeify.routed.ffn import RoutedFfn


def tell(network: nn.Module, categories: int) -> tuple[nn.Parameter, ...]:
    """Let the routed blocks of a network add a bias of each row's category, in place; return the biases by block.

    They become parameters of the network. Which category a row has, a block reads from its routes.
    """
    found: list[nn.Parameter] = []
    for block in [module for module in network.modules() if isinstance(module, RoutedFfn | RoutedBlock)]:
        like = network.get_parameter(block.units.output)
        zeros = torch.zeros(categories, block.units.units, dtype=like.dtype, device=like.device)
        block.told = nn.Embedding.from_pretrained(zeros, freeze=False)
        found += block.told.parameters()
    return tuple(found)
