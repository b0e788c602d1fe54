from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tables import empty_table

from attribution.sites import Site
from attribution.table import AttributionTable
from moeify.loop import run
from moeify.recipe.load import RecipeError, parse_recipe, to_yaml
from moeify.recipe.partition import Owners
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.rounds import Round
from moeify.splitting.assignment import assign
from moeify.splitting.owners import LeafUnits, owners
from moeify.splitting.partition import Partition
from tests.proposals import propose
from tests.toy import TEXT_CONFIG, ToyTextTask, toy_config

KINDS = [get_args(way.__annotations__["kind"])[0] for way in get_args(get_args(Owners)[0])]
CATEGORIES = ("a", "b", "c", "d")
DIM = 3


def way(kind: str) -> Owners:
    return TypeAdapter(Owners).validate_python({"kind": kind})


def random_units(
    number: int, parts: list[list[str]], seed: int = 0, site_units: int = 0, dim: int = 5, width: int = 1
) -> LeafUnits:
    """Units of a leaf in the middle of a site, everything about them at random, some dead."""
    generator = torch.Generator().manual_seed(seed)
    total = site_units or number + 5
    categories = tuple(c for part in parts for c in part)
    table = empty_table(categories, {"s": (total, DIM)}, width=width)
    for tensor in (table.counts, table.sampled):
        tensor.fill_(100.0)
    sums = table.sites["s"]
    alive = torch.rand(total, generator=generator) < 0.9
    for tensor in (sums.fisher, sums.absolute):
        tensor.copy_(torch.rand(total, len(categories), generator=generator, dtype=torch.float64) * alive[:, None])
    active = torch.randn(len(categories), total * width, 20, generator=generator, dtype=torch.float64)
    active *= alive.repeat_interleave(width)[:, None]
    sums.moments[0].tensors()[0].copy_(active @ active.transpose(1, 2))
    sums.power.copy_(active.square().sum(2).t())
    output, inputs = (torch.randn(*shape, generator=generator) for shape in ((DIM, total * width), (total, dim)))
    start = 2 if total > number + 2 else 0
    return LeafUnits(table, "s", start, number, parts, "fisher", output, lambda _: inputs, seed)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), width=st.sampled_from([1, 3]))
def test_capacities_are_met_and_the_answer_is_always_the_same(kind: str, data: st.DataObject, width: int) -> None:
    children = data.draw(st.integers(1, 4))
    widths = data.draw(st.lists(st.integers(0, 6), min_size=children, max_size=children))
    capacity = np.array([*widths, data.draw(st.integers(0, 9))])
    parts = [[f"c{i}", f"d{i}"][: 1 + i % 2] for i in range(children)]
    units = random_units(int(capacity.sum()), parts, data.draw(st.integers(0, 99)), width=width)
    deal = owners(way(kind), units)
    found = deal(capacity).owner_L
    assert np.bincount(found, minlength=len(capacity)).tolist() == capacity.tolist()
    deal(np.array([*[0] * children, units.number]))
    assert found.tolist() == deal(capacity).owner_L.tolist() == owners(way(kind), units)(capacity).owner_L.tolist()


def test_attribution_is_the_exact_assignment_of_the_score() -> None:
    units = random_units(20, [["a"], ["b", "c"]])
    score = (units.table.score("s", "fisher") * units.table.shares)[2:22]
    value = torch.stack([score[:, 0], score[:, 1:].sum(1), score.sum(1)], dim=1).numpy()
    capacity = np.array([5, 5, 10])
    found = owners(way("attribution"), units)(capacity)
    assert found.owner_L.tolist() == assign(value, capacity).owner.tolist()
    assert found.gap is not None
    assert 0 <= found.gap < 1e-12
    assert owners(way("random"), units)(capacity).gap is None


PLANTED = [0] * 6 + [1] * 6 + [2] * 12
"""Owner of each unit, before they are shuffled: expert a+c, expert b+d, core."""


def planted(seed: int) -> tuple[LeafUnits, np.ndarray]:
    """Units of three kinds: who they serve, how active they are, with whom, and what they read says so."""
    generator = np.random.default_rng(seed)
    owner = generator.permutation(PLANTED)
    number = len(owner)
    serves = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]], dtype=float)[owner]
    table = empty_table(CATEGORIES, {"s": (number, DIM)})
    for counts in (table.counts, table.sampled):
        counts.fill_(100.0)
    sums = table.sites["s"]
    for tensor in (sums.fisher, sums.absolute, sums.power):
        tensor.copy_(torch.from_numpy(100 * serves + generator.random(serves.shape)))
    together = (owner[:, None] == owner) + 0.05 * generator.random((number, number))
    active = together[None] * np.sqrt(sums.power.numpy().T[:, :, None] * sums.power.numpy().T[:, None])
    moment = torch.from_numpy((active + active.transpose(0, 2, 1)) / 2)
    sums.moments[0].tensors()[0].copy_(moment)
    inputs = np.eye(3, 8)[owner] * generator.uniform(0.5, 2, (number, 1)) + 0.05 * generator.standard_normal(
        (number, 8)
    )
    writes = torch.from_numpy(np.where(owner == 2, 4.0, 1.0) * np.ones((DIM, 1)))
    parts = [["a", "c"], ["b", "d"]]
    units = LeafUnits(table, "s", 0, number, parts, "fisher", writes, lambda _: torch.from_numpy(inputs))
    return units, owner


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", sorted({*KINDS} - {"random", "magnitude"}))
def test_a_planted_division_is_found(kind: str, seed: int) -> None:
    units, owner = planted(seed)
    assert owners(way(kind), units)(np.array([6, 6, 12])).owner_L.tolist() == owner.tolist()


def widened(units: LeafUnits, width: int) -> LeafUnits:
    """The same units, each spread over several features."""
    spread = torch.linspace(1, 2, width, dtype=torch.float64).softmax(0)
    old = units.table.sites["s"]
    table = empty_table(units.table.categories, {"s": (old.units, DIM)}, width=width)
    for counts in (table.counts, table.sampled):
        counts.fill_(100.0)
    for name in ("fisher", "absolute"):
        getattr(table.sites["s"], name).copy_(getattr(old, name))
    table.sites["s"].power.copy_(torch.kron(old.power, spread[:, None]))
    outer = spread.sqrt()[:, None] * spread.sqrt()
    for moment, mine in zip(old.moments[0].tensors()[0], table.sites["s"].moments[0].tensors()[0], strict=True):
        mine.copy_(torch.kron(moment, outer))
    writes = torch.kron(units.output_DF, spread.sqrt()[None])
    return LeafUnits(table, "s", 0, units.number, units.parts, "fisher", writes, units.reads)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"random"}))
def test_a_unit_of_several_features_is_dealt_out_as_one(kind: str) -> None:
    units, _ = planted(1)
    capacity = np.array([6, 6, 12])
    found = owners(way(kind), widened(units, 3))(capacity).owner_L
    assert found.tolist() == owners(way(kind), units)(capacity).owner_L.tolist()


def test_magnitude_keeps_the_largest_and_deals_the_others_blindly() -> None:
    units, owner = planted(0)
    found = owners(way("magnitude"), units)(np.array([6, 6, 12])).owner_L
    assert (found == 2).tolist() == (owner == 2).tolist()
    assert found.tolist() != owner.tolist()


def test_random_owners_are_those_of_the_seed() -> None:
    draws = [
        owners(way("random"), random_units(30, [["a"], ["b"]], seed))(np.array([8, 8, 14])).owner_L.tolist()
        for seed in (0, 1)
    ]
    assert draws[0] != draws[1]


def test_a_way_that_reads_input_weights_asks_for_them() -> None:
    units, _ = planted(0)
    blind = LeafUnits(units.table, "s", 0, units.number, units.parts, "fisher", units.output_DF)
    with pytest.raises(ValueError, match="site 's': got no input weights"):
        owners(way("moefication"), blind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_proposal_keeps_to_widths_nesting_and_the_unrouted(kind: str) -> None:
    units, _ = planted(0)
    table: AttributionTable = units.table
    table.rows.fill_(10.0)
    moments = table.sites["s"].moments
    moments[0].tensors()[0].copy_(torch.diag_embed(table.sites["s"].power.t()))
    moments[1].tensors()[0].copy_(torch.eye(DIM, dtype=torch.float64).expand(4, DIM, DIM) * 100)
    config = PartitionConfig.model_validate(
        {"multiple": 2, "min_units": 2, "unrouted": ["d"], "owners": {"kind": kind}}
    )
    rounds = [Round(train=1, recover=1, separation=s) for s in (0.3, 0.4)]
    whole = Partition.undivided(CATEGORIES, [Site("s", "x", units.number)])
    assert units.reads is not None
    weights = {"s": units.output_DF.float()}
    first = propose(whole, table, weights, config, rounds, "fisher", reads=units.reads)
    assert sorted(first.order["s"].tolist()) == list(range(units.number))
    widths = first.partition.widths["s"]
    assert widths[-1] == 0
    assert all(width % 2 == 0 for width in widths[1:])
    second = propose(first.partition, table, weights, config, rounds[1:], "fisher", reads=units.reads)
    assert second.order["s"][: widths[0]].tolist() == list(range(widths[0]))
    assert second.partition.separation > first.partition.separation


SHORT = {"rounds": [{"train": 5, "recover": 5, "separation": 0.3}, {"train": 5, "recover": 5, "separation": 0.45}]}


@pytest.mark.parametrize("kind", ["magnitude", "moefication"])
def test_input_weights_of_gated_units_are_read(kind: str) -> None:
    partition = {"multiple": 2, "min_units": 2, "owners": {"kind": kind}}
    config = toy_config(**{**TEXT_CONFIG, **SHORT, "partition": partition, "controls": []})
    assert [round_.accepted for round_ in run(config, ToyTextTask(config)).rounds] == [True, True]


def test_a_recipe_names_its_way() -> None:
    recipe = to_yaml(toy_config(partition={"owners": {"kind": "cmoe"}}))
    assert parse_recipe(recipe, where="recipe").partition.owners.kind == "cmoe"
    assert parse_recipe(to_yaml(toy_config()), where="recipe").partition.owners.kind == "attribution"
    with pytest.raises(RecipeError, match=r"partition\.owners"):
        parse_recipe(recipe.replace("cmoe", "cmoo"), where="recipe")
