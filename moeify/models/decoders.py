"""Causal language models of ``transformers``: where each family keeps the units of a layer, as data.

A family is told by the name of its class, so that ``transformers`` is imported only to build a network. To add one,
name its modules below; what cannot be named so stands in ``WITHOUT`` with the reason.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from attribution.edge_taps import Entry, Writer
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


@dataclass(frozen=True)
class Decoder:
    """One family. Names of modules are those below a layer, each with the number of the layer put in."""

    family: str
    network: str
    """Class of ``transformers`` with the language model's head; ``config``: class of its configuration."""
    config: str
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
    width: str = "intermediate_size"
    """Key of the configuration that says how many feed-forward units a layer has."""
    biases: str | bool = False
    """Whether ``up`` has a bias; or the key of the configuration that says so."""
    activation: str = "hidden_act"
    """Key of the configuration that names the activation function."""
    norm: str | None = "post_attention_layernorm"
    """The norm before the feed-forward block; None where edges cannot be followed: another norm stands behind the
    block, or it is given tokens without rows."""
    heads: bool = False
    """Whether the attention is what ``moeify.routed.attention`` computes: q_proj, k_proj, v_proj and o_proj, rotary
    positions in halves, one scaled dot product under the mask that the model hands over."""
    head_norms: bool = False
    """Whether queries and keys are normed, each head by itself, by q_norm and k_norm."""

    def sites(self, network: nn.Module) -> list[UnitSite]:
        """Return all sites in the network's order; ValueError for an activation that routed blocks do not compute."""
        found: list[UnitSite] = []
        for i in range(config_of(network).num_hidden_layers):
            found += [self._heads(network, i)] if self.heads else []
            found.append(self._ffn(network, i))
        return found

    def entries(self, network: nn.Module) -> tuple[Entry, ...]:
        """Return the ways into all sites but the first, which has none before it."""
        if self.norm is None:
            return ()
        found: list[Entry] = []
        for i in range(config_of(network).num_hidden_layers):
            layer = self.layer.format(i)
            if self.heads:
                attention = tuple(Writer(f"{layer}.self_attn.{part}_proj") for part in "qkv")
                found.append(Entry(f"layers.{i}.heads", attention, norm=f"{layer}.input_layernorm"))
            ffn = tuple(Writer(f"{layer}.{self.mlp}.{part}") for part in (self.gate, self.up) if part)
            found.append(Entry(f"layers.{i}.ffn", ffn, norm=f"{layer}.{self.norm}"))
        return tuple(found[1:])

    def build(self, config: dict[str, Any]) -> nn.Module:
        """Return an untrained network of this configuration."""
        import transformers

        network: nn.Module = getattr(transformers, self.network)(getattr(transformers, self.config)(**config))
        return network

    def with_units(self, config: dict[str, Any], units: int, heads: int | None) -> dict[str, Any]:
        """Return the configuration with so many feed-forward units a layer, and at least so many units of heads."""
        changed = {**config, self.width: units}
        return changed | _with_heads(config, heads) if heads is not None else changed

    def with_biases(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration with biases in feed-forward blocks; ValueError where there is no place for them."""
        match self.biases:
            case str(key):
                return {**config, key: True}
            case True:
                return config
            case _:
                raise ValueError(
                    f"feed-forward blocks of family {self.family!r} have no biases, which a told split model becomes; "
                    f"export it with --split"
                )

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
        )

    def _map(self, network: nn.Module, name: str) -> Any:
        return network.get_submodule(name) if self.transposed else linear(network, name)

    def _heads(self, network: nn.Module, layer: int) -> HeadUnits:
        config, module = config_of(network), f"{self.layer.format(layer)}.self_attn"
        key, queries = linear(network, f"{module}.k_proj"), config.num_attention_heads // config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return HeadUnits(
            f"layers.{layer}.heads",
            module,
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            units=key.out_features // size,
            queries=queries,
            size=size,
            bias=key.bias is not None,
            norms=("q_norm", "k_norm") if self.head_norms else None,
        )


DECODERS = (
    Decoder("llama", "LlamaForCausalLM", "LlamaConfig", biases="mlp_bias", heads=True),
    Decoder("mistral", "MistralForCausalLM", "MistralConfig", heads=True),
    Decoder("qwen2", "Qwen2ForCausalLM", "Qwen2Config", heads=True),
    Decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config", heads=True, head_norms=True),
    Decoder("gemma", "GemmaForCausalLM", "GemmaConfig"),
    Decoder("gemma2", "Gemma2ForCausalLM", "Gemma2Config", activation="hidden_activation", norm=None),
    Decoder("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextConfig", activation="hidden_activation", norm=None),
    Decoder(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        layer="gpt_neox.layers.{}",
        gate=None,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        biases=True,
    ),
    Decoder(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        layer="transformer.h.{}",
        gate=None,
        up="c_fc",
        down="c_proj",
        transposed=True,
        after="dropout",
        width="n_inner",
        biases=True,
        activation="activation_function",
        norm="ln_2",
    ),
    Decoder(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        layer="model.decoder.layers.{}",
        mlp="",
        gate=None,
        up="fc1",
        down="fc2",
        inline="activation_fn",
        width="ffn_dim",
        biases="enable_bias",
        activation="activation_function",
        norm=None,
    ),
)

WITHOUT = {
    "Phi3ForCausalLM": "gate and up are one module, gate_up_proj; units need an nn.Linear for each",
}
"""Class -> why there is no adapter, and what one would need."""


def config_of(network: nn.Module) -> Any:
    """Return the configuration of a network of ``transformers``."""
    return network.config


def decoder_of(network: nn.Module) -> Decoder | None:
    """Return the family of a network; None where it is not among them."""
    return next((decoder for decoder in DECODERS if decoder.network == type(network).__name__), None)


def decoder_named(family: object) -> Decoder | None:
    """Return the family of this name; None where it is not among them."""
    return next((decoder for decoder in DECODERS if decoder.family == family), None)


def _with_heads(config: dict[str, Any], units: int) -> dict[str, int]:
    """Return what a config says of at least so many groups of heads, each as large as before.

    More than asked for where ``transformers`` wants their number to divide the model's width.
    """
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    queries, width = heads // groups, config["hidden_size"]
    enough = next((n for n in range(units, groups) if width % (n * queries) == 0), groups)
    size = config.get("head_dim") or width // heads
    return {"num_attention_heads": enough * queries, "num_key_value_heads": enough, "head_dim": size}
