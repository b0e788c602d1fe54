import copy
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.export.fresh_check import ROUTE
from moeify.export.stock import Form
from moeify.export.stock_moe import to_moe
from moeify.models.build import logits
from moeify.recipe.config import RunConfig
from moeify.result import MEAN
from moeify.routed.split_model import SplitModel
from moeify.routers import by_layer
from moeify.routers.by_layer import Distil, LayerRouters, margin
from moeify.routers.router import leaves
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.task import Batch
from tests.networks import CATEGORIES, grouped_llama, rows_for, tiny_autoencoder, tiny_decoder, tiny_llama
from tests.test_pruning import TREE, WIDTHS, split_of
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config


def drawn(split: SplitModel, seed: int = 0) -> LayerRouters:
    generator, number = torch.Generator().manual_seed(seed), len(leaves(split))
    sizes = {name: len(weight) for name, weight in split.output_weights.items()}
    weights = {name: torch.randn(number, size, generator=generator) / size for name, size in sizes.items()}
    return LayerRouters(leaves(split), weights)


def by_hand(split: SplitModel, dense: torch.nn.Module, routers: LayerRouters, rows: torch.Tensor) -> torch.Tensor:
    """The dense network: the block's units off the best leaf's route are zero where the way out reads them."""
    tree, chosen = split.partition.tree, {}
    for site in split.space.sites:
        routes = [split.partition.active(site.name, tree.nodes[leaf].categories[0]) for leaf in tree.leaves]

        def look(_: object, given: tuple[torch.Tensor], name: str = site.name) -> None:
            chosen[name] = (given[0].float() @ routers.weights[name].t()).argmax(-1)

        def zero(_: object, given: tuple[torch.Tensor], name: str = site.name, routes=routes) -> tuple[torch.Tensor]:
            return (given[0] * torch.stack(routes)[chosen[name]],)

        dense.get_submodule(site.module).register_forward_pre_hook(look)
        dense.get_submodule(site.output.removesuffix(".weight")).register_forward_pre_hook(zero)
    return logits(dense, rows)


@given(st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_every_block_sends_every_token_where_its_own_router_says(seed: int) -> None:
    dense = tiny_llama(seed)
    split = split_of(copy.deepcopy(dense))
    routers, rows = drawn(split, seed=seed), rows_for(dense, 3, seed)
    found = split.by_layer(rows, routers.weights)
    torch.testing.assert_close(found, by_hand(split, dense, routers, rows))
    by_label = split(rows, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(by_label, split(rows, torch.zeros(3, 12, dtype=torch.long)))
    assert not torch.allclose(found, by_label)
    longer = torch.cat([rows[:, :7], rows_for(dense, 3, seed + 1)[:, 7:]], 1)
    torch.testing.assert_close(split.by_layer(longer, routers.weights)[:, :7], found[:, :7])


@pytest.mark.parametrize("form", get_args(Form))
@given(seed=st.integers(0, 1000))
@settings(max_examples=4, deadline=None)
def test_a_stock_mixture_with_these_routers_chooses_alike_and_can_still_be_forced(form: Form, seed: int) -> None:
    split = split_of(tiny_llama(seed).float())
    routers, rows = drawn(split, seed=seed), rows_for(split.network, 3, seed)
    if margin(split, routers, rows) < 1e-4:
        return
    stock = to_moe(split, form, routers)
    assert stock.forced is None
    with torch.no_grad():
        wanted = split.by_layer(rows, routers.weights)
        torch.testing.assert_close(stock.network(rows).logits, wanted, atol=1e-5, rtol=1e-4)
        for number, category in enumerate(CATEGORIES):
            ROUTE[form](stock.network, stock.experts[category])
            wanted = split(rows, torch.full((3,), number))
            torch.testing.assert_close(stock.network(rows).logits, wanted, atol=1e-5, rtol=1e-4)
        if form == "glm4_moe":
            for layer in stock.network.model.layers:
                layer.mlp.gate.e_score_correction_bias.zero_()
            wanted = split.by_layer(rows, routers.weights)
            torch.testing.assert_close(stock.network(rows).logits, wanted, atol=1e-5, rtol=1e-4)


class Coloured(ToyTextTask):
    """Categories of three tokens each, of their own: a token tells its category."""

    def _rows(self, purpose: list[int], rows: int, first_id: int = 0) -> Batch:
        batch = super()._rows(purpose, rows, first_id)
        tokens = torch.cat([batch.inputs, batch.targets[:, -1:]], 1) % 3 + 75 * batch.categories.unsqueeze(1)
        return Batch(tokens[:, :-1], tokens[:, 1:], batch.categories, batch.ids)


def coloured() -> tuple[Distil, SplitModel]:
    config = RunConfig.model_validate(TEXT_CONFIG)
    task = Coloured(config)
    tree = ExpertTree.undivided("abcd").split({0: [("a", "c"), ("d",), ("b",)]})
    widths = {f"layers.{i}.ffn": (8, 8, 8, 8) for i in range(2)}
    return Distil(task, config), SplitModel(task.build(), "abcd", Partition(tree, widths)).eval()


def test_distilled_routers_find_the_leaf_where_tokens_tell_it_and_cost_nothing_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(by_layer, "_ROWS", 32)
    distil, model = coloured()
    before = [parameter.clone() for parameter in model.parameters()]
    routers, report = distil(model)
    assert routers.experts == ("a+c", "d", "b")
    assert min(report.accuracy.values()) > 0.98
    assert abs(report.router_tax) < 1e-3
    assert report.label.keys() == report.router.keys() == {*"abcd", MEAN}
    again, same = distil(model)
    assert same == report
    for name, weight in routers.weights.items():
        assert torch.equal(weight, again.weights[name])
        torch.testing.assert_close(weight.bfloat16().float(), routers.rounded(torch.bfloat16).weights[name])
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_what_cannot_route_its_tokens_is_told_in_one_line() -> None:
    distil, model = coloured()
    rows = rows_for(tiny_llama(), 2)
    heads = {f"layers.{i}.{kind}": w for i in (0, 1) for kind, w in (("heads", (2, 1, 1, 1, 1)), ("ffn", (4,) * 5))}
    with pytest.raises(ValueError, match="heads are split, and a head looks over a whole row"):
        split_of(grouped_llama(), Partition(TREE, heads)).by_layer(rows, {})
    told = SplitModel(tiny_llama(), CATEGORIES, Partition(TREE, WIDTHS), told=True)
    with pytest.raises(ValueError, match="blocks are told labels"):
        told.by_layer(rows, drawn(told).weights)
    split = split_of(tiny_llama())
    with pytest.raises(ValueError, match="got routers of no site, wanted one of 3 leaves a site"):
        split.by_layer(rows, {})
    config = toy_config()
    with pytest.raises(ValueError, match="are for text that is read from its first token on"):
        Distil(ToyTask(config), config)(SplitModel(tiny_autoencoder(), CATEGORIES))
    with pytest.raises(ValueError, match="has one leaf, 'core'; there is nothing to route"):
        distil(SplitModel(model.network, "abcd"))


def test_blocks_that_run_inside_of_a_layer_route_too() -> None:
    sites = {"layers.0.ffn": (6, 2, 3, 3, 6), "layers.1.ffn": (4, 5, 2, 3, 6)}
    dense = tiny_decoder("opt")
    split = split_of(copy.deepcopy(dense), Partition(TREE, sites))
    rows, routers = rows_for(dense, 3), drawn(split)
    found = split.by_layer(rows, routers.weights)
    other = split.by_layer(rows, {name: -weight for name, weight in routers.weights.items()})
    assert not torch.allclose(found, other)
    split.repartition(Partition.undivided(CATEGORIES, split.space.readers))
    torch.testing.assert_close(split.by_layer(rows, {name: torch.ones(1, 24) for name in sites}), logits(dense, rows))
