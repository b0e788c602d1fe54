"""How a told twin is given the category: a learned vector of each category, zero to begin with.

Routing by label tells a split model what a row is, so a dense twin that is not told is no fair rival. A told twin must
know the category wherever routes act:

- a language model adds the vector to the output of its input embedding, at every position; the residual stream carries
  it to every layer;
- the autoencoder adds one to the pre-activations of the encoder's hidden layer and another to those of the decoder's,
  as a bias of each category. Told at the encoder alone, the decoder would have to learn the category through the code,
  which a split decoder need not.

Adding zero changes no bit, so a told twin begins as the dense twin itself.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.families import input_embedding
from moeify.routed import RoutedFfn, Routes


def tell(network: nn.Module, routes: Routes, categories: int) -> tuple[nn.Parameter, ...]:
    """Let a routed network add a vector of each row's category, in place; return the vectors, a row a category.

    They become parameters of the network. Which category a row has is read from ``routes``.
    """
    like = next(network.parameters())

    def vectors(width: int) -> nn.Embedding:
        zeros = torch.zeros(categories, width, dtype=like.dtype, device=like.device)
        return nn.Embedding.from_pretrained(zeros, freeze=False)

    added = []
    if (embedding := input_embedding(network)) is not None:
        told = vectors(embedding.embedding_dim)

        def add(module: nn.Module, args: Any, written: Float[Tensor, "rows positions dim"]) -> Tensor:
            return written + told(routes.categories)[:, None]

        embedding.register_forward_hook(add)
        network.add_module("told", told)
        added.append(told)
    else:
        for block in [module for module in network.modules() if isinstance(module, RoutedFfn)]:
            block.told = vectors(block.units.units)
            added.append(block.told)
    return tuple(vector for each in added for vector in each.parameters())
