import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradientXActivation
from jaxtyping import Float
from scipy.stats import spearmanr
from tables import empty_table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from attribution import scratch
from attribution.hashing import row_seed
from attribution.measure import Moments, measure
from attribution.sites import Site
from attribution.subject import Rows, Subject
from attribution.table import AttributionTable
from tests.subjects import NAMES, llama, nats, sample


class Mlp(nn.Module):
    def __init__(self, dim: int = 5, hidden: int = 7, classes: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, 6)
        self.up2 = nn.Linear(6, hidden)
        self.down2 = nn.Linear(hidden, classes)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... classes"]:
        x = self.down(torch.relu(self.up(x)))
        return self.down2(self.drop(torch.relu(self.up2(x))))


MLP_SITES = [Site("first", "down", 7), Site("second", "down2", 7)]


def mlp_rows(rows: int, positions: int | None = None) -> Rows:
    generator = torch.Generator().manual_seed(5)
    shape = (rows,) if positions is None else (rows, positions)
    return Rows(
        torch.randn(*shape, 5, generator=generator, dtype=torch.float64),
        torch.randint(4, shape, generator=generator),
        torch.arange(rows) * 3 // rows,
        torch.randperm(rows, generator=generator) + 100,
    )


def mlp() -> Mlp:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Mlp().double()


def measured(
    forward: Callable[[Tensor, Tensor], Tensor],
    network: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Rows],
    nats: Callable[[Tensor, Tensor], Tensor],
    sample: Callable[[Tensor, Sequence[int]], Tensor] | None,
    names: Sequence[str],
    seed: int = 0,
) -> AttributionTable:
    subject = Subject(network, tuple(sites), tuple(names), nats, sample, forward)
    return measure(subject, batches, seed=seed, moments=Moments())


def run_mlp(network: nn.Module, batches: Sequence[Rows], sites: Sequence[Site] = MLP_SITES) -> AttributionTable:
    return measured(lambda x, _: network(x), network, sites, batches, nats, sample, NAMES, seed=9)


LLAMA_SITES = [Site(f"layers.{i}.ffn", f"model.layers.{i}.mlp.down_proj", 12) for i in range(2)]


def llama_rows(rows: int) -> Rows:
    tokens = torch.randint(17, (rows, 9), generator=torch.Generator().manual_seed(1))
    return Rows(tokens[:, :-1], tokens[:, 1:], torch.arange(rows) * 3 // rows, torch.arange(rows))


def run_llama(network: LlamaForCausalLM, batches: Sequence[Rows]) -> AttributionTable:
    return measured(lambda x, _: network(x).logits, network, LLAMA_SITES, batches, nats, sample, NAMES, seed=4)


def oracle(network: Mlp, rows: Rows) -> AttributionTable:
    """Row by row, token by token, with the network cut open by hand."""
    network.eval()
    table = empty_table(NAMES, {"first": (7, 6), "second": (7, 4)})
    for r, c in enumerate(rows.categories.tolist()):
        x = rows.inputs[r]
        first = torch.relu(network.up(x))
        y1 = network.down(first)
        second = torch.relu(network.up2(y1))
        y2 = network.down2(second)
        y1.retain_grad()
        table.rows[c] += 1
        table.counts[c] += len(x)
        table.sampled[c] += len(x)
        drawn = sample(y2.detach()[None], [row_seed(9, int(rows.ids[r]))])
        spots = (first, second, y1, y2)
        loss = F.cross_entropy(y2, drawn[0], reduction="sum")
        sampled = torch.autograd.grad(loss, spots, retain_graph=True)
        true = torch.autograd.grad(F.cross_entropy(y2, rows.targets[r], reduction="sum"), spots[:2])
        for i, (name, a) in enumerate((("first", first.detach()), ("second", second.detach()))):
            sums = table.sites[name]
            inputs, outputs = (moment.tensors()[0] for moment in sums.moments)
            fisher, empirical, absolute, taylor = torch.zeros(4, 7, dtype=torch.float64)
            for t in range(len(x)):
                fisher += 0.5 * (sampled[i][t] * a[t]) ** 2
                empirical += 0.5 * (true[i][t] * a[t]) ** 2
                absolute += (true[i][t] * a[t]).abs()
                taylor -= true[i][t] * a[t]
                inputs[c] += torch.outer(a[t], a[t])
                outputs[c] += torch.outer(sampled[2 + i][t], sampled[2 + i][t])
                sums.rate[:, c] += (a[t] != 0).double()
                sums.total[:, c] += a[t]
                sums.power[:, c] += a[t] ** 2
            for kind, terms in (
                ("fisher", fisher), ("empirical", empirical), ("absolute", absolute), ("taylor", taylor)
            ):  # fmt: skip
                getattr(sums, kind)[:, c] += terms
                getattr(sums, f"{kind}_squares")[:, c] += terms**2
            sums.report[:, c] += taylor + fisher
            sums.report_squares[:, c] += (taylor + fisher) ** 2
    return table


def assert_equal(got: AttributionTable, wanted: AttributionTable, rtol: float = 1e-12) -> None:
    assert list(got.sites) == list(wanted.sites)
    for a, b in zip(got.tensors(), wanted.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-14 * float(1 + b.abs().max()))


@pytest.mark.parametrize("chunk", [2**18, 7 * 3 * 4, 1])
def test_sums_equal_an_oracle_that_goes_row_by_row_and_token_by_token(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_CHUNK", chunk)  # six rows are one part, four and two, or six
    network, rows = mlp(), mlp_rows(10, positions=3)
    assert_equal(run_mlp(network, [rows.take(slice(0, 6)), rows.take(slice(6, 10))]), oracle(network, rows))


def test_rows_without_positions_count_as_examples() -> None:
    network, rows = mlp(), mlp_rows(9)
    table = run_mlp(network, [rows])
    assert table.counts.tolist() == table.rows.tolist() == [3, 3, 3]
    single = Rows(rows.inputs[:, None], rows.targets[:, None], rows.categories, rows.ids)
    assert_equal(table, oracle(network, single))


def test_a_network_of_two_units_gives_the_numbers_worked_out_by_hand() -> None:
    """y = 3 a_1 - 2 a_2, loss = (y - t)^2 / 2; the model draws t = y + 1 or y - 1, so its g_y is -1 or +1."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(2, 1, bias=False)
            self.down.weight.data = torch.tensor([[3.0, -2.0]])

        def forward(self, x: Float[Tensor, "rows 2"]) -> Float[Tensor, "rows 1"]:
            return self.down(x)

    network = Two()
    rows = Rows(
        torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        torch.tensor([[1.0], [-6.0]]),
        torch.tensor([0, 1]),
        torch.tensor([0, 1]),
    )

    def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1) / 2

    def signs(outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        return outputs + torch.tensor([[1.0 if seed % 2 else -1.0] for seed in seeds])

    sites = [Site("s", "down", 2)]
    table = measured(lambda x, _: network(x), network, sites, [rows], half_squares, signs, ["a", "b"])
    # Row 1: y = -1, g_y = y - t = -2, g = (-6, 4), g a = (-6, 8). Row 2: y = -2, g_y = 4, g a = (0, -8).
    assert table.sites["s"].taylor.tolist() == [[6, 0], [-8, 8]]
    assert table.score("s", "absolute").tolist() == [[6, 0], [8, 8]]
    # Sampled labels: g = -+(3, -2), so (g a)^2 / 2 = (9, 16) / 2 and (0, 4) / 2.
    assert table.score("s", "fisher").tolist() == [[4.5, 0], [8, 2]]
    assert table.report("s").tolist() == [[10.5, 0], [0, 10]]
    # The loss is quadratic and its Hessian the Fisher information: report is the exact rise. Row 1 without unit 1:
    # y = -4, loss 12.5 from 2. Without unit 2: y = 3, loss 2 from 2. Row 2 without unit 2: y = 0, 18 from 8.
    inputs, outputs = (moment.tensors()[0] for moment in table.sites["s"].moments)
    assert outputs.flatten().tolist() == [1, 1]
    assert inputs.tolist() == [[[1, 2], [2, 4]], [[0, 0], [0, 1]]]
    assert table.dead("s").tolist() == [False, False]


@pytest.mark.parametrize("kind", ["mlp", "llama"])
def test_gradient_times_activation_equals_captum(kind: str) -> None:
    network: nn.Module
    if kind == "mlp":
        network, rows, sites = mlp(), mlp_rows(10, positions=3), MLP_SITES
        table = run_mlp(network, [rows])
    else:
        network, rows, sites = llama(), llama_rows(7), LLAMA_SITES
        table = run_llama(network, [rows])
    network.eval()

    def loss(inputs: Tensor) -> Tensor:
        outputs = network(inputs)
        return nats(outputs if kind == "mlp" else outputs.logits, rows.targets)

    layers = [network.get_submodule(site.reader) for site in sites]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peers = LayerGradientXActivation(loss, layers).attribute(rows.inputs, attribute_to_layer_input=True)
    for site, peer in zip(sites, peers, strict=True):
        by_token = (peer[0] if isinstance(peer, tuple) else peer).detach()
        for c in range(3):
            mine = by_token[rows.categories == c].flatten(0, 1)
            torch.testing.assert_close(table.sites[site.name].taylor[:, c], -mine.sum(0), rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(table.sites[site.name].absolute[:, c], mine.abs().sum(0), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["mlp", "llama"])
def test_tables_of_shards_add_up_to_the_table_of_the_whole(kind: str) -> None:
    network = mlp() if kind == "mlp" else llama()
    rows = mlp_rows(12, positions=3) if kind == "mlp" else llama_rows(12)

    def run(batches: Sequence[Rows]) -> AttributionTable:
        return run_mlp(network, batches) if isinstance(network, Mlp) else run_llama(network, batches)

    whole = run([rows])
    shards = [run([rows.take(slice(rank, None, 3))]) for rank in range(3)]
    assert_equal(shards[0] + shards[1] + shards[2], whole, rtol=1e-9)
    shuffled = rows.take(torch.randperm(12, generator=torch.Generator().manual_seed(2)))
    assert_equal(run([shuffled.take(slice(0, 5)), shuffled.take(slice(5, 12))]), whole, rtol=1e-9)


def test_empty_batches_and_categories_missing_from_a_shard_are_no_error() -> None:
    network, rows = mlp(), mlp_rows(9)
    table = run_mlp(network, [rows.take(slice(0, 0)), rows.take(slice(0, 3))])
    assert table.counts.tolist() == [3, 0, 0]
    with pytest.raises(ValueError, match="no examples of categories 'b', 'c'"):
        table.report("first")


def test_the_network_is_left_as_it_was_even_after_an_error() -> None:
    network, rows = mlp(), mlp_rows(9)
    network.train()
    network.drop.eval()
    network.up.weight.requires_grad_(False)
    network.up2.weight.grad = torch.ones_like(network.up2.weight)

    def state() -> tuple[object, ...]:
        return (
            [module.training for module in network.modules()],
            [parameter.requires_grad for parameter in network.parameters()],
            [None if parameter.grad is None else parameter.grad.tolist() for parameter in network.parameters()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()],
        )

    before = state()
    with torch.no_grad():
        run_mlp(network, [rows])
    assert state() == before
    with pytest.raises(ValueError, match="nats must return"):
        measured(lambda x, _: network(x), network, MLP_SITES, [rows], lambda *_: torch.zeros(2), sample, NAMES)
    assert state() == before


@pytest.mark.parametrize("sites", [1, 4])
def test_one_pass_measures_all_sites_and_costs_less_than_a_training_step(sites: int) -> None:
    network = llama()
    heads = [Site(f"layers.{i}.heads", f"model.layers.{i}.self_attn.o_proj", 2, width=4) for i in range(2)]
    asked = (*LLAMA_SITES, *heads)[:sites]
    rows = llama_rows(9)
    ran = {"forward": 0, "backward": 0}

    def forward(x: Tensor, _: Tensor) -> Tensor:
        assert not any(parameter.requires_grad for parameter in network.parameters())
        logits = network(x).logits
        ran["forward"] += 1
        logits.register_hook(lambda _: ran.update(backward=ran["backward"] + 1))
        return logits

    with FlopCounterMode(display=False) as step:
        nats(network(rows.inputs).logits, rows.targets).sum().backward()
    for draw, backwards, most in ((None, 1, 0.7), (sample, 2, 1.04)):
        subject = Subject(network, asked, NAMES, nats, draw, forward)
        with FlopCounterMode(display=False) as pass_:
            measure(subject, [rows])
        assert ran == {"forward": 1, "backward": backwards}
        assert pass_.get_total_flops() < most * step.get_total_flops()
        ran |= {"forward": 0, "backward": 0}


def test_units_that_never_fire_are_reported_dead() -> None:
    network = mlp()
    network.up.weight.data[2] = 0
    network.up.bias.data[2] = -1
    rows = mlp_rows(9)
    table = run_mlp(network, [rows])
    silent = (torch.relu(network.up(rows.inputs)) == 0).all(0)
    assert silent[2]
    assert not silent.all()
    assert torch.equal(table.dead("first"), silent)
    assert table.report("first")[2].tolist() == [0, 0, 0]


def test_another_use_of_the_activation_does_not_count_as_the_readers() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.other = nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.up(x).requires_grad_()
            return self.down(hidden) + 1000 * self.other(hidden)

    network, rows = Shared().double(), mlp_rows(9)
    table = measured(
        lambda x, _: network(x), network, [Site("s", "down", 7)], [rows], lambda y, _: y.sum(1), sample, NAMES
    )
    hidden = network.up(rows.inputs)
    wanted = -(hidden * network.down.weight.sum(0))[:3].sum(0)
    torch.testing.assert_close(table.sites["s"].taylor[:, 0], wanted.detach())


def test_bfloat16_activations_are_widened_before_they_are_added_up() -> None:
    rows = mlp_rows(9)
    coarse = Rows(rows.inputs.bfloat16(), rows.targets, rows.categories, rows.ids)
    network = mlp().bfloat16()
    table = measured(lambda x, _: network(x).float(), network, MLP_SITES, [coarse], nats, sample, NAMES, seed=9)
    exact = torch.relu(network.up(coarse.inputs)).double()[:3]
    torch.testing.assert_close(table.sites["first"].moments[0].tensors()[0][0], exact.T @ exact, rtol=1e-6, atol=1e-9)


def test_taylor_plus_fisher_ranks_single_units_as_ablation_does() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Mlp(hidden=64).double()
        inputs = torch.randn(600, 5, dtype=torch.float64)
        targets = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] * inputs[:, 2] > 0).long()
        targets = torch.where(torch.rand(600) < 0.3, torch.randint(4, (600,)), targets)
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        network.eval()
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
    rows = Rows(inputs, targets, torch.zeros(600, dtype=torch.int64), torch.arange(600))
    sites = [Site("first", "down", 64), Site("second", "down2", 64)]
    table = measured(lambda x, _: network(x), network, sites, [rows], nats, sample, ["all"])
    with torch.no_grad():
        base = F.cross_entropy(network(inputs), targets)
        for site in sites:
            reader = network.get_submodule(site.reader)
            rises = []
            for unit in range(64):
                keep = torch.ones(64, dtype=torch.float64)
                keep[unit] = 0
                handle = reader.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep,))
                rises.append(float(F.cross_entropy(network(inputs), targets) - base))
                handle.remove()
            agreement = spearmanr(rises, table.report(site.name)[:, 0]).statistic
            assert agreement > 0.97
            assert agreement > spearmanr(rises, table.score(site.name, "absolute")[:, 0]).statistic


def test_row_seeds_differ_between_rows_and_passes_and_fit_63_bits() -> None:
    seeds = {row_seed(seed, row) for seed in range(20) for row in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_bad_input_is_refused_with_its_place_and_the_way_out() -> None:
    network, rows = mlp(), mlp_rows(9)
    with pytest.raises(ValueError, match=r"no module 'donw'; nearest: down"):
        run_mlp(network, [rows], [Site("s", "donw", 7)])
    with pytest.raises(ValueError, match=r"site 's' has 8 units .* must be \[9 ... 8\], got \[9, 7\]"):
        run_mlp(network, [rows], [Site("s", "down", 8)])
    with pytest.raises(ValueError, match="did not run in forward"):
        measured(lambda x, _: x, network, MLP_SITES, [rows], nats, sample, NAMES)
    with pytest.raises(ValueError, match="does not depend on the units of site 'first'"):
        measured(lambda x, _: network(x).detach(), network, MLP_SITES, [rows], nats, sample, NAMES)
    with pytest.raises(ValueError, match="more than once in a forward pass"):
        measured(lambda x, _: network(x) + network(x), network, MLP_SITES, [rows], nats, sample, NAMES)
    with pytest.raises(ValueError, match="no batches"):
        run_mlp(network, [])
    with pytest.raises(ValueError, match="no sites"):
        run_mlp(network, [rows], [])
    with pytest.raises(ValueError, match="distinct names"):
        run_mlp(network, [rows], [MLP_SITES[0], MLP_SITES[0]])
    with pytest.raises(ValueError, match="categories 0 to 7; there are 3, numbered from 0: a, b, c"):
        run_mlp(
            network,
            [Rows(rows.inputs, rows.targets, rows.categories.clone().index_fill_(0, torch.tensor(8), 7), rows.ids)],
        )
    with pytest.raises(ValueError, match="9 categories but 8 rows of targets"):
        run_mlp(network, [Rows(rows.inputs, rows.targets[:8], rows.categories, rows.ids)])


def test_values_that_are_not_finite_are_refused_with_site_and_category() -> None:
    network, rows = mlp(), mlp_rows(9)
    rows.inputs[4] = torch.inf
    with pytest.raises(ValueError, match="site 'first' has a NaN or infinite activation on category 'b'"):
        run_mlp(network, [rows])
    network, rows = mlp(), mlp_rows(9)

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        return nats(outputs, targets) * torch.where(rows.categories == 2, torch.nan, 1.0)

    with pytest.raises(ValueError, match="site 'first' has a NaN or infinite gradient on category 'c'"):
        measured(lambda x, _: network(x), network, MLP_SITES, [rows], broken, sample, NAMES)


def test_several_draws_of_labels_give_the_mean_of_each() -> None:
    network, rows = mlp().eval(), mlp_rows(9, positions=2)
    drawn: list[Tensor] = []

    def watched(outputs: Tensor, seeds: Sequence[int]) -> Tensor:
        drawn.append(sample(outputs, seeds))
        return drawn[-1]

    asked = Subject(network, tuple(MLP_SITES), NAMES, nats, watched)
    found = measure(asked, [rows], seed=3, samples=3, moments=Moments())
    assert len(drawn) == 3
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], sample(network(rows.inputs), [row_seed(3, row) for row in rows.ids.tolist()]))

    def alone(row: int, labels: Tensor) -> AttributionTable:
        some = slice(row, row + 1)
        subject = Subject(network, asked.sites, NAMES, nats, lambda _, __: labels[some])
        return measure(subject, [rows.take(some)], moments=Moments())

    tables = [[alone(row, labels) for row in range(9)] for labels in drawn]
    for site in ("first", "second"):
        fisher_RUC = torch.stack([torch.stack([t.sites[site].fisher for t in each]) for each in tables]).mean(0)
        taylor_RUC = torch.stack([t.sites[site].taylor for t in tables[0]])
        sums = found.sites[site]
        torch.testing.assert_close(sums.fisher, fisher_RUC.sum(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(sums.fisher_squares, fisher_RUC.square().sum(0), rtol=1e-12, atol=0)
        report_RUC = taylor_RUC + fisher_RUC
        torch.testing.assert_close(sums.report_squares, report_RUC.square().sum(0), rtol=1e-12, atol=1e-15)
        (curvature,) = sums.outputs.tensors() if sums.outputs else ()
        by_row = [[t.sites[site].outputs for t in each] for each in tables]
        alone_RCDD = torch.stack([torch.stack([m.tensors()[0] for m in each if m]) for each in by_row]).mean(0)
        torch.testing.assert_close(curvature, alone_RCDD.sum(0), rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        measure(asked, [rows], samples=0)
