"""Owners that are learned: against the best assignment where that is known, and in runs."""

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attribution.measure import Uncounted
from benchmarks.gloo import run_together
from moeify.learned_owners import _slopes
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.recipe.partition import LearnedOwners
from moeify.routed.split_model import SplitModel
from moeify.splitting.assignment import assign
from moeify.splitting.learned import Keeps, _Plan, learned
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.store import FolderStore
from moeify.task import Batch
from moeify.world import Group, Solo, World
from tests.test_loop import final, outcome
from tests.toy import ToyTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

GROUPS = {0: [("a",), ("b", "c")]}
ASKED = LearnedOwners(kind="learned", steps=150)


def drawn(widths: list[int], seed: int = 0) -> np.ndarray:
    """Owners of a leaf at these widths, the last the leaf's own."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(widths)), widths))


@pytest.mark.parametrize("seed", range(3))
def test_where_every_unit_has_its_worth_the_best_assignment_is_learned(seed: int) -> None:
    """Of a loss that is linear in the factors the best owners are those of a transportation problem."""
    tree = ExpertTree.undivided(("a", "b", "c"))
    partition = Partition(tree, {"first": (24,), "second": (10,)})
    owned = {("first", 0): drawn([6, 5, 13], seed), ("second", 0): drawn([3, 3, 4], seed)}
    generator = torch.Generator().manual_seed(seed)
    worth = {s: torch.rand(3, n, generator=generator, dtype=torch.float64) for s, n in (("first", 24), ("second", 10))}
    asked: list[Keeps] = []

    def slopes(keeps: Keeps) -> Keeps:
        asked.append(keeps)
        return {site: -worth_CU for site, worth_CU in worth.items()}

    found = learned(partition, owned, GROUPS, ("a", "b", "c"), ASKED, [slopes] * 150)
    for (site, leaf), owner_L in found.items():
        capacity = np.bincount(owned[site, leaf], minlength=3)
        assert np.bincount(owner_L, minlength=3).tolist() == capacity.tolist()
        by_part = torch.stack([worth[site][0], worth[site][1:].sum(0), worth[site].sum(0)], 1).numpy()
        best = assign(by_part, capacity)
        got = by_part[np.arange(len(owner_L)), owner_L].sum()
        before = by_part[np.arange(len(owner_L)), owned[site, leaf]].sum()
        assert got - before > 0.99 * (best.value - before)
    first, last = (keeps["first"] for keeps in (asked[0], asked[-1]))
    unsure, sure = (float((keep_CU * (1 - keep_CU)).mean()) for keep_CU in (first, last))
    assert sure < 0.5 * unsure, "soft at first, harder in the end"
    assert torch.equal(last[1], last[2]), "categories that stay together run the same units"


def test_a_plan_is_a_plan() -> None:
    owner_L = drawn([4, 0, 7, 9])
    plan = _Plan(owner_L, [("a",), ("b",), ("c",)], ("a", "b", "c"), start=5)
    slope_CU = torch.randn(3, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        plan.descend(slope_CU, 1.0)
    share_LB = plan.shares()
    assert share_LB.sum(1) == pytest.approx(1)
    assert share_LB.sum(0) == pytest.approx([4, 0, 7, 9], abs=0.05)
    assert not share_LB[:, 1].any()
    assert np.bincount(plan.owners(), minlength=4).tolist() == [4, 0, 7, 9]
    keep_CU = torch.ones(3, 30, dtype=torch.float64)
    plan.write(keep_CU)
    assert bool((keep_CU[:, :5] == 1).all() and (keep_CU[:, 25:] == 1).all()), "units of other leaves stay"
    assert keep_CU[:, 5:25].t().numpy() == pytest.approx(share_LB[:, :3] + share_LB[:, 3:])


def test_without_a_lesson_nobody_moves_and_without_room_there_is_nothing_to_learn() -> None:
    partition = Partition(ExpertTree.undivided(("a", "b", "c")), {"s": (12,)})
    owned = {("s", 0): drawn([4, 4, 4])}

    def level(keeps: Keeps) -> Keeps:
        return {site: torch.zeros_like(keep_CU) for site, keep_CU in keeps.items()}

    found = learned(partition, owned, GROUPS, ("a", "b", "c"), ASKED, [level] * 5)
    assert found["s", 0].tolist() == owned["s", 0].tolist()
    whole = {("s", 0): np.full(12, 2)}
    assert learned(partition, whole, GROUPS, ("a", "b", "c"), ASKED, iter(())) is whole


def split_toy() -> tuple[ToyTask, SplitModel, Batch]:
    config = toy_config()
    task = ToyTask(config)
    model = SplitModel(task.build(), task.categories)
    batch = task.train_batch(3)
    return task, model, batch.take(model.order(batch.categories))


def slopes_of(model: SplitModel, keeps: Keeps, world: World, mine: Batch | Uncounted, rows: int) -> Keeps:
    return _slopes(model, ToyTask(toy_config()), world, mine, rows, keeps)


def some_keeps(model: SplitModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    widths = {site: model.partition.units(site) for site in model.partition.widths}
    return {site: torch.rand(4, units, generator=generator, dtype=torch.float64) for site, units in widths.items()}


def test_slopes_are_what_the_loss_does_when_a_factor_moves() -> None:
    task, model, batch = split_toy()
    keeps = some_keeps(model)
    found = slopes_of(model, keeps, Solo(), batch, len(batch.categories))
    exact = copy.deepcopy(model).double()

    def loss(keeps: Mapping[str, Tensor]) -> float:
        handles = []
        for site in exact.space.readers:
            factor_RU = keeps[site.name][batch.categories]
            reader = exact.network.get_submodule(site.reader)
            handles.append(reader.register_forward_pre_hook(lambda _, args, f=factor_RU: (args[0] * f,)))
        with exact.masked():
            outputs = exact(batch.inputs.double(), batch.categories)
        for handle in handles:
            handle.remove()
        return float(task.nats(outputs, batch.targets.double()).mean().detach())

    for site, slope_CU in found.items():
        for category, unit in ((0, 0), (1, 3), (3, keeps[site].shape[1] - 1)):
            ends = []
            for step in (1e-4, -1e-4):
                moved = {name: keep_CU.clone() for name, keep_CU in keeps.items()}
                moved[site][category, unit] += step
                ends.append(loss(moved))
            assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(float(slope_CU[category, unit]), rel=1e-3, abs=1e-7)


def worker(rank: int, folder: Path) -> None:
    _, model, batch = split_toy()
    slopes = slopes_of(model, some_keeps(model), Group(), batch.shard(rank, 2), len(batch.categories))
    save_file(dict(slopes), folder / f"{rank}.safetensors")


def test_two_workers_learn_what_one_does(tmp_path: Path) -> None:
    run_together(worker, tmp_path, size=2)
    _, model, batch = split_toy()
    whole = slopes_of(model, some_keeps(model), Solo(), batch, len(batch.categories))
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for site, slope_CU in whole.items():
        assert torch.equal(one[site], other[site])
        torch.testing.assert_close(one[site], slope_CU, rtol=1e-4, atol=1e-8)


def test_rows_that_count_for_nothing_teach_nothing() -> None:
    _, model, batch = split_toy()
    for nothing in (Uncounted(batch), batch.shard(len(batch.categories), 99)):
        found = slopes_of(model, some_keeps(model), Solo(), nothing, 20)
        assert not any(bool(slope_CU.any()) for slope_CU in found.values())
    assert all(parameter.requires_grad for parameter in model.network.parameters())


def test_a_run_learns_its_owners_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def asked(kind: str) -> RunConfig:
        return toy_config(partition={"multiple": 2, "min_units": 2, "owners": {"kind": kind}})

    config, plain = asked("learned"), asked("attribution")
    stores = [FolderStore(tmp_path / name, 2) for name in ("one", "two", "plain")]
    first = run(config, ToyTask(config), store=stores[0])
    again = run(config, ToyTask(config), store=stores[1])
    assert outcome(first) == outcome(again)
    other = run(plain, ToyTask(plain), store=stores[2])
    assert first.rounds[0].separation == other.rounds[0].separation, "the widths of the first cut are attribution's"
    one, two, rest = (final(store) for store in stores)
    assert all(torch.equal(one["split"][name], tensor) for name, tensor in two["split"].items())
    assert not all(torch.equal(one["split"][name], tensor) for name, tensor in rest["split"].items())
    assert all(torch.equal(one["dense"][name], tensor) for name, tensor in rest["dense"].items())
