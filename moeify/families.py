"""Adapters: where the units of each supported network live, and how to describe and rebuild it.

One case a family. A family is told by the name of its class, so that no model library is imported to ask.
"""

from collections.abc import Collection
from typing import Any, get_args

import torch
from torch import Tensor, nn

from attribution.edge_taps import Entry, Writer
from attribution.sites import Site
from moeify.partition_config import PLAIN, UnitKind
from moeify.units import FfnUnits, HeadUnits, UnitSite, UnitSpace, check, linear


def unit_space(network: nn.Module, kinds: Collection[UnitKind] = PLAIN) -> UnitSpace:
    """Return the sites of a network's units of these kinds, in the network's order.

    Kinds that the network has none of are passed over. ValueError for a network without an adapter.
    """
    match type(network).__name__:
        case "LlamaForCausalLM":
            layers = range(_config(network).num_hidden_layers)
            sites: list[UnitSite] = [part(network, i) for i in layers for part in (_llama_heads, _llama_ffn)]
        case "Autoencoder":
            sites = [_feed_forward(network, name) for name in ("encoder", "decoder")]
        case other:
            raise ValueError(
                f"no adapter for {other}; it needs a case in moeify.families that names the Linear layers of each site"
            )
    return check(network, [site for site in sites if site.kind in kinds])


def readers(network: nn.Module) -> tuple[Site, ...]:
    """Return every site that attribution can read, in the network's order, whether it is split or not."""
    return unit_space(network, get_args(UnitKind)).readers


def entries(network: nn.Module) -> tuple[Entry, ...]:
    """Return the ways into the sites of ``readers`` that have sites before them, for attribution of edges."""
    match type(network).__name__:
        case "LlamaForCausalLM":
            found = []
            for i in range(_config(network).num_hidden_layers):
                layer = f"model.layers.{i}"
                attention = tuple(Writer(f"{layer}.self_attn.{part}_proj") for part in "qkv")
                ffn = tuple(Writer(f"{layer}.mlp.{part}_proj") for part in ("gate", "up"))
                found += [
                    Entry(f"layers.{i}.heads", attention, norm=f"{layer}.input_layernorm"),
                    Entry(f"layers.{i}.ffn", ffn, norm=f"{layer}.post_attention_layernorm"),
                ]
            return tuple(found[1:])
        case "Autoencoder":
            return (Entry("decoder.hidden", (Writer("decoder.up"),)),)
        case other:
            raise ValueError(f"no adapter for {other}; it needs a case in moeify.families")


def describe(network: nn.Module) -> dict[str, Any]:
    """Return plain data from which ``rebuild`` makes a network of the same shape, all sites as wide as the widest."""
    match type(network).__name__:
        case "LlamaForCausalLM":
            return {"family": "llama", "config": _config(network).to_dict()}
        case "Autoencoder":
            up, down = linear(network, "encoder.up"), linear(network, "encoder.down")
            return {
                "family": "autoencoder",
                "inputs": up.in_features,
                "hidden": max(up.out_features, linear(network, "decoder.up").out_features),
                "code": down.out_features,
            }
        case other:
            raise ValueError(f"no adapter for {other}; it needs a case in moeify.families")


def rebuild(description: dict[str, Any]) -> nn.Module:
    """Return an untrained network of the described shape."""
    match description.get("family"):
        case "llama":
            from transformers import LlamaConfig, LlamaForCausalLM

            network: nn.Module = LlamaForCausalLM(LlamaConfig(**description["config"]))
            return network
        case "autoencoder":
            from moeify.models import Autoencoder

            return Autoencoder(description["inputs"], description["hidden"], description["code"])
        case other:
            raise ValueError(f"unknown network family {other!r}; this version rebuilds 'llama' and 'autoencoder'")


def with_units(description: dict[str, Any], units: int, heads: int | None = None) -> dict[str, Any]:
    """Return the description of the same network with another number of units in every site.

    ``units``: of each feed-forward site; ``heads``: of each site of attention heads, as many as it has if not given.
    More heads than asked for where the format wants their number to divide the model's width.
    """
    match description.get("family"):
        case "llama":
            config = {**description["config"], "intermediate_size": units}
            if heads is not None:
                config |= _with_heads(config, heads)
            return {**description, "config": config}
        case "autoencoder":
            return {**description, "hidden": units}
        case other:
            raise ValueError(f"unknown network family {other!r}")


def with_biases(description: dict[str, Any]) -> dict[str, Any]:
    """Return the description of the same network with biases in its feed-forward blocks."""
    match description.get("family"):
        case "llama":
            return {**description, "config": {**description["config"], "mlp_bias": True}}
        case "autoencoder":
            return description  # has them
        case other:
            raise ValueError(f"unknown network family {other!r}")


def example_inputs(network: nn.Module, rows: int, seed: int) -> Tensor:
    """Return random rows of valid input, as long as the network takes them."""
    generator = torch.Generator().manual_seed(seed)
    description = describe(network)
    match description["family"]:
        case "llama":
            shape = (rows, min(64, description["config"]["max_position_embeddings"]))
            return torch.randint(description["config"]["vocab_size"], shape, generator=generator)
        case _:
            return torch.rand(rows, description["inputs"], generator=generator)


def _config(network: nn.Module) -> Any:
    return network.config


def _llama_ffn(network: nn.Module, layer: int) -> FfnUnits:
    module = f"model.layers.{layer}.mlp"
    up = linear(network, f"{module}.up_proj")
    if _config(network).hidden_act != "silu":
        raise ValueError(f"hidden_act is {_config(network).hidden_act!r}; the llama adapter knows 'silu'")
    bias = up.bias is not None
    return FfnUnits(
        f"layers.{layer}.ffn", module, "gate_proj", "up_proj", "down_proj", "silu", up.out_features, bias, bias
    )


def _llama_heads(network: nn.Module, layer: int) -> HeadUnits:
    config, module = _config(network), f"model.layers.{layer}.self_attn"
    key, queries = linear(network, f"{module}.k_proj"), config.num_attention_heads // config.num_key_value_heads
    return HeadUnits(
        f"layers.{layer}.heads",
        module,
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        units=key.out_features // config.head_dim,
        queries=queries,
        size=config.head_dim,
        bias=key.bias is not None,
    )


def _with_heads(config: dict[str, Any], units: int) -> dict[str, int]:
    """Return what a Llama's config says of at least so many groups of heads, each as large as before."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    queries, width = heads // groups, config["hidden_size"]
    enough = next((n for n in range(units, groups) if width % (n * queries) == 0), groups)
    size = config.get("head_dim") or width // heads
    return {"num_attention_heads": enough * queries, "num_key_value_heads": enough, "head_dim": size}


def _feed_forward(network: nn.Module, module: str) -> FfnUnits:
    up = linear(network, f"{module}.up")
    return FfnUnits(
        f"{module}.hidden", module, None, "up", "down", "relu", up.out_features, up_bias=up.bias is not None
    )
