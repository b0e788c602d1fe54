"""A whole split model as a mixture of experts of a stock format, which plain ``transformers`` loads.

The core becomes the shared expert. Each leaf of the tree becomes a routed expert, which holds all that lies on the way
from below the core to the leaf: units of experts between are copied into every leaf below them. All experts of all
layers get one width, and all shared experts, with zeros behind. So that no token runs more than the longest route of
any layer, a core that is wider than the shared expert leaves its rest to every routed expert, as further copies.

Both formats run one routed expert a token with a weight of exactly 1, whatever the token. What chooses it is routers
that were trained (``moeify.routers.by_layer``), each of which scores the leaves by what its layer's experts read, or a
category is forced, which anyone may change. Either way the split model equals it, by ``SplitModel.by_layer`` or by
label, as long as no two best scores of a token are equal to rounding.

- ``glm4_moe``: sigmoid scores, over their sum (``norm_topk_prob``): of one expert that is 1. Where it is forced,
  ``e_score_correction_bias`` chooses it without touching its weight. Its head is always written by itself, even where
  the network's is its embedding: no GLM ties the two, so vLLM looks for a head and, finding none, runs whatever its
  memory held. Leading layers of which no unit is split (``partition.frozen``) are the dense ones that it begins with.
- ``granitemoeshared``: the softmax over one chosen expert is 1. Its router has no bias, and a linear score without one
  can be made largest for every token by a pair only: the expert chosen and a spare slot hold the same slice, and score
  v.x and -v.x for some v, all others 0. So there is one slot more than leaves; where routers choose, it is the twin of
  the first expert and scores the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.export.fresh_check import ROUTE
from moeify.export.stock import Form, Price, Stock, ffn_sites
from moeify.models.families import describe
from moeify.models.resizing import padded
from moeify.models.units import FfnUnits
from moeify.routed.split_model import SplitModel
from moeify.routers.by_layer import LayerRouters

_FIT = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose attention, norms and embeddings a format has too."""
_MULTIPLE = 8
"""Widths are multiples of so many units: 16 bytes in half precision, which grouped kernels ask for."""


class _Widths(NamedTuple):
    """Units of each layer."""

    shared: int
    expert: int
    slots: int
    """Experts."""

    @property
    def stored(self) -> int:
        return self.shared + self.slots * self.expert


class _Layer(NamedTuple):
    """A feed-forward block in slices, zero-padded; gate over up."""

    shared_in: Float[Tensor, "2*shared dim"]
    shared_out: Float[Tensor, "dim shared"]
    experts_in: Float[Tensor, "slots 2*expert dim"]
    experts_out: Float[Tensor, "slots dim expert"]


@torch.no_grad()
def to_moe(split: SplitModel, form: Form, chosen: str | LayerRouters) -> Stock:
    """Return the split model as a mixture of that format.

    ``chosen``: the category along whose route every token goes, or the routers that choose token by token. Raises
    ValueError where the format cannot hold the network, or where there is but one route.
    """
    tree = split.partition.tree
    if split.told:
        raise ValueError(
            "the split model is told the category (partition.told) by biases, which stock MoE formats have no place for"
        )
    if isinstance(chosen, str) and chosen not in tree.categories:
        raise ValueError(f"no category {chosen!r}; the model has {', '.join(split.categories)}")
    if len(tree.leaves) < 2:
        raise ValueError(f"one route serves {', '.join(split.categories)}, wanted two or more; export a dense model")
    source, sites = _shared_config(split.network), ffn_sites(split)
    if len(sites) < len(split.space.sites):
        raise ValueError("attention heads are split too, and stock MoE formats route feed-forward units alone")
    ways = [_ways(split, site.name) for site in sites]
    whole = _whole(ways) if form == "glm4_moe" else 0
    path = max(len(way) for _, paths in ways[whole:] for way in paths)
    route = max(len(core) + len(way) for core, paths in ways[whole:] for way in paths)
    network: nn.Module
    match form:
        case "glm4_moe":
            widths = _glm4_widths(path, route, len(tree.leaves))
            network = _glm4(source | {"first_k_dense_replace": whole}, widths, split.network)
        case "granitemoeshared":
            expert = _rounded(path)
            widths = _Widths(_rounded(route - expert), expert, len(tree.leaves) + 1)
            network = _granite(source, widths, split.network)
        case _:
            assert_never(form)
    _fill_as_it_is(network, split.network)  # whole layers too
    mixed, dense = list(enumerate(sites))[whole:], sum(site.units for site in sites[:whole])
    placed = dense
    for number, site in mixed:
        core, paths = ways[number]
        shared, rest = core[: widths.shared], core[widths.shared :]
        paths = [torch.cat([rest, way]) for way in paths]
        placed += len(shared) + sum(map(len, paths))
        layer = _layer(split, site, shared, paths, widths)
        block = network.get_submodule(f"model.layers.{number}")
        if form == "glm4_moe":
            _fill_glm4(block, layer)
        else:
            _fill_granite(block, layer)
    experts = {category: tree.leaves.index(tree.route(category)[-1]) for category in split.categories}
    routers = None if isinstance(chosen, str) else chosen
    if isinstance(chosen, str):
        ROUTE[form](network, experts[chosen])
    else:
        for number, site in mixed:
            _fill_router(network.get_submodule(f"model.layers.{number}"), form, chosen.weights[site.name])
    price = Price(
        own=split.space.units,
        copied=placed - split.space.units,
        padded=dense + len(mixed) * widths.stored - placed,
        runs=dense + len(mixed) * (widths.shared + widths.expert),
        routes={category: split.partition.active_units(category) for category in split.categories},
    )
    return Stock(network.eval(), price, form, None if routers else str(chosen), experts, routers)


def _ways(split: SplitModel, site: str) -> tuple[Int[Tensor, " core"], list[Int[Tensor, " way"]]]:
    """Return the units of the core, and for each leaf those on its way below the core."""
    owners, tree = split.partition.owners(site), split.partition.tree
    nodes = [tree.route(tree.nodes[leaf].categories[0])[1:] for leaf in tree.leaves]
    paths = [torch.isin(owners, torch.tensor(way)).nonzero()[:, 0] for way in nodes]
    return (owners == 0).nonzero()[:, 0], paths


def _whole(ways: Sequence[tuple[Tensor, list[Tensor]]]) -> int:
    """Return how many layers come, all of one width, before the first one of which anything is split."""
    split = (any(map(len, paths)) or len(core) != len(ways[0][0]) for core, paths in ways)
    return next((number for number, each in enumerate(split) if each), len(ways) - 1)


def _fill_as_it_is(network: nn.Module, source: nn.Module) -> None:
    """Copy what has the same name in both; a head comes from tied embeddings, and a bias that is no one's is zero."""
    held = dict(source.named_parameters())
    for name, tensor in network.named_parameters():
        if name in held:
            tensor.copy_(held[name])
        elif name == "lm_head.weight":
            tensor.copy_(held["model.embed_tokens.weight"])
        elif name.endswith("o_proj.bias"):
            tensor.zero_()


def _layer(split: SplitModel, site: FfnUnits, shared: Tensor, paths: list[Tensor], widths: _Widths) -> _Layer:
    gate, up, down = (
        split.network.get_parameter(f"{site.module}.{part}.weight") for part in (site.gate, site.up, site.down)
    )

    def way_in(index: Tensor, width: int) -> Tensor:
        return torch.cat([padded(weight[index], 0, width) for weight in (gate, up)])

    paths = paths + [shared[:0]] * (widths.slots - len(paths))
    return _Layer(
        way_in(shared, widths.shared),
        padded(down[:, shared], 1, widths.shared),
        torch.stack([way_in(path, widths.expert) for path in paths]),
        torch.stack([padded(down[:, path], 1, widths.expert) for path in paths]),
    )


def _shared_config(network: nn.Module) -> dict[str, Any]:
    """Return what both formats take over from the configuration of a Llama, or of a family built like one."""
    description = describe(network)
    family, config = description["family"], description.get("config", {})
    if family not in _FIT:
        fit = ", ".join(map(repr, _FIT))
        raise ValueError(f"no stock MoE holds a network of family {family!r}, only {fit} fit")
    if config.get("mlp_bias"):
        raise ValueError("mlp_bias is set; experts of stock MoE formats have no biases, export the split model instead")
    if config.get("sliding_window"):
        raise ValueError("sliding_window is set; stock MoE formats see all positions, export the split model instead")
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings attention_dropout "
        "bos_token_id eos_token_id pad_token_id rope_parameters"
    )
    biased = family == "qwen2" or config.get("attention_bias", False)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {name: config[name] for name in same.split()} | {"attention_bias": biased, "head_dim": size}


# --- glm4_moe -----------------------------------------------------------------------------------------


def _glm4_widths(path: int, route: int, leaves: int) -> _Widths:
    """Return the widths that run the fewest units, and of those that store the fewest.

    The shared expert is a whole number of experts wide; the two together hold ``route`` units, an expert ``path``.
    """
    found = []
    for expert in range(_rounded(path), _rounded(max(path, route)) + 1, _MULTIPLE):
        shared = max(1, -(-(route - expert) // expert)) * expert
        found.append(_Widths(shared, expert, leaves))
    return min(found, key=lambda widths: (widths.shared + widths.expert, widths.stored))


def _glm4(source: dict[str, Any], widths: _Widths, dense: nn.Module) -> nn.Module:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    held = dict(dense.named_parameters())
    if "model.layers.0.self_attn.o_proj.bias" in held:
        raise ValueError("attention_bias is set; glm4_moe has none at the attention's output, take granitemoeshared")
    ours = {
        "rope_parameters": {**source["rope_parameters"], "partial_rotary_factor": 1.0},
        "tie_word_embeddings": False,
    }
    config = Glm4MoeConfig(
        **source | ours,
        partial_rotary_factor=1.0,
        moe_intermediate_size=widths.expert,
        intermediate_size=held["model.layers.0.mlp.up_proj.weight"].shape[0],
        n_shared_experts=widths.shared // widths.expert,
        n_routed_experts=widths.slots,
        num_experts_per_tok=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
        num_mtp_layers=0,
        use_qk_norm="model.layers.0.self_attn.q_norm.weight" in held,
    )
    return Glm4MoeForCausalLM(config)


def _fill_glm4(layer: Any, values: _Layer) -> None:
    mlp = layer.mlp
    gate, up = values.shared_in.chunk(2)
    mlp.shared_experts.gate_proj.weight.copy_(gate)
    mlp.shared_experts.up_proj.weight.copy_(up)
    mlp.shared_experts.down_proj.weight.copy_(values.shared_out)
    mlp.experts.gate_up_proj.copy_(values.experts_in)
    mlp.experts.down_proj.copy_(values.experts_out)
    mlp.gate.weight.zero_()


# --- granitemoeshared ---------------------------------------------------------------------------------


def _granite(source: dict[str, Any], widths: _Widths, dense: nn.Module) -> nn.Module:
    from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM

    if "model.layers.0.self_attn.q_norm.weight" in dict(dense.named_parameters()):
        raise ValueError("queries and keys are normed, which granitemoeshared does not do; take glm4_moe")
    config = GraniteMoeSharedConfig(
        **source,
        intermediate_size=widths.expert,
        shared_intermediate_size=widths.shared,
        num_local_experts=widths.slots,
        num_experts_per_tok=1,
        embedding_multiplier=1.0,
        logits_scaling=1.0,
        residual_multiplier=1.0,
        attention_multiplier=source["head_dim"] ** -0.5,
    )
    return GraniteMoeSharedForCausalLM(config)


def _fill_granite(layer: Any, values: _Layer) -> None:
    layer.shared_mlp.input_linear.weight.copy_(values.shared_in)
    layer.shared_mlp.output_linear.weight.copy_(values.shared_out)
    moe = layer.block_sparse_moe
    moe.experts.gate_up_proj.copy_(values.experts_in)
    moe.experts.down_proj.copy_(values.experts_out)
    direction = torch.randn(moe.router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    moe.router.weight.zero_()[-1] = direction


def _fill_router(layer: Any, form: Form, weight_ED: Tensor) -> None:
    """Have the layer's router choose; a spare slot is the twin of the first expert, so it may take its tokens."""
    if form == "glm4_moe":
        layer.mlp.gate.weight.copy_(weight_ED)
        return
    moe = layer.block_sparse_moe
    for weight in (moe.experts.gate_up_proj, moe.experts.down_proj):
        weight[-1] = weight[0]
    moe.router.weight.copy_(torch.cat([weight_ED, weight_ED[:1]]))


def _rounded(width: int) -> int:
    return -(-max(1, width) // _MULTIPLE) * _MULTIPLE
