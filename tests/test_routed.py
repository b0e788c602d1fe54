import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moeify.models.build import logits
from moeify.models.families import unit_space
from moeify.models.units import Activation, FfnUnits
from moeify.routed.ffn import RoutedFfn, Routes
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from tests.networks import CATEGORIES, rows_for, tiny_autoencoder, tiny_llama
from tests.oracles import assert_equals_the_masked_oracle
from tests.trees import partitions

NETWORKS = {"llama": tiny_llama(), "autoencoder": tiny_autoencoder()}
SITES = {name: list(unit_space(network).readers) for name, network in NETWORKS.items()}


def split_of(family: str, partition: Partition) -> SplitModel:
    categories = sorted(partition.tree.categories)
    return SplitModel(copy.deepcopy(NETWORKS[family]), categories, partition).double()


@settings(deadline=None, max_examples=25)
@given(st.data(), st.sampled_from(["llama", "autoencoder"]), st.integers(1, 9), st.integers(0, 99))
def test_rectangles_equal_the_masked_oracle_forward_and_backward(
    data: st.DataObject, family: str, rows: int, seed: int
) -> None:
    partition = data.draw(partitions(SITES[family]))
    model = split_of(family, partition)
    inputs = rows_for(model.network, rows, seed)
    categories = torch.randint(len(model.categories), (rows,), generator=torch.Generator().manual_seed(seed))
    assert_equals_the_masked_oracle(model, inputs, categories)


@pytest.mark.parametrize("family", ["llama", "autoencoder"])
def test_an_undivided_split_model_is_the_dense_network(family: str) -> None:
    network = NETWORKS[family]
    inputs = rows_for(network, 6)
    model = SplitModel(copy.deepcopy(network), CATEGORIES)
    torch.testing.assert_close(model(inputs, torch.tensor([3, 0, 1, 1, 2, 0])), logits(network, inputs))


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_a_row_does_not_depend_on_its_neighbours_or_their_order(data: st.DataObject) -> None:
    model = split_of("llama", data.draw(partitions(SITES["llama"], categories=4)))
    inputs, categories = rows_for(model.network, 6), torch.tensor([2, 0, 3, 1, 1, 0])
    together = model(inputs, categories)
    for i in range(6):
        torch.testing.assert_close(
            together[i], model(inputs[i : i + 1], categories[i : i + 1])[0], rtol=1e-9, atol=1e-12
        )


def test_ablating_an_expert_silences_it_and_those_below() -> None:
    tree = ExpertTree.undivided("abcd").split({0: [("a", "b"), ("c", "d")]}).split({1: [("a",), ("b",)]})
    widths = {site.name: (8, 4, 2, 2, 8) for site in SITES["llama"]}
    model = split_of("llama", Partition(tree, widths))
    inputs, categories = rows_for(model.network, 4), torch.tensor([0, 1, 2, 3])
    intact = model(inputs, categories)
    with model.ablated("a+b"):
        wounded = model(inputs, categories)
    assert not torch.allclose(intact[:2], wounded[:2])
    assert torch.equal(intact[2:], wounded[2:])
    oracle = split_of("llama", Partition(tree, widths))
    with torch.no_grad():
        for site in oracle.space.sites:
            oracle.network.get_parameter(site.output)[:, 8:16] = 0
    torch.testing.assert_close(wounded, oracle(inputs, categories))
    assert torch.equal(model(inputs, categories), intact)


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_form_of_feed_forward_passes_gradcheck(activation: Activation, gated: bool, bias: bool) -> None:
    torch.manual_seed(0)
    block = nn.Module()
    block.up, block.down = nn.Linear(3, 6, bias=bias), nn.Linear(6, 2, bias=bias)
    if gated:
        block.gate = nn.Linear(3, 6, bias=bias)
    tree = ExpertTree.undivided("ab").split({0: [("a",), ("b",)]})
    routes = Routes(Partition(tree, {"s": (2, 3, 1)}), bounds=(0, 2, 5))
    units = FfnUnits("s", "", "gate" if gated else None, "up", "down", activation, 6, bias and gated, bias)
    routed = RoutedFfn(block, units, routes).double()
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = tuple(routed.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: routed(x), (x, *parameters))
    routes.masked = True
    masked = routed(x)
    routes.masked = False
    torch.testing.assert_close(routed(x), masked)


def by_hand(model: SplitModel, inputs: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
    """The stock network, every token's units off its own route set to zero where the down projection reads them."""
    network, partition = copy.deepcopy(NETWORKS["llama"]), model.partition
    for site in SITES["llama"]:
        active_CU = torch.stack([partition.active(site.name, c) for c in model.categories])
        mask_RPU = active_CU[categories].double()
        network.get_submodule(site.reader).register_forward_pre_hook(lambda _, given, mask=mask_RPU: (given[0] * mask,))
    return logits(network, inputs)


@settings(deadline=None, max_examples=25)
@given(st.data(), st.integers(1, 5), st.integers(0, 99))
def test_tokens_of_one_row_run_along_routes_of_their_own(data: st.DataObject, rows: int, seed: int) -> None:
    model = split_of("llama", data.draw(partitions(SITES["llama"])))
    inputs = rows_for(model.network, rows, seed)
    categories = torch.randint(len(model.categories), inputs.shape, generator=torch.Generator().manual_seed(seed))
    routed = model(inputs, categories)
    torch.testing.assert_close(routed, by_hand(model, inputs, categories), rtol=1e-9, atol=1e-12)
    assert_equals_the_masked_oracle(model, inputs, categories)


@settings(deadline=None, max_examples=10)
@given(st.data(), st.integers(0, 99))
def test_a_row_whose_tokens_share_a_route_runs_as_a_row(data: st.DataObject, seed: int) -> None:
    model = split_of("llama", data.draw(partitions(SITES["llama"]))).float()
    inputs = rows_for(model.network, 5, seed)
    categories = torch.randint(len(model.categories), (5,), generator=torch.Generator().manual_seed(seed))
    by_token = model(inputs, categories.unsqueeze(1).expand(inputs.shape))
    torch.testing.assert_close(by_token, model(inputs, categories))


def test_a_told_twin_is_told_each_tokens_category() -> None:
    model = SplitModel(copy.deepcopy(NETWORKS["llama"]), CATEGORIES, told=True).double()
    with torch.no_grad():
        for bias in model.told:
            bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(len(bias))))
    inputs = rows_for(model.network, 2)
    categories = torch.randint(4, inputs.shape, generator=torch.Generator().manual_seed(1))
    routed = model(inputs, categories)
    with model.masked():
        torch.testing.assert_close(routed, model(inputs, categories))
    assert not torch.allclose(routed, model(inputs, categories.roll(1, 1)))


def test_categories_must_fit_the_rows_and_be_the_models() -> None:
    model = split_of("llama", Partition.undivided(CATEGORIES, SITES["llama"]))
    inputs = rows_for(model.network, 3)
    with pytest.raises(ValueError, match="got 1 categories for 3 rows; give one a row"):
        model(inputs, torch.tensor([1]))
    for odd in (-1, 4):
        with pytest.raises(ValueError, match=rf"got category {odd}, wanted one of 0 \(a\), 1 \(b\), 2 \(c\), 3 \(d\)$"):
            model(inputs, torch.tensor([0, odd, 1]))


def test_routes_of_tokens_must_fit() -> None:
    tokens = split_of("llama", Partition.undivided(CATEGORIES, SITES["llama"]))
    inputs = rows_for(tokens.network, 2)
    with pytest.raises(ValueError, match=r"\(2, 3\) do not fit inputs \(2, 12\)"):
        tokens(inputs, torch.zeros(2, 3, dtype=torch.long))
    images = split_of("autoencoder", Partition.undivided(CATEGORIES, SITES["autoencoder"]))
    with pytest.raises(ValueError, match="one category a row"):
        images(rows_for(images.network, 2), torch.zeros(2, 10, dtype=torch.long))


def test_rectangles_follow_the_batch_the_partition_and_what_is_ablated() -> None:
    tree = ExpertTree.undivided("ab").split({0: [("a",), ("b",)]})
    routes = Routes(Partition(tree, {"s": (2, 3, 1)}), bounds=(0, 2, 5))
    core, one, other = ((slice(0, 5), slice(0, 2)), (slice(0, 2), slice(2, 5)), (slice(2, 5), slice(5, 6)))
    assert list(routes.rectangles("s")) == list(routes.rectangles("s")) == [core, one, other]
    with routes.ablating([1]):
        assert list(routes.rectangles("s")) == [core, other]
    assert list(routes.rectangles("s", 2))[1] == (slice(0, 4), slice(2, 5))
    routes.bounds = (0, 0, 5)
    assert list(routes.rectangles("s")) == [core, (slice(0, 5), slice(5, 6))]
    routes.partition = Partition(tree, {"s": (1, 3, 2)})
    assert list(routes.rectangles("s")) == [(slice(0, 5), slice(0, 1)), (slice(0, 5), slice(4, 6))]
