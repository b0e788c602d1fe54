"""Runs whose attention heads are split as well."""

from pathlib import Path

import pytest
import torch

from moeify.events import MemoryTracker
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.routed.split_model import SplitModel
from moeify.split_folder import load_from_run
from moeify.splitting.terms import costs, site_terms
from moeify.store import FolderStore
from moeify.task import Batch
from tests.test_loop import final, outcome
from tests.toy import TEXT_CONFIG, ToyTextTask

HEADS = {
    **TEXT_CONFIG,
    "model": {"kind": "llama", "hidden": 16, "layers": 2, "heads": 4, "ffn": 32},
    "rounds": [{"train": 6, "recover": 4, "separation": 0.25}, {"train": 4, "recover": 6, "separation": 0.35}],
    "training": {"steps": 24, "rows": 16, "learning_rate": 0.01},
}


def with_heads(**partition: object) -> RunConfig:
    common = {"multiple": 2, "min_units": 0, "units": ["ffn", "heads"], "cost": "flops"}
    return RunConfig.model_validate({**HEADS, "partition": {**common, **partition}})


WAYS = [
    {},
    {"owners": {"kind": "magnitude"}},
    {"owners": {"kind": "coactivation"}},
    {"owners": {"kind": "cmoe"}},
    {"grouping": {"kind": "residual"}, "refine": True, "frozen": ["layers.0.heads"]},
]


@pytest.mark.parametrize("way", WAYS)
def test_heads_and_neurons_are_split_together_by_their_operations(tmp_path: Path, way: dict[str, object]) -> None:
    config, store = with_heads(**way), FolderStore(tmp_path, 2)
    result = run(config, ToyTextTask(config), store=store)
    partition = load_from_run(tmp_path).partition
    assert list(partition.widths) == [f"layers.{i}.{kind}" for i in (0, 1) for kind in ("heads", "ffn")]
    assert any(sum(widths[1:]) for site, widths in partition.widths.items() if site.endswith("heads"))
    model = SplitModel(ToyTextTask(config).build(), "abcd", kinds=config.partition.units)
    terms = site_terms(config.partition, model.network, model.space, 12)
    assert partition.separation_of(costs(terms)) >= 0.35 - 1e-9
    active = result.active_flops
    assert active is not None
    assert active["mean"] == pytest.approx(sum(active[c] for c in "abcd") / 4)
    linears = sum(2 * m.weight.numel() for m in ToyTextTask(config).build().modules() if isinstance(m, torch.nn.Linear))
    whole = linears + 2 * 4 * 2 * 4 * 12
    inside = sum(terms[site.name].cost * site.units for site in model.space.sites)
    assert 1 - active["mean"] == pytest.approx(partition.separation_of(costs(terms)) * inside / whole)


def test_a_run_with_heads_ends_with_the_same_bits_after_an_interruption(tmp_path: Path) -> None:
    config = with_heads(compensation={"ridge": 0.01})
    whole = run(config, ToyTextTask(config), store=FolderStore(tmp_path / "whole", 2))
    store = FolderStore(tmp_path / "broken", 2)

    class Broken(ToyTextTask):
        def train_batch(self, step: int) -> Batch:
            if step == 17:
                raise KeyboardInterrupt
            return super().train_batch(step)

    with pytest.raises(KeyboardInterrupt):
        run(config, Broken(config), store=store)
    assert outcome(run(config, ToyTextTask(config), store=store)) == outcome(whole)
    one, other = (final(FolderStore(tmp_path / name, 2)) for name in ("whole", "broken"))
    assert all(torch.equal(one[arm][key], tensor) for arm, each in other.items() for key, tensor in each.items())


def test_frozen_sites_stay_whole_through_all_rounds(tmp_path: Path) -> None:
    config = with_heads(frozen=["layers.0.*"], heads={"multiple": 2}, cost="units")
    rounds = [each.model_copy(update={"separation": each.separation / 2}) for each in config.rounds]
    config = config.model_copy(update={"rounds": tuple(rounds)})
    run(config, ToyTextTask(config), store=FolderStore(tmp_path, 2))
    widths = load_from_run(tmp_path).partition.widths
    assert [sum(widths[f"layers.0.{kind}"][1:]) for kind in ("heads", "ffn")] == [0, 0]
    assert sum(widths["layers.1.ffn"][1:]) > 0
    assert all(width % 2 == 0 for width in widths["layers.1.heads"][1:])


def test_names_of_no_site_and_too_much_that_is_frozen_are_told_before_any_training() -> None:
    for partition, told in (
        ({"frozen": ["layers.2.*"]}, r"partition.frozen: got 'layers.2.\*', which matches none of 4 sites"),
        ({"frozen": ["*.ffn", "layers.0.*"]}, r"rounds.0.separation: got 0.25, at most 0.0\d+ can be reached"),
        ({"units": ["ffn"], "floors": {"*.heads": 0.5}}, r"partition.floors: got '\*.heads', which matches none of 2"),
    ):
        config, tracker = with_heads(**partition), MemoryTracker()
        with pytest.raises(ValueError, match=told):
            run(config, ToyTextTask(config), tracker=tracker)
        assert not tracker.events
