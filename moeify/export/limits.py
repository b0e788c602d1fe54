"""How fast a category's route can be: the share of the dense network's work that it needs, in bytes or operations.

Bytes where each weight is read for one row or token alone (decoding one row, and a row of a network of linear maps):
weights and, behind a prompt, keys and values. Everywhere else the operations of matrix products, convolutions and
attention. What a route needs is what its own units need: padding and copies of a format count against the export.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moeify.export.speeds import Bound
from moeify.export.works import Work, dense_run, filled_cache, prompts_of, routed_run
from moeify.models.build import logits
from moeify.models.families import example_inputs
from moeify.models.transformer import config_of
from moeify.models.units import HeadUnits, unit_parameters
from moeify.routed.split_model import SplitModel
from moeify.timing import flops


def bound_of(network: nn.Module, work: Work) -> Bound:
    """Return what limits the work."""
    match work.kind:
        case "decode":
            once = True
        case "prefill":
            once = False
        case "rows":
            inputs = example_inputs(network, 1, seed=0)
            once = inputs.is_floating_point() and inputs.dim() == 2
    return "bytes" if once and work.batch == 1 else "FLOPs"


def needed(dense: nn.Module, split: SplitModel, work: Work, categories: Sequence[str]) -> float:
    """Return the share of the dense network's work that rows of these categories, in turn, need."""
    if bound_of(dense, work) == "FLOPs":
        return flops(routed_run(split, work, categories)) / flops(dense_run(dense, work))
    (category,) = categories
    active = {site.name: float(split.partition.active(site.name, category).sum()) for site in split.space.sites}
    idle = sum((site.units - active[site.name]) * unit_parameters(split.network, site) for site in split.space.sites)
    own, whole = _weights(split.network) - idle, float(_weights(dense))
    if work.kind == "decode":
        held = _cached(dense, work)
        own, whole = own + _heads_share(dense, split, active) * held, whole + held
    return own / whole


def _weights(network: nn.Module) -> int:
    """Return the weights that a token needs; of an embedding that is not the head too, that is a row."""
    head: Any = getattr(network, "get_output_embeddings", lambda: None)()
    tied = getattr(head, "weight", None)
    tables = [m.weight for m in network.modules() if isinstance(m, nn.Embedding) and m.weight is not tied]
    total = sum(parameter.numel() for parameter in network.parameters())
    return total - sum(table.numel() - table.shape[1] for table in tables)


@torch.no_grad()
def _cached(network: nn.Module, work: Work) -> int:
    """Return how many keys and values stand before a token."""
    _, cache = filled_cache(network, prompts_of(network, work), lambda rows, **more: logits(network, rows, **more))
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def _heads_share(dense: nn.Module, split: SplitModel, active: dict[str, float]) -> float:
    """Return the share of the dense network's keys and values that are of heads on the route."""
    on = [active[site.name] for site in split.space.sites if isinstance(site, HeadUnits)]
    config = config_of(dense)
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return sum(on) / (groups * config.num_hidden_layers) if on else 1.0
