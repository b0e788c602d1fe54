from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from tables import empty_table

from attribution.moments import ExactMoment, SketchedMoment
from attribution.sites import Site
from attribution.table import AttributionTable, SiteSums
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.rounds import Round
from moeify.splitting.partition import Partition
from moeify.splitting.propose import menu, with_owners
from moeify.splitting.refine import Exchange

CATEGORIES = ("a", "b")
DIM = 3


def random_table(units: int, seed: int, rank: int | None = None) -> AttributionTable:
    """Correlated activations, different in each category; ``rank``: so many independent directions."""
    generator = torch.Generator().manual_seed(seed)
    table = empty_table(CATEGORIES, {"s": (units, DIM)})
    for counts in (table.counts, table.sampled, table.rows):
        counts.fill_(100.0)
    inputs, outputs = (moment.tensors()[0] for moment in table.sites["s"].moments)
    for c in range(2):
        root = torch.randn(units, rank or units, generator=generator, dtype=torch.float64)
        inputs[c] = 100 * (root @ root.T + 0.01 * torch.eye(units, dtype=torch.float64))
        out = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
        outputs[c] = 100 * out @ out.T
        table.sites["s"].fisher[:, c] = inputs[c].diagonal()
    return table


def exchange(table: AttributionTable, weight_DU: torch.Tensor) -> Exchange:
    whole = Partition.undivided(CATEGORIES, [Site("s", "x", weight_DU.shape[1])])
    return Exchange(whole, table, weight_DU, "s", 0, [("a",), ("b",)])


@pytest.mark.parametrize("seed", range(5))
def test_exchanges_keep_widths_never_raise_j_and_come_near_the_best_of_all_owners(seed: int) -> None:
    start_L = np.array([0, 0, 1, 1, 2, 2, 2])
    weight_DU = torch.randn(DIM, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = exchange(random_table(7, seed, rank=4), weight_DU)
    settled_L = found.settle(start_L)
    assert sorted(settled_L) == sorted(start_L)
    every = [found.residual(np.array(each)) for each in sorted(set(permutations(start_L)))]
    assert min(every) <= found.residual(settled_L) <= found.residual(start_L)
    assert np.searchsorted(sorted(every), found.residual(settled_L)) <= 0.1 * len(every)
    assert (found.settle(start_L) == settled_L).all()


def test_two_units_that_make_up_for_each_other_are_not_both_removed() -> None:
    """Units 0 and 1 always say the same, and so do 2 and 3: each category does without one of each pair, at no cost."""
    table = empty_table(CATEGORIES, {"s": (4, DIM)})
    for counts in (table.counts, table.sampled, table.rows):
        counts.fill_(1.0)
    inputs, outputs = (moment.tensors()[0] for moment in table.sites["s"].moments)
    pair = torch.ones(2, 2, dtype=torch.float64)
    for c in range(2):
        inputs[c] = torch.block_diag(pair, pair) + 1e-6 * torch.eye(4, dtype=torch.float64)
        outputs[c] = torch.eye(DIM, dtype=torch.float64)
    found = exchange(table, torch.ones(DIM, 4, dtype=torch.float64))
    apart_L = np.array([0, 0, 1, 1])
    settled_L = found.settle(apart_L)
    assert set(settled_L[:2]) == set(settled_L[2:]) == {0, 1}
    assert found.residual(settled_L) < 1e-3 * found.residual(apart_L)


def test_sketched_moments_are_left_as_they_are() -> None:
    table = empty_table(CATEGORIES, {"s": (4, DIM)})
    for counts in (table.counts, table.sampled, table.rows):
        counts.fill_(1.0)
    sums = SiteSums.zeros(4, 4, 2, moments=(SketchedMoment.zeros(2, 4, 2), ExactMoment.zeros(2, DIM)))
    found = exchange(replace(table, sites={"s": sums}), torch.ones(DIM, 4, dtype=torch.float64))
    start_L = np.array([0, 1, 2, 2])
    assert found.settle(start_L) is start_L


def test_a_refined_cut_has_the_same_widths_and_less_j() -> None:
    table = random_table(16, 3, rank=6)
    whole = Partition.undivided(CATEGORIES, [Site("s", "x", 16)])
    weights = {"s": torch.randn(DIM, 16, generator=torch.Generator().manual_seed(3))}
    rounds = [Round(train=1, recover=1, separation=0.25)]
    plain, refining = (
        menu(
            whole,
            table,
            weights,
            PartitionConfig(multiple=1, min_units=1, min_core=0.0, refine=refine),
            rounds,
            "fisher",
        )
        for refine in (False, True)
    )
    cut = plain.cut(0.25)
    assert plain.refined(cut) is cut
    tried = refining.cut(0.25)
    assert tried.predicted == cut.predicted, "exchanges come when the depth is known"
    made = refining.refined(tried)
    assert made.partition.widths == cut.partition.widths
    assert made.predicted < 0.9 * cut.predicted
    assert made.gap is None
    again = with_owners(whole, made, made.owned, table, weights)
    assert made.predicted == pytest.approx(again.predicted)
