from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_measure import LLAMA_SITES, MLP_SITES, NAMES, llama, llama_rows, mlp, mlp_rows, nats, sample
from torch import Tensor, nn

from attribution import scratch
from attribution.measure import Moments, measure
from attribution.moments import ExactMoment, LowRank, SketchedMoment, marginals, schur_residual
from attribution.sites import Site, output_weight, patches
from attribution.stability import Stability, strongest_category
from attribution.subject import Rows, Subject, batched


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1, stride=2)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.norm(self.conv1(x)))
        return self.head(torch.relu(self.conv2(maps)).mean((2, 3)))


def cnn_subject() -> tuple[Subject, Rows]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = Cnn().double()
        rows = Rows(
            torch.randn(12, 1, 7, 7, dtype=torch.float64), torch.randint(4, (12,)), torch.arange(12) // 4,
            torch.arange(12),
        )  # fmt: skip
    sites = (Site("maps", "conv2", 6, spatial=True), Site("pooled", "head", 5))
    return Subject(network, sites, NAMES, nats, sample), rows


def scaled_losses(subject: Subject, rows: Rows, site: Site, unit: int, scale: Tensor) -> Tensor:
    """Each row's loss with one unit multiplied by ``scale``."""
    keep = torch.ones(site.units, dtype=torch.float64)

    def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        factor = torch.where(torch.arange(site.units) == unit, scale, keep)
        return (args[0] * site.keeping(factor, args[0]),)

    handle = subject.reader(site).register_forward_pre_hook(before)
    try:
        return nats(subject.forward(rows.inputs, rows.categories), rows.targets)
    finally:
        handle.remove()


@pytest.mark.parametrize("chunk", [2**18, 100])
@pytest.mark.parametrize("kind", ["conv", "heads"])
def test_gradient_times_activation_of_wide_units_is_the_derivative_of_scaling_the_unit(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_CHUNK", chunk)
    if kind == "conv":
        subject, rows = cnn_subject()
    else:
        sites = tuple(Site(f"layers.{i}.heads", f"model.layers.{i}.self_attn.o_proj", 2, width=4) for i in range(2))
        subject, rows = Subject(llama(), sites, NAMES, nats, sample), llama_rows(12)
    table = measure(subject, [rows])
    subject.network.eval()
    for site in subject.sites:
        for unit in range(site.units):
            scale = torch.ones((), dtype=torch.float64, requires_grad=True)
            losses = scaled_losses(subject, rows, site, unit, scale)
            slopes_R = torch.stack([torch.autograd.grad(loss, scale, retain_graph=True)[0] for loss in losses])
            for c in range(3):
                mine = slopes_R[rows.categories == c]
                got = table.sites[site.name].taylor[unit, c]
                torch.testing.assert_close(got, -mine.sum(), rtol=1e-9, atol=1e-12)
            if kind == "conv":  # One position a row, so a row's Fisher term is half the square of its slope.
                got = table.sites[site.name].empirical[unit].sum()
                torch.testing.assert_close(got, slopes_R.square().sum() / 2, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("chunk", [2**18, 100])
def test_a_channel_fires_where_any_place_of_its_map_does(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_CHUNK", chunk)
    subject, rows = cnn_subject()
    with torch.no_grad():
        subject.network.norm.bias.fill_(-1.2)  # most places are 0, and so are some whole maps
    seen: list[Tensor] = []
    handle = subject.reader(subject.site("maps")).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    table = measure(subject, [rows])
    handle.remove()
    fires_RU = (seen[0] != 0).any(3).any(2)
    assert 0 < int(fires_RU.sum()) < fires_RU.numel()
    for c in range(3):
        assert torch.equal(table.sites["maps"].rate[:, c], fires_RU[rows.categories == c].sum(0).double())


def test_the_moments_of_a_convolution_predict_its_output_and_count_examples() -> None:
    subject, rows = cnn_subject()
    table = measure(subject, [rows], moments=Moments())
    assert table.counts.tolist() == [4, 4, 4]
    site = subject.site("maps")
    conv = subject.reader(site)
    weight = output_weight(conv, site).double()
    assert weight.shape == (6 * 9, 5)
    seen: list[Tensor] = []
    handle = conv.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad(), subject.still():
        subject.forward(rows.inputs, rows.categories)
        wanted = F.conv2d(seen[0], conv.weight, None, stride=2, padding=1)
    handle.remove()
    terms = patches(conv, site, seen[0])
    torch.testing.assert_close((terms @ weight).transpose(1, 2).reshape(wanted.shape), wanted)
    for c, name in enumerate(NAMES):
        mine = terms[rows.categories == c].flatten(0, 1)
        moment = table.second_moment("maps", name)
        assert isinstance(moment, Tensor)
        torch.testing.assert_close(moment, mine.T @ mine / 4)
    kept = torch.tensor([True] * 4 + [False] * 2)
    assert table.residual("maps", "a", weight, kept, ~kept) > 0
    assert table.residual("maps", "a", weight, torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)) == 0


def spectrum(seed: int, features: int, rank: int, noise: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(400, rank, generator=generator, dtype=torch.float64)
    mix = torch.randn(rank, features, generator=generator, dtype=torch.float64)
    return base @ mix + noise * torch.randn(400, features, generator=generator, dtype=torch.float64)


def test_a_sketch_of_enough_columns_is_the_moment_and_keeps_the_diagonal_always() -> None:
    for rank, noise, tolerance in ((10, 0.0, 1e-4), (10, 0.05, 2e-2)):
        terms = spectrum(0, 60, rank, noise)
        exact, sketch = ExactMoment.zeros(1, 60), SketchedMoment.zeros(1, 60, 24)
        for moment in (exact, sketch):
            moment.add(0, terms[:150])
            moment.add(0, terms[150:])
        wanted, got = exact.mean(0, 400.0), sketch.mean(0, 400.0)
        assert isinstance(got, LowRank)
        assert float((got.dense() - wanted).norm() / wanted.norm()) < tolerance
        torch.testing.assert_close(got.dense().diagonal(), wanted.diagonal(), rtol=1e-5, atol=0)
        torch.testing.assert_close(exact.trace(), sketch.trace())
    assert sum(t.numel() for t in sketch.tensors()) == 60 * 25


@pytest.mark.parametrize("width", [1, 3])
def test_the_low_rank_residual_and_marginals_equal_those_of_the_dense_matrix(width: int) -> None:
    generator = torch.Generator().manual_seed(3)

    def low_rank(size: int, rank: int) -> LowRank:
        return LowRank(
            torch.randn(size, rank, generator=generator, dtype=torch.float64),
            torch.rand(size, generator=generator, dtype=torch.float64),
        )

    inputs, curvature = low_rank(12 * width, 5), low_rank(4, 2)
    weight = torch.randn(12 * width, 4, generator=generator, dtype=torch.float64)
    code = torch.tensor([0, 1, 2, 1, 2, 1, 1, 2, 0, 1, 2, 1])
    kept, removed = code == 1, code == 2
    dense = schur_residual(inputs.dense(), curvature.dense(), weight, kept, removed)
    assert schur_residual(inputs, curvature, weight, kept, removed) == pytest.approx(dense, rel=1e-9)
    rises = marginals(inputs.dense(), curvature.dense(), weight, kept, removed)
    torch.testing.assert_close(marginals(inputs, curvature, weight, kept, removed), rises, rtol=1e-8, atol=1e-10)
    before = schur_residual(inputs.dense(), curvature.dense(), weight, kept, removed, damping=1e-6)
    exact = marginals(inputs.dense(), curvature.dense(), weight, kept, removed, damping=1e-6)
    for unit in kept.nonzero()[:, 0].tolist():
        less, more = kept.clone(), removed.clone()
        less[unit], more[unit] = False, True
        wanted = schur_residual(inputs.dense(), curvature.dense(), weight, less, more, damping=1e-6) - before
        assert float(exact[unit]) == pytest.approx(wanted, rel=1e-6)


def test_sketches_of_shards_add_up_and_moments_can_be_taken_of_some_sites_alone() -> None:
    network, rows = mlp(), mlp_rows(12, positions=3)
    subject = Subject(network, tuple(MLP_SITES), NAMES, nats, sample)
    moments = Moments(columns=4, sites=("second",))
    whole = measure(subject, [rows], moments=moments)
    halves = [measure(subject, [rows.take(slice(i, None, 2))], moments=moments) for i in range(2)]
    for got, wanted in zip((halves[0] + halves[1]).tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert whole.sites["first"].moments == []
    assert isinstance(whole.second_moment("second", "a"), LowRank)
    with pytest.raises(ValueError, match="no site 'third'; nearest: first"):
        measure(subject, [rows], moments=Moments(sites=("third",)))


def test_the_pass_ends_once_the_implied_partition_no_longer_changes() -> None:
    network, rows = mlp(), mlp_rows(240, positions=3)
    rows.inputs[..., 0] += 3 * (rows.categories == 0)[:, None]
    rows.inputs[..., 1] += 3 * (rows.categories == 1)[:, None]
    subject = Subject(network, tuple(MLP_SITES), NAMES, nats)
    batches = batched(rows.inputs, rows.targets, rows.categories, 6)
    looks: list[int] = []

    def reduce(tensors: object) -> None:
        looks.append(1)

    early = measure(subject, batches, stability=Stability(strongest_category, 0.9, 2, every=4, reduce=reduce))
    assert len(looks) * 24 == early.rows.sum() < 240
    whole = measure(subject, batches)
    ends = strongest_category(early), strongest_category(whole)
    agree = sum(int((ends[0][site] == ends[1][site]).sum()) for site in ends[0])
    assert agree >= 11  # of 14 units
    never = measure(subject, batches, stability=Stability(lambda t: {"x": t.rows}, 1.0, 2, every=4))
    assert never.rows.sum() == 240


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Stability(strongest_category, every=0), "at least 1, got 2 and 0"),
        (lambda: Stability(strongest_category, patience=0), "at least 1, got 0 and 4"),
        (lambda: Stability(strongest_category, agreement=2.0), "0 to 1, got 2.0"),
        (lambda: Moments(-1), "columns must be at least 1, got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_readers_without_a_weight_matrix_are_refused_when_moments_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"site 's': the reader 'r' is a Sequential; .* need nn.Linear"):
        output_weight(nn.Sequential(), Site("s", "r", 3))
    with pytest.raises(ValueError, match="width 2; a unit has at least one feature, a channel exactly one"):
        Site("s", "r", 3, width=2, spatial=True)
    assert [site.features for site in LLAMA_SITES] == [12, 12]
