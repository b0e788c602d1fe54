import pytest
import torch
from tables import empty_table

from attribution.table import AttributionTable, SiteSums
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.rounds import Round
from moeify.splitting.grouping import NothingToSplitError
from moeify.splitting.owners import Given
from moeify.splitting.partition import Partition
from moeify.splitting.propose import check_handed_over, shuffled
from moeify.splitting.terms import SiteTerms, Terms, costs
from tests.proposals import propose

CATEGORIES = ("a", "b", "c", "d")
UNITS, DIM = 16, 3


def table_of(favourites: dict[str, list[int]], noise: float = 0.01, seed: int = 0) -> AttributionTable:
    """Each unit matters to the categories listed for it; activations are independent, so J adds up over units."""
    generator = torch.Generator().manual_seed(seed)
    table = empty_table(CATEGORIES, dict.fromkeys(favourites, (UNITS, DIM)))
    table.counts.fill_(100.0)
    table.sampled.fill_(100.0)
    table.rows.fill_(10.0)
    for site, owners in favourites.items():
        sums: SiteSums = table.sites[site]
        sums.fisher.copy_(torch.rand(UNITS, 4, generator=generator, dtype=torch.float64) * noise)
        for unit, categories in enumerate(owners):
            for category in str(categories):
                if category in CATEGORIES:
                    sums.fisher[unit, CATEGORIES.index(category)] += 1.0
        for c in range(4):
            inputs, outputs = (moment.tensors()[0] for moment in sums.moments)
            inputs[c] = torch.diag(sums.fisher[:, c] * 100)
            outputs[c] = torch.eye(DIM, dtype=torch.float64) * 100
    return table


def weights(table: AttributionTable) -> dict[str, torch.Tensor]:
    return {site: torch.ones(DIM, UNITS) for site in table.sites}


def whole(table: AttributionTable) -> Partition:
    from attribution.sites import Site

    return Partition.undivided(CATEGORIES, [Site(site, "x", UNITS) for site in table.sites])


def rounds(*separations: float, branching: int = 2) -> list[Round]:
    return [Round(train=1, recover=1, separation=s, branching=branching) for s in separations]


CONFIG = PartitionConfig(multiple=1, min_units=1, min_core=0.0)
CLEAR = ["ac"] * 4 + ["bd"] * 4 + ["abcd"] * 8  # a and c share units, b and d do


def test_categories_that_share_units_stay_together_and_get_those_units() -> None:
    table = table_of({"s": CLEAR})
    proposal = propose(whole(table), table, weights(table), CONFIG, rounds(0.25), "fisher")
    tree = proposal.partition.tree
    assert {frozenset(tree.nodes[i].categories) for i in tree.children(0)} == {frozenset("ac"), frozenset("bd")}
    place = {node.name: i for i, node in enumerate(tree.nodes)}
    owners = proposal.partition.owners("s")
    by_unit = torch.empty(UNITS, dtype=torch.long)
    by_unit[proposal.order["s"]] = owners
    assert by_unit.tolist() == [place["a+c"]] * 4 + [place["b+d"]] * 4 + [0] * 8
    assert proposal.partition.separation == 0.25


def test_the_knapsack_spends_where_it_costs_least_and_equal_does_not() -> None:
    entangled = ["abcd"] * 16
    table = table_of({"divided": CLEAR, "entangled": entangled})
    knapsack = propose(whole(table), table, weights(table), CONFIG, rounds(0.15), "fisher")
    equal = propose(
        whole(table), table, weights(table), CONFIG.model_copy(update={"budget": "equal"}), rounds(0.15), "fisher"
    )
    assert sum(knapsack.partition.widths["divided"][1:]) == 2 * 4
    assert sum(knapsack.partition.widths["entangled"][1:]) == 2 * 1
    assert equal.partition.widths["divided"] == equal.partition.widths["entangled"]
    assert knapsack.predicted < equal.predicted
    for proposal in (knapsack, equal):
        assert proposal.partition.separation >= 0.15


def test_the_predicted_rise_is_worked_out_by_hand() -> None:
    """Independent activations: J = 1/2 tr(H) sum over removed units of E[a^2], averaged over categories."""
    table = table_of({"s": CLEAR}, noise=0.0)
    proposal = propose(whole(table), table, weights(table), CONFIG, rounds(0.25), "fisher")
    assert proposal.predicted == pytest.approx(0.0, abs=1e-4)
    wider = propose(whole(table), table, weights(table), CONFIG, rounds(0.3125), "fisher")
    # One more unit a child, of those that all four need: each category loses the one of the other child.
    assert wider.predicted == pytest.approx(0.5 * DIM * 1.0, rel=1e-4)


def test_a_second_round_nests_in_the_first_and_only_divides_leaves() -> None:
    table = table_of({"s": CLEAR})
    first = propose(whole(table), table, weights(table), CONFIG, rounds(0.25, 0.375), "fisher")
    moved = AttributionTable(
        table.categories, table.counts, table.rows, table.sampled, {"s": permuted(table.sites["s"], first.order["s"])}
    )
    second = propose(first.partition, moved, weights(moved), CONFIG, rounds(0.375), "fisher")
    assert [n.name for n in first.partition.tree.nodes] == [
        n.name for n in second.partition.tree.nodes if n.parent == 0 or n.parent is None
    ]
    before, after = first.partition, second.partition
    for node in before.tree.nodes:
        old = before.tree.index(node.name)
        new = after.tree.index(node.name)
        inside = set(
            range(
                before.starts("s")[old], before.starts("s")[old] + sum(before.widths["s"][old : before.tree.end(old)])
            )
        )
        start = after.starts("s")[new]
        now = second.order["s"][start : start + sum(after.widths["s"][new : after.tree.end(new)])]
        assert set(now.tolist()) == inside
    assert after.widths["s"][0] == before.widths["s"][0]


def permuted(sums: SiteSums, order: torch.Tensor) -> SiteSums:
    inputs, outputs = (moment.tensors()[0] for moment in sums.moments)
    moved = [t[:, order][:, :, order] if t is inputs else t if t is outputs else t[order] for t in sums.tensors()]
    return sums.like(moved)


def test_the_random_control_has_the_same_tree_and_widths_and_other_owners() -> None:
    table = table_of({"s": CLEAR})
    proposal = propose(whole(table), table, weights(table), CONFIG, rounds(0.25), "fisher")
    control = shuffled(whole(table), proposal, table, weights(table), seed=0)
    assert control.partition == proposal.partition
    assert not torch.equal(control.order["s"], proposal.order["s"])
    assert torch.equal(torch.sort(control.order["s"]).values, torch.arange(UNITS))
    assert control.predicted > 0.1
    assert proposal.predicted < 0.1
    again = shuffled(whole(table), proposal, table, weights(table), seed=0)
    assert torch.equal(control.order["s"], again.order["s"])


def test_widths_are_multiples_and_leave_room_for_later_rounds() -> None:
    table = table_of({"s": CLEAR})
    config = PartitionConfig(multiple=2, min_units=2, min_core=0.25)
    proposal = propose(whole(table), table, weights(table), config, rounds(0.25, 0.3), "fisher")
    assert proposal.partition.widths["s"] == (8, 4, 4)
    narrow = propose(whole(table), table, weights(table), config, rounds(0.05, 0.3), "fisher")
    assert narrow.partition.widths["s"] == (8, 4, 4), "each child needs two grandchildren of two units"


def test_a_cut_goes_as_far_as_there_is_room() -> None:
    table = table_of({"s": CLEAR})
    config = PartitionConfig(multiple=4, min_units=4, min_core=0.5)
    for budget in ("knapsack", "equal"):
        changed = config.model_copy(update={"budget": budget})
        assert propose(whole(table), table, weights(table), changed, rounds(0.4), "fisher").partition.separation == 0.25


def test_units_of_several_features_are_removed_with_all_of_them() -> None:
    """Two features of half the power each are worth one: the same cut, at the same J."""
    narrow = table_of({"s": CLEAR})
    sums = narrow.sites["s"]
    wide = empty_table(CATEGORIES, {"s": (UNITS, DIM)}, width=2)
    for name in ("counts", "sampled", "rows"):
        getattr(wide, name).copy_(getattr(narrow, name))
    wide.sites["s"].fisher.copy_(sums.fisher)
    for mine, its in zip(wide.sites["s"].moments, sums.moments, strict=True):
        pairs = torch.eye(2, dtype=torch.float64) / 2 if mine is wide.sites["s"].moments[0] else torch.eye(1).double()
        mine.tensors()[0].copy_(torch.kron(its.tensors()[0], pairs))
    for grouping in ({"kind": "affinity"}, {"kind": "residual"}):
        config = PartitionConfig.model_validate({**CONFIG.model_dump(), "grouping": grouping})
        one = propose(whole(narrow), narrow, weights(narrow), config, rounds(0.3125), "fisher")
        two = propose(whole(wide), wide, {"s": torch.ones(DIM, 2 * UNITS)}, config, rounds(0.3125), "fisher")
        assert one.partition == two.partition
        assert torch.equal(one.order["s"], two.order["s"])
        assert two.predicted == pytest.approx(one.predicted, rel=1e-4)


def with_terms(table: AttributionTable, **sites: SiteTerms) -> Terms:
    plain = SiteTerms(CONFIG.multiple, CONFIG.min_units, CONFIG.min_core)
    return {site: sites.get(site, plain) for site in table.sites}


def test_the_knapsack_spends_what_units_cost() -> None:
    """Twins but for the cost of a unit: one unit of the dear site saves as much as ten of the cheap one."""
    table = table_of({"cheap": CLEAR, "dear": CLEAR}, noise=0.0)
    terms = with_terms(table, dear=SiteTerms(1, 0, 0.0, cost=10), cheap=SiteTerms(1, 0, 0.0))
    proposal = propose(whole(table), table, weights(table), CONFIG, rounds(0.2), "fisher", terms=terms)
    partition, spent = proposal.partition, costs(terms)
    assert partition.separation_of(spent) == pytest.approx(0.2, abs=10 / 176)
    assert partition.separation_of(spent) >= 0.2
    assert partition.widths["cheap"] == (16, 0, 0), "experts of four units in the dear site alone do it, at no J"
    assert partition.widths["dear"] == (8, 4, 4)
    plain = propose(whole(table), table, weights(table), CONFIG, rounds(0.2), "fisher").partition
    assert min(plain.owned) > 0
    assert sum(plain.widths["cheap"][1:]) > 0


@pytest.mark.parametrize("grouping", [{"kind": "affinity"}, {"kind": "residual"}])
@pytest.mark.parametrize("budget", ["knapsack", "equal"])
def test_a_frozen_site_is_never_split_and_a_floor_holds(grouping: dict[str, str], budget: str) -> None:
    table = table_of({"free": CLEAR, "frozen": CLEAR, "floored": CLEAR})
    terms = with_terms(table, frozen=SiteTerms(1, 4, 1.0), floored=SiteTerms(1, 1, 0.75))
    config = PartitionConfig.model_validate({**CONFIG.model_dump(), "grouping": grouping, "budget": budget})
    first = propose(whole(table), table, weights(table), config, rounds(0.2, 0.25), "fisher", terms=terms)
    assert first.partition.widths["frozen"] == (16, 0, 0)
    assert first.partition.widths["floored"][0] >= 12
    moved = AttributionTable(
        table.categories,
        table.counts,
        table.rows,
        table.sampled,
        {site: permuted(table.sites[site], first.order[site]) for site in table.sites},
    )
    second = propose(first.partition, moved, weights(moved), config, rounds(0.25), "fisher", terms=terms)
    assert second.partition.widths["frozen"] == (16, *[0] * 6)
    assert second.partition.separation > first.partition.separation


def test_an_expert_with_too_few_units_for_its_children_is_named() -> None:
    table = table_of({"s": CLEAR})
    config = PartitionConfig(multiple=4, min_units=16)
    with pytest.raises(ValueError, match="'core' owns 16 units of site 's', too few for 2 children of 16"):
        propose(whole(table), table, weights(table), config, rounds(0.2), "fisher")


def test_units_that_were_given_go_to_the_expert_of_their_categories_whatever_is_measured() -> None:
    table = table_of({"s": CLEAR, "frozen": CLEAR})
    given = [Given(slice(8, 11), ("b", "d")), Given(slice(11, 12), ("a",)), Given(slice(12, 16), ("a", "b"))]
    terms = {"s": SiteTerms(1, 1, 0.0), "frozen": SiteTerms(1, 1, 1.0)}
    known = whole(table), table, weights(table), CONFIG, rounds(0.125), "fisher"
    proposal = propose(*known, terms=terms, given={"s": given, "frozen": given})
    tree, partition = proposal.partition.tree, proposal.partition
    owners = torch.empty(UNITS, dtype=torch.long)
    owners[proposal.order["s"]] = partition.owners("s")
    assert owners[8:11].tolist() == [tree.index("b+d")] * 3
    assert owners[11] == tree.index("a+c")
    assert partition.widths == {"s": (8, 4, 4), "frozen": (UNITS, 0, 0)}
    assert owners[:8].tolist().count(tree.index("a+c")) == 3, "attribution finds the owners of the others"
    assert owners[4:8].tolist().count(tree.index("b+d")) == 1
    told = r"routing\.experts: got 9 of the 16 units of site 's' for one expert, wanted at most 8"
    many = {"s": [Given(slice(7, 16), ("b",))]}
    with pytest.raises(ValueError, match=told):
        propose(*known, given=many)
    with pytest.raises(ValueError, match=told):
        check_handed_over(whole(table), many, CONFIG, terms, [("a", "c"), ("b", "d")])
    check_handed_over(whole(table), {"s": given, "frozen": many["s"]}, CONFIG, terms, [("a", "c"), ("b", "d")])


def unrouted(*names: str, **changes: object) -> PartitionConfig:
    return PartitionConfig.model_validate({"multiple": 1, "min_units": 1, "unrouted": names, **changes})


def test_unrouted_categories_get_no_expert_and_run_on_the_core_alone() -> None:
    table = table_of({"s": ["ab"] * 4 + ["c"] * 4 + ["abcd"] * 8}, noise=0.0)
    # Experts of 4 units: a, b and c run 12 of 16 units, d the core's 8: 1 - (3 x 12 + 8) / 64.
    proposal = propose(whole(table), table, weights(table), unrouted("d"), rounds(0.3125), "fisher")
    tree, partition = proposal.partition.tree, proposal.partition
    assert [(node.name, node.parent) for node in tree.nodes] == [("core", None), ("a+b", 0), ("c", 0), ("d", 0)]
    assert partition.widths["s"] == (8, 4, 4, 0)
    assert partition.active_fraction == {"a": 0.75, "b": 0.75, "c": 0.75, "d": 0.5}
    assert partition.separation == 0.3125
    assert proposal.predicted == pytest.approx(0.0, abs=1e-4)
    assert proposal.order["s"].tolist() == [*range(8, 16), *range(8)]


def test_what_the_unrouted_lose_counts_in_the_predicted_rise() -> None:
    table = table_of({"s": ["abd"] * 4 + ["cd"] * 4 + ["abcd"] * 8}, noise=0.0)
    proposal = propose(whole(table), table, weights(table), unrouted("d"), rounds(0.3125), "fisher")
    assert proposal.partition.widths["s"] == (8, 4, 4, 0)
    # d loses eight units, each of 1/2 tr(H) E[a^2] = 1/2 DIM, for a quarter of the data.
    assert proposal.predicted == pytest.approx(0.25 * 8 * 0.5 * DIM, rel=1e-4)


def test_one_category_alone_may_be_moved_out_of_a_core_that_all_others_share() -> None:
    table = table_of({"s": ["a"] * 4 + ["abcd"] * 12})
    proposal = propose(whole(table), table, weights(table), unrouted("b", "c", "d"), rounds(0.1875), "fisher")
    assert [node.name for node in proposal.partition.tree.nodes] == ["core", "a", "b+c+d"]
    assert proposal.partition.widths["s"] == (12, 4, 0)
    assert proposal.partition.separation == 0.1875  # three categories of four are spared four units of 16
    control = shuffled(whole(table), proposal, table, weights(table), seed=0)
    assert control.partition == proposal.partition
    with pytest.raises(NothingToSplitError):
        propose(
            proposal.partition, table, weights(table), unrouted("b", "c", "d"), rounds(0.2), "fisher"
        )  # the unrouted are not divided


def test_a_later_round_divides_the_routed_only() -> None:
    table = table_of({"s": ["ab"] * 4 + ["c"] * 4 + ["abcd"] * 8})
    for grouping in ({"kind": "affinity"}, {"kind": "residual"}):
        config = unrouted("d", grouping=grouping)
        first = propose(whole(table), table, weights(table), config, rounds(0.3, 0.4), "fisher")
        sums = {"s": permuted(table.sites["s"], first.order["s"])}
        moved = AttributionTable(table.categories, table.counts, table.rows, table.sampled, sums)
        second = propose(first.partition, moved, weights(moved), config, rounds(0.4), "fisher").partition
        names = [node.name for node in second.tree.nodes]
        assert names == ["core", "a+b", "a", "b", "c", "d"]
        assert second.active_fraction["d"] == first.partition.active_fraction["d"]
