"""Compensation that follows: against a slow fit of one site after the other, and in runs."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from attribution.measure import Moments, Uncounted, measure
from attribution.subject import Rows
from attribution.table import AttributionTable
from benchmarks.gloo import run_together
from moeify.fitting import split
from moeify.following import Uncut, cut, follow
from moeify.loop import run
from moeify.models.build import Autoencoder, logits
from moeify.models.families import unit_space
from moeify.models.units import FfnUnits, UnitSite, output_weight
from moeify.recipe.partition import Compensation, RandomOwners
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.rounds import Round
from moeify.routed.split_model import SplitModel
from moeify.splitting.propose import Proposal
from moeify.store import FolderStore
from moeify.task import Batch
from moeify.task_subject import subject_of
from moeify.world import Group, Solo
from tests.networks import (
    CATEGORIES,
    DECODER_CONFIGS,
    rows_for,
    tiny_autoencoder,
    tiny_decoder,
    tiny_llama,
)
from tests.proposals import propose
from tests.test_loop import final, outcome
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config

FOLLOWING = Compensation(ridge=0.01, follow=True)
ROWS = 24
Ready = tuple[SplitModel, Proposal, AttributionTable, list[Rows]]
"""A model that is about to be cut: the cut, what it was made from, rows."""


class Squares(ToyTask):
    """What following and measuring ask of a task, of any network."""

    def nats(self, outputs: Tensor, _: Tensor) -> Tensor:
        return outputs.flatten(1).square().sum(1)

    def root(self, outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        drawn = [torch.randn(outputs.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(outputs.dtype)


TASK = Squares(toy_config())


def batches_of(network: nn.Module) -> list[Rows]:
    """Rows of all categories in two batches, in no order."""
    inputs, categories = rows_for(network, ROWS, seed=3), torch.arange(ROWS) % 4
    return [
        Rows(inputs[part], inputs[part], categories[part], torch.arange(ROWS)[part])
        for part in (slice(0, 10), slice(10, None))
    ]


def measured(model: SplitModel, batches: Sequence[Rows]) -> AttributionTable:
    subject = subject_of(TASK, model.network, model.space.readers, model)
    ordered = []
    for rows in batches:
        order = model.order(rows.categories)
        ordered.append(Rows(rows.inputs[order], rows.targets[order], rows.categories[order], rows.ids[order]))
    with model.masked():
        return measure(subject, ordered, moments=Moments(2048))


def proposed(model: SplitModel, batches: Sequence[Rows], separation: float) -> tuple[Proposal, AttributionTable]:
    table = measured(model, batches)
    config = PartitionConfig(multiple=1, min_units=1, min_core=0.0, owners=RandomOwners(kind="random"))
    rounds = [Round(train=0, recover=0, branching=2, separation=separation)]
    return propose(model.partition, table, model.output_weights, config, rounds, "fisher"), table


def twice_cut(network: nn.Module) -> Ready:
    """A model cut once, and the next cut."""
    model, batches = SplitModel(network, CATEGORIES).eval(), batches_of(network)
    first, table = proposed(model, batches, 0.3)
    model.cut(first, table, None)
    return model, *proposed(model, batches, 0.45), batches


def cut_with_heads() -> Ready:
    """A decoder's first cut, heads and all."""
    network = tiny_llama()
    model, batches = SplitModel(network, CATEGORIES, kinds=("ffn", "heads")).eval(), batches_of(network)
    return model, *proposed(model, batches, 0.3), batches


@pytest.mark.parametrize("family", ["autoencoder", *DECODER_CONFIGS])
def test_a_model_that_was_cut_computes_what_it_did_before_while_it_is_asked_to(family: str) -> None:
    network = tiny_autoencoder() if family == "autoencoder" else tiny_decoder(family)
    model, proposal, table, batches = twice_cut(network)
    known = batches[0].inputs, batches[0].categories
    with torch.no_grad():
        before = model(*known)
        uncut = Uncut.of(model, proposal)
        model.cut(proposal, table, Compensation(ridge=0.01))
        after = model(*known)
        with uncut.again(model):
            again = model(*known)
        assert torch.equal(model(*known), after)
    scale = float(before.abs().max())
    assert float((again - before).abs().max()) < 1e-5 * scale
    assert float((after - before).abs().max()) > 1e-3 * scale


def caught(network: nn.Module, site: UnitSite, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """What a site's reader reads, and what is said to be the stream behind, in one pass."""
    seen: dict[str, Tensor] = {}

    def behind(_: nn.Module, __: Any, output: Any) -> None:
        seen["stream"] = output[0] if isinstance(output, tuple) else output

    stream = site.stream if isinstance(site, FfnUnits) else None
    handles = [
        network.get_submodule(site.site.reader).register_forward_pre_hook(lambda _, args: seen.update(units=args[0])),
        network.get_submodule(stream or site.site.reader).register_forward_hook(behind),
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen["units"].flatten(0, -2), seen["stream"].flatten(0, -2)


@pytest.mark.parametrize("family", ["autoencoder", *DECODER_CONFIGS])
def test_behind_a_block_stands_what_it_writes_and_nothing_that_bends_it(family: str) -> None:
    """A change of the output weights is in the stream as it is: that is what makes the fit a linear one."""
    network = (tiny_autoencoder() if family == "autoencoder" else tiny_decoder(family)).double()
    inputs = rows_for(network, 4)
    for site in unit_space(network).sites:
        assert isinstance(site, FfnUnits)
        units, before = caught(network, site, lambda: logits(network, inputs))
        weight = output_weight(network, site)
        change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
        with torch.no_grad():
            weight += change
        _, after = caught(network, site, lambda: logits(network, inputs))
        torch.testing.assert_close(after - before, units @ change.T, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            weight -= change
    streams = {site.stream for site in unit_space(network).sites if isinstance(site, FfnUnits)}
    followed = {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "gpt2", "vit"}
    assert (None not in streams) == (family in followed)


@pytest.mark.parametrize(
    "ready", [lambda: twice_cut(tiny_llama()), lambda: twice_cut(tiny_autoencoder()), lambda: cut_with_heads()]
)
def test_output_weights_are_those_of_a_fit_of_one_site_after_the_other(ready: Callable[[], Ready]) -> None:
    model, proposal, table, batches = ready()
    dense, slow = copy.deepcopy(model), copy.deepcopy(model)
    cut(model, proposal, table, FOLLOWING, None, TASK, lambda: batches, Solo())
    slow.cut(proposal, table, Compensation(ridge=0.01))
    lacking: list[tuple[float, float]] = []

    def passes(which: SplitModel, site: UnitSite) -> tuple[Tensor, Tensor]:
        found = []
        for category in range(4):  # of one category, so that no model moves a row
            inputs = torch.cat([rows.inputs[rows.categories == category] for rows in batches])
            with which.masked():
                known = inputs, torch.full((len(inputs),), category)
                found.append(caught(which.network, site, lambda: which(*known)))  # noqa: B023
        units, stream = zip(*found, strict=True)
        return torch.cat(units), torch.cat(stream)

    for site in slow.space.sites:
        (whole, wanted), (units, got) = passes(dense, site), passes(slow, site)
        pull = (0.01 * whole.square().mean() * len(units)).sqrt()
        left = torch.cat([units, pull * torch.eye(units.shape[1], dtype=units.dtype)])
        right = torch.cat([wanted - got, torch.zeros(units.shape[1], got.shape[1], dtype=units.dtype)])
        with torch.no_grad():
            output_weight(slow.network, site).add_(torch.linalg.lstsq(left, right).solution.T)
        lacking.append((float((wanted - got).square().sum()), float((wanted - passes(slow, site)[1]).square().sum())))
    for name, tensor in slow.network.state_dict().items():
        torch.testing.assert_close(model.network.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)
    assert all(after < before for before, after in lacking)


@pytest.mark.parametrize("family", DECODER_CONFIGS)
def test_every_family_follows_and_still_runs_as_its_oracle(family: str) -> None:
    model, proposal, table, batches = twice_cut(tiny_decoder(family))
    closed = copy.deepcopy(model)
    closed.cut(proposal, table, Compensation(ridge=0.01))
    cut(model, proposal, table, FOLLOWING, None, TASK, lambda: batches, Solo())
    first = model.space.sites[0]
    assert not torch.equal(output_weight(model.network, first), output_weight(closed.network, first))
    inputs = batches[0].inputs, batches[0].categories
    with torch.no_grad():
        routed = model(*inputs)
        with model.masked():
            torch.testing.assert_close(routed, model(*inputs), rtol=1e-4, atol=1e-4 * float(routed.abs().max()))


def test_where_nothing_was_lost_nothing_is_changed() -> None:
    model, _, _, batches = twice_cut(tiny_llama())
    whole = copy.deepcopy(model.network.state_dict())
    uncut = Uncut(
        model.partition, {site.output: model.network.get_parameter(site.output) for site in model.space.sites}
    )
    follow(model, uncut, TASK, lambda: batches, 0.01, Solo())
    assert all(torch.equal(whole[name], tensor) for name, tensor in model.network.state_dict().items())


def test_numbers_that_are_none_are_named() -> None:
    model, proposal, _, batches = twice_cut(tiny_llama())
    with torch.no_grad():
        output_weight(model.network, model.space.sites[0])[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"not positive definite with ridge 0.01; check that activations are finite"):
        follow(model, Uncut.of(model, proposal), TASK, lambda: batches, 0.01, Solo())


def workers(rank: int, folder: Path) -> None:
    model, proposal, table, batches = twice_cut(tiny_llama())
    mine = [Rows(b.inputs[rank::2], b.targets[rank::2], b.categories[rank::2], b.ids[rank::2]) for b in batches]
    more = Uncounted(batches[0]) if rank else batches[0]  # rows that one of the two has, run by both
    cut(model, proposal, table, FOLLOWING, None, TASK, lambda: [*mine, more], Group())
    save_model(model.network, str(folder / f"{rank}.safetensors"))


@pytest.mark.slow
def test_two_workers_come_to_what_one_comes_to(tmp_path: Path) -> None:
    run_together(workers, tmp_path)
    model, proposal, table, batches = twice_cut(tiny_llama())
    rows = [*batches, batches[0]]
    cut(model, proposal, table, FOLLOWING, None, TASK, lambda: rows, Solo())
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert {site.output for site in model.space.sites} <= one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        torch.testing.assert_close(tensor, model.network.get_parameter(name).detach(), rtol=1e-7, atol=1e-9)


class Broken(ToyTextTask):
    def train_batch(self, step: int) -> Batch:
        if step == 17:
            raise KeyboardInterrupt
        return super().train_batch(step)


class Asked(ToyTextTask):
    """Counts how often the rows of a cut are asked for."""

    cuts = 0

    def probe_batches(self, round_: int, rows: int, rows_at_once: int) -> Iterator[Batch]:
        self.cuts += 1
        return super().probe_batches(round_, rows, rows_at_once)


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_run_follows_in_every_arm_and_ends_with_the_same_bits_after_an_interruption(tmp_path: Path) -> None:
    closed = toy_config(**TEXT_CONFIG)
    config = toy_config(**{**TEXT_CONFIG, "partition": {**TEXT_CONFIG["partition"], "compensation": {"follow": True}}})
    asked = Asked(config)
    whole = run(config, asked, store=FolderStore(tmp_path / "whole", 2))
    store = FolderStore(tmp_path / "broken", 2)
    with pytest.raises(KeyboardInterrupt):
        run(config, Broken(config), store=store)
    assert outcome(run(config, ToyTextTask(config), store=store)) == outcome(whole)
    one, other = (final(FolderStore(tmp_path / name, 2)) for name in ("whole", "broken"))
    assert all(torch.equal(one[arm][key], tensor) for arm, each in other.items() for key, tensor in each.items())
    once = Asked(closed)
    plain = run(closed, once, store=FolderStore(tmp_path / "closed", 2))
    rounds, arms, sites = 2, 2, 2
    assert asked.cuts == once.cuts + rounds * arms * sites
    assert plain.rounds[0].tax_cut != whole.rounds[0].tax_cut


def test_a_trained_network_of_ones_own_is_split_with_it_if_nothing_else_is_said() -> None:
    torch.manual_seed(0)
    data = {name: (torch.rand(60, 6) < chance).float() for name, chance in (("dark", 0.2), ("light", 0.8))}
    network = Autoencoder(6, 16, 3)
    closed, follows, unsaid = (
        split(network, data, loss="pixels", separation=0.35, partition=said)
        for said in ({"compensation": {"follow": False}}, {"compensation": {"follow": True}}, {})
    )
    of_ridge = split(network, data, loss="pixels", separation=0.35, partition={"compensation": {"ridge": 0.02}})
    assert closed.partition.separation == follows.partition.separation
    assert closed.test_loss["dense"] == follows.test_loss["dense"]
    assert closed.test_loss["split"] != follows.test_loss["split"]
    assert unsaid.test_loss == follows.test_loss
    assert of_ridge.config.partition.compensation == Compensation(ridge=0.02, follow=True)
