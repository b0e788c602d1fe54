"""Stock networks as GGUF files, for llama.cpp and what is built on it.

A dense Llama is written with the width that each layer has: architecture ``llama`` where all are equal, else ``deci``,
which is a Llama whose feed-forward length is a list. Mixtures are ``glm4moe`` and ``granitemoe``. llama.cpp turns
neighbouring dimensions of a head where transformers turns halves, so ``llama``, ``deci`` and ``granitemoe`` have the
rows of queries and keys in another order.

Needs the ``gguf`` package; checking a file needs llama.cpp, in ``xllamacpp``: both come with ``moeify[gguf]``.
"""

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn

from moeify.data.given_tokenizer import beginning
from moeify.models.pretrained import GENERATION

_CONTROL, _NORMAL, _UNUSED = 3, 1, 5
"""GGUF's token types."""
_KNOWN = ("llama", "glm4_moe", "granitemoeshared")
"""Kinds of models, as ``transformers`` names them."""
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "shared_mlp.output_linear": "ffn_down_shexp",
    "block_sparse_moe.router": "ffn_gate_inp",
}
"""A layer's modules in transformers -> tensors of a block in GGUF, where one is the other as it is."""


def require(*, verify: bool) -> None:
    """Raise ValueError where a package is missing that writing, or checking, needs."""
    if find_spec("gguf") is None:
        raise ValueError("writing a GGUF file needs the gguf package; pip install 'moeify[gguf]'")
    if verify and find_spec("xllamacpp") is None:
        raise ValueError(
            "checking a GGUF file in llama.cpp needs the xllamacpp package; pip install 'moeify[gguf]', "
            "or do without the check (--no-verify)"
        )


def write(network: nn.Module, assets: Mapping[str, bytes], path: Path, *, dtype: torch.dtype, name: str) -> None:
    """Write a network and its tokenizer to one GGUF file.

    ``assets``: the tokenizer's files by name, ``tokenizer.json`` among them; a chat template comes along, and the ends
    of texts that ``generation_config.json`` names.

    Matrices are stored in ``dtype``; norms, biases and routers in float32. Raises ValueError for what the format, or
    this writer, does not hold.
    """
    import gguf

    config: Any = network.config
    if config.model_type not in _KNOWN:
        raise ValueError(f"the GGUF writer knows {', '.join(_KNOWN)}, not {config.model_type}; export without --gguf")
    if config.rope_parameters["rope_type"] != "default" or config.attention_bias:
        raise ValueError("the GGUF writer knows plain rotary positions and no attention_bias; export without --gguf")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act is {config.hidden_act!r}, the GGUF writer knows 'silu'; export without --gguf")
    if getattr(config, "use_qk_norm", False):
        raise ValueError("queries and keys are normed, which the GGUF writer does not know; export without --gguf")
    architecture, settings = _settings(network)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_file_type(
        {torch.float32: gguf.LlamaFileType.ALL_F32, torch.float16: gguf.LlamaFileType.MOSTLY_F16}.get(
            dtype, gguf.LlamaFileType.MOSTLY_BF16
        )
    )
    for setting, value in settings.items():
        getattr(writer, f"add_{setting}")(value)
    _add_tokenizer(writer, assets, config)
    for key, tensor in _tensors(network, architecture):
        _add(writer, key, tensor.detach().float().contiguous(), dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _settings(network: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return the architecture, and what each ``add_`` method of a writer is to be given."""
    from gguf import ExpertGatingFuncType

    config: Any = network.config
    common = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
    }
    match config.model_type:
        case "llama":
            if config.mlp_bias:
                raise ValueError("mlp_bias is set, which the GGUF writer does not know; export without --gguf")
            widths = [
                network.get_parameter(f"model.layers.{layer}.mlp.up_proj.weight").shape[0]
                for layer in range(config.num_hidden_layers)
            ]
            if len(set(widths)) == 1:
                return "llama", common | {"feed_forward_length": widths[0]}
            return "deci", common | {"feed_forward_length": widths}
        case "glm4_moe":
            return "glm4moe", common | {
                "feed_forward_length": config.intermediate_size,
                "expert_feed_forward_length": config.moe_intermediate_size,
                "expert_count": config.n_routed_experts,
                "expert_used_count": config.num_experts_per_tok,
                "expert_shared_count": config.n_shared_experts,
                "expert_weights_scale": config.routed_scaling_factor,
                "expert_weights_norm": config.norm_topk_prob,
                "expert_gating_func": ExpertGatingFuncType.SIGMOID,
                "expert_group_count": config.n_group,
                "expert_group_used_count": config.topk_group,
                "leading_dense_block_count": config.first_k_dense_replace,
                "nextn_predict_layers": config.num_mtp_layers,
            }
        case "granitemoeshared":
            return "granitemoe", common | {
                "feed_forward_length": config.intermediate_size,
                "expert_shared_feed_forward_length": config.shared_intermediate_size,
                "expert_count": config.num_local_experts,
                "expert_used_count": config.num_experts_per_tok,
                "attention_scale": config.attention_multiplier,
                "embedding_scale": config.embedding_multiplier,
                "residual_scale": config.residual_multiplier,
                "logit_scale": config.logits_scaling,
            }
        case other:
            raise AssertionError(other)


def _tensors(network: nn.Module, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors as llama.cpp wants them."""
    config: Any = network.config
    turned = architecture != "glm4moe"
    yield "token_embd.weight", network.get_parameter("model.embed_tokens.weight")
    yield "output_norm.weight", network.get_parameter("model.norm.weight")
    if not config.tie_word_embeddings:
        yield "output.weight", network.get_parameter("lm_head.weight")
    for layer in range(config.num_hidden_layers):
        named = dict(network.get_submodule(f"model.layers.{layer}").named_parameters())
        for name, tensor in named.items():
            part, block = name.removesuffix(".weight"), f"blk.{layer}"
            match part.rpartition(".")[2]:
                case "q_proj" if turned:
                    yield f"{block}.attn_q.weight", _turned(tensor, config.num_attention_heads)
                case "k_proj" if turned:
                    yield f"{block}.attn_k.weight", _turned(tensor, config.num_key_value_heads)
                case "gate_up_proj":
                    gate, up = tensor.chunk(2, dim=1)
                    yield f"{block}.ffn_gate_exps.weight", gate
                    yield f"{block}.ffn_up_exps.weight", up
                case "down_proj" if part.endswith("experts.down_proj") and tensor.ndim == 3:
                    yield f"{block}.ffn_down_exps.weight", tensor
                case "input_linear":
                    gate, up = tensor.chunk(2)
                    yield f"{block}.ffn_gate_shexp.weight", gate
                    yield f"{block}.ffn_up_shexp.weight", up
                case "post_attention_layernorm" if architecture == "glm4moe":
                    yield f"{block}.post_attention_norm.weight", tensor
                case _:
                    yield f"{block}.{_PARTS[part]}.weight", tensor
        if architecture == "glm4moe" and layer >= config.first_k_dense_replace:
            bias = network.get_buffer(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
            yield f"blk.{layer}.exp_probs_b.bias", bias


def _turned(weight: Tensor, heads: int) -> Tensor:
    """Return the rows of queries or keys with each head's two halves interleaved."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add(writer: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    import gguf

    values = tensor.numpy()
    if tensor.ndim == 1 or "ffn_gate_inp" in name or dtype == torch.float32:
        writer.add_tensor(name, values)
    elif dtype == torch.float16:
        writer.add_tensor(name, values.astype("float16"))
    else:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _add_tokenizer(writer: Any, assets: Mapping[str, bytes], config: Any) -> None:
    tokenizer = json.loads(assets["tokenizer.json"])
    before = tokenizer["pre_tokenizer"] or {}
    plain = before.get("type") == "ByteLevel" and not before.get("add_prefix_space") and before.get("use_regex", True)
    if tokenizer["model"]["type"] != "BPE" or not plain or tokenizer["normalizer"]:
        raise ValueError("the GGUF writer knows byte-level BPE tokenizers, and this is another; export without --gguf")
    known = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    known |= special
    tokens = [known.get(index, f"[PAD{index}]") for index in range(config.vocab_size)]
    kinds = [_CONTROL if i in special else _NORMAL if i in known else _UNUSED for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    begin = beginning(tokenizers.Tokenizer.from_str(assets["tokenizer.json"].decode()))
    if (first := config.bos_token_id if begin is None else begin) is not None:
        writer.add_bos_token_id(first)
    writer.add_add_bos_token(begin is not None)
    generation = json.loads(assets.get(GENERATION, b"{}"))
    ends = generation.get("eos_token_id", config.eos_token_id)
    for kind, end in zip(("eos", "eot", "eom"), ends if isinstance(ends, list) else [ends], strict=False):
        if end is not None:  # at each of the three llama.cpp stops
            getattr(writer, f"add_{kind}_token_id")(end)
    template = json.loads(assets.get("tokenizer_config.json", b"{}")).get("chat_template")
    template = assets["chat_template.jinja"].decode() if "chat_template.jinja" in assets else template
    if isinstance(template, str):
        writer.add_chat_template(template)
