"""Channels inside of residual blocks as units of attribution: against Captum, exact ablation and least squares."""

import copy

import pytest
import torch
from captum.attr import LayerGradientXActivation
from subjects import NAMES, activations, by_category, close, extra, losses_of, nats, sample
from torch import Tensor, nn
from torch.nn import functional as F

from attribution.ablation import ablation_rises, joint_rises, single
from attribution.measure import Moments, measure
from attribution.moments import schur_residual
from attribution.sites import Site, output_weight, patches
from attribution.subject import Rows, Subject
from attribution.table import AttributionTable
from moeify.models.families import readers
from moeify.models.resnet import ResNet
from moeify.recipe.partition import (
    AttributionOwners,
    CmoeOwners,
    CoactivationOwners,
    MagnitudeOwners,
    MoeficationOwners,
    Owners,
)
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.rounds import Round
from moeify.routed.split_model import SplitModel
from moeify.splitting.propose import Proposal, menu
from moeify.splitting.surgery import compensate_sites, permute
from tests.networks import rows_for, tiny_resnet


def measured(each: int = 4) -> tuple[Subject, Rows, AttributionTable]:
    network, number = tiny_resnet().eval(), 3 * each
    rows = Rows(rows_for(network, number), torch.arange(number) % 5, torch.arange(number) // each, torch.arange(number))
    subject = Subject(network, readers(network), NAMES, nats, sample)
    return subject, rows, measure(subject, [rows], moments=Moments())


def test_taylor_is_captums_gradient_times_activation_summed_over_the_map() -> None:
    subject, rows, table = measured()
    layers = [subject.reader(site) for site in subject.sites]
    found = LayerGradientXActivation(losses_of(subject), layers).attribute(
        rows.inputs.clone().requires_grad_(), additional_forward_args=extra(rows), attribute_to_layer_input=True
    )
    for site, values in zip(subject.sites, found, strict=True):
        z = (values if isinstance(values, Tensor) else values[0]).detach()
        close(table.score(site.name, "taylor"), by_category(-z, rows, site))
        z_RU = z.sum((2, 3))
        squares = torch.stack([z_RU[rows.categories == c].square().mean(0) / 2 for c in range(3)], 1)
        close(table.score(site.name, "empirical"), squares)


def test_exact_ablation_is_the_loss_without_what_the_second_convolution_reads_of_a_channel() -> None:
    subject, rows, _ = measured()
    network = subject.network
    for site in subject.sites:
        rises = ablation_rises(subject, [rows], site.name, single(site.units), at_once=20)
        intact = nats(network(rows.inputs), rows.targets)
        for unit in range(site.units):
            wounded = copy.deepcopy(network)
            with torch.no_grad():
                wounded.get_submodule(site.reader).weight[:, unit] = 0.0
            rise_R = nats(wounded(rows.inputs), rows.targets) - intact
            close(rises[unit], torch.stack([rise_R[rows.categories == c].mean() for c in range(3)]), 1e-7)


def test_a_small_unit_is_worth_what_taylor_says() -> None:
    """Scaled down, a channel's worth is its first-order term: the estimate has the right scale and sign."""
    subject, rows, _ = measured()
    with torch.no_grad():
        for site in subject.sites:
            subject.reader(site).weight.mul_(1e-4)
    table = measure(subject, [rows])
    for site in subject.sites:
        rises = ablation_rises(subject, [rows], site.name, single(site.units))
        close(table.score(site.name, "taylor"), rises, 1e-2)


def test_j_is_what_no_linear_map_of_the_kept_channels_patches_gives_back() -> None:
    subject, rows, table = measured(16)
    for site in subject.sites:
        reader = subject.reader(site)
        kept = torch.arange(site.units) % 3 > 0
        weight = output_weight(reader, site)
        wide = kept.repeat_interleave(9)
        for c, name in enumerate(NAMES):
            terms = patches(reader, site, activations(subject, rows, site))[rows.categories == c].flatten(0, 1)
            gone = terms[:, ~wide] @ weight[~wide]
            fit = terms[:, wide] @ torch.linalg.lstsq(terms[:, wide], gone, driver="gelsd").solution
            lost = (gone - fit).detach()
            curvature = table.curvature(site.name, name)
            assert isinstance(curvature, Tensor)
            wanted = float(((lost @ curvature) * lost).sum()) / 16 / 2  # over the examples of a category
            moments = table.second_moment(site.name, name), curvature
            got = schur_residual(*moments, weight, kept, ~kept, damping=1e-10)
            assert got == pytest.approx(wanted, rel=1e-6)
            assert table.residual(site.name, name, weight, kept, ~kept) == pytest.approx(wanted, rel=0.05)


def test_on_maps_of_one_value_j_of_a_channel_is_its_fisher_information() -> None:
    """One example a category, and the same patch everywhere: both factors are of rank one, and nothing is approximate.

    Gradients of places add up before they are squared, as in the loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, two, head = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1), nn.Linear(3, 5)
        network = nn.Sequential(one, nn.ReLU(), two, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    flat = torch.rand(3, 2, 1, 1, dtype=torch.float64).expand(3, 2, 5, 4)
    subject = Subject(network, (Site("s", "2", 4, spatial=True),), NAMES, nats, sample)
    table = measure(subject, [Rows(flat, torch.tensor([0, 2, 4]), torch.arange(3), torch.arange(3))], moments=Moments())
    weight, none = output_weight(two, subject.site("s")), torch.zeros(4, dtype=torch.bool)
    for c, name in enumerate(NAMES):
        moments = table.second_moment("s", name), table.curvature("s", name)
        for unit, fisher in enumerate(table.score("s", "fisher")[:, c].tolist()):
            found = schur_residual(*moments, weight, none, torch.arange(4) == unit, damping=1e-12)
            assert found == pytest.approx(fisher, rel=1e-6, abs=1e-15)


def cut_of(model: SplitModel, table: AttributionTable, owners: Owners) -> Proposal:
    config = PartitionConfig(multiple=1, min_units=1, owners=owners)
    rounds = [Round(train=0, recover=0, branching=3, separation=0.4)]
    known = model.partition, table, model.output_weights
    return menu(*known, config, rounds, "fisher", reads=model.input_weight).cut(0.4)


@pytest.mark.parametrize("way", [AttributionOwners, CmoeOwners, CoactivationOwners, MagnitudeOwners, MoeficationOwners])
def test_channels_find_owners_every_way(way: type) -> None:
    subject, _, table = measured()
    model = SplitModel(subject.network, NAMES)
    proposal = cut_of(model, table, way(kind=way.model_fields["kind"].annotation.__args__[0]))
    assert proposal.partition.separation == pytest.approx(0.4, abs=0.07)
    assert {site: sorted(order.tolist()) for site, order in proposal.order.items()} == {
        "layer1.0.channels": list(range(6)),
        "layer2.0.channels": list(range(12)),
    }
    assert proposal.predicted > 0


def test_the_correction_at_a_cut_is_the_ridge_fit_of_what_the_convolution_gave() -> None:
    subject, rows, table = measured()
    network = subject.network
    assert isinstance(network, ResNet)
    site, ridge = subject.site("layer2.0.channels"), 0.01
    reader = subject.reader(site)
    a, before = activations(subject, rows, site), reader.weight.detach().clone()
    model = SplitModel(network, NAMES)
    proposal = cut_of(model, table, AttributionOwners(kind="attribution"))
    compensate_sites(model.network, model.space, table, proposal, ridge)
    present = torch.argsort(proposal.order[site.name])
    active_CU = torch.stack([proposal.partition.active(site.name, c)[present] for c in NAMES])
    masked = a * active_CU[rows.categories][:, :, None, None]
    x, y = (patches(reader, site, values).flatten(0, 1) for values in (masked, a))
    old = before.flatten(1).t()
    # Every category has four of the twelve rows: means over examples, sums over places.
    scale = ridge * float(y.square().sum(0).mean()) / 12
    gram = x.T @ x / 12 + scale * torch.eye(x.shape[1], dtype=torch.float64)
    wanted = torch.linalg.solve(gram, x.T @ y @ old / 12 + scale * old).detach()
    torch.testing.assert_close(reader.weight.detach().flatten(1).t(), wanted, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        whole, blind, mended = (
            F.conv2d(values, weight, padding=1)
            for values, weight in ((a, before), (masked, before), (masked, reader.weight))
        )
    assert (mended - whole).square().sum() < 0.7 * (blind - whole).square().sum()


def test_a_cut_in_tree_order_gives_what_masked_channels_give() -> None:
    """Units move and routes are cut; in eval mode the split model is the dense one with channels off the route at 0."""
    subject, rows, table = measured()
    dense = copy.deepcopy(subject.network)
    model = SplitModel(subject.network, NAMES).eval()
    proposal = cut_of(model, table, AttributionOwners(kind="attribution"))
    permute(model.network, None, model.space, proposal.order)
    model.repartition(proposal.partition)
    plain = Subject(dense, subject.sites, NAMES, nats)
    removed = {}
    for site in subject.sites:
        present = torch.argsort(proposal.order[site.name])
        removed[site.name] = ~torch.stack([proposal.partition.active(site.name, c)[present] for c in NAMES])
    rise_R = nats(model(rows.inputs, rows.categories), rows.targets) - nats(dense(rows.inputs), rows.targets)
    wanted = torch.stack([rise_R[rows.categories == c].mean() for c in range(3)]).detach()
    torch.testing.assert_close(joint_rises(plain, [rows], removed), wanted)
