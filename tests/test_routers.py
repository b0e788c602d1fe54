import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.routed.split_model import SplitModel
from moeify.routers.classifiers import _classifiers, rows_to_fit, train
from moeify.routers.router import (
    MEMORY,
    Layer,
    Router,
    category_of_leaf,
    early,
    features,
    leaf_of_category,
    leaves,
    remember,
    scores,
)
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from tests.networks import CATEGORIES, tiny_autoencoder, tiny_llama
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config


def split_llama(groups: list[tuple[str, ...]] | None = None, *, heads: bool = False) -> SplitModel:
    """A tiny Llama whose leaves serve these groups of categories, units dealt out evenly; one head is the first's."""
    tree = ExpertTree.undivided(CATEGORIES).split({0: groups or [("c",), ("a",), ("d",), ("b",)]})
    model = SplitModel(tiny_llama(), CATEGORIES)
    nodes = len(tree.nodes)
    widths = {site.name: (site.units - (nodes - 1) * 4, *[4] * (nodes - 1)) for site in model.space.sites}
    if heads:
        widths |= {f"layers.{i}.heads": (1, 1, *[0] * (nodes - 2)) for i in range(2)}
    return SplitModel(tiny_llama(), CATEGORIES, Partition(tree, widths))


def some_router(model: SplitModel, kind: str = "token", threshold: float = 0.0, seed: int = 0) -> Router:
    generator = torch.Generator().manual_seed(seed)
    dim, experts = 16, len(leaves(model))
    weight = 40 * torch.randn(experts, 2 * dim + 1, generator=generator, dtype=torch.float64)
    weight[:, -1] = 0  # what the count alone says
    return Router(kind, leaves(model), (Layer(weight, torch.zeros(experts, dtype=torch.float64)),), threshold)


def test_leaves_and_categories_name_each_other() -> None:
    model = split_llama([("c",), ("d", "a"), ("b",)])
    assert leaves(model) == ("c", "d+a", "b")
    assert leaf_of_category(model).tolist() == [1, 2, 0, 1]
    assert [CATEGORIES[c] for c in category_of_leaf(model)] == ["c", "d", "b"]


def test_evidence_is_a_fading_mean_and_the_mean_times_the_root_of_what_it_is_worth() -> None:
    tokens = torch.randn(1, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = features(remember(tokens), torch.arange(1, 51).unsqueeze(0))
    for last in (0, 1, 7, 49):
        weights = torch.tensor([(1 - 1 / MEMORY) ** (last - place) for place in range(last + 1)], dtype=torch.float64)
        mean = (weights.unsqueeze(1) * tokens[0, : last + 1]).sum(0) / weights.sum()
        root = weights.sum() / weights.square().sum().sqrt()
        torch.testing.assert_close(found[0, last], torch.cat([mean, mean * root, root.unsqueeze(0)]))
    torch.testing.assert_close(found[0, 0, -1], torch.tensor(1.0, dtype=torch.float64))
    assert 49 < float(features(tokens[:, 0], torch.tensor([10**6]))[0, -1]) ** 2 < 2 * MEMORY
    torch.testing.assert_close(remember(tokens[:, 20:], remember(tokens)[:, 19]), remember(tokens)[:, 20:])


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 99))
def test_a_decision_depends_on_no_later_token(rows: int, positions: int, seed: int) -> None:
    model = split_llama()
    router = some_router(model, seed=seed)
    tokens = torch.randint(40, (rows, positions), generator=torch.Generator().manual_seed(seed))
    read = router.read(early(model.network, tokens))
    torch.testing.assert_close(read.exp().sum(-1), torch.ones(rows, positions, dtype=torch.float64))
    for until in range(1, positions + 1):
        begun = router.read(early(model.network, tokens[:, :until]))
        torch.testing.assert_close(begun, read[:, :until], rtol=1e-12, atol=1e-12)


def test_the_route_follows_a_text_that_changes() -> None:
    weight = torch.zeros(2, 5, dtype=torch.float64)
    weight[0, 2] = weight[1, 3] = 1.0  # each kind of token speaks for an expert of its own
    router = Router("token", ("a", "b"), (Layer(weight, torch.zeros(2, dtype=torch.float64)),), 0.0)
    kinds = torch.eye(2, dtype=torch.float64)
    text = torch.cat([kinds[:1].expand(200, 2), kinds[1:].expand(60, 2)]).unsqueeze(0)
    served = router.read(text)[0].argmax(-1)
    changed = int(served.argmax())
    assert served.tolist() == [0] * changed + [1] * (260 - changed)
    assert changed == 200 + round(MEMORY * math.log(2)) - 1


def test_what_a_router_reads_does_not_depend_on_routes() -> None:
    model = split_llama()
    tokens = torch.randint(40, (2, 7))
    before = early(model.network, tokens)
    with torch.no_grad():
        for site in model.space.sites:
            model.network.get_parameter(site.output).mul_(3)
    assert torch.equal(before, early(model.network, tokens))
    images = torch.rand(3, 10)
    torch.testing.assert_close(early(tiny_autoencoder(), images), images.unsqueeze(1).double())


@pytest.mark.parametrize("groups", [None, [("a", "b"), ("c", "d")]])
def test_training_finds_the_leaf_of_rows_that_differ(groups: list[tuple[str, ...]] | None) -> None:
    task = ToyTask(toy_config())
    base = SplitModel(task.build(), CATEGORIES)
    tree = ExpertTree.undivided(CATEGORIES).split({0: groups or [(c,) for c in CATEGORIES]})
    below = len(tree.nodes) - 1
    widths = {site.name: (site.units - 4 * below, *[4] * below) for site in base.space.sites}
    model = SplitModel(task.build(), CATEGORIES, Partition(tree, widths))
    before = copy.deepcopy(model.state_dict())
    layers = train(model, task.probe_batches(9, 64, 16), task.held_out_batches("validation", 16, 16), seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    router = Router("document", leaves(model), layers, 0.0)
    right = total = 0
    for batch in task.held_out_batches("test", 32, 16):
        probabilities = router.read(early(model.network, batch.inputs))[:, 0].exp()
        right += int((probabilities.argmax(1) == leaf_of_category(model)[batch.categories]).sum())
        total += len(batch.categories)
    assert right / total > 0.95


def test_training_is_the_same_each_time_and_needs_two_leaves() -> None:
    task = ToyTextTask(toy_config(**TEXT_CONFIG))
    tree = ExpertTree.undivided(CATEGORIES).split({0: [("a", "b", "c"), ("d",)]})
    model = SplitModel(task.build(), CATEGORIES)
    with pytest.raises(ValueError, match="one leaf, 'core'"):
        train(model, [], [], seed=0)
    model.repartition(Partition(tree, {site.name: (16, 8, 8) for site in model.space.sites}))
    one, other = (
        train(model, task.probe_batches(9, 16, 16), task.held_out_batches("validation", 8, 16), seed=3)
        for _ in range(2)
    )
    assert [[*map(torch.equal, a, b)] for a, b in zip(one, other, strict=True)] == [[True, True]] * len(one)
    assert one[0].weight_OI.shape[1] == 2 * 16 + 1
    assert torch.equal(one[-1].weight_OI[0], -one[-1].weight_OI[1])


def test_what_no_line_parts_a_committee_does_and_few_examples_have_a_line_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(1200, 2, generator=generator, dtype=torch.float64)
    leaf = (places[:, 0] * places[:, 1] > 0).long()
    line, bent = _classifiers(places[:1000], leaf[:1000], seed=0)

    def right(layers: list[Layer]) -> float:
        return (scores(layers, places[1000:]).argmax(1) == leaf[1000:]).double().mean().item()

    assert [layer.weight_OI.shape for layer in (*line, *bent)] == [(2, 2), (256, 2), (2, 256)]
    assert right(line) < 0.7
    assert right(bent) > 0.8
    rare = torch.zeros(1000, dtype=torch.long)
    rare[:19] = 1
    assert len(list(_classifiers(places[:1000], rare, seed=0))) == 1


def test_how_many_rows_are_fit_falls_with_the_width_of_what_is_read() -> None:
    network = tiny_autoencoder()
    model = SplitModel(network, CATEGORIES)
    assert rows_to_fit(model, torch.zeros(4, 10)) == 4096
    wide = 2**20
    assert rows_to_fit(model, torch.zeros(4, wide)) == 1


def test_a_router_must_hold_together() -> None:
    def layer(reads: int, gives: int) -> Layer:
        return Layer(torch.zeros(gives, reads).double(), torch.zeros(gives).double())

    with pytest.raises(ValueError, match=r"got 1\.5, wanted a probability"):
        Router("token", ("a",), (layer(3, 1),), 1.5)
    with pytest.raises(ValueError, match="2 experts got weights"):
        Router("token", ("a", "b"), (layer(3, 3),), 0.5)
    with pytest.raises(ValueError, match=r"2 experts got weights \[\(4, 3\), \(2, 5\)\], which do not fit together"):
        Router("token", ("a", "b"), (layer(3, 4), layer(5, 2)), 0.5)
    with pytest.raises(ValueError, match="2 experts got weights"):
        Router("token", ("a", "b"), (), 0.5)
