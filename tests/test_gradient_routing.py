"""Gradient routing in mixed batches, held against one backward pass a category with the rules written out by hand."""

import copy
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attribution.sites import Site
from moeify.models.build import logits
from moeify.models.families import unit_space
from moeify.models.resizing import widened
from moeify.models.units import input_weight
from moeify.recipe.config import RunConfig
from moeify.recipe.routing import GivenExpert, Routing
from moeify.recipe.training import Training
from moeify.routed.gradients import GradientRouter
from moeify.routed.learning import Damped, Factors, damp
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.task import Batch, Redrawn, Task
from moeify.training import Contestant, train
from moeify.world import Solo
from tests.networks import CATEGORIES, grouped_llama, rows_for, tiny_autoencoder, tiny_llama
from tests.toy import TEXT_CONFIG, ToyTextTask
from tests.trees import partitions

NETWORKS = {"llama": tiny_llama(), "autoencoder": tiny_autoencoder(), "biased": grouped_llama(bias=True)}
SITES = {name: list(unit_space(network).readers) for name, network in NETWORKS.items()}
KINDS = ("parameters", "activations", "both")

OnRoute = Callable[[str, str], Tensor]
"""Site and category -> which units are on the route of its labelled rows."""


def weighted(outputs: Tensor, rows: Tensor) -> Tensor:
    """A sum in which every output of every row counts differently, whichever rows are there."""
    flat = outputs.flatten(1)
    inner = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)
    return (flat * inner * (1.0 + rows[:, None].to(flat) / 7)).sum()


def oracle(
    network: nn.Module, routing: Routing, segments: Sequence[tuple[str, bool, Tensor]], inputs: Tensor, on: OnRoute
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and gradients, a backward pass a segment (category, whether labelled, rows)."""
    outputs, total = {}, {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for category, labelled, rows in segments:
        alone = copy.deepcopy(network)
        space = unit_space(alone)
        kept = 1.0 - routing.strength.get(category, 1.0)
        hard = routing.routes == "hard" or category in routing.hard
        for site in space.sites:
            off = ~on(site.name, category) if labelled else torch.zeros(site.units, dtype=torch.bool)

            flow = kept if routing.gradients in ("activations", "both") else 1.0

            def hook(_: nn.Module, given: tuple[Tensor], off: Tensor = off, flow: float | None = flow) -> Tensor:
                (a,) = given
                return a * (~off).double() if flow is None else torch.where(off, flow * a + (1 - flow) * a.detach(), a)

            if hard:
                hook = functools.partial(hook, flow=None)
            alone.get_submodule(site.site.reader).register_forward_pre_hook(hook)
        out = logits(alone, inputs[rows])
        outputs.update(dict(zip(rows.tolist(), out.detach(), strict=True)))
        weighted(out, rows).backward()
        for site in space.sites:
            off = ~on(site.name, category) if labelled else torch.zeros(site.units, dtype=torch.bool)
            read = kept if routing.gradients == "parameters" else 1.0
            write = 1.0 if routing.gradients == "activations" else kept
            for part in site.slices:
                grad = alone.get_parameter(part.parameter).grad
                assert grad is not None
                factor = torch.ones(site.units, dtype=torch.float64)
                factor[off] = write if part.parameter == site.output else read
                grad *= factor.view(-1, *[1] * (grad.dim() - 1 - part.axis))
        units = {part.parameter for site in space.sites for part in site.slices}
        apart = labelled and category in routing.apart
        for name, parameter in alone.named_parameters():
            if parameter.grad is not None and (name in units or not apart):
                total[name] += parameter.grad
    return torch.stack([outputs[row] for row in range(len(inputs))]), total


def mixed(model: SplitModel, router: GradientRouter, inputs: Tensor, categories: Tensor, labelled: Tensor):
    """Outputs and gradients of one batch, arranged as training does."""
    order = torch.argsort(model.positions(categories) * 2 + ~labelled, stable=True)
    model.zero_grad()
    with model.learns(router.learning(model.partition, categories[order], labelled[order])):
        outputs = model(inputs[order], categories[order])
    weighted(outputs, order).backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.network.named_parameters()}
    return outputs[torch.argsort(order)].detach(), grads


def segments_of(names: Sequence[str], categories: Tensor, labelled: Tensor) -> list[tuple[str, bool, Tensor]]:
    pairs = itertools.product(range(len(names)), (False, True))
    found = [(names[c], known, ((categories == c) & (labelled == known)).nonzero()[:, 0]) for c, known in pairs]
    return [each for each in found if len(each[2])]


def compare(family: str, partition: Partition, names: Sequence[str], routing: Routing, on: OnRoute, seed: int) -> None:
    model = SplitModel(copy.deepcopy(NETWORKS[family]), names, partition).double()
    random = torch.Generator().manual_seed(seed)
    rows = 9
    categories = torch.randint(len(names), (rows,), generator=random)
    labelled = torch.rand(rows, generator=random) < 0.7
    inputs = torch.rand(rows, 10, generator=random, dtype=torch.float64)
    if family != "autoencoder":
        inputs = torch.randint(40, (rows, 12), generator=random)
    router = GradientRouter(routing, names, SITES[family], 0)
    outputs, grads = mixed(model, router, inputs, categories, labelled)
    wanted = oracle(NETWORKS[family], routing, segments_of(names, categories, labelled), inputs, on)
    torch.testing.assert_close(outputs, wanted[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads, wanted[1], rtol=1e-9, atol=1e-11)


@st.composite
def routings(draw: st.DrawFn, categories: Sequence[str], **more: object) -> Routing:
    routes = draw(st.sampled_from(["soft", "hard"]))
    hard = [c for c in categories if routes == "hard" or draw(st.booleans())]
    strength = {c: draw(st.sampled_from([0.0, 0.3, 1.0])) for c in categories if c not in hard and draw(st.booleans())}
    return Routing.model_validate(
        {
            "gradients": draw(st.sampled_from(KINDS)),
            "routes": routes,
            "routes_after_cut": routes,
            "hard": hard if routes == "soft" else [],
            "strength": strength,
            "core": draw(st.sampled_from(["learns", "frozen"])),
            **more,
        }
    )


@settings(deadline=None, max_examples=25)
@given(st.data(), st.sampled_from(sorted(NETWORKS)), st.integers(0, 99))
def test_a_mixed_batch_along_the_partition_equals_one_pass_a_category(
    data: st.DataObject, family: str, seed: int
) -> None:
    partition = data.draw(partitions(SITES[family]))
    names = sorted(partition.tree.categories)
    routing = data.draw(routings(names))
    divided = len(partition.tree.nodes) > 1
    owning = {c for i, n in enumerate(partition.tree.nodes) if i and partition.owned[i] for c in n.categories}

    def on(site: str, category: str) -> Tensor:
        if not divided:
            return torch.ones(partition.units(site), dtype=torch.bool)
        active = partition.active(site, category)
        if routing.core == "frozen" and category in owning:
            active = active & (partition.owners(site) != 0)
        return active

    if routing.core == "frozen" and any(routing.is_hard(c, cut=divided) for c in names):
        routing = routing.model_copy(update={"core": "learns"})  # a core that runs and learns nothing: see below
    compare(family, partition, names, routing, on, seed)


@pytest.mark.parametrize("core", ["learns", "frozen"])
@pytest.mark.parametrize("gradients", KINDS)
@pytest.mark.parametrize("family", sorted(NETWORKS))
def test_a_mixed_batch_along_given_experts_equals_one_pass_a_category(family: str, gradients: str, core: str) -> None:
    experts = [
        {"categories": ["c", "a"], "units": 0.25},
        {"categories": ["d"], "units": 0.0, "sites": {SITES[family][0].name: 0.3}},
    ]
    routing = Routing.model_validate(
        {"gradients": gradients, "experts": experts, "core": core, "strength": {"a": 0.5}, "hard": []}
    )

    def on(site: str, category: str) -> Tensor:
        units = next(each.units for each in SITES[family] if each.name == site)
        first, second = round(0.25 * units), round(0.55 * units) if site == SITES[family][0].name else 0
        starts = units - (second or first), units - (second - first if second else 0)
        core_units = torch.arange(units) < starts[0]
        own = (torch.arange(units) >= starts[0]) & (torch.arange(units) < starts[1])
        match category:
            case "b":  # no expert names it: it teaches everything
                return torch.ones(units, dtype=torch.bool)
            case "d":
                own = torch.arange(units) >= starts[1]
        return own if core == "frozen" else own | core_units

    undivided = Partition.undivided(CATEGORIES, SITES[family])
    compare(family, undivided, CATEGORIES, routing, on, seed=5)


def rows_of(family: str, number: int) -> Batch:
    """Rows of all categories in turn, each of which is its own target."""
    random, ids = torch.Generator().manual_seed(1), torch.arange(number)
    inputs = torch.rand(number, 10, generator=random, dtype=torch.float64)
    if family != "autoencoder":
        inputs = torch.randint(40, (number, 12), generator=random)
    return Batch(inputs, ids, ids % len(CATEGORIES), ids)


def task_of(batch: Batch) -> Task:
    """A task that has this batch at every step, and whose loss is ``weighted``."""
    task = Redrawn(ToyTextTask(RunConfig.model_validate(TEXT_CONFIG)), lambda _: batch)
    task.units_per_row, task.nats = 1, each_weighted
    return task


def each_weighted(outputs: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([weighted(out[None], row[None]) for out, row in zip(outputs, rows, strict=True)])


GROUPS = (("a",), ("b", "c"), ("d",))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("gradients", ["parameters", "both"])
@pytest.mark.parametrize("family", sorted(NETWORKS))
def test_rows_that_are_apart_teach_their_own_experts_units_and_nothing_else(
    family: str, gradients: str, cut: bool, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, rows = SITES[family], rows_of(family, 16)  # dividing by 16 rounds nothing, where norms are float32
    experts = [{"categories": group, "units": 0.0 if group == ("d",) else 0.25} for group in GROUPS]
    asked = {"gradients": gradients, "experts": experts, "apart": ["a", "c", "d"], "labelled": 0.6}
    routing = Routing.model_validate({**asked, "routes_after_cut": "soft"})
    ends = {site.name: (site.units, round(site.units / 4), round(site.units / 2)) for site in sites}
    widths = {name: (units - half, quarter, half - quarter, 0) for name, (units, quarter, half) in ends.items()}
    partition = Partition(ExpertTree.undivided(CATEGORIES).split({0: GROUPS}), widths)
    model = SplitModel(
        copy.deepcopy(NETWORKS[family]), CATEGORIES, partition if cut else Partition.undivided(CATEGORIES, sites)
    ).double()
    router, found = GradientRouter(routing, CATEGORIES, sites, 0), dict[str, Tensor]()

    def look(contestant: Contestant, _: Training) -> float:
        for name, parameter in contestant.model.network.named_parameters():
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        contestant.step += 1
        return 0.0

    monkeypatch.setattr("moeify.training._update", look)
    settings = Training(steps=1, rows=16, clip=1e9, accumulate=accumulate, explosion=1e9)
    train(Contestant(model, settings, router), task_of(rows), Solo(), settings, 1, 1, lambda *_: None)

    def on(site: str, category: str) -> Tensor:
        owners = partition.owners(site)
        own = next(number for number, group in enumerate(GROUPS, 1) if category in group)
        return owners == own if category in ("a", "c") else (owners == own) | (owners == 0)

    labelled = router.labelled(rows.categories, rows.ids)
    assert 0 < labelled.sum() < 16
    really = routing.model_copy(update={"apart": ("a", "c")})  # d has no units of its own, so it teaches the core
    segments = segments_of(CATEGORIES, rows.categories, labelled)
    _, wanted = oracle(NETWORKS[family], really, segments, rows.inputs, on)
    torch.testing.assert_close(found, {name: grad / 16 for name, grad in wanted.items()}, rtol=1e-9, atol=1e-11)


def test_hard_given_routes_run_only_what_is_on_them() -> None:
    routing = Routing.model_validate(
        {"gradients": "parameters", "hard": ["a"], "experts": [{"categories": ["b"], "units": 0.5}]}
    )
    assert routing.is_hard("a", cut=False)
    # a is named by no expert, so that it has no route: it runs, and teaches, everything
    undivided = Partition.undivided(CATEGORIES, SITES["llama"])
    half = torch.ones(24, dtype=torch.bool)
    compare("llama", undivided, CATEGORIES, routing, lambda site, category: half, seed=1)
    named = Routing.model_validate(
        {
            "gradients": "parameters",
            "hard": ["a", "c", "d"],
            "experts": [{"categories": ["b"], "units": 0.5}, {"categories": ["a", "c", "d"], "units": 0}],
        }
    )
    core = torch.arange(24) < 12
    compare("llama", undivided, CATEGORIES, named, lambda site, c: half if c == "b" else core, seed=1)


def test_without_labels_or_with_strength_zero_everything_learns_as_in_the_dense_network() -> None:
    model = SplitModel(copy.deepcopy(NETWORKS["llama"]), CATEGORIES)
    experts = [{"categories": [c], "units": 0.2} for c in CATEGORIES]
    inputs, categories = rows_for(model.network, 6), torch.tensor([0, 0, 1, 2, 3, 3])
    none, all_ = torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    plain = mixed(model, GradientRouter(Routing(), CATEGORIES, SITES["llama"], 0), inputs, categories, all_)
    for gradients in KINDS:
        routing = Routing.model_validate({"gradients": gradients, "experts": experts})
        weak = routing.model_copy(update={"strength": dict.fromkeys(CATEGORIES, 0.0)})
        for chosen, labelled in ((routing, none), (weak, all_)):
            router = GradientRouter(chosen, CATEGORIES, SITES["llama"], 0)
            torch.testing.assert_close(mixed(model, router, inputs, categories, labelled), plain)
        router = GradientRouter(routing, CATEGORIES, SITES["llama"], 0)
        routed = mixed(model, router, inputs, categories, all_)
        torch.testing.assert_close(routed[0], plain[0])
        moved = routed[1]["model.layers.1.mlp.down_proj.weight"], plain[1]["model.layers.1.mlp.down_proj.weight"]
        assert torch.allclose(*moved) == (gradients == "activations")


def test_a_frozen_core_runs_on_hard_routes_and_learns_nothing() -> None:
    tree = ExpertTree.undivided("ab").split({0: [("a",), ("b",)]})
    partition = Partition(tree, {site.name: (8, 8, 8) for site in SITES["llama"]})
    inputs, categories = rows_for(NETWORKS["llama"], 4), torch.tensor([0, 0, 1, 1])
    known = torch.ones(4, dtype=torch.bool)
    found = {}
    for core in ("learns", "frozen"):
        model = SplitModel(copy.deepcopy(NETWORKS["llama"]), "ab", partition)
        routing = Routing.model_validate({"gradients": "parameters", "routes": "hard", "core": core})
        found[core] = mixed(model, GradientRouter(routing, "ab", SITES["llama"], 0), inputs, categories, known)
    torch.testing.assert_close(found["learns"][0], found["frozen"][0])
    name = "model.layers.0.mlp.up_proj.weight"
    assert found["frozen"][1][name][:8].abs().max() == 0
    assert found["learns"][1][name][:8].abs().min() > 0
    torch.testing.assert_close(found["learns"][1][name][8:], found["frozen"][1][name][8:])


def test_a_told_units_bias_is_its_own_parameter() -> None:
    model = SplitModel(copy.deepcopy(NETWORKS["autoencoder"]), "ab", told=True).double()
    experts = [{"categories": [c], "units": 0.25} for c in "ab"]
    routing = Routing.model_validate({"gradients": "parameters", "experts": experts})
    router = GradientRouter(routing, "ab", SITES["autoencoder"], 0)
    known = torch.ones(4, dtype=torch.bool)
    _, grads = mixed(model, router, rows_for(model.network, 4), torch.tensor([0, 0, 1, 1]), known)
    told = grads["decoder.told.weight"]
    for category, (off, on) in enumerate(((slice(18, 24), slice(0, 18)), (slice(12, 18), slice(0, 12)))):
        assert told[category, off].abs().max() == 0
        assert told[category, on].abs().max() > 0


def test_labels_are_known_for_the_same_examples_each_time() -> None:
    router = GradientRouter(Routing(gradients="both", labelled=0.1), CATEGORIES, SITES["llama"], 3)
    categories, examples = torch.arange(4).repeat_interleave(5000), torch.arange(5000).repeat(4)
    known = router.labelled(categories, examples)
    order = torch.randperm(20000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(router.labelled(categories[order], examples[order]), known[order])
    for category in range(4):
        assert known[categories == category].double().mean() == pytest.approx(0.1, abs=0.02)
    assert not torch.equal(known[:5000], known[5000:10000])
    other = GradientRouter(Routing(gradients="both", labelled=0.1), CATEGORIES, SITES["llama"], 4)
    assert not torch.equal(other.labelled(categories, examples), known)
    more = GradientRouter(Routing(gradients="both", labelled=0.4), CATEGORIES, SITES["llama"], 3)
    assert bool((more.labelled(categories, examples) | ~known).all()), "a larger fraction keeps what was labelled"


def test_rows_out_of_order_are_refused() -> None:
    model = SplitModel(copy.deepcopy(NETWORKS["llama"]), CATEGORIES)
    routing = Routing.model_validate({"gradients": "both", "experts": [{"categories": ["a"], "units": 0.5}]})
    router = GradientRouter(routing, CATEGORIES, SITES["llama"], 0)
    categories = torch.tensor([1, 0])
    learning = router.learning(model.partition, categories, torch.ones(2, dtype=torch.bool))
    with (
        model.learns(learning),
        pytest.raises(ValueError, match="gradient routing needs rows in leaf order"),
    ):
        model(rows_for(model.network, 2), categories)


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        ([{"categories": ["a"], "sites": {"x.*": 0.5}}], r"experts\.0\.sites: got 'x\.\*', which matches none of 1"),
        ([{"categories": ["a"], "units": 0.01}], r"experts\.0: got 0\.01 of the 8 units of site 's', which is none"),
        ([{"categories": ["a"], "units": 0.5, "sites": {"*": 1.0}}, {"categories": ["b"], "units": 0.5}], "got 12 of"),
        (
            [{"categories": ["a"], "units": 1.0}, {"categories": ["b"], "units": 0.0}],
            r"experts\.1: got no unit of site",
        ),
    ],
)
def test_experts_that_do_not_fit_the_network_are_refused(experts: list[dict[str, object]], said: str) -> None:
    routing = Routing(gradients="both", experts=tuple(GivenExpert.model_validate(each) for each in experts))
    with pytest.raises(ValueError, match=said):
        GradientRouter(routing, "ab", [Site("s", "s", 8)], 0)


@pytest.mark.parametrize("family", sorted(NETWORKS))
def test_a_widened_network_gives_the_same_outputs_and_can_learn_in_its_fresh_units(family: str) -> None:
    network = NETWORKS[family]
    wide, before = widened(network, lambda _: 6, seed=1), torch.random.get_rng_state()
    inputs = rows_for(network, 3)
    torch.testing.assert_close(logits(wide, inputs), logits(network, inputs))
    logits(wide, inputs).square().sum().backward()
    for site in unit_space(wide).sites:
        assert site.units == unit_space(network)[site.name].units + 6
        read, wrote = input_weight(wide, site), wide.get_parameter(site.output)
        assert read[-6:].abs().min() > 0
        assert wrote.grad is not None
        assert wrote[:, -6:].abs().max() == 0
        assert wrote.grad[:, -6:].abs().max() > 0
    assert torch.equal(input_weight(wide, site), input_weight(widened(network, lambda _: 6, seed=1), site))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fresh_units_go_to_their_expert_and_shares_are_of_the_others() -> None:
    experts = [{"categories": ["a"], "units": 0.5, "fresh": 2}, {"categories": ["b"], "fresh": 4}]
    routing = Routing.model_validate({"gradients": "both", "experts": experts})
    assert routing.added("s") == 6
    learning = GradientRouter(routing, "ab", [Site("s", "s", 16)], 0).learning(
        Partition.undivided("ab", [Site("s", "s", 16)]), torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool)
    )
    assert learning is not None
    assert learning.sites["s"].units == [slice(0, 5), slice(5, 12), slice(12, 16)]


def test_sites_may_be_expanded_by_different_numbers_of_units() -> None:
    expert = {"categories": ["a"], "fresh": 2, "expand": {"*.0.*": 0, "*.1.*": 5}}
    routing = Routing.model_validate({"gradients": "both", "experts": [expert]})
    network = tiny_llama().float()
    wide, sites = widened(network, routing.added, seed=1), unit_space(network).sites
    more = {site.name: 0 if ".0." in site.name else 5 if ".1." in site.name else 2 for site in sites}
    assert {site.name: site.units for site in unit_space(wide).sites} == {s.name: s.units + more[s.name] for s in sites}
    inputs = rows_for(network, 3)
    torch.testing.assert_close(logits(wide, inputs), logits(network, inputs))
    router = GradientRouter(routing, "ab", unit_space(wide).readers, 0)
    assert {site: widths[1] for site, widths in router._given.items()} == more
    assert widened(network, lambda _: 0, seed=1) is network
    nowhere = Routing.model_validate({"gradients": "both", "experts": [{**expert, "expand": {"no.such": 3}}]})
    with pytest.raises(ValueError, match=r"routing.experts.0.expand: got 'no.such', which matches none of"):
        GradientRouter(nowhere, "ab", unit_space(wide).readers, 0)


def test_damping_stops_gradients_of_rectangles_only() -> None:
    values = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    damped = [
        Damped(slice(0, 2), slice(0, 3), Factors(0.0, 1.0, 1.0)),
        Damped(slice(2, 4), slice(3, 6), Factors(0.5, 1, 1)),
    ]
    out = damp(values, damped)
    assert torch.equal(out, values)
    out.sum().backward()
    wanted = torch.ones(4, 6, dtype=torch.float64)
    wanted[:2, :3], wanted[2:, 3:] = 0, 0.5
    assert values.grad is not None
    assert torch.equal(values.grad, wanted)


def test_the_documents_examples_are_sections_of_a_recipe() -> None:
    text = (Path(__file__).parents[1] / "docs" / "routing.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        routing = Routing.model_validate(yaml.safe_load(block)["routing"])
        assert routing.early
        assert not list(routing.misfits())
