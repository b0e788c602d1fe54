import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attribution import interactions
from attribution.interactions import Interaction, Neighbours, measure_interactions
from attribution.sites import Site
from attribution.subject import Rows, Subject

NAMES = ("a", "b", "c")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 6)
        self.up2, self.down2 = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... classes"]:
        return self.down2(torch.relu(self.up2(self.down(torch.tanh(self.up(x))))))


MLP_SITES = (Site("first", "down", 8), Site("second", "down2", 9))


def nats(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(outputs), -1).sum(1)


def mlp_subject() -> Subject:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Subject(Mlp().double(), MLP_SITES, NAMES, nats)


def mlp_rows(rows: int = 12, positions: int = 3) -> Rows:
    generator = torch.Generator().manual_seed(5)
    return Rows(
        torch.randn(rows, positions, 5, generator=generator, dtype=torch.float64),
        torch.randint(4, (rows, positions), generator=generator),
        torch.arange(rows) * 3 // rows,
        torch.arange(rows),
    )


def subject_of_units(units: int, width: int = 1) -> Subject:
    """A network whose units' activations are its inputs."""
    network = nn.Sequential(nn.Identity(), nn.Linear(units * width, 1)).double()
    return Subject(network, (Site("s", "1", units, width),), ("all",), lambda outputs, _: outputs.sum(-1))


def rows_of(activation_TF: Tensor) -> Rows:
    number = len(activation_TF)
    nothing = torch.zeros(number, dtype=torch.int64)
    return Rows(activation_TF, nothing, nothing, torch.arange(number))


def found(batches: Sequence[Tensor], k: int, oversample: int = 1, width: int = 1) -> Neighbours:
    """Neighbours by co-activation of activations that are given."""
    subject = subject_of_units(batches[0].shape[1] // width, width)
    return measure_interactions(subject, [rows_of(some) for some in batches], k=k, oversample=oversample)["s"]


def dense(strength_TU: Tensor) -> Tensor:
    """The slow oracle: all pairs, token by token."""
    sums_UU = torch.zeros(strength_TU.shape[1], strength_TU.shape[1], dtype=torch.float64)
    for strength_U in strength_TU.double():
        sums_UU += torch.outer(strength_U, strength_U)
    return sums_UU.fill_diagonal_(0)


def as_dense(neighbours: Neighbours) -> Tensor:
    return torch.zeros(neighbours.units, neighbours.units, dtype=torch.float64).scatter_add_(
        1, neighbours.index, neighbours.lower
    )


def check_bounds(neighbours: Neighbours, true_UU: Tensor) -> None:
    slack = 1e-12 * float(1 + true_UU.max())
    slots = neighbours.index.shape[1]
    torch.testing.assert_close(neighbours.totals, true_UU.sum(1), rtol=1e-12, atol=slack)
    assert bool((neighbours.bound * (slots + 1) <= neighbours.totals + slack).all())
    absent = torch.ones_like(true_UU, dtype=torch.bool)
    for u in range(neighbours.units):
        full = neighbours.lower[u] > 0
        numbers = neighbours.index[u]
        assert numbers[~full].tolist() == [u] * int((~full).sum())
        assert neighbours.upper[u][~full].tolist() == [0] * int((~full).sum())
        assert len(set(numbers[full].tolist()) | {u}) == int(full.sum()) + 1
        true = true_UU[u, numbers[full]]
        lower, upper = neighbours.lower[u][full], neighbours.upper[u][full]
        assert bool((lower <= true + slack).all())
        assert bool((true <= upper + slack).all())
        assert bool((upper <= lower + neighbours.bound[u] + slack).all())
        absent[u, numbers[full]] = False
    assert bool((true_UU.masked_fill(~absent, 0) <= neighbours.bound.unsqueeze(1) + slack).all())


def heavy_tailed(seed: int, tokens: int, units: int) -> Tensor:
    """Activations with a few huge values, zeros and ties, and units that come and go."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, units, generator=generator, dtype=torch.float64)
    values = values * torch.rand(tokens, units, generator=generator, dtype=torch.float64).pow(-0.7).clamp(max=1e4)
    values[torch.rand(tokens, units, generator=generator) < 0.4] = 0
    if seed % 3 == 0:
        values = values.clamp(-2, 2).round()
    return values * (torch.arange(tokens)[:, None] // 5 + torch.arange(units) % 4 != 2)


@pytest.mark.parametrize("kind", ["coactivation", "attribution"])
def test_with_a_slot_for_every_other_unit_all_sums_are_exact(kind: Interaction) -> None:
    subject, rows = mlp_subject(), mlp_rows()
    batches = [rows.take(slice(0, 5)), rows.take(slice(5, 5)), rows.take(slice(5, 12))]
    result = measure_interactions(subject, batches, k=4, oversample=2, kind=kind)
    for name, strengths in strengths_by_row(subject, rows, kind).items():
        neighbours = result[name]
        assert neighbours.exact
        assert (neighbours.kind, neighbours.tokens, neighbours.rows) == (kind, 36, 12)
        true_UU = dense(strengths)
        torch.testing.assert_close(as_dense(neighbours), true_UU, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(neighbours.totals, true_UU.sum(1), rtol=1e-12, atol=1e-15)
        assert torch.equal(neighbours.lower, neighbours.upper)
        check_bounds(neighbours, true_UU)


def strengths_by_row(subject: Subject, rows: Rows, kind: Interaction) -> dict[str, Tensor]:
    """One row at a time, the network cut open by hand."""
    network = subject.network
    assert isinstance(network, Mlp)
    strengths: dict[str, list[Tensor]] = {"first": [], "second": []}
    for x, targets in zip(rows.inputs, rows.targets, strict=True):
        first = torch.tanh(network.up(x))
        second = torch.relu(network.up2(network.down(first)))
        loss = F.cross_entropy(network.down2(second), targets, reduction="sum")
        gradients = torch.autograd.grad(loss, (first, second))
        for name, a, g in zip(strengths, (first, second), gradients, strict=True):
            strengths[name].append((a if kind == "coactivation" else a * g).detach().abs())
    return {name: torch.cat(parts) for name, parts in strengths.items()}


def test_one_site_can_be_asked_for_alone_and_the_order_of_categories_does_not_matter() -> None:
    subject, rows = mlp_subject(), mlp_rows()
    whole = measure_interactions(subject, [rows], k=8, kind="attribution")
    shuffled = rows.take(torch.randperm(12, generator=torch.Generator().manual_seed(1)))
    alone = measure_interactions(subject, [shuffled], k=8, kind="attribution", sites=["second"])
    assert list(alone) == ["second"]
    torch.testing.assert_close(as_dense(alone["second"]), as_dense(whole["second"]), rtol=1e-12, atol=1e-15)


@given(
    seed=st.integers(0, 10_000),
    units=st.integers(1, 14),
    slots=st.integers(1, 8),
    batches=st.lists(st.integers(1, 6), min_size=1, max_size=12),
)
@settings(max_examples=80, deadline=None)
def test_bounds_hold_on_heavy_tailed_data_in_many_small_batches(
    seed: int, units: int, slots: int, batches: list[int]
) -> None:
    values = heavy_tailed(seed, sum(batches), units)
    neighbours = found(values.split(batches), k=1, oversample=slots)
    check_bounds(neighbours, dense(values.abs()))
    assert neighbours.exact or slots < units - 1


@given(
    seed=st.integers(0, 10_000),
    units=st.integers(1, 14),
    slots=st.integers(1, 8),
    shards=st.integers(2, 6),
)
@settings(max_examples=60, deadline=None)
def test_bounds_hold_after_shards_are_merged_in_any_order_and_nesting(
    seed: int, units: int, slots: int, shards: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = heavy_tailed(seed, 8 * shards, units)
    parts = [found(some.split(3), k=1, oversample=slots) for some in values.split(8)]
    while len(parts) > 1:
        one = parts.pop(int(torch.randint(len(parts), (), generator=generator)))
        other = parts.pop(int(torch.randint(len(parts), (), generator=generator)))
        parts.append(one + other)
    check_bounds(parts[0], dense(values.abs()))
    assert (parts[0].tokens, parts[0].rows) == (8 * shards, 8 * shards)
    if slots >= units - 1:
        torch.testing.assert_close(as_dense(parts[0]), dense(values.abs()), rtol=1e-12, atol=1e-12)


def test_merging_two_shards_by_hand() -> None:
    # Unit 0 with a slot for one neighbour: 3 x unit 1 and 1 x unit 2 leave a counter of 2 and a bound of 1.
    one = found([torch.tensor([[1.0, 3, 1, 0]], dtype=torch.float64)], k=1)
    assert (one.index[0].tolist(), one.lower[0].tolist(), one.upper[0].tolist()) == ([1], [3], [3])
    assert one.bound[0] == 1
    # 4 x unit 2 and 1 x unit 3: a counter of 3, a bound of 1. Together 3 against 2: unit 2, in at most 4 + 1.
    other = found([torch.tensor([[1.0, 0, 4, 1]], dtype=torch.float64)], k=1)
    both = one + other
    assert (both.index[0].tolist(), both.lower[0].tolist(), both.upper[0].tolist()) == ([2], [4], [5])
    assert (both.bound[0], both.totals[0]) == (4, 9)


def test_pairs_heavier_than_the_rest_are_found_with_close_sums() -> None:
    units, tokens = 120, 3000
    generator = torch.Generator().manual_seed(0)
    cluster = torch.randperm(units, generator=generator) % 20
    on = torch.rand(tokens, 20, generator=generator, dtype=torch.float64) < 0.1
    values = torch.rand(tokens, units, generator=generator, dtype=torch.float64) * (0.05 + on[:, cluster])
    neighbours = found(values.split(250), k=5, oversample=4)
    assert not neighbours.exact
    true_UU = dense(values)
    check_bounds(neighbours, true_UU)
    rows, columns = neighbours.top().nonzero()
    assert len(rows) == 5 * units
    assert bool((cluster[rows] == cluster[columns]).all())
    got = torch.from_numpy(neighbours.top().toarray())
    torch.testing.assert_close(got[rows, columns], true_UU[rows, columns], rtol=1e-9, atol=0)


def test_a_pair_above_the_share_of_a_slot_is_never_missed() -> None:
    # Whatever is above totals / (slots + 1) is above the bound, so it must have a slot.
    for seed in range(30):
        values = heavy_tailed(seed, 40, 20)
        neighbours = found(values.split(2), k=3)
        true_UU = dense(values.abs())
        heavy = true_UU > neighbours.totals.unsqueeze(1) / 4 * (1 + 1e-9)
        assert bool((as_dense(neighbours)[heavy] > 0).all())


def test_top_and_symmetric_are_sparse_matrices_of_the_heaviest() -> None:
    neighbours = found([torch.tensor([[1.0, 4, 2, 0]], dtype=torch.float64)], k=1, oversample=3)
    # All pairs: 01 4, 02 2, 12 8; unit 3 has none.
    assert neighbours.exact
    assert neighbours.top().toarray().tolist() == [[0, 4, 0, 0], [0, 0, 8, 0], [0, 8, 0, 0], [0, 0, 0, 0]]
    assert neighbours.top(2).toarray().tolist() == [[0, 4, 2, 0], [4, 0, 8, 0], [2, 8, 0, 0], [0, 0, 0, 0]]
    larger, added = neighbours.symmetric(), neighbours.symmetric("sum")
    assert larger.toarray().tolist() == [[0, 4, 0, 0], [4, 0, 8, 0], [0, 8, 0, 0], [0, 0, 0, 0]]
    assert added.toarray().tolist() == [[0, 4, 0, 0], [4, 0, 16, 0], [0, 16, 0, 0], [0, 0, 0, 0]]
    for matrix in (larger, added, neighbours.top()):
        assert matrix.format == "csr"
        assert matrix.has_sorted_indices
        assert matrix.has_canonical_format
        assert (matrix.data > 0).all()
    with pytest.raises(ValueError, match="k must be 1 to 3, the neighbours kept, got 4"):
        neighbours.top(4)


def test_a_wide_unit_has_the_norm_of_its_features_and_the_inner_product_with_the_gradient() -> None:
    values = torch.randn(9, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    neighbours = found([values[:4], values[4:]], k=3, width=3)
    torch.testing.assert_close(as_dense(neighbours), dense(values.view(9, 4, 3).norm(dim=2)), rtol=1e-12, atol=1e-15)
    subject = subject_of_units(4, 3)
    weight = subject.network.get_submodule("1").weight.detach().view(4, 3)
    got = measure_interactions(subject, [rows_of(values)], k=3, kind="attribution")["s"]
    wanted = dense((values.view(9, 4, 3) * weight).sum(2).abs())
    torch.testing.assert_close(as_dense(got), wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["coactivation", "attribution"])
def test_a_channel_is_a_unit_over_its_whole_map(kind: Interaction) -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x))).mean((2, 3))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Conv().double()
        inputs = torch.randn(7, 2, 6, 6, dtype=torch.float64)
    rows = Rows(inputs, torch.arange(7) % 3, torch.zeros(7, dtype=torch.int64), torch.arange(7))
    subject = Subject(network, (Site("s", "two", 6, spatial=True),), ("all",), nats)
    neighbours = measure_interactions(subject, [rows.take(slice(0, 3)), rows.take(slice(3, 7))], k=5, kind=kind)["s"]
    strengths = []
    for x, target in zip(inputs, rows.targets, strict=True):
        a = torch.relu(network.one(x[None]))
        (g,) = torch.autograd.grad(F.cross_entropy(network.two(a).mean((2, 3)), target[None]), a)
        strengths.append(a[0].flatten(1).norm(dim=1) if kind == "coactivation" else (a * g)[0].sum((1, 2)).abs())
    true_UU = dense(torch.stack(strengths).detach())
    torch.testing.assert_close(as_dense(neighbours), true_UU, rtol=1e-12, atol=1e-15)
    assert neighbours.tokens == 7


def test_units_cut_into_blocks_give_the_same_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = heavy_tailed(4, 30, 17)
    whole = found(values.split(6), k=3)
    monkeypatch.setattr(interactions, "_ELEMENTS", 17 * 5)
    blocks = found(values.split(6), k=3)
    for a, b in zip((whole.lower, whole.upper, whole.bound), (blocks.lower, blocks.upper, blocks.bound), strict=True):
        torch.testing.assert_close(a.sort(-1).values, b.sort(-1).values, rtol=1e-12, atol=1e-12)


def test_the_same_pass_twice_gives_the_same_bits() -> None:
    values = heavy_tailed(3, 60, 40)
    one, two = (found(values.split(7), k=4) for _ in range(2))
    for field in ("index", "lower", "upper", "totals", "bound"):
        assert torch.equal(getattr(one, field), getattr(two, field)), field


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that was made meanwhile."""

    numel = 0

    def __torch_dispatch__(  # type: ignore[override]
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        made = func(*args, **(kwargs or {}))  # type: ignore[operator]
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize("kind", ["coactivation", "attribution"])
def test_no_tensor_of_all_pairs_is_ever_made(kind: Interaction, monkeypatch: pytest.MonkeyPatch) -> None:
    units, slots = 4000, 8
    monkeypatch.setattr(interactions, "_ELEMENTS", 2**18)
    subject = subject_of_units(units)
    values = torch.randn(4, 10, units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with Largest() as seen:
        shards = [
            measure_interactions(subject, [rows_of(some)], k=2, oversample=4, kind=kind)["s"] for some in values[:2]
        ]
        both = shards[0] + shards[1]
        both.symmetric()
    assert seen.numel <= max(2**18, 2 * units * slots, values.numel())
    assert seen.numel < units**2 // 50
    assert both.index.shape == (units, slots)


def test_values_that_are_not_finite_are_refused_with_site_and_category() -> None:
    subject, rows = mlp_subject(), mlp_rows()
    rows.inputs[5, 1] = torch.nan
    with pytest.raises(ValueError, match="site 'first' has a NaN or infinite activation on category 'b'"):
        measure_interactions(subject, [rows])
    with pytest.raises(ValueError, match="has a NaN or infinite activation or gradient on category 'b'"):
        measure_interactions(subject, [rows], kind="attribution")

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        return nats(outputs, targets) * torch.where(torch.arange(12) == 11, torch.inf, 1.0)

    broken_subject = Subject(subject.network, MLP_SITES, NAMES, broken)
    with pytest.raises(ValueError, match="site 'second' has a NaN or infinite activation or gradient on category 'c'"):
        measure_interactions(broken_subject, [mlp_rows()], kind="attribution")


def test_the_network_is_left_as_it_was_even_after_an_error() -> None:
    subject, rows = mlp_subject(), mlp_rows()
    network = subject.network.train()
    network.get_parameter("up.weight").requires_grad_(False)
    weight = network.get_parameter("up2.weight")
    weight.grad = torch.ones_like(weight)

    def state() -> tuple[object, ...]:
        return (
            [module.training for module in network.modules()],
            [parameter.requires_grad for parameter in network.parameters()],
            [None if parameter.grad is None else parameter.grad.tolist() for parameter in network.parameters()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()],
        )

    before = state()
    kinds: tuple[Interaction, ...] = ("coactivation", "attribution")
    for kind in kinds:
        measure_interactions(subject, [rows], kind=kind)
        assert state() == before
    rows.inputs[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        measure_interactions(subject, [rows], kind="attribution")
    assert state() == before


def test_bad_input_is_refused_with_its_place_and_the_way_out() -> None:
    subject, rows = mlp_subject(), mlp_rows()
    with pytest.raises(ValueError, match="k and oversample must be at least 1, got 0 and 4"):
        measure_interactions(subject, [rows], k=0)
    with pytest.raises(ValueError, match="no sites to measure"):
        measure_interactions(subject, [rows], sites=[])
    with pytest.raises(ValueError, match="no site 'frist'; nearest: first"):
        measure_interactions(subject, [rows], sites=["frist"])
    with pytest.raises(ValueError, match="no batches"):
        measure_interactions(subject, [rows.take(slice(0, 0))])
    wrong = Subject(subject.network, (Site("s", "down", 7),), NAMES, nats)
    with pytest.raises(ValueError, match=r"site 's' has 7 units .* must be .12 ... 7., got .12, 3, 8."):
        measure_interactions(wrong, [rows])
    unread = Subject(subject.network, MLP_SITES, NAMES, nats, run=lambda x, _: x)
    with pytest.raises(ValueError, match="did not run in forward"):
        measure_interactions(unread, [rows])
    network = subject.network
    twice = Subject(network, MLP_SITES, NAMES, nats, run=lambda x, _: network(x) + network(x))
    with pytest.raises(ValueError, match="more than once"):
        measure_interactions(twice, [rows])
    deaf = Subject(network, MLP_SITES, NAMES, nats, run=lambda x, _: network(x).detach())
    with pytest.raises(ValueError, match="does not depend on the units of site 'first'"):
        measure_interactions(deaf, [rows], kind="attribution")
    shards = measure_interactions(subject, [rows], k=2), measure_interactions(subject, [rows], k=3)
    for one, other in itertools.permutations(shards):
        with pytest.raises(ValueError, match="different"):
            one["first"] + other["first"]
