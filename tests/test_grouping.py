"""Which categories part, against trying every way."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from attribution.sites import Site
from attribution.table import AttributionTable
from moeify.recipe.given_tree import Nested
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.rounds import Round
from moeify.splitting.assignment import assign
from moeify.splitting.grouping import NothingToSplitError, choose_groups
from moeify.splitting.partition import Partition
from moeify.splitting.trials import Trials
from tests.proposals import propose
from tests.tables import empty_table

UNITS, DIM = 24, 3
AFFINITY = PartitionConfig(multiple=1, min_units=1, min_core=0.0)


def residual(**changes: object) -> PartitionConfig:
    grouping = {"kind": "residual", **changes}
    return PartitionConfig.model_validate({"multiple": 1, "min_units": 1, "min_core": 0.0, "grouping": grouping})


def a_round(branching: int = 2, separation: float = 0.3) -> Round:
    return Round(train=1, recover=1, separation=separation, branching=branching)


def random_table(
    seed: int, categories: str, sites: tuple[str, ...] = ("s", "t"), units: int = UNITS
) -> AttributionTable:
    """Correlated activations, every category with a scale of its own for every unit."""
    generator = torch.Generator().manual_seed(seed)
    table = empty_table(tuple(categories), dict.fromkeys(sites, (units, DIM)))
    for counts in (table.counts, table.sampled, table.rows):
        counts.fill_(100.0)
    for sums in table.sites.values():
        inputs, outputs = (moment.tensors()[0] for moment in sums.moments)
        for c in range(len(categories)):
            scale_U = torch.rand(units, generator=generator, dtype=torch.float64) ** 3
            a_TU = torch.randn(100, units, generator=generator, dtype=torch.float64)
            a_TU = (a_TU + a_TU.roll(1, 1)) * scale_U
            g_TD = torch.randn(100, DIM, generator=generator, dtype=torch.float64)
            inputs[c], outputs[c] = a_TU.T @ a_TU, g_TD.T @ g_TD
            sums.fisher[:, c] = a_TU.square().sum(0) / 2
    return table


def weights(table: AttributionTable) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {site: torch.randn(DIM, sums.units, generator=generator) for site, sums in table.sites.items()}


def whole(table: AttributionTable) -> Partition:
    return Partition.undivided(table.categories, [Site(site, "x", sums.units) for site, sums in table.sites.items()])


def divisions(items: str, count: int) -> Iterator[list[str]]:
    """Yield every way to divide items into so many groups."""
    if not items:
        if count == 0:
            yield []
        return
    for size in range(len(items)):
        for others in itertools.combinations(items[1:], size):
            rest = "".join(item for item in items[1:] if item not in others)
            for more in divisions(rest, count - 1):
                yield [items[0] + "".join(others), *more]


def slow_cost(table: AttributionTable, parts: list[str], owners: dict[str, torch.Tensor]) -> float:
    total = 0.0
    for site, owner in owners.items():
        for bin_, part in enumerate(parts):
            for category in part:
                kept = (owner == bin_) | (owner == len(parts))
                weight = weights(table)[site].t().double()
                total += table.residual(site, category, weight, kept, ~kept) / len(table.categories)
    return total


def test_a_trial_costs_the_schur_residuals_of_its_assignment() -> None:
    table = random_table(0, "abcd")
    trials = Trials(whole(table), table, weights(table), AFFINITY, "fisher", 0, 0.25)
    parts = ["ac", "bd"]
    proposal = propose(
        whole(table),
        table,
        weights(table),
        AFFINITY.model_copy(update={"budget": "equal"}),
        [a_round(separation=0.25)],
        "fisher",
    )
    made = [tuple(part) for part in proposal.groups[0]]
    assert trials.cost(made) == pytest.approx(proposal.predicted, rel=1e-5)
    owners = {}
    for site in ("s", "t"):  # a quarter of the units each, by hand: exhaustive search is out of reach, so by the solver
        mass = table.score(site, "fisher") / 4
        value = torch.stack([mass[:, [0, 2]].sum(1), mass[:, [1, 3]].sum(1), mass.sum(1)], 1)
        owners[site] = torch.from_numpy(assign(value.numpy(), torch.tensor([6, 6, 12]).numpy()).owner)
    assert trials.cost(parts) == pytest.approx(slow_cost(table, parts, owners), rel=1e-5)


def changes(parts: list[str], balanced: bool) -> Iterator[list[str]]:
    """Yield every division that one category's move, or two categories' exchange, leads to."""
    home = {c: k for k, part in enumerate(parts) for c in part}
    for one, other in itertools.combinations(home, 2):
        swapped = {**home, one: home[other], other: home[one]}
        yield ["".join(sorted(c for c in home if swapped[c] == k)) for k in range(len(parts))]
    for one, k in itertools.product(home, range(len(parts))):
        moved = {**home, one: k}
        new = ["".join(sorted(c for c in home if moved[c] == k)) for k in range(len(parts))]
        if all(new) and (not balanced or max(map(len, new)) <= -(-len(home) // len(parts))):
            yield new


@pytest.mark.parametrize("balanced", [True, False])
def test_no_single_change_would_lower_the_residual(balanced: bool) -> None:
    for seed in range(3):
        table = random_table(seed, "abcde")
        trials = Trials(whole(table), table, weights(table), AFFINITY, "fisher", 0, 0.3)
        got = choose_groups(whole(table), table, weights(table), residual(balanced=balanced), a_round(), "fisher")[0]
        parts = ["".join(part) for part in got]
        assert trials.cost(parts) == min(trials.cost(other) for other in (parts, *changes(parts, balanced)))


def test_the_grouping_is_the_best_of_all_or_close_even_where_there_is_no_structure() -> None:
    ranks = []
    for seed in range(5):
        table = random_table(seed, "abcdef")
        trials = Trials(whole(table), table, weights(table), AFFINITY, "fisher", 0, 0.3)
        costs = sorted(trials.cost(parts) for parts in divisions("abcdef", 3) if max(map(len, parts)) == 2)
        got = choose_groups(whole(table), table, weights(table), residual(), a_round(branching=3), "fisher")[0]
        ranks.append(costs.index(trials.cost(got)))
    assert sorted(ranks)[2] == 0
    assert max(ranks) <= 2


def planted(groups: list[str], categories: str) -> AttributionTable:
    """Independent activations; a sixth of the units matter to all, the others to one of the groups each."""
    table = random_table(0, categories)
    for sums in table.sites.values():
        sums.fisher.fill_(0.01)
        sums.fisher[:4] = 1.0
        for k, units in enumerate(torch.arange(4, UNITS).tensor_split(len(groups))):
            for category in groups[k]:
                sums.fisher[units, categories.index(category)] = 1.0
        inputs = sums.moments[0].tensors()[0]
        for c in range(len(categories)):
            inputs[c] = torch.diag(sums.fisher[:, c] * 200)
    return table


@pytest.mark.parametrize("config", [AFFINITY, residual(), residual(candidates=3)])
def test_planted_groups_are_found(config: PartitionConfig) -> None:
    for groups in (["ac", "bd"], ["acf", "bde"], ["af", "bd", "ce"]):
        table = planted(groups, "".join(sorted("".join(groups))))
        got = choose_groups(whole(table), table, weights(table), config, a_round(len(groups), 0.4), "fisher")[0]
        assert ["".join(part) for part in got] == groups


def test_unbalanced_groups_may_have_any_size() -> None:
    table = planted(["abcde", "f"], "abcdef")
    loose = AFFINITY.model_copy(update={"grouping": AFFINITY.grouping.model_copy(update={"balanced": False})})
    for config, sizes in ((AFFINITY, [3, 3]), (loose, [5, 1])):
        got = choose_groups(whole(table), table, weights(table), config, a_round(), "fisher")[0]
        assert list(map(len, got)) == sizes
    seen = set()
    for seed in range(5):
        table = random_table(seed, "abcdef")
        trials = Trials(whole(table), table, weights(table), AFFINITY, "fisher", 0, 0.3)
        got = choose_groups(whole(table), table, weights(table), residual(balanced=False), a_round(), "fisher")[0]
        seen.add(tuple(sorted(map(len, got))))
        assert math.isfinite(trials.cost(got))
    assert len(seen) > 1


def test_the_same_table_gives_the_same_groups() -> None:
    table = random_table(3, "abcdef")
    first = choose_groups(whole(table), table, weights(table), residual(), a_round(), "fisher")
    again = choose_groups(whole(table), table, weights(table), residual(), a_round(), "fisher")
    assert first == again


def test_when_every_leaf_serves_one_category_there_is_nothing_to_split() -> None:
    table = random_table(0, "abcd")
    done = propose(whole(table), table, weights(table), AFFINITY, [a_round(4)], "fisher").partition
    for config in (AFFINITY, residual()):
        with pytest.raises(NothingToSplitError):
            choose_groups(done, table, weights(table), config, a_round(), "fisher")


def test_branching_divides_evenly() -> None:
    table = random_table(0, "abcd")
    for config in (AFFINITY, residual()):
        groups = choose_groups(whole(table), table, weights(table), config, a_round(3), "fisher")[0]
        assert len(groups) == 3
        assert max(len(g) for g in groups) <= math.ceil(4 / 3)


@pytest.mark.parametrize("config", [AFFINITY, residual()])
def test_given_groups_stay_whole_and_apart_and_the_others_go_where_they_belong(config: PartitionConfig) -> None:
    table = planted(["ace", "bdf"], "abcdef")

    def groups(tree: Nested | None, branching: int = 2) -> list[str]:
        got = choose_groups(whole(table), table, weights(table), config, a_round(branching, 0.4), "fisher", tree)[0]
        return ["".join(part) for part in got]

    assert groups(None) == ["ace", "bdf"]
    assert groups((("a", "b", "c"), ("d", "e", "f"))) == ["abc", "def"], "given, against attribution"
    assert groups((("a", "b"), "c", ("d", "e", "f"))) == ["ab", "c", "def"], "given groups win over branching"
    assert groups((("a", "c"), "d")) == ["ace", "bdf"], "free categories join those like them"
    assert groups((("a", "b"),))[0].startswith("ab")
    assert len(groups((("a", "b"), ("c", "d")), 4)) == 4
    assert groups((("a", "b", "c", "d"), "e")) == ["abcd", "ef"], "as balanced as what is given allows"


def test_what_is_given_below_is_not_used_before_its_round() -> None:
    table = planted(["ace", "bdf"], "abcdef")
    tree = ((("a", "b"), "c"), ("d", "e", "f"))
    first = propose(whole(table), table, weights(table), AFFINITY, [a_round(), a_round(2, 0.4)], "fisher", tree)
    assert [node.name for node in first.partition.tree.nodes] == ["core", "a+b+c", "d+e+f"]
    second = choose_groups(first.partition, table, weights(table), AFFINITY, a_round(2, 0.4), "fisher", tree)
    assert second[1] == [("a", "b"), ("c",)]
    assert len(second[2]) == 2


def test_only_the_leaves_that_passed_are_divided() -> None:
    table = random_table(0, "abcd")
    first = propose(whole(table), table, weights(table), AFFINITY, [a_round()], "fisher").partition
    assert set(choose_groups(first, table, weights(table), AFFINITY, a_round(2, 0.4), "fisher", only={2})) == {2}
    with pytest.raises(NothingToSplitError, match="permuted labels"):
        choose_groups(first, table, weights(table), AFFINITY, a_round(2, 0.4), "fisher", only=set())
