"""Random roots of the Fisher information, against the Fisher information itself, and against labels that are drawn."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from attribution.hashing import signs
from attribution.measure import Moments, measure
from attribution.roots import bernoulli_root, categorical_root, categorical_root_of
from attribution.sites import Site
from attribution.subject import IGNORED, Rows, Subject
from tests.subjects import close, nats, sample, subject_of

CPU = torch.device("cpu")


def fisher_of_classes(logits: Tensor) -> Tensor:
    """The mean over classes y of (p - y) (p - y)^T, class by class."""
    chance = logits.softmax(-1)
    off = chance - torch.eye(len(logits), dtype=logits.dtype)
    return torch.einsum("y,yi,yj->ij", chance, off, off)


@pytest.mark.parametrize("scale", [0.3, 3, 30])
def test_over_all_signs_the_second_moment_of_a_root_is_the_fisher_information(scale: float) -> None:
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    every = torch.tensor(list(product([1.0, -1.0], repeat=6)), dtype=torch.float64)
    roots = categorical_root_of(logits.expand(64, -1), every)
    close(roots.mT @ roots / 64, fisher_of_classes(logits))
    assert float(roots.sum(-1).abs().max()) < 1e-12


def test_drawn_roots_have_that_second_moment_within_their_noise() -> None:
    rows = 40_000
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5])
    root = categorical_root(logits.expand(rows, 1, 4), range(rows))[:, 0].double()
    torch.testing.assert_close(root.mT @ root / rows, fisher_of_classes(logits.double()), rtol=0, atol=0.01)
    root = bernoulli_root(logits.expand(rows, 4), range(rows)).double()
    chance = logits.double().sigmoid()
    torch.testing.assert_close(root.mT @ root / rows, torch.diag(chance * (1 - chance)), rtol=0, atol=0.01)


def test_positions_and_rows_are_independent() -> None:
    outputs = torch.zeros(2000, 3, 2)
    found = categorical_root(outputs, range(2000))[..., 0]
    kept = found[found.abs().sum(1) > 0].sign()
    assert float((kept[:, 0] * kept[:, 1]).mean().abs()) < 0.1
    assert float((kept[:-1, 2] * kept[1:, 2]).mean().abs()) < 0.1


def test_a_seed_gives_the_same_root_wherever_its_row_is() -> None:
    outputs = torch.randn(5, 3, 70, generator=torch.Generator().manual_seed(0))
    seeds = [2**63 - 1, 0, 7, 2**62, 12345]
    part = [4, 1]
    assert torch.equal(signs([seeds[row] for row in part], 70, CPU), signs(seeds, 70, CPU)[part])
    for root in (categorical_root, bernoulli_root):
        whole = root(outputs, seeds)
        alone = root(outputs[part], [seeds[row] for row in part])
        assert torch.equal(alone.sign(), whole[part].sign())
        assert_close(alone, whole[part], rtol=1e-6, atol=1e-7)  # a tail of a vector register is rounded otherwise
        assert not torch.allclose(root(outputs, seeds[::-1]), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_and_at_the_end(dtype: torch.dtype) -> None:
    outputs = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    for root in (categorical_root, bernoulli_root):
        assert torch.equal(root(outputs, [1, 2, 3]), root(outputs.float(), [1, 2, 3]).to(dtype))
    assert bool(categorical_root(outputs * 1000, [1, 2, 3]).isfinite().all())


def test_signs_are_fair_and_do_not_hang_together() -> None:
    found = signs(range(1000), 200, CPU)
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    noise = 5 / 1000**0.5
    assert float(found.mean().abs()) < noise / 10
    assert float((found.mT @ found / 1000 - torch.eye(200)).abs().max()) < noise
    assert float((found @ found.mT / 200).fill_diagonal_(0).abs().max()) < 6 / 200**0.5
    assert torch.equal(signs([3], 100, CPU)[:, :33], signs([3], 33, CPU))


def sure(logit: float) -> tuple[Subject, list[Rows]]:
    """A classifier that is sure of a class of ten in each of its rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Identity(), nn.Linear(10, 10)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.eye(10) * logit + 0.1 * torch.randn(10, 10))
    labels = torch.arange(200) % 10
    inputs = F.one_hot(labels, 10).double() + 0.1
    rows = Rows(inputs, labels, torch.zeros(200, dtype=torch.int64), torch.arange(200))
    return Subject(network, (Site("s", "1", 10),), ("a",), nats, sample, root=categorical_root), [rows]


def exact_fisher(subject: Subject, rows: Rows) -> Tensor:
    """1/2 E[(g a)^2] over all labels, label by label."""
    total = torch.zeros(10, dtype=torch.float64)
    chance = subject.network(rows.inputs).softmax(-1).detach()
    for label in range(10):
        a = rows.inputs.clone().requires_grad_()
        loss = F.cross_entropy(subject.network(a), torch.full_like(rows.targets, label), reduction="sum")
        z = torch.autograd.grad(loss, a)[0] * rows.inputs
        total += (chance[:, label, None] * z.square() / 2).sum(0)
    return total / len(rows.ids)


def test_a_root_is_far_less_noisy_than_labels_where_the_model_is_sure() -> None:
    subject, (rows,) = sure(7.0)
    wanted = exact_fisher(subject, rows)
    labels = Subject(subject.network, subject.sites, subject.categories, nats, sample)
    roots, drawn = (
        torch.stack([measure(asked, [rows], seed=s).score("s", "fisher")[:, 0] for s in range(20)])
        for asked in (subject, labels)
    )
    assert bool(((roots.mean(0) - wanted).abs() < 5 * roots.std(0) / 20**0.5).all())
    assert float((roots - wanted).norm()) < float((drawn - wanted).norm()) / 3


@pytest.mark.parametrize("kind", ["mlp", "conv", "llama"])
def test_measured_from_roots_every_sum_is_as_from_labels_in_the_mean(kind: str) -> None:
    """Fisher information and curvature agree with those of many drawn labels; all other sums are the same bits."""
    subject, batches = subject_of(kind)
    rooted = Subject(subject.network, subject.sites, subject.categories, nats, sample, root=categorical_root)
    roots, labels = (measure(asked, batches, samples=400, moments=Moments()) for asked in (rooted, subject))
    for site in subject.sites:
        assert torch.equal(roots.score(site.name, "taylor"), labels.score(site.name, "taylor"))
        one, other = roots.score(site.name, "fisher"), labels.score(site.name, "fisher")
        assert float((one - other).abs().max()) < 0.15 * float(other.max())
        for category in subject.categories:
            pair = (table.curvature(site.name, category) for table in (roots, labels))
            one, other = (each for each in pair if isinstance(each, Tensor))
            assert float((one - other).norm()) < 0.2 * float(other.norm())
        close(roots.report(site.name), roots.score(site.name, "taylor") + roots.score(site.name, "fisher"))


def test_roots_do_not_depend_on_how_rows_are_dealt_out() -> None:
    subject, batches = subject_of("llama")
    rooted = Subject(subject.network, subject.sites, subject.categories, nats, root=categorical_root)
    whole = measure(rooted, batches, seed=5, samples=2)
    parts = [measure(rooted, [batch], seed=5, samples=2) for batch in batches]
    for one, other in zip(whole.tensors(), (parts[0] + parts[1]).tensors(), strict=True):
        close(one, other, 1e-11)
    other_seed = measure(rooted, batches, seed=6, samples=2)
    assert not torch.equal(other_seed.sites["layers.0.ffn"].fisher, whole.sites["layers.0.ffn"].fisher)


def test_positions_that_no_loss_asks_for_add_nothing() -> None:
    asked: list[Tensor] = []

    def root(outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        asked.append(categorical_root(outputs, seeds))
        return asked[-1]

    subject = Subject(nn.Linear(2, 3), (Site("s", "", 2),), ("a",), nats, sample, root=root)
    outputs, targets = torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
    targets[:, 1] = IGNORED
    drawn = subject.drawn(outputs, targets, [1, 2])
    assert not bool(drawn[:, 1].any())
    for place in (0, 2, 3):
        assert torch.equal(drawn[:, place], asked[0][:, place])
