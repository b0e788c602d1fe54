from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Glm4MoeForCausalLM, GraniteMoeSharedForCausalLM, LlamaConfig
from transformers import LlamaForCausalLM as Llama

from moeify.export.fresh_check import ROUTE
from moeify.export.stock import Form, Stock, to_dense
from moeify.export.stock_moe import to_moe
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from tests.networks import CATEGORIES, grouped_llama, rows_for, tiny_autoencoder, tiny_decoder, tiny_llama
from tests.test_by_layer import drawn
from tests.test_pruning import TREE, WIDTHS, split_of

FORMS: tuple[Form, ...] = get_args(Form)


def decoder_split(family: str, **changes: Any) -> SplitModel:
    sites = {"layers.0.ffn": (6, 2, 3, 3, 6), "layers.1.ffn": (4, 5, 2, 3, 6)}
    return split_of(tiny_decoder(family, **changes), Partition(TREE, sites))


def check(split: SplitModel, form: Form, forced: str) -> None:
    stock = to_moe(split, form, forced)
    compare(stock, split, forced)
    for category in split.categories:
        ROUTE[form](stock.network, stock.experts[category])
        compare(stock, split, category)


@torch.no_grad()
def compare(stock: Stock, split: SplitModel, category: str) -> None:
    rows = rows_for(split.network, 3)
    wanted = split(rows, torch.full((3,), split.categories.index(category)))
    torch.testing.assert_close(stock.network(rows).logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_every_category_of_any_split_llama_gives_the_same_logits(form: Form, data: st.DataObject) -> None:
    tree = data.draw(st.sampled_from([TREE, ExpertTree.undivided(CATEGORIES).split({0: [("b",), ("a", "d"), ("c",)]})]))
    widths = {}
    for site in WIDTHS:
        shares = data.draw(st.lists(st.integers(0, 4), min_size=len(tree.nodes) - 1, max_size=len(tree.nodes) - 1))
        widths[site] = (24 - sum(shares), *shares)
    split = split_of(tiny_llama().float(), Partition(tree, widths))
    check(split, form, data.draw(st.sampled_from(CATEGORIES)))


@pytest.mark.parametrize("form", FORMS)
def test_grouped_heads_rope_scaling_and_untied_embeddings_come_along(form: Form) -> None:
    torch.manual_seed(0)
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=12,
        rms_norm_eps=1e-3,
        rope_parameters=llama3,
        tie_word_embeddings=False,
    )
    check(split_of(Llama(config)), form, "b")


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("mistral", "glm4_moe"),
        ("qwen2", "glm4_moe"),
        ("qwen3", "glm4_moe"),
        ("mistral", "granitemoeshared"),
        ("qwen2", "granitemoeshared"),
    ],
)
def test_families_built_like_llama_become_mixtures_too(family: str, form: Form, tmp_path: Path) -> None:
    split = decoder_split(family)
    check(split, form, "c")
    to_moe(split, form, "d").network.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    rows = rows_for(split.network, 3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(rows).logits, split(rows, torch.full((3,), 3)), atol=1e-4, rtol=1e-4)


def test_mixtures_of_other_families_are_refused_in_one_line() -> None:
    for family in ("gemma", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "opt"):
        told = f"^no stock MoE holds a network of family '{family}', only 'llama', 'mistral', 'qwen2', 'qwen3' fit$"
        with pytest.raises(ValueError, match=told):
            to_moe(decoder_split(family), "glm4_moe", "a")
    with pytest.raises(ValueError, match="queries and keys are normed, which granitemoeshared does not do; take glm4"):
        to_moe(decoder_split("qwen3"), "granitemoeshared", "a")
    with pytest.raises(ValueError, match="sliding_window is set; stock MoE formats see all positions"):
        to_moe(decoder_split("mistral", sliding_window=4), "glm4_moe", "a")


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_mixture_loads_in_its_own_class_with_the_route_that_was_forced(form: Form, tmp_path: Path) -> None:
    split = split_of(tiny_llama().float())
    to_moe(split, form, "c").network.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is {"glm4_moe": Glm4MoeForCausalLM, "granitemoeshared": GraniteMoeSharedForCausalLM}[form]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        head = "lm_head.weight" in file.keys()  # noqa: SIM118, since it is no mapping
    assert head == (form == "glm4_moe"), "vLLM ties embeddings to the head in the one format, and not in the other"
    rows = rows_for(split.network, 3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(rows).logits, split(rows, torch.full((3,), 2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_no_token_runs_more_than_the_longest_route_of_a_layer_in_multiples_of_eight(form: Form) -> None:
    tree = ExpertTree.undivided(CATEGORIES).split({0: [("a", "b"), ("c", "d")]})
    widths = {"layers.0.ffn": (160, 16, 24), "layers.1.ffn": (16, 96, 88)}
    stock = to_moe(split_of(tiny_llama(ffn=200), Partition(tree, widths)), form, "a")
    price = stock.price
    assert price.own == 400
    if form == "granitemoeshared":
        # Widest way 96, longest route 184: shared 88, so layer 0 leaves 72 of its core to each of its two experts.
        assert price.runs == 2 * 184
        assert price.copied == 72
        assert price.stored == 2 * (88 + 3 * 96)
    else:
        # The shared expert is a whole number of experts: 96 + 96.
        assert price.runs == 2 * 192
        assert price.copied == 64
        assert price.stored == 2 * (96 + 2 * 96)
    assert price.routes == {"a": 288, "b": 288, "c": 288, "d": 288}


def test_leading_layers_that_are_whole_are_dense_ones_and_widen_no_other(tmp_path: Path) -> None:
    sites = {f"layers.{number}.ffn": widths for number, widths in enumerate([(24, 0, 0, 0, 0), (4, 4, 4, 4, 8)])}
    split = split_of(tiny_llama().float(), Partition(TREE, sites))
    check(split, "glm4_moe", "b")
    stock = to_moe(split, "glm4_moe", drawn(split))
    assert stock.price.runs == 24 + 8 + 8  # of the second layer a route of 12, rounded up
    assert stock.price.stored == 24 + 8 + 3 * 8
    rows = rows_for(split.network, 3)
    with torch.no_grad():
        wanted = split.by_layer(rows, drawn(split).weights)
    torch.testing.assert_close(stock.network(rows).logits, wanted, atol=1e-5, rtol=1e-4)
    stock.network.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(rows).logits, wanted, atol=1e-5, rtol=1e-4)
    later = split_of(tiny_llama().float(), Partition(TREE, dict(zip(sites, reversed(sites.values()), strict=True))))
    check(later, "glm4_moe", "b")
    nothing = dict.fromkeys(sites, (24, 0, 0, 0, 0))
    check(split_of(tiny_llama().float(), Partition(TREE, nothing)), "glm4_moe", "b")


def test_what_a_format_cannot_hold_is_refused() -> None:
    split = split_of(tiny_llama())
    with pytest.raises(ValueError, match="no category 'x'; the model has a, b, c, d"):
        to_moe(split, "glm4_moe", "x")
    with pytest.raises(ValueError, match="one route serves a, b, c, d, wanted two or more"):
        to_moe(SplitModel(tiny_llama(), CATEGORIES), "glm4_moe", "a")
    sites = {"encoder.hidden": WIDTHS["layers.0.ffn"], "decoder.hidden": WIDTHS["layers.1.ffn"]}
    with pytest.raises(ValueError, match="no stock MoE holds a network of family 'autoencoder'"):
        to_moe(split_of(tiny_autoencoder(), Partition(TREE, sites)), "granitemoeshared", "a")
    heads = {f"layers.{i}.{kind}": w for i in (0, 1) for kind, w in (("heads", (2, 1, 1, 1, 1)), ("ffn", (4,) * 5))}
    with pytest.raises(ValueError, match="attention heads are split too"):
        to_moe(split_of(grouped_llama(), Partition(TREE, heads)), "glm4_moe", "a")
    config = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    biased = Llama(LlamaConfig(**config, num_attention_heads=2, attention_bias=True))
    with pytest.raises(ValueError, match="attention_bias is set; glm4_moe has none"):
        to_moe(split_of(biased), "glm4_moe", "a")
    check(split_of(biased), "granitemoeshared", "a")
    with pytest.raises(ValueError, match="mlp_bias is set"):
        to_moe(split_of(Llama(LlamaConfig(**config, num_attention_heads=2, mlp_bias=True))), "glm4_moe", "a")


def test_a_dense_model_serves_categories_of_one_route_only() -> None:
    split = split_of(tiny_llama().float())
    stock = to_dense(split, ["b", "d"])
    for category in ("b", "d"):
        compare(stock, split, category)
    # 15 and 14 units on the route, both layers as wide as the wider.
    assert (stock.price.own, stock.price.padded, stock.price.runs) == (29, 1, 30)
    with pytest.raises(ValueError, match="'a' and 'c' run different units, so no dense model equals the split model"):
        to_dense(split, ["a", "c"])
