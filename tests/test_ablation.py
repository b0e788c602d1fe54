from collections.abc import Sequence

import pytest
import torch
from captum.attr import FeatureAblation
from subjects import NAMES, activations, by_category, close, extra, nats, subject_of, tail, whole
from torch import Tensor, nn

from attribution.ablation import Value, ablation_rises, joint_rises, single
from attribution.sites import Site
from attribution.subject import Rows, Subject

REST = ("targets", "categories", "ids")


def slow_rises(subject: Subject, batches: Sequence[Rows], site: Site, removed: Tensor, value: Value) -> Tensor:
    """One set, row by row, feature by feature."""
    subject.network.eval()
    rows = whole(batches)
    a = activations(subject, rows, site)
    features = torch.arange(site.features) if site.spatial else torch.arange(site.features) // site.width
    gone = [f for f in range(site.features) if removed[features[f]]]

    def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        for f in gone:
            if site.spatial:
                x[:, f] = a[:, f].mean() if value == "mean" else 0
            else:
                x[..., f] = a[..., f].mean() if value == "mean" else 0
        return (x,)

    sums, tokens = torch.zeros(2, 3, dtype=torch.float64)
    for r in range(len(rows.ids)):
        row = rows.take(slice(r, r + 1))
        base = nats(subject.forward(row.inputs, row.categories), row.targets)
        handle = subject.reader(site).register_forward_pre_hook(before)
        cut = nats(subject.forward(row.inputs, row.categories), row.targets)
        handle.remove()
        sums[row.categories] += (cut - base).detach()
        tokens[row.categories] += 1 if site.spatial else a[0].numel() // site.features
    return sums / tokens


class Two(nn.Module):
    """y = 3 a_1 - 2 a_2."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(2, 1, bias=False)
        self.down.weight.data = torch.tensor([[3.0, -2.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x)


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1) / 2


def two() -> tuple[Subject, list[Rows]]:
    rows = Rows(
        torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        torch.tensor([[1.0], [-6.0]]),
        torch.tensor([0, 1]),
        torch.tensor([0, 1]),
    )
    return Subject(Two(), (Site("s", "down", 2),), ("a", "b"), half_squares), [rows]


def test_a_network_of_two_units_gives_the_numbers_worked_out_by_hand() -> None:
    """Row 1: a = (1, 2), y = -1, t = 1, loss 2. Row 2: a = (0, 1), y = -2, t = -6, loss 8. Mean a = (.5, 1.5)."""
    subject, batches = two()
    sets = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    # Without unit 1: y = -4, loss 12.5; y = -2. Without 2: y = 3, loss 2; y = 0, loss 18. Without both: y = 0.
    rises = ablation_rises(subject, batches, "s", sets)
    assert rises.tolist() == [[10.5, 0], [0, 10], [-1.5, 10], [0, 0]]
    # Unit 1 at its mean: y = -2.5, loss 6.125; y = -.5, loss 15.125. Unit 2: y = 0, loss .5; y = -3, loss 4.5.
    rises = ablation_rises(subject, batches, "s", sets[:2], value="mean")
    assert rises.tolist() == [[4.125, 7.125], [-1.5, -3.5]]
    assert joint_rises(subject, batches, {"s": sets[:2]}).tolist() == [10.5, 10]


@pytest.mark.parametrize("value", ["zero", "mean"])
@pytest.mark.parametrize("kind", ["mlp", "conv", "llama"])
def test_batched_ablation_equals_a_slow_loop(kind: str, value: Value) -> None:
    subject, batches = subject_of(kind)
    generator = torch.Generator().manual_seed(1)
    for site in subject.sites:
        sets = torch.cat([single(site.units), torch.rand(3, site.units, generator=generator) < 0.5])
        wanted = torch.stack([slow_rises(subject, batches, site, removed, value) for removed in sets])
        for at_once in (4, 1000):
            rises = ablation_rises(subject, batches, site.name, sets, value=value, at_once=at_once)
            torch.testing.assert_close(rises, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["mlp", "conv", "llama"])
def test_zeroing_single_units_equals_captum(kind: str) -> None:
    subject, batches = subject_of(kind)
    subject.network.eval()
    rows = whole(batches)
    for site in subject.sites:
        a = activations(subject, rows, site)
        unit = torch.arange(site.features) // site.width
        mask = (unit[:, None, None] if site.spatial else unit).expand(a[:1].shape)
        found = FeatureAblation(tail(subject, site)).attribute(
            a, baselines=0, feature_mask=mask, additional_forward_args=extra(rows)
        )
        # Captum says the fall, of the whole row, at each feature of a group.
        wanted = by_category(-found, rows, site) / (a[0].numel() // site.units)
        close(ablation_rises(subject, batches, site.name, single(site.units)), wanted)


def test_batches_without_rows_change_nothing() -> None:
    subject, batches = subject_of("mlp")
    nothing = batches[0].take(slice(0, 0))
    for value in ("zero", "mean"):
        rises = ablation_rises(subject, [nothing, *batches], "first", single(7), value=value)
        assert torch.equal(rises, ablation_rises(subject, batches, "first", single(7), value=value))
        removed = {"first": torch.arange(7) < 3}
        joint = joint_rises(subject, [*batches, nothing], removed, value=value)
        assert torch.equal(joint, joint_rises(subject, batches, removed, value=value))


def test_rows_of_a_forward_pass_stay_in_category_order_and_within_the_limit() -> None:
    subject, batches = subject_of("mlp")
    seen: list[Tensor] = []

    def run(inputs: Tensor, categories: Tensor) -> Tensor:
        seen.append(categories)
        return subject.network(inputs)

    watched = Subject(subject.network, subject.sites, NAMES, nats, run=run)
    ablation_rises(
        watched, [batches[0], batches[1].take(batches[1].categories.argsort())], "first", single(7), at_once=17
    )
    assert max(len(categories) for categories in seen) == 15
    assert all((categories.diff() >= 0).all() for categories in seen)


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_joint_removal_gives_each_category_its_own_loss_without_its_own_units(value: Value) -> None:
    subject, batches = subject_of("llama")
    generator = torch.Generator().manual_seed(1)
    removed = {site.name: torch.rand(3, site.units, generator=generator) < 0.5 for site in subject.sites}
    rises = joint_rises(subject, batches, removed, value=value)
    for c in range(3):
        same = joint_rises(subject, batches, {name: units[c] for name, units in removed.items()}, value=value)
        torch.testing.assert_close(rises[c], same[c], rtol=1e-12, atol=0)
    for site in subject.sites:
        one = joint_rises(subject, batches, {site.name: removed[site.name]}, value=value)
        alone = ablation_rises(subject, batches, site.name, removed[site.name], value=value)
        torch.testing.assert_close(one, alone.diagonal(), rtol=1e-10, atol=1e-13)
    assert float((rises - one).abs().min()) > 1e-3


def test_the_network_is_left_as_it_was() -> None:
    subject, batches = subject_of("conv")
    subject.network.train()
    before = {name: value.clone() for name, value in subject.network.state_dict().items()}
    ablation_rises(subject, batches, "maps", single(6), value="mean")
    assert all(module.training for module in subject.network.modules())
    assert all(parameter.requires_grad for parameter in subject.network.parameters())
    assert not any(module._forward_pre_hooks for module in subject.network.modules())
    assert all(torch.equal(value, before[name]) for name, value in subject.network.state_dict().items())


def test_bad_input_is_refused_with_its_place_and_the_way_out() -> None:
    subject, batches = subject_of("mlp")
    with pytest.raises(ValueError, match=r"sets must be \[sets 7\], the units of site 'first', got \[8, 8\]"):
        ablation_rises(subject, batches, "first", single(8))
    with pytest.raises(ValueError, match="no site 'frist'; nearest: first"):
        ablation_rises(subject, batches, "frist", single(7))
    with pytest.raises(ValueError, match="at least one row"):
        ablation_rises(subject, batches, "first", single(7), at_once=0)
    with pytest.raises(ValueError, match="no rows of 'c'"):
        ablation_rises(subject, [batches[0].take(batches[0].categories < 2)], "first", single(7))
    with pytest.raises(ValueError, match=r"units of site 'first' must be \[7\] or \[3 7\], got \[8\]"):
        joint_rises(subject, batches, {"first": torch.ones(8, dtype=torch.bool)})
    with pytest.raises(ValueError, match="no sites"):
        joint_rises(subject, batches, {})
    with pytest.raises(ValueError, match="no batches"):
        ablation_rises(subject, [], "first", single(7), value="mean")
    wrong = Subject(subject.network, (Site("s", "down", 8),), NAMES, nats)
    with pytest.raises(ValueError, match=r"site 's' has 8 units .* must be \[6 ... 8\], got \[6, 3, 7\]"):
        ablation_rises(wrong, batches, "s", single(8))
    twice = Subject(
        subject.network, subject.sites, NAMES, nats, run=lambda x, _: subject.network(x) + subject.network(x)
    )
    with pytest.raises(ValueError, match="more than once"):
        ablation_rises(twice, batches, "first", single(7))
    never = Subject(subject.network, subject.sites, NAMES, nats, run=lambda x, _: x)
    with pytest.raises(ValueError, match="'down' of site 'first' did not run"):
        ablation_rises(never, batches, "first", single(7))
    broken = [batches[0], Rows(batches[1].inputs * torch.nan, *[getattr(batches[1], n) for n in REST])]
    with pytest.raises(ValueError, match="NaN or infinite score on category 'a'"):
        ablation_rises(subject, broken, "first", single(7))


@pytest.mark.usefixtures("shapes_unchecked")
def test_only_masks_say_what_is_removed() -> None:
    subject, batches = subject_of("mlp")
    for kind in (torch.int64, torch.float32, torch.uint8):
        with pytest.raises(ValueError, match=rf"sets must be torch\.bool, .* got {kind}; give x\.bool\(\)"):
            ablation_rises(subject, batches, "first", single(7).to(kind))
        with pytest.raises(ValueError, match=rf"site 'first' must be torch\.bool, .* got {kind}"):
            joint_rises(subject, batches, {"first": torch.ones(7, dtype=kind)})
    with pytest.raises(ValueError, match=r"sets must be \[sets 7\], the units of site 'first', got \[7\]"):
        ablation_rises(subject, batches, "first", torch.ones(7, dtype=torch.bool))
    assert ablation_rises(subject, batches, "first", single(7)[:0]).shape == (0, 3)


def test_sites_that_differ_in_tokens_cannot_be_removed_together() -> None:
    subject, batches = subject_of("mlp")
    network = subject.network

    def run(inputs: Tensor, _: Tensor) -> Tensor:
        return network.down2(torch.relu(network.up2(network.down(torch.relu(network.up(inputs))).mean(1))))

    pooled = Subject(network, subject.sites, NAMES, lambda outputs, _: outputs.square().sum(1), run=run)
    removed = {"first": torch.arange(7) < 3, "second": torch.arange(8) < 3}
    with pytest.raises(ValueError, match="differ in positions a row"):
        joint_rises(pooled, batches, removed)
    assert ablation_rises(pooled, batches, "second", single(8)).isfinite().all()
