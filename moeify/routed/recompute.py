"""Layers that forget their activations and compute them again in the backward pass: memory for a third more arithmetic.

What a routed layer runs stands in the routes that all layers share, and the backward pass may come when those say
something else (a batch's gradient routing ends with its forward pass), so it is put down with each layer's pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from moeify.models.families import layers
from moeify.routed.ffn import Routes
from moeify.routed.split_model import SplitModel


def recompute(model: SplitModel) -> None:
    """Let each layer of a model's decoder keep its input alone, in training, in place; the gradients are the same bits.

    ValueError for a network without decoder layers.
    """
    recompute_layers(model.network, model.routes)


def recompute_layers(network: nn.Module, routes: Routes) -> None:
    """Do so in a network whose routed blocks, if it has any, follow these routes."""
    found = layers(network)
    if not found:
        raise ValueError(f"{type(network).__name__} has no decoder layers that could be computed again")
    for layer in found:
        layer.forward = _recomputed(layer, layer.forward, routes)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], routes: Routes) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), routes.as_now()

    def run(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run
