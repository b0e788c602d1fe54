"""Whether an expert is a clean module: its removal against that of as many units at random."""

import numpy as np
import pytest
import torch

from moeify import rows as rows_of
from moeify.clean_modules import drawn_units, interval, module_tests, without_units
from moeify.evaluation import losses_without, row_losses
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.result import ModuleTest
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.world import Solo
from tests.toy import ToyTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

TREE = ExpertTree.undivided("abcd").split({0: [("a", "b"), ("c", "d")]}).split({1: [("a",), ("b",)]})


def divided(config: RunConfig) -> tuple[ToyTask, SplitModel]:
    task = ToyTask(config)
    model = SplitModel(task.build(), task.categories)
    widths = {
        site.name: tuple(np.diff(np.linspace(0, site.units, len(TREE.nodes) + 1).round().astype(int)).tolist())
        for site in model.space.sites
    }
    return task, SplitModel(task.build(), task.categories, Partition(TREE, widths))


def test_units_are_drawn_from_what_its_categories_run_as_many_as_it_owns() -> None:
    _, model = divided(toy_config())
    tree, partition = model.partition.tree, model.partition
    for name, runs in (("a", {"core", "a+b", "a"}), ("a+b", {"core", "a+b", "a", "b"})):
        node = tree.index(name)
        seen = set()
        for draw in range(40):
            drawn = drawn_units(partition, node, rows_of.generator(0, "null", node, draw))
            for site, units in drawn.items():
                owned = sum(partition.widths[site][node : tree.end(node)])
                assert len(set(units.tolist())) == len(units) == owned
                seen |= {tree.nodes[int(partition.owners(site)[unit])].name for unit in units}
        assert seen == runs


def test_the_experts_own_units_drawn_are_the_expert_removed_and_weights_come_back() -> None:
    config = toy_config()
    task, model = divided(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    node = model.partition.tree.index("b")
    own = {site: torch.nonzero(model.partition.owners(site) == node)[:, 0] for site in model.partition.widths}
    with without_units(model, own):
        zeroed = row_losses(model, task, Solo(), config.evaluation, "test")
    removed = losses_without(model, task, Solo(), config.evaluation)["b"]
    torch.testing.assert_close(zeroed.nats_R, removed.nats_R, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        rises = [
            1.0 + 3.0 * torch.randn(50, generator=generator, dtype=torch.float64),
            torch.randn(80, generator=generator, dtype=torch.float64),
        ]
        low, high = interval(rises, np.random.default_rng(trial), resamples=300)
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 198


def test_a_run_tests_every_expert_and_repeats_to_the_digit() -> None:
    config = toy_config(evaluation={"test_rows": 32, "rows_at_once": 16, "null_draws": 3})
    result = run(config, ToyTask(config))
    assert [module.expert for module in result.modules] == list(result.own_other["a"])
    for module in result.modules:
        served = [c for c in result.categories if result.own_other[c][module.expert] != 0.0]
        own = sum(result.own_other[c][module.expert] for c in served) / len(served)
        assert module.own == pytest.approx(own)
        assert module.own_low <= module.own <= module.own_high
        assert module.other == 0.0
        assert len(set(module.drawn_own)) == len(set(module.drawn_other)) == 3
    assert run(config, ToyTask(config)).modules == result.modules
    assert run(toy_config(), ToyTask(toy_config())).modules == ()


def test_an_expert_that_does_nothing_is_no_module() -> None:
    config = toy_config(evaluation={"test_rows": 32, "rows_at_once": 16, "null_draws": 2})
    task, model = divided(config)
    node = model.partition.tree.index("b")
    own = {site: torch.nonzero(model.partition.owners(site) == node)[:, 0] for site in model.partition.widths}
    with without_units(model, own):
        intact = row_losses(model, task, Solo(), config.evaluation, "test")
        removed = losses_without(model, task, Solo(), config.evaluation)
        found = {each.expert: each for each in module_tests(model, task, Solo(), config, intact, removed)}
    assert (found["b"].own, found["b"].verdict) == (pytest.approx(0.0, abs=1e-6), "no rise")


@pytest.mark.parametrize(
    ("changes", "p", "verdict"),
    [
        ({}, 0.05, "clean"),
        ({"drawn": 18}, 1 / 19, "too few draws"),
        ({"own": -0.1, "own_low": -0.2}, 1.0, "no rise"),
        ({"drawn": 18, "apart": 1}, 0.1, "no more than random"),
        ({"drawn": 38, "apart": 1}, 0.05, "clean"),
        ({"other": 0.15}, 0.05, "clean"),
        ({"other": 0.2}, 0.05, "hurts others"),
        ({"own_low": -0.01}, 0.05, "no rise"),
    ],
)
def test_verdicts(changes: dict[str, float], p: float, verdict: str) -> None:
    """Random removals hurt more, but everyone; ``apart`` of them hurt the expert's own categories alone."""
    drawn, apart = int(changes.pop("drawn", 19)), int(changes.pop("apart", 0))
    module = ModuleTest(
        expert="a",
        own=changes.get("own", 0.5),
        own_low=changes.get("own_low", 0.4),
        own_high=0.6,
        other=changes.get("other", 0.0),
        drawn_own=(0.9,) * (drawn + apart),
        drawn_other=(0.8,) * drawn + (0.0,) * apart,
    )
    assert (module.p, module.verdict) == (pytest.approx(p), verdict)
