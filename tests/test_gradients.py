import hashlib
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attribution import gradients
from attribution.gradients import GradientSketch, measure_gradients
from attribution.hashing import row_seed
from attribution.sites import Site
from attribution.subject import Rows, Subject

NAMES = ("a", "b", "c")
LARGE = 2**18
"""So many buckets that the few elements of these networks hardly meet."""


class Mlp(nn.Module):
    def __init__(self, backwards: bool = False) -> None:
        super().__init__()
        layers = {"up": nn.Linear(5, 8), "down": nn.Linear(8, 4)}
        for name in sorted(layers, reverse=not backwards):
            self.add_module(name, layers[name])

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... classes"]:
        return self.get_submodule("down")(torch.tanh(self.get_submodule("up")(x)))


def nats(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(outputs), -1).sum(1)


def mlp(backwards: bool = False) -> Mlp:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        weights = {k: torch.randn_like(p, dtype=torch.float64) for k, p in sorted(Mlp().named_parameters())}
        network = Mlp(backwards).double()
    network.load_state_dict(weights)
    return network


def subject_of(network: nn.Module, site: Site | None = None) -> Subject:
    return Subject(network, (site or Site("s", "down", 8),), NAMES, nats)


def mlp_rows(rows: int = 60, positions: int = 2) -> Rows:
    generator = torch.Generator().manual_seed(5)
    categories = torch.arange(rows) * 3 // rows
    inputs = torch.randn(rows, positions, 5, generator=generator, dtype=torch.float64)
    inputs += categories.double().sub(1)[:, None, None]
    return Rows(
        inputs,
        torch.randint(4, (rows, positions), generator=generator),
        categories,
        torch.randperm(rows, generator=generator) + 100,
    )


def row_gradients(network: nn.Module, rows: Rows) -> Tensor:
    """The slow oracle: each row's whole gradient, laid end to end by the parameters' names."""
    parameters = [p for _, p in sorted(network.named_parameters()) if p.requires_grad]
    found = []
    for x, target in zip(rows.inputs, rows.targets, strict=True):
        parts = torch.autograd.grad(nats(network(x[None]), target[None]).sum(), parameters)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


def exact_products(gradient_RX: Tensor, rows: Rows, folds: int, seed: int = 0) -> Tensor:
    """Mean inner product over all pairs of rows of different folds, pair by pair."""
    fold = [row_seed(seed, row) % folds for row in rows.ids.tolist()]
    category = rows.categories.tolist()
    products_RR = gradient_RX @ gradient_RX.T
    sums, pairs = torch.zeros(2, 3, 3, dtype=torch.float64)
    for i in range(len(fold)):
        for j in range(len(fold)):
            if fold[i] != fold[j]:
                sums[category[i], category[j]] += products_RR[i, j]
                pairs[category[i], category[j]] += 1
    return sums / pairs


def cosine(products_CC: Tensor) -> Tensor:
    norms_C = products_CC.diagonal().sqrt()
    return products_CC / torch.outer(norms_C, norms_C)


def test_without_collisions_cosines_and_norms_are_those_of_all_pairs_of_rows_of_different_folds() -> None:
    network, rows = mlp(), mlp_rows()
    sketch = measure_gradients(subject_of(network), [rows], size=LARGE, folds=4)
    wanted_CC = exact_products(row_gradients(network, rows), rows, 4)
    assert int((sketch.sums.abs().sum((0, 1)) != 0).sum()) == sketch.parameters == 84
    torch.testing.assert_close(sketch.squared_norms(), wanted_CC.diagonal(), rtol=1e-9, atol=0)
    torch.testing.assert_close(sketch.cosines(), cosine(wanted_CC).clamp(-1, 1), rtol=1e-9, atol=1e-12)
    assert sketch.counts.sum(0).tolist() == [20, 20, 20]


def test_every_element_goes_to_its_bucket_with_its_sign() -> None:
    """Hashed anew in Python's whole numbers."""
    network, rows, size, seed = mlp(), mlp_rows(6), 13, 5
    sketch = measure_gradients(subject_of(network), [rows], size=size, folds=2, seed=seed)
    wanted = torch.zeros(2, 3, size, dtype=torch.float64)
    full = 2**64 - 1
    for r, row in enumerate(rows.ids.tolist()):
        network.zero_grad()
        nats(network(rows.inputs[r : r + 1]), rows.targets[r : r + 1]).sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            key = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "big")
            for place, value in enumerate(parameter.grad.flatten().tolist()):
                mixed = (place * 0x9E3779B97F4A7C15 + key) & full
                mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & full
                mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & full
                mixed = (mixed ^ (mixed >> 31)) >> 2
                sign = -1 if mixed & 1 else 1
                wanted[row_seed(seed, row) % 2, rows.categories[r], (mixed >> 1) % size] += sign * value
    torch.testing.assert_close(sketch.sums, wanted, rtol=1e-9, atol=1e-12)


def test_hashes_do_not_depend_on_how_a_gradient_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    network, rows = mlp(), mlp_rows()
    whole = measure_gradients(subject_of(network), [rows], size=64)
    monkeypatch.setattr(gradients, "_CHUNK", 7)
    torch.testing.assert_close(measure_gradients(subject_of(network), [rows], size=64).sums, whole.sums)


def test_a_sketch_is_off_by_no_more_than_its_size_allows() -> None:
    network, size = mlp(), 256
    three = mlp_rows(3)
    rows = three.take(torch.arange(48) // 16)  # The same row again and again: gradients without noise.
    rows = Rows(rows.inputs, rows.targets, rows.categories, torch.arange(48))
    gradient_CX = row_gradients(network, three)
    true_CC = cosine(gradient_CX @ gradient_CX.T)
    above = torch.triu_indices(3, 3, 1).unbind()
    errors = []
    for seed in range(30):
        sketch = measure_gradients(subject_of(network), [rows], size=size, folds=2, seed=seed)
        errors.append((sketch.cosines() - true_CC)[above])
    scaled = torch.stack(errors) * size**0.5 / (1 - true_CC[above].square())
    assert bool((true_CC[above].abs() < 0.95).all())
    assert 0.3 < float(scaled.square().mean().sqrt()) < 1.15
    assert float(scaled.mean().abs()) < 0.25
    assert float(scaled.abs().max()) < 4


def test_sketches_of_shards_add_up_and_batches_and_the_order_of_rows_do_not_matter() -> None:
    network, rows = mlp(), mlp_rows()
    subject = subject_of(network)
    whole = measure_gradients(subject, [rows])
    shuffled = rows.take(torch.randperm(60, generator=torch.Generator().manual_seed(1)))
    in_batches = measure_gradients(subject, [shuffled.take(slice(at, at + 13)) for at in range(0, 78, 13)])
    shards = [measure_gradients(subject, [rows.take(slice(rank, None, 3))]) for rank in range(3)]
    for other in (in_batches, shards[0] + shards[1] + shards[2]):
        torch.testing.assert_close(other.sums, whole.sums, rtol=1e-9, atol=1e-12)
        assert torch.equal(other.counts, whole.counts)
        torch.testing.assert_close(other.cosines(), whole.cosines(), rtol=1e-9, atol=1e-12)
    for mine, other in zip(shards[0].tensors(), shards[1].tensors(), strict=True):
        mine += other  # As an all-reduce does.
    torch.testing.assert_close((shards[0] + shards[2]).cosines(), whole.cosines(), rtol=1e-9, atol=1e-12)


def test_the_order_of_parameters_and_the_name_of_a_wrapper_do_not_matter() -> None:
    network, other, rows = mlp(), mlp(backwards=True), mlp_rows()
    assert [k for k, _ in network.named_parameters()] != [k for k, _ in other.named_parameters()]
    one = measure_gradients(subject_of(network), [rows])
    torch.testing.assert_close(measure_gradients(subject_of(other), [rows]).sums, one.sums, rtol=1e-9, atol=1e-12)


def test_frozen_parameters_take_no_part_and_nothing_is_left_changed() -> None:
    network, rows = mlp().train(), mlp_rows()
    up, down = (network.get_parameter(name) for name in ("up.weight", "down.bias"))
    down.requires_grad_(False)
    up.grad = torch.ones_like(up)
    subject = subject_of(network)
    with torch.no_grad():
        sketch = measure_gradients(subject, [rows], size=LARGE, folds=4)
    assert sketch.parameters == 80
    wanted_CC = exact_products(row_gradients(network, rows), rows, 4)
    torch.testing.assert_close(sketch.cosines(), cosine(wanted_CC).clamp(-1, 1), rtol=1e-9, atol=1e-12)
    rows.inputs[30] = torch.nan
    with pytest.raises(ValueError, match=r"parameter 'up.weight' has a NaN or infinite gradient on category 'b'"):
        measure_gradients(subject, [rows])
    assert [k for k, p in network.named_parameters() if not p.requires_grad] == ["down.bias"]
    assert [k for k, p in network.named_parameters() if p.grad is not None] == ["up.weight"]
    assert torch.equal(up.grad, torch.ones_like(up))
    assert network.training


def test_a_parameter_in_two_places_counts_once_with_both_gradients() -> None:
    network, rows = mlp(), mlp_rows()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rest = [nn.Linear(8, 5), nn.Linear(5, 8), nn.Linear(8, 4)]
    tied = nn.Sequential(network.get_submodule("up"), nn.Tanh(), *rest)
    tied.double()[3].weight = tied[0].weight  # type: ignore[union-attr]
    sketch = measure_gradients(subject_of(tied, Site("s", "4", 8)), [rows], size=LARGE, folds=4)
    assert sketch.parameters == 40 + 8 + 45 + 8 + 36
    wanted_CC = exact_products(row_gradients(tied, rows), rows, 4)
    torch.testing.assert_close(sketch.squared_norms(), wanted_CC.diagonal(), rtol=1e-9, atol=1e-12)


MEANS = cosine(torch.tensor([[1, 0.6, -0.3], [0.6, 1, 0.2], [-0.3, 0.2, 1]], dtype=torch.float64))


def noisy(seed: int, rows: int, noise: float, size: int) -> GradientSketch:
    """A linear network, so that a row's gradient is the row: its category's mean, cosines ``MEANS``, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(200, 3, generator=generator, dtype=torch.float64))
    mean_CX = torch.linalg.cholesky(MEANS) @ basis.T
    categories = torch.arange(3).repeat_interleave(rows)
    inputs = noise / 200**0.5 * torch.randn(3 * rows, 200, generator=generator, dtype=torch.float64)
    batch = Rows(mean_CX[categories] + inputs, categories, categories, torch.arange(3 * rows))
    network = nn.Sequential(nn.Linear(200, 1, bias=False)).double()
    subject = Subject(network, (Site("s", "0", 200),), NAMES, lambda outputs, _: outputs.sum(1))
    return measure_gradients(subject, [batch], size=size, seed=seed)


def test_noise_does_not_shorten_cosines() -> None:
    folded, plain = [], []
    for seed in range(12):
        sketch = noisy(seed, rows=40, noise=5.0, size=4096)
        folded.append(sketch.cosines())
        mean_CS = sketch.sums.sum(0) / sketch.counts.sum(0).unsqueeze(1)
        plain.append(cosine(mean_CS @ mean_CS.T))
        torch.testing.assert_close(sketch.squared_norms(), torch.ones(3, dtype=torch.float64), rtol=0, atol=0.6)
    means = [torch.stack(found).mean(0)[0, 1] for found in (folded, plain)]
    assert means[0] == pytest.approx(0.6, abs=0.05)
    assert means[1] < 0.42


@pytest.mark.parametrize(
    ("noise", "size", "level", "least", "most"),
    [(3.0, 4096, 0.95, 0.92, 1), (0.1, 512, 0.95, 0.92, 1), (3.0, 4096, 0.5, 0.4, 0.65)],
)
def test_intervals_hold_the_true_cosine_about_as_often_as_they_say(
    noise: float, size: int, level: float, least: float, most: float
) -> None:
    above = torch.triu_indices(3, 3, 1).unbind()
    inside = []
    for seed in range(25):
        sketch = noisy(seed, rows=40, noise=noise, size=size)
        lower_CC, upper_CC = sketch.interval(level)
        assert bool((lower_CC <= sketch.cosines()).all() & (sketch.cosines() <= upper_CC).all())
        inside.append(((lower_CC <= MEANS) & (upper_CC >= MEANS))[above].double().mean())
    assert least <= float(torch.stack(inside).mean()) <= most


def test_an_interval_says_when_one_fold_decides() -> None:
    sums = torch.zeros(3, 2, 4, dtype=torch.float64)
    sums[:2, :, 0] = 1
    sums[0, 1, 1] = 1
    sketch = GradientSketch(("a", "b"), sums, torch.tensor([[1.0, 1], [1, 1], [0, 0]], dtype=torch.float64), 0, 4)
    lower_CC, upper_CC = sketch.interval()
    assert lower_CC.tolist() == [[1, -1], [-1, 1]]
    assert upper_CC.tolist() == [[1, 1], [1, 1]]


def test_bad_input_is_refused_with_the_way_out() -> None:
    network, rows = mlp(), mlp_rows()
    subject = subject_of(network)

    def refused(match: str, batches: Sequence[Rows], size: int = 64, folds: int = 4) -> None:
        with pytest.raises(ValueError, match=match):
            measure_gradients(subject, batches, size=size, folds=folds)

    refused("size must be at least 1 and folds at least 2, got 0 and 4", [rows], size=0)
    refused("size must be at least 1 and folds at least 2, got 64 and 1", [rows], folds=1)
    refused("no batches", [])
    refused("no batches", [rows.take(slice(0, 0))])
    one = measure_gradients(subject, [rows.take(slice(0, 41))], size=64, folds=4)
    with pytest.raises(ValueError, match=r"category 'c' has 1 rows in 1 folds.*measure more rows of it"):
        one.cosines()
    with pytest.raises(ValueError, match="category 'c' has 1 rows"):
        one.squared_norms()
    with pytest.raises(ValueError, match="cannot add sketches of different"):
        one + measure_gradients(subject, [rows], size=64, folds=4, seed=1)
    whole = measure_gradients(subject, [rows], size=64, folds=4)
    with pytest.raises(ValueError, match=r"a level must be between 0 and 1, got 95\.0"):
        whole.interval(95.0)
    whole.sums[:, 1] = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64).unsqueeze(1)
    whole.counts.fill_(5)
    with pytest.raises(ValueError, match="the gradient of category 'b' cannot be told from noise over 20 rows"):
        whole.cosines()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    refused("no parameter has requires_grad", [rows])
    unused = nn.ModuleDict({"down": nn.Linear(8, 4), "rest": network}).double()
    silent = Subject(unused, (Site("s", "down", 8),), NAMES, nats, run=lambda x, _: network(x))
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        measure_gradients(silent, [rows])
