from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from captum.attr import LayerGradientXActivation
from scipy.stats import kstest
from subjects import (
    NAMES,
    activations,
    by_category,
    close,
    extra,
    in_float64,
    llama,
    losses_of,
    nats,
    subject_of,
    tail,
    whole,
)
from torch import Tensor, nn

from attribution.ablation import ablation_rises, joint_rises, single
from attribution.measure import measure
from attribution.methods import (
    METHODS,
    Ablation,
    Absolute,
    ActivationRate,
    Conductance,
    Fisher,
    IntegratedGradients,
    InternalInfluence,
    LinearOutputs,
    Method,
    Random,
    RelP,
    Taylor,
    TaylorFisher,
    Wanda,
    WeightMagnitude,
    all_scores,
    scores,
)
from attribution.roots import categorical_root
from attribution.sites import Site
from attribution.subject import Rows, Subject

EVERY: tuple[Method, ...] = (
    Taylor(),
    Absolute(),
    Fisher("sampled"),
    Fisher("true"),
    TaylorFisher(),
    LinearOutputs(),
    IntegratedGradients(3),
    Conductance(3),
    InternalInfluence(3),
    RelP(),
    WeightMagnitude(),
    ActivationRate(),
    Wanda(),
    Random(1),
    Ablation("zero"),
    Ablation("mean"),
)
KINDS = ["mlp", "conv", "llama"]


def evaluated(kind: str) -> tuple[Subject, list[Rows], Rows]:
    """Captum and the slow loops run the network in the mode that it is in."""
    subject, batches = subject_of(kind)
    subject.network.eval()
    return subject, batches, whole(batches)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_scores_every_unit_for_every_category(kind: str) -> None:
    assert {type(method) for method in EVERY} == set(METHODS)
    subject, batches = subject_of(kind)
    subject.network.train()
    asked = [method for method in EVERY if kind == "conv" or not isinstance(method, LinearOutputs)]
    found = all_scores(asked, subject, batches, seed=4)
    assert list(found) == asked
    for method, by_site in found.items():
        assert list(by_site) == [site.name for site in subject.sites]
        for site in subject.sites:
            score = by_site[site.name]
            assert score.dtype == torch.float64, method
            assert list(score.shape) == [site.units, 3], method
            assert bool(score.isfinite().all()), method
            assert float(score.abs().max()) > 0, method
            torch.testing.assert_close(scores(method, subject, batches, seed=4)[site.name], score, rtol=0, atol=0)
    assert all(module.training for module in subject.network.modules())
    assert all(parameter.requires_grad for parameter in subject.network.parameters())
    for module in subject.network.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_times_activation_equals_captum(kind: str) -> None:
    subject, batches, rows = evaluated(kind)
    found = all_scores([Taylor(), Absolute()], subject, batches)
    for site in subject.sites:
        z = LayerGradientXActivation(losses_of(subject), subject.reader(site)).attribute(
            rows.inputs, additional_forward_args=extra(rows), attribute_to_layer_input=True
        )
        z = z.detach()
        close(found[Taylor()][site.name], by_category(-z, rows, site))
        z_PU = site.arrange(z).sum(3)  # The size is taken of a whole unit.
        close(found[Absolute()][site.name], by_units(z_PU.abs(), rows))


def by_units(terms: Tensor, rows: Rows) -> Tensor:
    """Return the means over each category's tokens of terms [rows positions units]."""
    return by_category(terms, rows, Site("any", "any", terms.shape[2]))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_integrated_gradients_equal_captum_where_its_weights_are_exact(kind: str, steps: int) -> None:
    """Captum keeps the weights of the steps in float32, and those of one and of two nodes fit in."""
    subject, batches, rows = evaluated(kind)
    found = scores(IntegratedGradients(steps), subject, batches)
    for site in subject.sites:
        close(found[site.name], by_category(-integrated(subject, rows, site, steps), rows, site))


@pytest.mark.parametrize("kind", KINDS)
def test_integrated_gradients_of_many_steps_equal_captum_to_its_rounding(kind: str) -> None:
    subject, batches, rows = evaluated(kind)
    found = scores(IntegratedGradients(7), subject, batches)
    for site in subject.sites:
        close(found[site.name], by_category(-integrated(subject, rows, site, 7), rows, site), 1e-6)


def integrated(subject: Subject, rows: Rows, site: Site, steps: int) -> Tensor:
    return CaptumIntegratedGradients(tail(subject, site)).attribute(
        activations(subject, rows, site), baselines=0, additional_forward_args=extra(rows), n_steps=steps
    )


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_integrated_gradients_of_the_last_site_add_up_to_the_rise_without_it(kind: str) -> None:
    subject, batches = subject_of(kind)
    site = subject.sites[-1]
    rise = joint_rises(subject, batches, {site.name: torch.ones(site.units, dtype=torch.bool)})
    found = scores(IntegratedGradients(20), subject, batches)[site.name]
    close(found.sum(0), rise, 1e-11)
    rough = scores(IntegratedGradients(1), subject, batches)[site.name].sum(0)
    assert float((rough / rise - 1).abs().max()) > 1e-4


def test_integrated_gradients_of_every_site_of_a_transformer_add_up_to_the_rise_without_it() -> None:
    subject, batches = subject_of("llama")
    # A large eps, since norms that are steep near 0 take hundreds of steps.
    exact = Subject(in_float64(llama(), eps=1.0), subject.sites, NAMES, nats)
    found = scores(IntegratedGradients(40), exact, batches)
    for site in subject.sites:
        rise = joint_rises(exact, batches, {site.name: torch.ones(site.units, dtype=torch.bool)})
        close(found[site.name].sum(0), rise)


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_equals_a_slow_loop_over_rows_and_tokens(kind: str) -> None:
    subject, batches, rows = evaluated(kind)
    found = scores(Fisher("true"), subject, batches)
    for site in subject.sites:
        losses, a = tail(subject, site), activations(subject, rows, site).requires_grad_()
        terms = []
        for r in range(len(rows.ids)):
            loss = losses(a, *extra(rows))[r]
            z_PUW = site.arrange(torch.autograd.grad(loss, a)[0] * a)[r]
            terms.append(z_PUW.detach().sum(2).square() / 2)
        close(found[site.name], by_units(torch.stack(terms), rows))


def test_the_report_is_the_one_of_a_measured_table() -> None:
    subject, batches = subject_of("llama")
    table = measure(subject, batches, seed=4)
    found = all_scores([TaylorFisher(), Taylor(), Fisher("sampled")], subject, batches, seed=4)
    other = scores(TaylorFisher(), subject, batches, seed=5)
    for site in subject.sites:
        assert torch.equal(found[TaylorFisher()][site.name], table.report(site.name))
        both = found[Taylor()][site.name] + found[Fisher("sampled")][site.name]
        close(found[TaylorFisher()][site.name], both, 1e-12)
        assert not torch.equal(other[site.name], table.report(site.name))


def moved(subject: Subject, rows: Rows, site: Site) -> Tensor:
    """What each unit's activation adds to each output in a straight line [rows units outputs], output by output."""
    losses, a = tail(subject, site), activations(subject, rows, site).requires_grad_()
    outputs: list[Tensor] = []
    watched = replace(subject, nats=lambda z, _: outputs.append(z) or z[:, 0])
    losses = tail(watched, site)
    losses(a, *extra(rows))
    slopes = [torch.autograd.grad(outputs[0][:, k].sum(), a, retain_graph=True)[0] for k in range(outputs[0].shape[1])]
    return torch.stack([site.arrange(slope * a.detach()).sum((1, 3)) for slope in slopes], 2)


def test_linear_outputs_are_the_loss_where_the_outputs_would_be_moved_to() -> None:
    subject, batches, rows = evaluated("conv")
    found = scores(LinearOutputs(), subject, batches)
    before = subject.nats(subject.forward(rows.inputs, rows.categories).detach(), rows.targets)
    for site in subject.sites:
        z_RUK = moved(subject, rows, site)
        terms = torch.zeros(len(rows.ids), site.units, dtype=torch.float64)
        for unit in range(site.units):
            outputs = subject.forward(rows.inputs, rows.categories).detach() - z_RUK[:, unit]
            terms[:, unit] = subject.nats(outputs, rows.targets) - before
        close(found[site.name], by_units(terms[:, None], rows))


def test_linear_outputs_of_a_last_layer_are_exact_ablation_and_nothing_else_is() -> None:
    """Its outputs are moved in a straight line: no approximation is left."""
    subject, batches = hidden_classifier()
    truth = ablation_rises(subject, batches, "hidden", single(9), value="zero")
    close(scores(LinearOutputs(), subject, batches)["hidden"], truth, 1e-10)
    parabola = scores(TaylorFisher(samples=200), subject, batches)["hidden"]
    assert float((parabola - truth).abs().max()) > 0.01 * float(truth.abs().max())
    table = measure(subject, batches, exact_outputs=4)
    close(table.report("hidden"), truth, 1e-10)
    assert float(table.standard_error("hidden", "report").min()) >= 0
    with pytest.raises(ValueError, match=r"outputs are \[11, 4\]; LinearOutputs goes through at most 3 outputs a row"):
        scores(LinearOutputs(3), subject, batches)


def test_linear_outputs_need_no_labels_of_the_models_own() -> None:
    subject, batches = subject_of("conv")
    with_labels = scores(LinearOutputs(), subject, batches)
    without = scores(LinearOutputs(), replace(subject, sample=None), batches)
    assert all(torch.equal(without[site.name], with_labels[site.name]) for site in subject.sites)


def test_the_standard_error_of_linear_outputs_is_that_of_the_rows() -> None:
    subject, batches = hidden_classifier()
    rows = whole(batches)
    table = measure(subject, batches, exact_outputs=4)
    mine = [row for row in range(11) if int(rows.categories[row]) == 1]
    each = [
        measure(subject, [rows.take(torch.tensor([r]))], exact_outputs=4).sites["hidden"].report[:, 1] for r in mine
    ]
    error = torch.stack(each).std(0) / len(mine) ** 0.5
    close(table.standard_error("hidden", "report")[:, 1], error, 1e-8)


def hidden_classifier() -> tuple[Subject, list[Rows]]:
    """A hidden layer that a linear one reads, of four classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)).double().eval()
        inputs = 2 * torch.randn(11, 5, dtype=torch.float64)
    with torch.no_grad():
        network[2].weight.mul_(6)
    rows = Rows(inputs, torch.arange(11) % 4, torch.arange(11) * 3 // 11, torch.arange(11))
    return Subject(network, (Site("hidden", "2", 9),), NAMES, nats, root=categorical_root), [rows]


def test_sampled_labels_are_asked_for_by_name() -> None:
    subject, batches = subject_of("llama")
    rooted = replace(subject, root=categorical_root)
    for method in (Fisher("sampled", 2), TaylorFisher(2, "sampled")):
        found, other = scores(method, rooted, batches), scores(replace(method, labels="model"), rooted, batches)
        for site in subject.sites:
            assert torch.equal(found[site.name], scores(method, subject, batches)[site.name])
            assert not torch.equal(found[site.name], other[site.name])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_activations_equal_slow_sums(kind: str) -> None:
    subject, batches, rows = evaluated(kind)
    methods = (WeightMagnitude(), ActivationRate(), Wanda())
    magnitude, rate, wanda = all_scores(methods, subject, batches).values()
    for site in subject.sites:
        weight = subject.reader(site).weight.detach()
        a = activations(subject, rows, site)
        for c in range(3):
            mine = a[rows.categories == c]
            values_FX = mine.transpose(0, 1).flatten(1) if site.spatial else mine.flatten(0, -2).T
            for u in range(site.units):
                features = range(u * site.width, (u + 1) * site.width)
                sums = [float(weight[:, f].abs().sum()) for f in features]
                sizes = [float(values_FX[f].square().mean()) ** 0.5 for f in features]
                tokens = mine[:, u].flatten(1) if site.spatial else values_FX[list(features)].T
                assert float(magnitude[site.name][u, c]) == pytest.approx(sum(sums), rel=1e-12)
                weighted = sum(s * size for s, size in zip(sums, sizes, strict=True))
                assert float(wanda[site.name][u, c]) == pytest.approx(weighted, rel=1e-12)
                assert float(rate[site.name][u, c]) == float((tokens != 0).any(1).double().mean())


def test_random_scores_are_uniform_and_depend_on_seed_and_site_alone() -> None:
    network = nn.Linear(2, 2)
    a, b = Site("a", "", 4000), Site("b", "", 4000)
    both = Subject(network, (a, b), NAMES, nats)
    found = scores(Random(3), both, [])
    again = scores(Random(3), Subject(network, (b,), NAMES, nats), [], seed=8)
    assert torch.equal(found["b"], again["b"])
    assert not torch.equal(found["a"], found["b"])
    assert not torch.equal(found["a"], scores(Random(4), both, [])["a"])
    assert kstest(torch.cat(list(found.values())).flatten().numpy(), "uniform").pvalue > 0.01
    values = torch.stack([*found.values(), scores(Random(4), both, [])["a"]])
    correlations = np.corrcoef(values.transpose(1, 2).flatten(0, 1).numpy())
    assert np.abs(correlations - np.eye(9)).max() < 4 / 4000**0.5


def test_ablation_is_the_exact_one() -> None:
    subject, batches = subject_of("llama")
    found = all_scores([Ablation("zero"), Ablation("mean")], subject, batches)
    for site in subject.sites:
        for method in (Ablation("zero"), Ablation("mean")):
            rises = ablation_rises(subject, batches, site.name, single(site.units), value=method.value)
            assert torch.equal(found[method][site.name], rises)
        assert not torch.equal(found[Ablation("zero")][site.name], found[Ablation("mean")][site.name])


@pytest.mark.parametrize("make", [IntegratedGradients, Conductance, InternalInfluence])
def test_no_steps_are_refused(make: Callable[[int], Method]) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        make(0)


def test_bad_input_is_refused_with_the_way_out() -> None:
    subject, batches = subject_of("mlp")
    unsampled = Subject(subject.network, subject.sites, NAMES, nats)
    assert scores(Taylor(), unsampled, batches)
    for method in (Fisher("model"), TaylorFisher()):
        with pytest.raises(ValueError, match="give the subject 'root' or 'sample'"):
            scores(method, unsampled, batches)
    for asked in (unsampled, replace(unsampled, root=categorical_root)):
        with pytest.raises(ValueError, match="the subject's 'sample'; give it, or take labels='model'"):
            scores(Fisher("sampled"), asked, batches)
    ab = [batch.take(batch.categories < 2) for batch in batches]
    for method in (Taylor(), IntegratedGradients(1), Ablation("zero")):
        with pytest.raises(ValueError, match=r"no (rows|examples) of .*'c'"):
            scores(method, subject, ab)
        with pytest.raises(ValueError, match=r"no (rows|batches)"):
            scores(method, subject, [])
    network = subject.network
    cut = Subject(network, subject.sites, NAMES, nats, run=lambda x, _: network(x).detach())
    with pytest.raises(ValueError, match="does not depend on the units of site 'first'"):
        scores(IntegratedGradients(1), cut, batches)
    other = Subject(nn.ModuleDict({"s": nn.Identity()}), (Site("s", "s", 5),), NAMES, nats, run=lambda x, _: x)
    with pytest.raises(ValueError, match="the reader 's' is a Identity; output weights"):
        scores(WeightMagnitude(), other, batches)
