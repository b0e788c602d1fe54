from typing import get_args

import pytest

from moeify.models.families import unit_space
from moeify.models.units import flops
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.partition import UnitKind
from moeify.recipe.reach import Stake
from moeify.splitting.terms import Terms, costs, plain_terms, site_terms, stakes, terms_in_reach
from tests.networks import grouped_llama, tiny_autoencoder
from tests.toy import toy_config

NETWORK = grouped_llama(heads=6, groups=3, bias=True)
SPACE = unit_space(NETWORK, get_args(UnitKind))


def terms(**partition: object) -> Terms:
    return site_terms(PartitionConfig.model_validate(partition), NETWORK, SPACE, 12)


def test_operations_of_a_unit_are_worked_out_by_hand() -> None:
    neuron, group = SPACE["layers.0.ffn"], SPACE["layers.0.heads"]
    assert flops(NETWORK, neuron, 12) == 2 * 3 * 24
    # Two query heads of four dimensions, a key head and a value head; the same again for what the queries write; then
    # each query meets six positions on average, in one product with keys and one with values.
    assert flops(NETWORK, group, 12) == 2 * 24 * (2 * 4 + 4 + 4 + 2 * 4) + 2 * 2 * 2 * 4 * 6
    autoencoder = tiny_autoencoder()
    assert flops(autoencoder, unit_space(autoencoder)["encoder.hidden"], 1) == 2 * (10 + 3)


def test_units_cost_one_each_or_their_operations() -> None:
    assert set(costs(terms(units=["ffn", "heads"])).values()) == {1}
    assert costs(terms(cost="flops"))["layers.1.heads"] == flops(NETWORK, SPACE["layers.1.heads"], 12)
    assert costs(terms(cost="flops"))["layers.1.ffn"] == flops(NETWORK, SPACE["layers.1.ffn"], 12)


def test_each_kind_of_unit_has_its_limits() -> None:
    found = terms(multiple=4, min_units=6)
    assert {(each.multiple, each.min_units, each.least) for each in found.values()} == {(4, 6, 8), (1, 0, 0)}
    found = terms(heads={"multiple": 2, "min_units": 1})
    assert (found["layers.0.heads"].least, found["layers.0.heads"].where) == (2, "partition.heads")
    assert plain_terms(PartitionConfig(), ["layers.0.ffn"])["layers.0.ffn"] == terms()["layers.0.ffn"]


def test_floors_and_frozen_sites_are_named_or_matched() -> None:
    found = terms(min_core=0.2, floors={"layers.0.*": 0.5, "*.ffn": 0.3, "layers.1.heads": 0.1}, frozen=["*.0.heads"])
    assert {site: each.core for site, each in found.items()} == {
        "layers.0.heads": 1.0,
        "layers.0.ffn": 0.5,
        "layers.1.heads": 0.2,
        "layers.1.ffn": 0.3,
    }
    frozen, free = found["layers.0.heads"], found["layers.1.ffn"]
    assert (frozen.frozen, frozen.least) == (True, 0)
    assert [frozen.given(7, root=root) for root in (True, False)] == [0, 0]
    assert [free.given(7, root=root) for root in (True, False)] == [4, 7]
    units = {site.name: site.units for site in SPACE.sites}
    assert stakes(found, units) == [
        pytest.approx(Stake(3 / 46, 1.0, 1 / 3)),
        pytest.approx(Stake(20 / 46, 0.5, 8 / 20)),
        pytest.approx(Stake(3 / 46, 0.2, 1 / 3)),
        pytest.approx(Stake(20 / 46, 0.3, 8 / 20)),
    ]
    alike = [pytest.approx(Stake(6 / 46, 0.1, 1 / 3)), pytest.approx(Stake(40 / 46, 0.1, 8 / 20))]
    assert stakes(terms(), units) == alike


def test_experts_without_room_are_told_before_anything_is_trained() -> None:
    """A site of 20 units has room for two experts of 8, but not for four of them, now or in a later round."""
    rounds = [{"train": 1, "recover": 1, "separation": 0.2, "branching": 4}]
    two = [{**rounds[0], "separation": 0.1, "branching": 2}, rounds[0]]
    for asked in (rounds, two):
        config = toy_config(rounds=asked, partition={"multiple": 1, "min_units": 8})
        with pytest.raises(ValueError, match=r"'core' owns 20 units of site 'layers\.0\.ffn', too few for . children"):
            terms_in_reach(config, tuple("abcd"), NETWORK, SPACE, 12)
    few = toy_config(rounds=rounds, partition={"multiple": 1, "min_units": 4, "floors": {"*.heads": 0.1}})
    assert terms_in_reach(few, tuple("abcd"), NETWORK, SPACE, 12)["layers.0.ffn"].least == 4


def test_names_of_no_site_are_told_a_line_each() -> None:
    with pytest.raises(ValueError, match=r"partition.frozen") as caught:
        terms(frozen=["layer.0.ffn", "layers.1.*"], floors={"layers.7.*": 0.5})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        "partition.frozen: got 'layer.0.ffn', which matches none of 4 sites, wanted names or patterns such as "
        "'layers.0.heads' or '*.heads'; nearest: 'layers.0.ffn'"
    )
    assert lines[1].startswith("partition.floors: got 'layers.7.*'")
