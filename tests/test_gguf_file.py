from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn

from moeify.data.documents import Document
from moeify.data.tokens import train_tokenizer
from moeify.export import gguf_file
from moeify.export.stock import Form, to_dense
from moeify.export.stock_moe import to_moe
from moeify.export.verification import ROUTED, TOLERANCE, Source
from moeify.models.build import build_llama
from moeify.recipe.model import LlamaModel
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from tests.networks import CATEGORIES, tiny_decoder
from tests.test_by_layer import drawn
from tests.test_pruning import TREE, WIDTHS
from tests.texts import WORDS

gguf = pytest.importorskip("gguf")
VOCABULARY = 300


@pytest.fixture(scope="module")
def assets() -> dict[str, bytes]:
    documents = [Document(" ".join(WORDS[i:]), str(i)) for i in range(len(WORDS))]
    return {"tokenizer.json": train_tokenizer([documents], VOCABULARY - 4).to_str().encode()}


def llama(length: int = 80) -> nn.Module:
    config = LlamaModel(kind="llama", hidden=32, layers=2, heads=2, ffn=24)
    return build_llama(config, vocabulary=VOCABULARY, length=length, end=0, seed=0)


def source(length: int = 80, widths: Mapping[str, Sequence[int]] = WIDTHS) -> Source:
    partition = Partition(TREE, {site: tuple(each) for site, each in widths.items()})
    return Source.of(SplitModel(llama(length), CATEGORIES, partition).eval(), torch.float32)


def written(network: nn.Module, assets: Mapping[str, bytes], place: Path, dtype: torch.dtype = torch.float32) -> Any:
    gguf_file.write(network, assets, place / "model.gguf", dtype=dtype, name="tiny")
    return gguf.GGUFReader(place / "model.gguf")


def test_layers_keep_their_own_widths_and_nothing_is_padded(assets: Mapping[str, bytes], tmp_path: Path) -> None:
    split = source().whole
    stock = to_dense(split, ["a"], padded=False)
    assert stock.price.padded == 0
    reader = written(stock.network, assets, tmp_path)
    assert reader.fields["general.architecture"].contents() == "deci"
    assert reader.fields["deci.feed_forward_length"].contents() == [12, 11]
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    up = split.network.get_parameter("model.layers.1.mlp.up_proj.weight")[:11]
    assert np.array_equal(tensors["blk.1.ffn_up.weight"], up.detach().numpy())


def test_equal_layers_are_a_plain_llama_with_heads_turned(assets: Mapping[str, bytes], tmp_path: Path) -> None:
    network = llama()
    reader = written(network, assets, tmp_path)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["llama.feed_forward_length"].contents() == 24
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    query = network.get_parameter("model.layers.0.self_attn.q_proj.weight").detach().numpy()
    # Two heads of 16 rows: of each, rows i and i + 8 come to lie side by side.
    order = [head * 16 + half * 8 + i for head in range(2) for i in range(8) for half in range(2)]
    assert np.array_equal(tensors["blk.0.attn_q.weight"], query[order])
    assert "output.weight" not in tensors  # tied


def test_half_precision_is_for_matrices(assets: Mapping[str, bytes], tmp_path: Path) -> None:
    stock = to_moe(source().whole, "glm4_moe", "a")
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        kinds = {t.name: t.tensor_type.name for t in written(stock.network, assets, tmp_path, dtype).tensors}
        assert kinds["blk.0.ffn_up_exps.weight"] == kinds["token_embd.weight"] == name
        assert {kinds[f"blk.0.{n}"] for n in ("attn_norm.weight", "ffn_gate_inp.weight", "exp_probs_b.bias")} == {"F32"}


def test_the_tokenizer_comes_along_and_unused_tokens_are_marked(assets: Mapping[str, bytes], tmp_path: Path) -> None:
    reader = written(llama(), assets, tmp_path)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(kinds) == VOCABULARY
    assert (tokens[0], kinds[0]) == ("<|end|>", 3)
    assert (tokens[-1], kinds[-1]) == ("[PAD299]", 5)
    assert reader.fields["tokenizer.ggml.merges"].contents()
    other = {"tokenizer.json": assets["tokenizer.json"].replace(b'"ByteLevel"', b'"Whitespace"')}
    with pytest.raises(ValueError, match="knows byte-level BPE tokenizers"):
        written(llama(), other, tmp_path)


def test_what_begins_and_ends_a_text_and_a_chat_come_along(assets: Mapping[str, bytes], tmp_path: Path) -> None:
    plain = written(llama(), assets, tmp_path).fields
    assert plain["tokenizer.ggml.add_bos_token"].contents() is False
    assert "tokenizer.chat_template" not in plain
    tokenizer = tokenizers.Tokenizer.from_str(assets["tokenizer.json"].decode())
    tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    more = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "generation_config.json": b'{"eos_token_id": [7, 9]}',
        "chat_template.jinja": b"{{ messages }}",
    }
    network: Any = llama()
    network.config.eos_token_id = [1, 2]
    fields = written(network, more, tmp_path).fields
    told = {name: fields[f"tokenizer.{name}"].contents() for name in ("ggml.add_bos_token", "ggml.bos_token_id")}
    assert told == {"ggml.add_bos_token": True, "ggml.bos_token_id": 0}
    assert [fields[f"tokenizer.ggml.{kind}_token_id"].contents() for kind in ("eos", "eot")] == [7, 9]
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"


def test_what_the_writer_does_not_know_is_refused(assets: Mapping[str, bytes], tmp_path: Path) -> None:
    network: Any = llama()
    network.config.rope_parameters = {**network.config.rope_parameters, "rope_type": "llama3"}
    with pytest.raises(ValueError, match="knows plain rotary positions"):
        written(network, assets, tmp_path)
    for family in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "opt"):
        told = f"^the GGUF writer knows llama, glm4_moe, granitemoeshared, not {family}; export without --gguf$"
        with pytest.raises(ValueError, match=told):
            written(tiny_decoder(family), assets, tmp_path)
    sites = {"layers.0.ffn": (6, 2, 3, 3, 6), "layers.1.ffn": (4, 5, 2, 3, 6)}
    for family, told in (("qwen2", "no attention_bias"), ("qwen3", "queries and keys are normed")):
        split = SplitModel(tiny_decoder(family), CATEGORIES, Partition(TREE, sites))
        with pytest.raises(ValueError, match=told):
            written(to_moe(split, "glm4_moe", "a").network, assets, tmp_path)


def test_a_missing_package_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None if name == "xllamacpp" else object())
    gguf_file.require(verify=False)
    with pytest.raises(ValueError, match=r"needs the xllamacpp package; pip install 'moeify\[gguf\]'"):
        gguf_file.require(verify=True)
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"writing a GGUF file needs the gguf package; pip install 'moeify\[gguf\]'"):
        gguf_file.require(verify=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "routed", "widths"),
    [
        (None, False, WIDTHS),
        ("glm4_moe", False, WIDTHS),
        ("glm4_moe", True, WIDTHS),
        ("glm4_moe", True, WIDTHS | {"layers.0.ffn": (24, 0, 0, 0, 0)}),
        ("granitemoeshared", False, WIDTHS),
        ("granitemoeshared", True, WIDTHS),
    ],
)
def test_llama_cpp_predicts_what_the_split_model_does(
    form: Form | None, routed: bool, widths: Mapping[str, Sequence[int]], assets: Mapping[str, bytes], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    of = source(widths=widths)
    routers = drawn(of.part) if routed else "c"
    stock = to_moe(of.part, form, routers) if form else to_dense(of.part, ["c"], padded=False)
    for dtype in (torch.float32,) if form else (torch.float32, torch.float16):
        path = tmp_path / f"{dtype}.gguf"
        gguf_file.write(stock.network, assets, path, dtype=dtype, name="tiny")
        differences = of.against_gguf(path, stock, assets, dtype)
        own = {ROUTED} if routed and form else set()
        assert differences.keys() == (own | set("abcd") if form else {"c"})
        assert max(differences.values()) <= TOLERANCE
    with torch.no_grad():
        stock.network.get_parameter("model.norm.weight").mul_(1.1)
    gguf_file.write(stock.network, assets, tmp_path / "odd.gguf", dtype=torch.float32, name="tiny")
    with pytest.raises(RuntimeError, match=r"the export for '.*' differs from the split model"):
        of.against_gguf(tmp_path / "odd.gguf", stock, assets, torch.float32)


@pytest.mark.slow
def test_of_a_row_as_long_as_the_context_llama_cpp_is_asked_all_but_the_last_token(
    assets: Mapping[str, bytes], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    of = source(length=8)
    assert of.inputs.shape[1] == 8
    stock = to_dense(of.part, ["c"], padded=False)
    gguf_file.write(stock.network, assets, tmp_path / "model.gguf", dtype=torch.float32, name="tiny")
    assert of.against_gguf(tmp_path / "model.gguf", stock, assets, torch.float32)["c"] <= TOLERANCE
