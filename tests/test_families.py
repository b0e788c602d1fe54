import copy
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from attribution.edges import measure_edges
from attribution.measure import Moments, measure
from attribution.subject import Rows, Subject
from moeify.export.pruning import only, prune
from moeify.export.stock import extract
from moeify.models.build import Autoencoder, logits
from moeify.models.families import (
    TRANSFORMERS,
    describe,
    entries,
    example_inputs,
    opened,
    readers,
    rebuild,
    transformer_of,
    unit_space,
)
from moeify.models.fused import closed
from moeify.models.units import input_weight, output_weight, unit_parameters
from moeify.recipe.data import TextData
from moeify.recipe.partition import UnitKind
from moeify.routed.split_model import SplitModel
from moeify.split_folder import load_split, save_split
from moeify.splitting.partition import Partition
from moeify.splitting.surgery import permute
from moeify.splitting.tree import ExpertTree
from moeify.subjects import of_checkpoint
from moeify.tasks.language import sample_tokens, token_nats
from tests.networks import CATEGORIES, DECODER_CONFIGS, rows_for, tiny_decoder


def llama(groups: int) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}
        heads = {"num_attention_heads": 4, "num_key_value_heads": groups, "max_position_embeddings": 8}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))


@pytest.mark.parametrize(("groups", "width"), [(4, 4), (2, 8), (1, 16)])
def test_heads_that_share_keys_are_one_unit_and_sites_follow_the_network(groups: int, width: int) -> None:
    sites = readers(llama(groups))
    assert [site.name for site in sites] == ["layers.0.heads", "layers.0.ffn", "layers.1.heads", "layers.1.ffn"]
    assert [(site.units, site.width) for site in sites] == [(groups, width), (24, 1)] * 2


@pytest.mark.parametrize("groups", [4, 2])
def test_every_entry_is_measured_from_all_sites_before_it(groups: int) -> None:
    network = llama(groups)
    tokens = torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(1))
    rows = Rows(tokens[:, :-1], tokens[:, 1:], torch.tensor([0, 0, 1, 1]), torch.arange(4))
    subject = Subject(network, readers(network), ("a", "b"), token_nats, sample_tokens)
    found = measure_edges(subject, [rows], entries(network))
    names = [site.name for site in subject.sites]
    assert set(found.pairs) == {(a, b) for i, b in enumerate(names) for a in names[:i]}
    assert all(bool(edges.taylor.any()) for edges in found.pairs.values())
    assert measure(subject, [rows]).sites.keys() == set(names)


def test_the_autoencoders_second_hidden_layer_is_entered_through_the_code() -> None:
    (entry,) = entries(Autoencoder(6, 5, 3))
    assert (entry.site, [writer.module for writer in entry.writers], entry.norm) == (
        "decoder.hidden",
        ["decoder.up"],
        None,
    )


def test_a_network_without_an_adapter_is_named() -> None:
    for ask in (readers, entries):
        with pytest.raises(ValueError, match="no adapter for Linear"):
            ask(nn.Linear(2, 2))


WITH_HEADS = {"llama", "mistral", "qwen2", "qwen3", "phi3", "bert", "roberta", "distilbert", "vit"}
WITH_HEADS |= {"bert_classifier", "roberta_classifier", "distilbert_classifier"}
IMAGES = {"vit"}
TREE = ExpertTree.undivided(CATEGORIES).split({0: [("a", "b"), ("c", "d")]}).split({1: [("a",), ("b",)]})
BOTH = get_args(UnitKind)


def split_of(network: nn.Module, kinds: tuple[UnitKind, ...] = BOTH, *, told: bool = False) -> SplitModel:
    widths = {
        site.name: (8, 2, 2, 2, 6) if site.width == 1 else (1, 1, 0, 0, site.units - 2)
        for site in unit_space(network, kinds).readers
    }
    return SplitModel(network, CATEGORIES, Partition(TREE, widths), kinds=kinds, told=told)


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer with a token a letter."""
    letters = Tokenizer(WordLevel({letter: number for number, letter in enumerate(string.ascii_lowercase)}, "a"))
    letters.pre_tokenizer = Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, mask_token="z").save_pretrained(folder)


EVERY = pytest.mark.parametrize("family", [each.family for each in TRANSFORMERS])


def test_every_family_is_tested() -> None:
    assert list(DECODER_CONFIGS) == [each.family for each in TRANSFORMERS]


@EVERY
def test_sites_of_a_family(family: str) -> None:
    kinds = ["heads", "ffn"] if family in WITH_HEADS else ["ffn"]
    space = unit_space(tiny_decoder(family), BOTH)
    assert [site.name for site in space.sites] == [f"layers.{i}.{kind}" for i in (0, 1) for kind in kinds]
    assert {site.units for site in space.sites if site.kind == "ffn"} == {20}
    groups = getattr(tiny_decoder(family).config, "num_key_value_heads", 6)
    assert {site.units for site in space.sites if site.kind == "heads"} <= {groups}


@EVERY
def test_a_permutation_of_a_familys_units_changes_no_output(family: str) -> None:
    network = tiny_decoder(family).double()
    inputs = rows_for(network, 3)
    before = logits(network, inputs)
    weights = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    space = unit_space(network, BOTH)
    order = {site.name: torch.arange(site.units).roll(1) for site in space.sites}
    permute(network, None, space, order)
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, weights[name])}
    assert moved == {part.parameter for site in space.sites for part in site.slices}
    torch.testing.assert_close(logits(network, inputs), before, rtol=1e-9, atol=1e-10)


@EVERY
def test_undivided_a_family_is_the_stock_network_under_its_own_names(family: str) -> None:
    network = tiny_decoder(family).double()
    inputs = rows_for(network, 4)
    model = SplitModel(copy.deepcopy(network), CATEGORIES, kinds=BOTH)
    assert list(model.network.state_dict()) == list(network.state_dict())
    categories = torch.tensor([3, 0, 1, 1])
    torch.testing.assert_close(model(inputs, categories), logits(network, inputs), rtol=1e-9, atol=1e-10)
    with model.masked():
        torch.testing.assert_close(model(inputs, categories), logits(network, inputs), rtol=1e-9, atol=1e-10)


@EVERY
def test_a_familys_routes_equal_the_masked_oracle_forward_and_backward(family: str) -> None:
    model = split_of(tiny_decoder(family).double())
    inputs, categories = rows_for(model.network, 6), torch.tensor([2, 0, 3, 1, 1, 0])

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        outputs = model(inputs, categories)
        (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum().backward()
        return outputs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    routed, routed_grads = run()
    with model.masked():
        masked, masked_grads = run()
    torch.testing.assert_close(routed, masked, rtol=1e-9, atol=1e-10)
    assert routed_grads.keys() == masked_grads.keys() == dict(model.named_parameters()).keys()
    for name, gradient in routed_grads.items():
        torch.testing.assert_close(gradient, masked_grads[name], rtol=1e-7, atol=1e-8)
    alone = model(inputs[:1], categories[:1])
    assert (alone - model(inputs[:1], categories[1:2])).abs().max() > 1e-3


@EVERY
@pytest.mark.parametrize("kinds", [("ffn",), BOTH])
def test_what_is_extracted_for_a_category_loads_in_transformers_and_gives_its_route(
    family: str, kinds: tuple[UnitKind, ...], tmp_path: Path
) -> None:
    model = split_of(tiny_decoder(family), kinds).eval()
    inputs = rows_for(model.network, 3)
    for number, category in enumerate(CATEGORIES):
        extract(model, category).save_pretrained(tmp_path / category)
        auto = getattr(transformers, transformer_of(model.network).auto)
        loaded = auto.from_pretrained(tmp_path / category, dtype=torch.float32)
        assert type(loaded) is type(model.network)
        assert all(site.units < 20 for site in unit_space(opened(copy.deepcopy(loaded))).sites)
        with torch.no_grad():
            wanted = model(inputs, torch.full((3,), number))
            torch.testing.assert_close(loaded(inputs).logits, wanted, rtol=1e-4, atol=1e-4)


@EVERY
def test_a_familys_split_folder_gives_the_split_model_back(family: str, tmp_path: Path) -> None:
    model = split_of(tiny_decoder(family)).eval()
    save_split(model, tmp_path / "split", {})
    loaded = load_split(tmp_path / "split")
    inputs, categories = rows_for(model.network, 4), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs, categories), model(inputs, categories), rtol=0, atol=0)
        part = prune(model, only(model.partition, ["a", "c"]))
        wanted = model(inputs, torch.tensor([0, 0, 2, 2]))
        torch.testing.assert_close(part(inputs, torch.tensor([0, 0, 1, 1])), wanted, rtol=1e-4, atol=1e-4)
    assert part.space.units < model.space.units


@EVERY
def test_a_family_is_rebuilt_from_plain_data(family: str) -> None:
    network = tiny_decoder(family)
    description = json.loads(json.dumps(describe(network)))
    again = rebuild(description)
    assert type(again) is type(network)
    assert description["family"] == family
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes
    again.load_state_dict(network.state_dict())
    inputs = example_inputs(network, rows=2, seed=0)
    assert inputs.shape == ((2, 2, 4, 6) if family in IMAGES else (2, 12))
    torch.testing.assert_close(logits(again.eval(), inputs), logits(network, inputs), rtol=0, atol=0)


@pytest.mark.parametrize(("family", "window"), [("mistral", 4), ("qwen2", 4), ("qwen3", 4)])
def test_heads_see_no_more_than_a_sliding_window(family: str, window: int) -> None:
    """The model makes the mask of the window, and split heads take it as it is."""
    changes = {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    network = tiny_decoder(family, sliding_window=window, **changes).double()
    inputs = rows_for(network, 4)
    stock = logits(network, inputs)
    assert not torch.allclose(stock, logits(tiny_decoder(family).double(), inputs))
    model = SplitModel(copy.deepcopy(network), CATEGORIES, kinds=BOTH)
    torch.testing.assert_close(model(inputs, torch.tensor([0, 1, 2, 3])), stock, rtol=1e-9, atol=1e-10)
    cache = DynamicCache(config=network.config)
    pieces = [model.network(p, cache=cache, use_cache=True).logits for p in inputs.split([5] + [1] * 7, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), stock, rtol=1e-9, atol=1e-10)


@EVERY
def test_tokens_of_a_row_have_routes_of_their_own_in_a_family(family: str) -> None:
    """Routed equals masked; with one category a row, both equal routes of whole rows."""
    model = split_of(tiny_decoder(family).double(), ("ffn",))
    inputs = rows_for(model.network, 4)
    if family in IMAGES:
        with pytest.raises(ValueError, match="other inputs take one category a row"):
            model(inputs, torch.zeros(4, 7, dtype=torch.long))
        return
    categories = torch.randint(4, inputs.shape, generator=torch.Generator().manual_seed(1))
    routed = model(inputs, categories)
    with model.masked():
        torch.testing.assert_close(routed, model(inputs, categories), rtol=1e-9, atol=1e-10)
    whole = torch.tensor([2, 0, 3, 1])
    by_token = model(inputs, whole[:, None].expand_as(inputs))
    torch.testing.assert_close(by_token, model(inputs, whole), rtol=1e-9, atol=1e-10)


@EVERY
def test_a_family_can_be_told_the_category(family: str, tmp_path: Path) -> None:
    model = split_of(tiny_decoder(family), ("ffn",), told=True)
    inputs, categories = rows_for(model.network, 4), torch.tensor([0, 1, 2, 3])
    before = model(inputs, categories)
    assert [bias.shape for bias in model.told] == [(4, 20)] * 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for bias in model.told:
            nn.init.normal_(bias)
    after = model(inputs, categories)
    assert (after - before).abs().max() > 1e-3
    with model.masked():
        torch.testing.assert_close(after, model(inputs, categories), rtol=1e-4, atol=1e-4)
    save_split(model.eval(), tmp_path / "split", {})
    torch.testing.assert_close(load_split(tmp_path / "split")(inputs, categories), after, rtol=0, atol=0)
    if transformer_of(model.network).biases:
        dense = extract(model, "c")
        torch.testing.assert_close(logits(dense, inputs[2:3]), after[2:3], rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match=f"blocks of family '{family}' have no biases, .* export it with --split"):
            extract(model, "c")
    assert model.input_weight("layers.0.ffn").shape == (20, 24 * (2 if transformer_of(model.network).gate else 1))


@EVERY
def test_biases_of_categories_move_with_a_familys_units(family: str) -> None:
    model = SplitModel(tiny_decoder(family).double(), CATEGORIES, told=True)
    for number, bias in enumerate(model.told):
        bias.data.copy_(torch.linspace(-1, 1 + number, bias.numel()).view_as(bias))
    inputs, categories = rows_for(model.network, 4), torch.tensor([0, 1, 2, 3])
    before = model(inputs, categories)
    permute(model.network, None, model.space, {site.name: torch.arange(20).roll(3) for site in model.space.sites})
    torch.testing.assert_close(model(inputs, categories), before, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("changes", [{"do_layer_norm_before": False}, {"enable_bias": False}])
def test_variants_of_opt(changes: dict[str, Any]) -> None:
    """As in OPT-350m, norms behind the blocks; and without biases."""
    network = tiny_decoder("opt", **changes).double()
    inputs, categories = rows_for(network, 4), torch.tensor([0, 1, 2, 3])
    undivided = SplitModel(copy.deepcopy(network), CATEGORIES)
    torch.testing.assert_close(undivided(inputs, categories), logits(network, inputs), rtol=1e-9, atol=1e-10)
    model = split_of(network)
    routed = model(inputs, categories)
    with model.masked():
        torch.testing.assert_close(routed, model(inputs, categories), rtol=1e-9, atol=1e-10)


def test_dropout_behind_a_block_of_gpt2_stays() -> None:
    network = tiny_decoder("gpt2", resid_pdrop=0.5, n_inner=None).double().train()
    model = SplitModel(copy.deepcopy(network), CATEGORIES)
    inputs, categories = rows_for(network, 4), torch.tensor([0, 1, 2, 3])

    def drawn(run: Callable[[], Tensor]) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return run()

    stock = drawn(lambda: logits(network, inputs))
    assert (stock - logits(network.eval(), inputs)).abs().max() > 1e-3
    torch.testing.assert_close(drawn(lambda: model(inputs, categories)), stock, rtol=1e-9, atol=1e-10)
    with model.masked():
        torch.testing.assert_close(drawn(lambda: model(inputs, categories)), stock, rtol=1e-9, atol=1e-10)


def test_weights_that_lie_the_other_way_round_are_read_the_right_way() -> None:
    network = tiny_decoder("gpt2")
    site = unit_space(network).sites[1]
    block = network.get_submodule("transformer.h.1.mlp")
    assert torch.equal(input_weight(network, site), block.c_fc.weight.t())
    assert torch.equal(output_weight(network, site), block.c_proj.weight.t())
    output_weight(network, site).data[:, 3] = 7.0
    assert bool((block.c_proj.weight[3] == 7.0).all())
    assert unit_parameters(network, site) == 24 + 1 + 24


@EVERY
def test_a_familys_share_of_operations_counts_every_matrix(family: str) -> None:
    """All that multiplies a token: matrices but the embeddings (the tied head is one, positions and input are not); of
    an image, every token it becomes."""
    model = split_of(tiny_decoder(family), ("ffn",))
    looked_up = {"model.embed_tokens.weight", "gpt_neox.embed_in.weight", "model.decoder.embed_tokens.weight"}
    looked_up |= {"model.decoder.embed_positions.weight", "transformer.wte.weight", "transformer.wpe.weight"}
    once = ("classifier.", "pre_classifier.", "bert.pooler.")  # for a whole row
    named = dict(model.network.named_parameters(remove_duplicate=True)).items()
    matrices = sum(
        tensor.numel()
        for name, tensor in named
        if tensor.ndim == 2 and name not in looked_up and "embeddings" not in name and not name.startswith(once)
    )
    untied = ("lm_head.weight", "embed_out.weight", "classifier.")
    matrices += 0 if any(name.startswith(untied) for name, _ in named) else 40 * 24
    of_a_unit = 24 * (3 if transformer_of(model.network).gate else 2)
    size, length = getattr(model.network.config, "head_dim", 4), 7 if family in IMAGES else 12
    both_ways = 1 if transformer_of(model.network).learns == "next token" else 2
    seen = both_ways * 2 * 6 * size * length if family in WITH_HEADS else 0
    # Of 20 units a layer, a's route runs 8 + 2 + 2. An image is 6 patches, which a convolution makes, and the class's.
    tokens, outside = (7, 2 * (6 * 24 * 2 * 2 * 2 + 24 * 5)) if family in IMAGES else (1, 0)
    share = 1 - tokens * 2 * 2 * 8 * of_a_unit / (tokens * (2 * matrices + 2 * seen) + outside)
    assert model.active_flops(12)["a"] == pytest.approx(share)


@EVERY
def test_a_checkpoint_of_a_family_is_measured(family: str, tmp_path: Path) -> None:
    if family in IMAGES:
        return  # tests/test_encoders.py does
    checkpoint, texts = tmp_path / "checkpoint", tmp_path / "texts"
    classifies = family.endswith("_classifier")
    closed(tiny_decoder(family)).save_pretrained(checkpoint)
    save_tokenizer(checkpoint)
    for name, letters in (("one", "abcdef"), ("two", "uvwxyz")):
        (texts / name).mkdir(parents=True)
        for number in range(4):
            (texts / name / f"{number}.txt").write_text(letters * 9, encoding="utf-8")
    source = {"kind": "folders", "categories": {name: str(texts / name) for name in ("one", "two")}}
    data = TextData.model_validate({"kind": "text", "source": source, "vocabulary": 300, "length": 10})
    if classifies:
        with pytest.raises(
            ValueError, match=r"checkpoint classifies texts; split it from Python, moeify.split\(.*'classes'"
        ):
            of_checkpoint(checkpoint, data, base=tmp_path, rows=4, rows_at_once=4, seed=0)
        return
    probed = of_checkpoint(checkpoint, data, base=tmp_path, rows=4, rows_at_once=4, seed=0)
    table = measure(probed.subject, probed.batches)
    assert list(table.sites) == [site.name for site in readers(probed.subject.inner)]
    for name in table.sites:
        assert torch.isfinite(table.report(name)).all()
        assert table.report(name).abs().max() > 0
    if ways := entries(probed.subject.inner):
        edges = measure_edges(probed.subject, probed.batches, ways)
        assert all(bool(edge.taylor.any()) and bool(edge.taylor.isfinite().all()) for edge in edges.pairs.values())
    else:
        assert family in {"gemma2", "gemma3_text", "opt", "bert", "roberta", "distilbert"}


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_rows_moments_are_its_own_whatever_rows_are_beside_it(family: str) -> None:
    model = SplitModel(tiny_decoder(family), CATEGORIES).eval()
    tokens = torch.randint(40, (5, 9), generator=torch.Generator().manual_seed(1))
    together = Rows(tokens[:, :-1], tokens[:, 1:], torch.tensor([0, 0, 1, 2, 3]), torch.arange(5))
    alone = [
        Rows(tokens[i : i + 1, :-1], tokens[i : i + 1, 1:], together.categories[i : i + 1], torch.tensor([i]))
        for i in range(5)
    ]
    subject = Subject(model.network, model.space.readers, CATEGORIES, token_nats, sample_tokens, model)
    with model.masked():
        one, other = (measure(subject, batches, moments=Moments(None)) for batches in ([together], alone))
    for site in one.sites:
        for category in CATEGORIES:
            assert one.curvature(site, category).abs().max() > 0
            torch.testing.assert_close(
                one.curvature(site, category), other.curvature(site, category), rtol=1e-3, atol=1e-7
            )
            torch.testing.assert_close(
                one.second_moment(site, category), other.second_moment(site, category), rtol=1e-3, atol=1e-7
            )


def test_an_activation_that_routed_blocks_do_not_compute_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"hidden_act is 'mish'; the qwen3 adapter knows 'silu', .*'gelu_pytorch_tanh'$"
    ):
        unit_space(tiny_decoder("qwen3", hidden_act="mish"))


def test_an_architecture_without_an_adapter_is_refused_in_one_line() -> None:
    network = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9))
    for ask in (unit_space, entries, describe):
        with pytest.raises(ValueError, match=r"^no adapter for BloomForCausalLM[^\n]* docs/extending.md [^\n]*$"):
            ask(network)


# --- maps that a stock architecture keeps as one ------------------------------------------------------


def test_fused_maps_are_opened_before_units_are_named_and_closed_before_a_network_leaves() -> None:
    network = closed(tiny_decoder("phi3").double())
    inputs = rows_for(network, 3)
    stock, before = {name: tensor.clone() for name, tensor in network.state_dict().items()}, logits(network, inputs)
    with pytest.raises(ValueError, match=r"gate_up_proj' of Phi3ForCausalLM holds several maps as one; give .*opened"):
        unit_space(network)
    units = unit_space(opened(network), BOTH)
    assert units["layers.0.ffn"].ways_in[0].parameter == "model.layers.0.mlp.gate_up_proj.up.weight"
    assert not stock.keys() >= network.state_dict().keys()
    torch.testing.assert_close(logits(network, inputs), before, rtol=1e-9, atol=1e-10)
    again = closed(network).state_dict()
    assert list(again) == list(stock)
    assert all(torch.equal(again[name], tensor) for name, tensor in stock.items())


@pytest.mark.parametrize("changes", [{"partial_rotary_factor": 0.5}, {"sliding_window": 4}, {"num_key_value_heads": 6}])
def test_variants_of_phi3(changes: dict[str, Any]) -> None:
    """As in Phi-4-mini, positions turn a part of each head; as in Phi-3-mini, windows slide."""
    network = tiny_decoder("phi3", **changes).double()
    inputs, categories = rows_for(network, 4), torch.tensor([0, 1, 2, 3])
    stock = logits(closed(copy.deepcopy(network)), inputs)
    assert (stock - logits(tiny_decoder("phi3").double(), inputs)).abs().max() > 1e-3
    model = SplitModel(copy.deepcopy(network), CATEGORIES, kinds=BOTH)
    torch.testing.assert_close(model(inputs, categories), stock, rtol=1e-9, atol=1e-10)
    routed = split_of(network)
    with routed.masked():
        masked = routed(inputs, categories)
    torch.testing.assert_close(routed(inputs, categories), masked, rtol=1e-9, atol=1e-10)


def test_heads_of_phi3_whose_positions_have_long_factors_all_stay() -> None:
    long = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}
    network = tiny_decoder("phi3", rope_parameters={**long, "rope_theta": 1e4}, original_max_position_embeddings=12)
    model = split_of(network).eval()
    inputs = rows_for(network, 3)
    dense = extract(model, "c")
    assert dense.config.num_attention_heads == 6
    torch.testing.assert_close(logits(dense, inputs), model(inputs, torch.full((3,), 2)), rtol=1e-4, atol=1e-4)


# --- tokens that see both ways ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "vit", "bert_classifier"])
def test_split_heads_of_an_encoder_see_tokens_that_come_later(family: str) -> None:
    model = split_of(tiny_decoder(family).double()).eval()
    inputs, categories = rows_for(model.network, 2), torch.tensor([0, 2])
    changed = inputs.clone()
    changed[..., -1] = (changed[..., -1] + 1) % 40
    assert (model(changed, categories) - model(inputs, categories))[:, 0].abs().max() > 1e-6


def test_dropout_of_an_encoder_stays() -> None:
    network = tiny_decoder("bert", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.3).double().train()
    model = SplitModel(copy.deepcopy(network), CATEGORIES, kinds=BOTH)
    inputs, categories = rows_for(network, 4), torch.tensor([0, 1, 2, 3])
    with model.masked():
        for run in (model, lambda rows, _: logits(network, rows)):
            one, other = run(inputs, categories), run(inputs, categories)
            assert (one - other).abs().max() > 1e-3
    assert not SplitModel(tiny_decoder("bert"), CATEGORIES).network.bert.encoder.layer[0].attention.self.training


def test_a_family_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="unknown network family 'rnn'; this version rebuilds autoencoder, resnet, l"):
        rebuild({"family": "rnn"})
