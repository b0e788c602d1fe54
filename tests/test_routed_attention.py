import copy
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from moeify.models.build import logits
from moeify.models.families import unit_space
from moeify.recipe.partition import UnitKind
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from tests.networks import CATEGORIES, grouped_llama, rows_for
from tests.oracles import assert_equals_the_masked_oracle
from tests.trees import partitions

NETWORKS = {
    "own keys": grouped_llama(),
    "shared keys": grouped_llama(heads=6, groups=3),
    "biased": grouped_llama(heads=6, groups=3, bias=True),
    "one group": grouped_llama(heads=4, groups=1),
}
BOTH = get_args(UnitKind)


def sites(kind: str) -> list:
    return list(unit_space(NETWORKS[kind], BOTH).readers)


def split_of(kind: str, partition: Partition) -> SplitModel:
    model = SplitModel(copy.deepcopy(NETWORKS[kind]), sorted(partition.tree.categories), partition)
    assert {site.kind for site in model.space.sites} == set(BOTH)
    return model


def four_experts(kind: str) -> Partition:
    """A tree of two levels; of the heads one unit is the core's, one a group's, the others a leaf's."""
    tree = ExpertTree.undivided(CATEGORIES).split({0: [("a", "b"), ("c", "d")]}).split({1: [("a",), ("b",)]})
    widths = {}
    for site in sites(kind):
        heads = (1, 1, 0, 0, site.units - 2) if site.units > 1 else (1, 0, 0, 0, 0)
        widths[site.name] = heads if site.width > 1 else (8, 2, 2, 2, 6)
    return Partition(tree, widths)


@settings(deadline=None, max_examples=30)
@given(st.data(), st.sampled_from(list(NETWORKS)), st.integers(1, 9), st.integers(0, 99))
def test_rectangles_of_heads_equal_the_masked_oracle_forward_and_backward(
    data: st.DataObject, kind: str, rows: int, seed: int
) -> None:
    model = split_of(kind, data.draw(partitions(sites(kind))))
    inputs = rows_for(model.network, rows, seed)
    categories = torch.randint(len(model.categories), (rows,), generator=torch.Generator().manual_seed(seed))
    gradients = assert_equals_the_masked_oracle(model, inputs, categories)
    assert gradients.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_undivided_heads_are_the_stock_attention_under_its_own_names(kind: str) -> None:
    network = NETWORKS[kind]
    inputs, categories = rows_for(network, 6), torch.tensor([3, 0, 1, 1, 2, 0])
    model = SplitModel(copy.deepcopy(network), CATEGORIES, kinds=BOTH)
    assert [site.name for site in model.space.sites] == [
        f"layers.{i}.{units}" for i in (0, 1) for units in ("heads", "ffn")
    ]
    assert list(model.network.state_dict()) == list(network.state_dict())
    torch.testing.assert_close(model(inputs, categories), logits(network, inputs), rtol=1e-10, atol=1e-12)
    with model.masked():
        torch.testing.assert_close(model(inputs, categories), logits(network, inputs), rtol=1e-10, atol=1e-12)


def test_left_out_heads_stay_the_stock_module() -> None:
    model = SplitModel(copy.deepcopy(NETWORKS["own keys"]), CATEGORIES)
    assert [site.name for site in model.space.sites] == ["layers.0.ffn", "layers.1.ffn"]
    assert type(model.network.get_submodule("model.layers.0.self_attn")).__name__ == "LlamaAttention"


@settings(deadline=None, max_examples=10)
@given(st.data(), st.sampled_from(list(NETWORKS)))
def test_a_row_does_not_depend_on_its_neighbours_or_their_order(data: st.DataObject, kind: str) -> None:
    model = split_of(kind, data.draw(partitions(sites(kind), categories=4)))
    inputs, categories = rows_for(model.network, 6), torch.tensor([2, 0, 3, 1, 1, 0])
    together = model(inputs, categories)
    for i in range(6):
        alone = model(inputs[i : i + 1], categories[i : i + 1])[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-12)


def test_a_position_sees_nothing_behind_it() -> None:
    model = split_of("shared keys", four_experts("shared keys"))
    inputs, categories = rows_for(model.network, 4), torch.tensor([0, 1, 2, 3])
    changed = inputs.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 40
    before, after = model(inputs, categories), model(changed, categories)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_heads_of_an_ablated_expert_give_nothing() -> None:
    model = split_of("biased", four_experts("biased"))
    inputs, categories = rows_for(model.network, 4), torch.tensor([0, 1, 2, 3])
    intact = model(inputs, categories)
    with model.ablated("a+b", "c+d"):
        wounded = model(inputs, categories)
    oracle = split_of("biased", four_experts("biased"))
    with torch.no_grad():
        for site in oracle.space.sites:
            core = oracle.partition.widths[site.name][0] * site.site.width
            oracle.network.get_parameter(site.output)[:, core:] = 0
    torch.testing.assert_close(wounded, oracle(inputs, categories), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(intact, wounded)
    with model.ablated("core"):
        silent = model(inputs, categories)
    assert bool(silent.isfinite().all())


@pytest.mark.parametrize("kind", ["own keys", "shared keys"])
def test_a_mask_of_the_callers_hides_positions_in_every_rectangle(kind: str) -> None:
    """Rows that are padded on the left give what they give without padding: the model makes a mask with a row each."""
    model = split_of(kind, four_experts(kind))
    model.routes.bounds = (0, 1, 2, 3, 4)
    inputs, pads = rows_for(model.network, 4), [0, 3, 1, 4]
    mask = torch.ones(4, 12, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model.network(inputs, attention_mask=mask, position_ids=places).logits
    for row, pad in enumerate(pads):
        model.routes.bounds = tuple(int(position > row) for position in range(5))
        alone = model.network(inputs[row : row + 1, pad:]).logits[0]
        torch.testing.assert_close(padded[row, pad:], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", list(NETWORKS))
@pytest.mark.parametrize("masked", [False, True])
def test_a_cache_gives_the_same_outputs_token_by_token(kind: str, masked: bool) -> None:
    model = split_of(kind, four_experts(kind)).eval()
    model.routes.masked = masked
    inputs = rows_for(model.network, 4)
    whole = model(inputs, torch.tensor([0, 1, 2, 3]))
    cache = DynamicCache(config=model.network.config)
    parts = [inputs[:, :5], *inputs[:, 5:].split(1, dim=1)]
    pieces = [model.network(part, cache=cache, use_cache=True).logits for part in parts]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-12)


def test_single_precision_agrees_with_the_oracle() -> None:
    model = split_of("shared keys", four_experts("shared keys")).float()
    inputs, categories = rows_for(model.network, 8), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    routed = model(inputs, categories)
    with model.masked():
        torch.testing.assert_close(routed, model(inputs, categories), rtol=1e-4, atol=1e-5)


def test_an_attention_of_split_heads_passes_gradcheck() -> None:
    torch.manual_seed(0)
    model = split_of("biased", four_experts("biased"))
    attention = model.network.get_submodule("model.layers.0.self_attn")
    model.routes.bounds = (0, 1, 1, 2, 3)
    x = torch.randn(3, 4, 24, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(1, 4, 2, dtype=torch.float64).repeat(1, 1, 2)
    rotary = (angles.cos(), angles.sin())
    assert torch.autograd.gradcheck(
        lambda x, *_: attention(x, position_embeddings=rotary)[0], (x, *attention.parameters()), fast_mode=True
    )


def test_rows_without_a_route_are_refused() -> None:
    model = split_of("own keys", four_experts("own keys"))
    model.routes.bounds = (0, 1, 2, 2, 2)
    with pytest.raises(ValueError, match=r"site 'layers.0.heads': got 4 rows, wanted .* routes, \(2,\)"):
        model.network(rows_for(model.network, 4))
