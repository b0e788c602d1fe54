"""Transformers of ``transformers``: where a family keeps the units of a layer, as data.

A family is told by the name of its class, so that ``transformers`` is imported only to build a network. To add one,
name its modules in a file of ``moeify.models.adapters``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attribution.edge_taps import Entry, Writer
from moeify.models.fused import FusedLinear, open_fused
from moeify.models.units import Activation, FfnUnits, HeadUnits, UnitSite, linear

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What ``transformers`` calls them -> what routed blocks compute."""

Learns = Literal["next token", "masked token", "class of an image", "class of a text"]
"""What a network predicts: the token after each, tokens that are hidden from it, or what an image or a text is."""
_ROWS = 64
"""Tokens of a random row, at most."""


@dataclass(frozen=True)
class Heads:
    """An attention block whose heads are units: ``moeify.routed.attention`` computes what it does. Names of modules are
    those below ``module``, which is named below the layer."""

    module: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    out: str = "o_proj"
    inline: str | None = None
    """See ``HeadUnits``."""
    norm: str | None = "input_layernorm"
    """The norm before the block."""
    norms: tuple[str, str] | None = None
    """See ``HeadUnits``."""
    sized: bool = True
    """Whether the configuration has a ``head_dim``, so that a layer may have fewer heads of the same size."""


@dataclass(frozen=True)
class Transformer:
    """One family. Names of modules are those below a layer, each with the number of the layer put in."""

    family: str
    network: str
    """Class of ``transformers`` with the head that makes predictions; ``config``: class of its configuration."""
    config: str
    learns: Learns = "next token"
    layer: str = "model.layers.{}"
    """Qualified name of a layer."""
    mlp: str = "mlp"
    """The feed-forward block; empty where the layer itself runs it, see ``FfnUnits.inline``."""
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    inline: str | None = None
    transposed: bool = False
    after: str | None = None
    """These three: see ``FfnUnits``."""
    fused: bool = False
    """Whether maps named ``module.part`` are one stock module, parts side by side in the order in which they are named
    here; they are opened, see ``moeify.models.fused``."""
    width: str = "intermediate_size"
    """Key of the configuration that says how many feed-forward units a layer has."""
    biases: str | bool = False
    """Whether ``up`` has a bias; or the key of the configuration that says so."""
    activation: str = "hidden_act"
    """Key of the configuration that names the activation function."""
    norm: str | None = "post_attention_layernorm"
    """The norm before the feed-forward block; None where the residual stream cannot be followed: another norm stands
    behind the block, or it is given tokens without rows."""
    heads: Heads | None = None
    """Whether heads are units too, and where."""
    padded: bool = False
    """Whether positions are counted from behind the padding token's number, so that as many fewer are left."""

    @property
    def auto(self) -> str:
        """The class of ``transformers`` by which everybody loads such a network."""
        match self.learns:
            case "next token":
                return "AutoModelForCausalLM"
            case "masked token":
                return "AutoModelForMaskedLM"
            case "class of an image":
                return "AutoModelForImageClassification"
            case "class of a text":
                return "AutoModelForSequenceClassification"

    def sites(self, network: nn.Module) -> list[UnitSite]:
        """Return all sites in the network's order; ValueError for an activation that routed blocks do not compute."""
        closed = [name for name in self._fused(network) if not isinstance(network.get_submodule(name), FusedLinear)]
        if closed:
            raise ValueError(
                f"{closed[0]!r} of {self.network} holds several maps as one; "
                f"give moeify.models.families.opened(network) in place of the network"
            )
        found: list[UnitSite] = []
        for i in range(config_of(network).num_hidden_layers):
            found += [self._heads(network, i, self.heads)] if self.heads else []
            found.append(self._ffn(network, i))
        return found

    def entries(self, network: nn.Module) -> tuple[Entry, ...]:
        """Return the ways into all sites but the first, which has none before it."""
        if self.norm is None:
            return ()
        found: list[Entry] = []
        for i in range(config_of(network).num_hidden_layers):
            layer = self.layer.format(i)
            if heads := self.heads:
                ways = tuple(Writer(f"{layer}.{heads.module}.{n}") for n in (heads.query, heads.key, heads.value))
                found.append(Entry(f"layers.{i}.heads", ways, norm=f"{layer}.{heads.norm}"))
            ffn = tuple(Writer(f"{layer}.{self.mlp}.{part}") for part in (self.gate, self.up) if part)
            found.append(Entry(f"layers.{i}.ffn", ffn, norm=f"{layer}.{self.norm}"))
        return tuple(found[1:])

    def places(self, network: nn.Module) -> dict[str, int]:
        """Return the convolution that makes tokens of an image, and how many it makes; 0 for what classifies a text,
        once for all of its tokens."""
        if self.learns == "class of a text":
            inside = self.layer.partition("{")[0]
            named = network.named_modules()
            return {n: 0 for n, module in named if isinstance(module, nn.Linear) and not n.startswith(inside)}
        if self.learns != "class of an image":
            return {}
        found = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
        return dict.fromkeys(found, self._tokens(network) - 1)

    def describe(self, network: nn.Module) -> dict[str, Any]:
        """Return the network's configuration."""
        return {"config": config_of(network).to_dict()}

    def build(self, description: dict[str, Any]) -> nn.Module:
        """Return an untrained network of this configuration."""
        import transformers

        config = getattr(transformers, self.config)(**description["config"])
        return self.opened(getattr(transformers, self.network)(config))

    def opened(self, network: nn.Module) -> nn.Module:
        """Open the maps that are fused, in place, and return the network."""
        open_fused(network, self._fused(network))
        return network

    def with_units(self, description: dict[str, Any], units: int, heads: int | None) -> dict[str, Any]:
        """Return the configuration with so many feed-forward units a layer, and at least so many units of heads."""
        config = {**description["config"], self.width: units}
        if heads is not None and self.heads and self.heads.sized:
            config |= _with_heads(config, heads)
        return {**description, "config": config}

    def with_biases(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration with biases in feed-forward blocks; ValueError where there is no place for them."""
        match self.biases:
            case str(key):
                return {**description, "config": {**description["config"], key: True}}
            case True:
                return description
            case _:
                raise ValueError(
                    f"feed-forward blocks of family {self.family!r} have no biases, which a told split model becomes; "
                    f"export it with --split"
                )

    def inputs(self, network: nn.Module, rows: int, generator: torch.Generator) -> Tensor:
        """Return random tokens, as many as the network takes or ``_ROWS``; or random images."""
        config = config_of(network)
        if self.learns == "class of an image":
            return torch.randn(rows, config.num_channels, *image_size(config), generator=generator)
        tokens = torch.randint(config.vocab_size - 1, (rows, min(_ROWS, self.positions(config))), generator=generator)
        unlike = config.pad_token_id if self.padded else None
        return tokens if unlike is None else tokens + (tokens >= unlike).long()

    def positions(self, config: Any) -> int:
        """Return how many tokens a row may have."""
        return config.max_position_embeddings - (config.pad_token_id + 1 if self.padded else 0)

    def _tokens(self, network: nn.Module) -> int:
        """Return how many tokens an image becomes, the one of the class among them; 1 for text."""
        if self.learns != "class of an image":
            return 1
        config = config_of(network)
        sizes = zip(image_size(config), _pair(config.patch_size), strict=True)
        rows, columns = (image // patch for image, patch in sizes)
        return rows * columns + 1

    def _ffn(self, network: nn.Module, layer: int) -> FfnUnits:
        module = ".".join(filter(None, (self.layer.format(layer), self.mlp)))
        activation = getattr(config_of(network), self.activation)
        if activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"{self.activation} is {activation!r}; the {self.family} adapter knows {known}")
        ways_in = {name: self._map(network, f"{module}.{name}") for name in (self.gate, self.up) if name}
        return FfnUnits(
            f"layers.{layer}.ffn",
            module,
            self.gate,
            self.up,
            self.down,
            ACTIVATIONS[activation],
            ways_in[self.up].weight.shape[int(self.transposed)],
            gate_bias=self.gate is not None and ways_in[self.gate].bias is not None,
            up_bias=ways_in[self.up].bias is not None,
            inline=self.inline,
            transposed=self.transposed,
            after=self.after,
            places=self._tokens(network),
            stream=self.layer.format(layer) if self.norm else None,
        )

    def _map(self, network: nn.Module, name: str) -> Any:
        return network.get_submodule(name) if self.transposed else linear(network, name)

    def _heads(self, network: nn.Module, layer: int, heads: Heads) -> HeadUnits:
        config, module = config_of(network), f"{self.layer.format(layer)}.{heads.module}"
        key, (queries, size) = linear(network, f"{module}.{heads.key}"), _of_heads(config)
        return HeadUnits(
            f"layers.{layer}.heads",
            module,
            heads.query,
            heads.key,
            heads.value,
            heads.out,
            units=key.out_features // size,
            queries=queries,
            size=size,
            bias=key.bias is not None,
            norms=heads.norms,
            inline=heads.inline,
            causal=self.learns == "next token",
            places=self._tokens(network),
        )

    def _fused(self, network: nn.Module) -> Mapping[str, Mapping[str, int]]:
        """Return stock module -> part -> its rows, of every layer."""
        return dict(self._fused_of_layers(network)) if self.fused else {}

    def _fused_of_layers(self, network: nn.Module) -> Iterator[tuple[str, Mapping[str, int]]]:
        config = config_of(network)
        (queries, size), heads = _of_heads(config), self.heads
        groups = config.num_attention_heads // queries
        for i in range(config.num_hidden_layers):
            maps = {f"{self.mlp}.{name}": getattr(config, self.width) for name in (self.gate, self.up) if name}
            if heads:
                widths = {heads.query: groups * queries * size, heads.key: groups * size, heads.value: groups * size}
                maps |= {f"{heads.module}.{name}": rows for name, rows in widths.items()}
            found: dict[str, dict[str, int]] = {}
            for name, rows in maps.items():
                module, _, part = name.rpartition(".")
                found.setdefault(f"{self.layer.format(i)}.{module}", {})[part] = rows
            yield from found.items()


def config_of(network: nn.Module) -> Any:
    """Return the configuration of a network of ``transformers``."""
    return network.config


def image_size(config: Any) -> tuple[int, int]:
    """Return height and width of the images that a network takes."""
    return _pair(config.image_size)


def _pair(sides: Any) -> tuple[int, int]:
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return height, width


def _of_heads(config: Any) -> tuple[int, int]:
    """Return how many query heads share keys, and the dimensions of a head."""
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads // groups, size


def _with_heads(config: dict[str, Any], units: int) -> dict[str, int]:
    """Return what a config says of at least so many groups of heads, each as large as before.

    More than asked for where ``transformers`` wants their number to divide the model's width; all where factors of
    rotary positions are given for heads of the size that ``hidden_size`` and their number imply.
    """
    heads, width = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    queries = heads // groups
    if "short_factor" in (config.get("rope_parameters") or {}):
        return {}
    enough = next((n for n in range(units, groups) if width % (n * queries) == 0), groups)
    size = config.get("head_dim") or width // heads
    grouped = {"num_key_value_heads": enough} if "num_key_value_heads" in config else {}
    return {"num_attention_heads": enough * queries, **grouped, "head_dim": size}
