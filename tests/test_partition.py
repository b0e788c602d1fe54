import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attribution.sites import Site
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from tests.trees import partitions

SITES = [Site("one", "a", 24), Site("two", "b", 13)]


def small() -> Partition:
    tree = ExpertTree.undivided(["a", "b"]).split({0: [("a",), ("b",)]})
    return Partition(tree, {"s": (1, 2, 1)})


def test_units_may_cost_more_in_one_site_than_in_another() -> None:
    tree = ExpertTree.undivided("ab").split({0: [("a",), ("b",)]})
    partition = Partition(tree, {"s": (2, 1, 1), "t": (1, 1, 2)})
    costs = {"s": 1, "t": 10}
    assert partition.active_units("a", costs) == 3 + 20
    assert partition.active_shares(costs) == {"a": 23 / 44, "b": 33 / 44}
    assert partition.separation_of(costs) == pytest.approx(1 - 28 / 44)
    assert partition.separation_of({"s": 1, "t": 1}) == partition.separation == partition.separation_of()
    assert partition.surplus(0.0, costs) == 56 - 88
    assert partition.surplus(partition.separation_of(costs), costs) == 0
    assert partition.surplus(0.5, costs) == 56 - 44


def test_a_small_partition_by_hand() -> None:
    partition = small()
    assert partition.owners("s").tolist() == [0, 1, 1, 2]
    assert partition.active("s", "b").tolist() == [True, False, False, True]
    assert partition.active_fraction == {"a": 0.75, "b": 0.5}
    assert partition.separation == pytest.approx(1 - 0.625)
    assert partition.owned == (1, 2, 1)


@given(partitions(SITES))
def test_every_unit_has_exactly_one_owner_in_contiguous_ranges(partition: Partition) -> None:
    for site in SITES:
        owners = partition.owners(site.name)
        assert len(owners) == site.units
        assert bool((owners[1:] >= owners[:-1]).all())
        for node, (start, width) in enumerate(
            zip(partition.starts(site.name), partition.widths[site.name], strict=True)
        ):
            assert bool((owners[start : start + width] == node).all())


@given(partitions(SITES))
def test_an_edge_lives_iff_its_ends_share_a_category_route(partition: Partition) -> None:
    live = partition.live("one", "two")
    together = torch.zeros_like(live)
    for category in partition.tree.categories:
        together |= partition.active("one", category)[:, None] & partition.active("two", category)[None, :]
    nodes = partition.tree.nodes
    for i in range(24):
        for j in range(13):
            a, b = int(partition.owners("one")[i]), int(partition.owners("two")[j])
            assert bool(live[i, j]) == (partition.tree.related(a, b))
    assert bool((live == together).all()), [node.name for node in nodes]


@given(partitions(SITES))
def test_json_gives_the_partition_back(partition: Partition) -> None:
    assert Partition.from_json(partition.as_json()) == partition


@given(st.integers(-3, 3), st.integers(-3, 5))
def test_widths_that_do_not_fit_are_refused(a: int, b: int) -> None:
    tree = ExpertTree.undivided(["a", "b"]).split({0: [("a",), ("b",)]})
    if min(a, b) < 0:
        with pytest.raises(ValueError, match="width >= 0"):
            Partition(tree, {"s": (0, a, b)})
    elif min(a, b) == 0:
        with pytest.raises(ValueError, match="has no unit on its route"):
            Partition(tree, {"s": (0, a, b)})
    else:
        assert Partition(tree, {"s": (0, a, b)}).separation > 0
