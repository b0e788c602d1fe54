import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeify.export.pruning import only, prune, without
from moeify.models.families import describe
from moeify.models.resizing import shaped
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from tests.networks import CATEGORIES, grouped_llama, rows_for, tiny_autoencoder, tiny_llama
from tests.trees import partitions

TREE = ExpertTree.undivided(CATEGORIES).split({0: [("a", "c"), ("b", "d")]}).split({1: [("a",), ("c",)]})
"""core - (a+c - (a, c), b+d)"""
WIDTHS = {"layers.0.ffn": (7, 2, 3, 4, 8), "layers.1.ffn": (4, 5, 2, 3, 10)}


def split_of(network: torch.nn.Module, partition: Partition | None = None) -> SplitModel:
    return SplitModel(network, CATEGORIES, partition or Partition(TREE, WIDTHS)).eval()


def outputs(model: SplitModel, category: str) -> Tensor:
    rows = rows_for(model.network, 3)
    rows = rows.float() if rows.is_floating_point() else rows
    with torch.no_grad():
        return model(rows, torch.full((3,), model.categories.index(category)))


def names(partition: Partition) -> list[str]:
    return [node.name for node in partition.tree.nodes]


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_what_is_kept_gives_the_same_outputs_whatever_the_tree(data: st.DataObject) -> None:
    network = data.draw(st.sampled_from([tiny_llama, tiny_autoencoder]))().float()
    whole = SplitModel(network, CATEGORIES).eval()
    names = {f"c{i}": category for i, category in enumerate(CATEGORIES)}
    drawn = data.draw(partitions(list(whole.space.readers), categories=4)).as_json()
    for node in drawn["nodes"]:
        node["categories"] = [names[c] for c in node["categories"]]
    whole.repartition(Partition.from_json(drawn))
    kept = data.draw(st.lists(st.sampled_from(CATEGORIES), min_size=1, unique=True))
    pruning = only(whole.partition, kept)
    part = prune(whole, pruning)
    assert set(part.categories) == set(kept)
    routes = torch.stack(
        [torch.cat([whole.partition.active(site, category) for site in whole.partition.widths]) for category in kept]
    )
    assert part.space.units == int(routes.any(0).sum())
    for category in kept:
        torch.testing.assert_close(outputs(part, category), outputs(whole, category))


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_without_equals_ablation_and_changes_no_other_category(data: st.DataObject) -> None:
    whole = split_of(tiny_llama().float())
    dropped = data.draw(
        st.sampled_from([("a",), ("c",), ("a", "c"), ("b", "d"), ("a", "b", "d"), ("c", "a", "b", "d")])
    )
    pruning = without(whole.partition, dropped)
    part = prune(whole, pruning)
    assert part.categories == CATEGORIES
    assert part.space.units < whole.space.units
    for category in CATEGORIES:
        with whole.ablated(*pruning.removed):
            torch.testing.assert_close(outputs(part, category), outputs(whole, category))
        if category not in dropped:
            torch.testing.assert_close(outputs(part, category), outputs(whole, category))
        else:
            assert (outputs(part, category) - outputs(whole, category)).abs().max() > 1e-5


@pytest.mark.parametrize("groups", [6, 3])
def test_heads_leave_like_other_units(groups: int) -> None:
    widths = {"heads": (2, 1, 1, 1, 1) if groups == 6 else (1, 0, 0, 1, 1), "ffn": (4,) * 5}
    sites = {f"layers.{i}.{kind}": each for i in (0, 1) for kind, each in widths.items()}
    whole = split_of(grouped_llama(groups=groups, bias=True).float(), Partition(TREE, sites))
    part = prune(whole, only(whole.partition, ["a", "c"]))
    left = 5 if groups == 6 else 2
    assert part.space["layers.0.heads"].units == left
    assert part.network.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (left * 24 // groups, 24)
    for category in ("a", "c"):
        torch.testing.assert_close(outputs(part, category), outputs(whole, category))
    pruning = without(whole.partition, ["b", "d"])
    part = prune(whole, pruning)
    for category in CATEGORIES:
        with whole.ablated(*pruning.removed):
            torch.testing.assert_close(outputs(part, category), outputs(whole, category))


def test_experts_with_one_child_left_become_one_with_it() -> None:
    pruning = only(Partition(TREE, WIDTHS), ["a", "d"])
    assert names(pruning.partition) == ["core", "a", "b+d"]
    assert pruning.partition.widths == {"layers.0.ffn": (7, 5, 8), "layers.1.ffn": (4, 7, 10)}
    assert pruning.kept["layers.0.ffn"].tolist() == [*range(12), *range(16, 24)]
    assert names(only(Partition(TREE, WIDTHS), ["c"]).partition) == ["core"]


def test_the_removed_categories_units_are_gone_and_an_empty_leaf_stands_there() -> None:
    whole = split_of(tiny_llama().float())
    pruning = without(whole.partition, ["a", "c"])
    assert pruning.removed == ("a+c",)
    assert names(pruning.partition) == ["core", "a+c", "b+d"]
    assert pruning.partition.owned == (11, 0, 18)
    part = prune(whole, pruning)
    gone = whole.network.get_parameter("model.layers.0.mlp.up_proj.weight")[7:16]
    left = part.network.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert left.shape[0] == 15
    assert not any(torch.equal(row, other) for row in gone for other in left)


def test_what_has_no_expert_of_its_own_cannot_be_taken_out() -> None:
    partition = Partition(TREE, WIDTHS)
    with pytest.raises(ValueError, match=r"'b' has no expert of its own to take out; it shares 'b\+d' with d, take"):
        without(partition, ["b"])
    undivided = Partition(ExpertTree.undivided(CATEGORIES), {"layers.0.ffn": (24,)})
    with pytest.raises(ValueError, match="'a' has no expert of its own"):
        without(undivided, ["a"])
    coreless = Partition(TREE, {"layers.0.ffn": (0, 2, 6, 6, 10)})
    assert without(coreless, ["a"]).removed == ("a",)
    with pytest.raises(ValueError, match=r"'b' has no unit left in site 'layers\.0\.ffn'; export the other categories"):
        without(coreless, ["b", "d"])
    for names_ in ([], ["x"]):
        for part in (only, without):
            with pytest.raises(ValueError, match="the model has a, c, b, d"):
                part(partition, names_)


def test_a_network_takes_a_width_for_each_site() -> None:
    network = shaped(describe(tiny_llama()), {"layers.0.ffn": 5, "layers.1.ffn": 9})
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters() if "mlp" in name}
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (5, 16)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (16, 5)
    assert shapes["model.layers.1.mlp.up_proj.weight"] == (9, 16)
    assert network(torch.arange(6)[None]).logits.shape == (1, 6, 40)
    narrow = shaped(describe(tiny_autoencoder()), {"encoder.hidden": 3, "decoder.hidden": 7})
    assert narrow.get_parameter("encoder.up.bias").shape == (3,)
    assert narrow(torch.rand(2, 10)).shape == (2, 10)
