import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.functional import jvp
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import attribution.edge_products
import attribution.edges
from attribution.edge_table import EdgeSums, EdgeTable, Pair
from attribution.edge_taps import Entry, Writer, linearised
from attribution.edges import measure_edges
from attribution.measure import measure
from attribution.sites import Site
from attribution.subject import Rows, Subject

NAMES = ("a", "b", "c")


@dataclass(frozen=True)
class Case:
    subject: Subject
    entries: tuple[Entry, ...]
    rows: Rows
    pairs: tuple[Pair, ...]
    """Those expected by default."""
    rtol: float = 1e-9


def nats(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(outputs), -1).sum(1)


def logits(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, _: network(x).logits


def numbered(inputs: Tensor, targets: Tensor) -> Rows:
    rows = len(inputs)
    return Rows(inputs, targets, torch.arange(rows) * 3 // rows, torch.arange(rows) + 100)


def mlp() -> Case:
    """Units between Linear layers that are reader and writer at once."""
    network = nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)
    ).double()
    sites = Site("one", "2", 7), Site("two", "4", 3, width=2), Site("three", "6", 8)
    rows = numbered(torch.randn(10, 5, dtype=torch.float64), torch.randint(4, (10,)))
    entries = Entry("two", (Writer("2"),)), Entry("three", (Writer("4"),))
    return Case(Subject(network, sites, NAMES, nats), entries, rows, (("one", "two"), ("two", "three")))


def bottleneck() -> Case:
    """Units that meet in a narrow layer, with positions."""
    network = nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 2), nn.Linear(2, 8),
        nn.ReLU(), nn.Linear(8, 4),
    ).double()  # fmt: skip
    sites = Site("one", "2", 7), Site("two", "5", 6), Site("three", "8", 8)
    rows = numbered(torch.randn(7, 4, 5, dtype=torch.float64), torch.randint(4, (7, 4)))
    entries = Entry("two", (Writer("3"),)), Entry("three", (Writer("6"),))
    return Case(Subject(network, sites, NAMES, nats), entries, rows, (("one", "two"), ("two", "three")))


def conv() -> Case:
    """Channels, batch norm, strides, and at last a Linear that reads whole maps."""
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4),
        nn.ReLU(inplace=True), nn.Conv2d(4, 5, 2, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(20, 6), nn.ReLU(),
        nn.Linear(6, 4),
    ).double()  # fmt: skip
    norm = network[3]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    sites = (
        Site("a", "2", 3, spatial=True), Site("b", "5", 4, spatial=True), Site("c", "8", 5, width=4), Site("d", "10", 6)
    )  # fmt: skip
    entries = Entry("b", (Writer("2"),)), Entry("c", (Writer("5"),)), Entry("d", (Writer("8"),))
    rows = numbered(torch.randn(6, 2, 7, 7, dtype=torch.float64), torch.randint(4, (6,)))
    return Case(Subject(network, sites, NAMES, nats), entries, rows, (("a", "b"), ("b", "c"), ("c", "d")))


def all_before(names: Sequence[str]) -> tuple[Pair, ...]:
    return tuple((s, t) for i, t in enumerate(names) for s in names[:i])


def llama() -> Case:
    """Two layers; heads with two query heads a key head, gated neurons."""
    config = LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=10, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8, use_cache=False, initializer_range=0.4,
    )  # fmt: skip
    network = LlamaForCausalLM(config).double()
    sites: list[Site] = []
    entries: list[Entry] = []
    for i in range(2):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            nn.init.normal_(network.get_submodule(f"{layer}.{norm}").get_parameter("weight"))
        sites += [Site(f"{i}.heads", f"{layer}.self_attn.o_proj", 2, 4), Site(f"{i}.ffn", f"{layer}.mlp.down_proj", 10)]
        heads = tuple(Writer(f"{layer}.self_attn.{name}_proj") for name in "qkv")
        ffn = tuple(Writer(f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        entries += [
            Entry(f"{i}.heads", heads, f"{layer}.input_layernorm"),
            Entry(f"{i}.ffn", ffn, f"{layer}.post_attention_layernorm"),
        ]
    tokens = torch.randint(17, (6, 6))
    subject = Subject(network, tuple(sites), NAMES, nats, run=logits(network))
    # The norms compute in float32.
    return Case(
        subject, tuple(entries), numbered(tokens[:, :-1], tokens[:, 1:]), all_before([s.name for s in sites]), 1e-4
    )


def gpt2() -> Case:
    """Layer norms with biases; queries, keys and values written by one Conv1D."""
    config = GPT2Config(
        vocab_size=17, n_embd=8, n_inner=11, n_layer=2, n_head=2, n_positions=8, use_cache=False, initializer_range=0.4
    )
    network = GPT2LMHeadModel(config).double()
    sites: list[Site] = []
    entries: list[Entry] = []
    for i in range(2):
        layer = f"transformer.h.{i}"
        for norm in ("ln_1", "ln_2"):
            for part in ("weight", "bias"):
                nn.init.normal_(network.get_submodule(f"{layer}.{norm}").get_parameter(part))
        sites += [Site(f"{i}.heads", f"{layer}.attn.c_proj", 2, 4), Site(f"{i}.ffn", f"{layer}.mlp.c_proj", 11)]
        entries += [
            Entry(f"{i}.heads", (Writer(f"{layer}.attn.c_attn", (8, 8, 8)),), f"{layer}.ln_1"),
            Entry(f"{i}.ffn", (Writer(f"{layer}.mlp.c_fc"),), f"{layer}.ln_2"),
        ]
    tokens = torch.randint(17, (6, 6))
    subject = Subject(network, tuple(sites), NAMES, nats, run=logits(network))
    return Case(subject, tuple(entries), numbered(tokens[:, :-1], tokens[:, 1:]), all_before([s.name for s in sites]))


CASES = {"mlp": mlp, "bottleneck": bottleneck, "conv": conv, "llama": llama, "gpt2": gpt2}


def made(name: str) -> Case:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        case = CASES[name]()
    case.subject.network.eval()
    return case


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return made(request.param)


def thirds(case: Case) -> dict[str, Tensor]:
    """Blocks of every site, not contiguous, one of them empty."""
    return {site.name: torch.tensor([0, 2, 3])[torch.arange(site.units) % 3] for site in case.subject.sites}


def run(case: Case, batches: Sequence[Rows] | None = None, **options: Any) -> EdgeTable:
    return measure_edges(case.subject, batches or [case.rows], case.entries, **options)


def cut_one_by_one(case: Case, pair: Pair) -> Float[Tensor, "rows sources targets"]:
    """The derivative of each row's loss by how much of each edge is cut: oracle of a pass over edges.

    What a unit adds to the writers' outputs is a Jacobian-vector product of writer and norm in the direction of what
    the unit alone puts out; v's part of it times a cut of 0 is taken from the writers' outputs as the network runs.
    """
    subject = case.subject
    source, target = subject.site(pair[0]), subject.site(pair[1])
    entry = next(entry for entry in case.entries if entry.site == pair[1])
    reader, rows = subject.reader(source), len(case.rows.inputs)
    cuts_RUV = torch.zeros(rows, source.units, target.units, dtype=torch.float64, requires_grad=True)
    kept: dict[str, Tensor] = {}

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        a = args[0].detach()
        kept["units"] = torch.cat([a * source.keeping(keep_U, a) for keep_U in torch.eye(source.units).double()])
        kept["put"] = reader.forward(kept["units"]) - reader.forward(torch.zeros_like(kept["units"]))

    def normed(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept["stream"] = args[0].detach()

    def written(writer: Writer) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            axis = 1 if output.ndim == 4 else -1
            lengths = writer.sections or (output.shape[axis],)
            owner = torch.cat([torch.arange(target.units).repeat_interleave(n // target.units) for n in lengths])
            norm = subject.inner.get_submodule(entry.norm) if entry.norm else nn.Identity()
            added = kept["put"]
            if writer.module != source.reader:
                at = (kept["stream"] if entry.norm else args[0].detach()).repeat(
                    source.units, *[1] * (args[0].ndim - 1)
                )
                _, added = jvp(lambda x: module.forward(norm.forward(x)), at, added)
            for u, added_u in enumerate(added.detach().split(rows)):
                shape = [rows, -1, 1, 1] if axis == 1 else [rows, *[1] * (output.ndim - 2), -1]
                output = output - added_u * cuts_RUV[:, u, owner].view(shape)
            return output

        return hook

    with subject.still():
        hooks = [reader.register_forward_pre_hook(read)]
        if entry.norm:
            hooks.append(subject.inner.get_submodule(entry.norm).register_forward_pre_hook(normed))
        for writer in entry.writers:
            hooks.append(subject.inner.get_submodule(writer.module).register_forward_hook(written(writer)))
        loss_R = subject.row_nats(subject.forward(case.rows.inputs, case.rows.categories), case.rows.targets)
        for hook in hooks:
            hook.remove()
        return torch.autograd.grad(loss_R.sum(), cuts_RUV)[0]


def assert_close(got: Tensor, wanted: Tensor, rtol: float) -> None:
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


def assert_same(got: EdgeTable, wanted: EdgeTable, rtol: float = 1e-9) -> None:
    assert list(got.pairs) == list(wanted.pairs)
    for a, b in zip(got.tensors(), wanted.tensors(), strict=True):
        assert_close(a, b, rtol)


def test_every_edge_equals_the_derivative_of_the_loss_by_cutting_it_alone(case: Case) -> None:
    table = run(case)
    assert tuple(table.pairs) == case.pairs
    for pair, sums in table.pairs.items():
        wanted_RUV = cut_one_by_one(case, pair)
        assert wanted_RUV.abs().max() > 1e-5
        assert sums.squares is not None
        for c in range(3):
            mine = wanted_RUV[case.rows.categories == c]
            assert_close(sums.taylor[c], mine.sum(0), case.rtol)
            assert_close(sums.squares[c], mine.square().sum(0), case.rtol)


def test_edges_between_blocks_are_sums_of_edges_between_units(case: Case) -> None:
    by_unit, blocks = run(case), thirds(case)
    by_block = run(case, blocks=blocks)
    for (s, t), sums in by_block.pairs.items():
        wanted = torch.zeros_like(sums.taylor)
        for u, b in enumerate(blocks[s].tolist()):
            for v, d in enumerate(blocks[t].tolist()):
                wanted[:, b, d] += by_unit.pairs[s, t].taylor[:, u, v]
        assert_close(sums.taylor, wanted, 1e-6 if case.rtol > 1e-6 else 1e-9)


@pytest.mark.parametrize("blocked", [slice(0), slice(2), slice(2, None), slice(None)], ids=str)
def test_both_ways_to_multiply_give_the_same_sums(case: Case, blocked: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [site.name for site in case.subject.sites[blocked]]
    blocks = {site: block_U for site, block_U in thirds(case).items() if site in some}
    found = []
    for way in (True, False):
        monkeypatch.setattr(attribution.edge_products.Route, "blocked", lambda _, way=way: way)
        found.append(run(case, blocks=blocks))
    assert_same(*found)


def test_small_scratch_gives_the_same_sums(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"blocks": thirds(case)}, {"errors": False}):
        whole = run(case, **options)
        with monkeypatch.context() as patch:
            patch.setattr(attribution.edge_products, "_SCRATCH", 500)
            patch.setattr(attribution.edge_products, "_ROOM", 1000)
            assert_same(run(case, **options), whole)


def test_tables_of_shards_add_up_and_the_order_of_rows_does_not_matter(case: Case) -> None:
    whole = run(case)
    shards = [run(case, [case.rows.take(slice(rank, None, 3))]) for rank in range(3)]
    assert_same(shards[0] + shards[1] + shards[2], whole)
    rows = len(case.rows.inputs)
    shuffled = case.rows.take(torch.randperm(rows, generator=torch.Generator().manual_seed(2)))
    nothing = shuffled.take(slice(0, 0))
    assert_same(run(case, [shuffled.take(slice(0, 4)), nothing, shuffled.take(slice(4, rows))]), whole)
    some = run(case, [case.rows.take(slice(0, rows // 3))])
    s, t = case.pairs[0]
    assert some.counts.count_nonzero() == 1
    with pytest.raises(ValueError, match="no examples of categories 'b', 'c'"):
        some.taylor(s, t)


def test_counts_are_those_of_the_attribution_table(case: Case) -> None:
    edges, units = run(case), measure(case.subject, [case.rows])
    assert torch.equal(edges.counts, units.counts)
    assert torch.equal(edges.rows, units.rows)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_edges_into_a_unit_and_the_share_of_embedding_and_biases_add_up_to_the_whole_stream(name: str) -> None:
    case = made(name)
    subject, entry = case.subject, case.entries[-1]
    network = subject.inner
    assert entry.norm
    norm = network.get_submodule(entry.norm)
    writers = [network.get_submodule(writer.module) for writer in entry.writers]
    stream: list[Tensor] = []
    outputs: list[Tensor] = []
    hooks = [norm.register_forward_pre_hook(lambda _, args: stream.append(args[0].detach()))]
    hooks += [writer.register_forward_hook(lambda _, __, y: outputs.append(y)) for writer in writers]
    loss_R = subject.row_nats(subject.forward(case.rows.inputs, case.rows.categories), case.rows.targets)
    gradients = torch.autograd.grad(loss_R.sum(), outputs)
    for hook in hooks:
        hook.remove()
    if isinstance(network, GPT2LMHeadModel):
        positions = torch.arange(case.rows.inputs.shape[1])
        rest = network.transformer.wte(case.rows.inputs) + network.transformer.wpe(positions)
        for site in subject.sites[:-1]:
            rest = rest + subject.reader(site).get_parameter("bias")
    else:
        rest = network.get_submodule("model.embed_tokens")(case.rows.inputs)

    def into_units(direction: Tensor) -> Tensor:
        found = torch.zeros(subject.sites[-1].units, dtype=torch.float64)
        for writer, gradient in zip(writers, gradients, strict=True):
            _, added = jvp(lambda x, writer=writer: writer.forward(norm.forward(x)), stream[0], direction.detach())
            found -= (added * gradient).sum((0, 1)).detach()
        return found

    table, target = run(case), subject.sites[-1].name
    edges_V = torch.stack([sums.taylor.sum((0, 1)) for (_, t), sums in table.pairs.items() if t == target]).sum(0)
    # The whole stream's share is next to nothing, for norms do not see how long it is.
    assert_close(edges_V, into_units(stream[0] - rest), case.rtol)


def test_a_network_of_two_units_each_gives_the_numbers_worked_out_by_hand() -> None:
    """x = 1, 2; a = (x, -x); b = a W with W = ((3, 1), (1, -2)); y = 10 b_1 + 100 b_2; the loss is y."""

    def layer(weight: list[list[float]]) -> nn.Linear:
        found = nn.Linear(len(weight[0]), len(weight), bias=False)
        found.weight.data = torch.tensor(weight)
        return found

    network = nn.Sequential(layer([[1.0], [-1.0]]), layer([[3.0, 1.0], [1.0, -2.0]]), layer([[10.0, 100.0]]))
    subject = Subject(network, (Site("a", "1", 2), Site("b", "2", 2)), ("one", "two"), lambda y, _: y.sum(1))
    inputs = torch.tensor([[1.0], [2.0], [2.0]])
    rows = Rows(inputs, torch.zeros(3), torch.tensor([0, 1, 1]), torch.arange(3))
    table = measure_edges(subject, [rows], [Entry("b", (Writer("1"),))])
    # Source 1 adds 3 x to b_1 and x to b_2, source 2 adds -x and 2 x; cutting takes away 10 or 100 times that.
    assert table.pairs["a", "b"].taylor.tolist() == [[[-30, -100], [10, -200]], [[-120, -400], [40, -800]]]
    assert table.taylor("a", "b")[1].tolist() == [[-60, -200], [20, -400]]
    assert table.pairs["a", "b"].squares is not None
    assert table.pairs["a", "b"].squares[1].tolist() == [[7200, 80000], [800, 320000]]
    assert table.standard_error("a", "b").tolist() == [[[torch.inf] * 2] * 2, [[0, 0], [0, 0]]]


def test_without_errors_there_are_no_squares_and_the_same_sums() -> None:
    case = made("gpt2")
    with_errors, without = run(case), run(case, errors=False)
    for pair, sums in without.pairs.items():
        assert sums.squares is None
        assert_close(sums.taylor, with_errors.pairs[pair].taylor, 1e-9)
    with pytest.raises(ValueError, match="errors=True"):
        without.standard_error(*case.pairs[0])
    with pytest.raises(ValueError, match="with and without squares"):
        without + with_errors


def test_standard_errors_are_those_of_the_rows() -> None:
    case = made("mlp")
    table, wanted_RUV = run(case), cut_one_by_one(case, ("one", "two"))
    for c in range(3):
        mine = wanted_RUV[case.rows.categories == c]
        assert_close(table.standard_error("one", "two")[c], mine.std(0) / len(mine) ** 0.5, 1e-6)


def test_between_blocks_nothing_of_the_size_units_times_units_is_made() -> None:
    units, dim = 300, 6

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.RMSNorm(dim), nn.Linear(dim, units), nn.Linear(units, dim)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, tuple | list) else [found]:
                if isinstance(tensor, Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return found

    network = nn.Sequential(Block(), Block())
    sites = Site("one", "0.down", units), Site("two", "1.down", units)
    subject = Subject(network, sites, NAMES, nats)
    rows = numbered(torch.randn(6, 2, dim), torch.randint(dim, (6, 2)))
    blocks = {site.name: torch.arange(units) % 4 for site in sites}
    with Largest() as largest:
        measure_edges(subject, [rows], [Entry("two", (Writer("1.up"),), "1.norm")], blocks=blocks)
    assert 0 < largest.numbers <= 6 * 2 * units
    with Largest() as largest:
        measure_edges(subject, [rows], [Entry("two", (Writer("1.up"),), "1.norm")])
    assert largest.numbers >= units * units


def test_half_precision_is_widened() -> None:
    case = made("bottleneck")
    network = case.subject.network.bfloat16()
    rows = replace(case.rows, inputs=case.rows.inputs.bfloat16())
    case = replace(case, subject=replace(case.subject, run=lambda x, _: network(x).float()), rows=rows)
    by_unit, by_block = run(case), run(case, blocks={n: torch.zeros_like(b) for n, b in thirds(case).items()})
    for pair, sums in by_unit.pairs.items():
        assert_close(sums.taylor.sum((1, 2)), by_block.pairs[pair].taylor.flatten(), 1e-5)


class GemmaLike(nn.Module):
    """Root mean square norm with 1 + weight for the scale."""

    def __init__(self, dim: int, power: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dtype=torch.float64))
        self.eps = 1e-3
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.abs().pow(self.power).mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


@pytest.mark.parametrize(
    "norm",
    [GemmaLike(5), nn.RMSNorm(5), nn.LayerNorm(5, eps=0.1), nn.LayerNorm(5, elementwise_affine=False)],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_is_linearised_as_autograd_does(norm: nn.Module) -> None:
    norm = norm.double()
    x, change, h = torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, pushed = jvp(norm, x, change)
    did = linearised(norm, "norm", x, y)
    along = (did.unit * change).mean(2, keepdim=True)
    torch.testing.assert_close(did.inverse * did.push(change - did.unit * along), pushed.detach())
    back = did.inverse * did.pull(h)
    back = back - did.unit * (did.unit * back).mean(2, keepdim=True)
    torch.testing.assert_close((back * change).sum(), (h * pushed.detach()).sum())


def test_the_network_is_left_as_it_was_even_after_an_error() -> None:
    case = made("gpt2")
    network = case.subject.network
    network.train()
    network.get_submodule("transformer.h.0").eval()
    weight = network.get_parameter("transformer.h.1.mlp.c_fc.weight").requires_grad_(False)
    weight.grad = torch.ones_like(weight)

    def state() -> tuple[object, ...]:
        return (
            [module.training for module in network.modules()],
            [parameter.requires_grad for parameter in network.parameters()],
            [None if parameter.grad is None else parameter.grad.tolist() for parameter in network.parameters()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()],
        )

    before = state()
    with torch.no_grad():
        run(case)
    assert state() == before
    with pytest.raises(ValueError, match="nats must return"):
        run(replace(case, subject=replace(case.subject, nats=lambda *_: torch.zeros(2))))
    assert state() == before


def test_bad_input_is_refused_with_its_place_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = made("llama")
    subject, last = case.subject, case.entries[-1]

    def refused(match: str, *entries: Entry, pairs: Sequence[Pair] | None = None, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            measure_edges(subject, [case.rows], entries or case.entries, pairs=pairs, **options)

    refused("no site '1.fnn'; nearest: 1.ffn", replace(last, site="1.fnn"))
    refused(
        "entry of site '1.ffn': the network has no module 'model.nrm'; nearest: model", replace(last, norm="model.nrm")
    )
    refused("distinct sites", last, last)
    refused("a target needs a site before it", case.entries[0])
    refused("need an entry of site '0.ffn'", last, pairs=[("0.heads", "0.ffn")])
    refused("source must come before the target", pairs=[("1.ffn", "0.ffn")])
    refused("distinct, at least one", pairs=[])
    refused("no site 'x'", blocks={"x": torch.zeros(3, dtype=torch.int64)})
    refused(
        r"blocks of site '0.ffn' .* 10 units, got torch.int64 \[3\]",
        blocks={"0.ffn": torch.zeros(3, dtype=torch.int64)},
    )
    refused(
        "is not what the norm 'model.layers.1.input_layernorm' returned",
        replace(last, norm="model.layers.1.input_layernorm"),
    )
    refused(
        r"8 output features in sections of \[8\].*10 units",
        replace(last, writers=case.entries[2].writers, norm=case.entries[2].norm),
    )
    refused("sections must add up", replace(last, writers=(Writer("model.layers.1.mlp.up_proj", (10, 10)),)))
    with pytest.raises(ValueError, match="distinct writers"):
        Entry("s", ())
    with pytest.raises(ValueError, match="no batches"):
        run(case, [case.rows.take(slice(0, 0))])
    monkeypatch.setattr(attribution.edges, "MOST_EDGES", 50)
    refused("0.ffn -> 1.ffn: 10 x 10 are more than 50; give blocks")


def test_networks_that_cannot_be_followed_are_refused_by_name() -> None:
    case = made("bottleneck")
    subject, entries = case.subject, case.entries

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            measure_edges(replace(subject, **changes), [case.rows], entries)

    net = subject.inner
    refused("'2' ran more than once", run=lambda x, _: net(x) + net(x))
    refused("'2' did not run", run=lambda x, _: x)
    refused("does not depend on the writer '3'", run=lambda x, _: net(x).detach())
    refused("site 'one' has 8 units of 1, .* must have 8 on axis -1", sites=(Site("one", "2", 8), *subject.sites[1:]))
    refused("NaN or infinite attribution on category 'b'", nats=lambda y, t: nats(y, t) / (case.rows.categories != 1))
    with pytest.raises(ValueError, match="writes 3 features and the writer '6' takes 2"):
        measure_edges(subject, [case.rows], entries, pairs=[("one", "three")])
    case = made("gpt2")
    backwards = replace(case.subject, sites=case.subject.sites[::-1])
    with pytest.raises(ValueError, match=r"mlp.c_proj' ran after 'transformer.h.1.ln_1', so it cannot write"):
        measure_edges(backwards, [case.rows], case.entries)


def test_activations_changed_in_place_are_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.out = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.up(x)
            y = self.down(hidden)
            hidden.zero_()
            return self.out(torch.tanh(y)) + hidden.sum()

    subject = Subject(Changing(), (Site("one", "down", 7), Site("two", "out", 6)), NAMES, nats)
    rows = numbered(torch.randn(6, 5), torch.randint(4, (6,)))
    with pytest.raises(ValueError, match="'down' was changed in place"):
        measure_edges(subject, [rows], [Entry("two", (Writer("down"),))])


def test_a_norm_of_another_kind_is_refused() -> None:
    norm, x = GemmaLike(5, power=3), torch.randn(2, 4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'odd' \(GemmaLike\) computes neither a layer norm nor an RMS norm"):
        linearised(norm, "odd", x, norm(x))


def test_tables_of_different_kinds_are_refused() -> None:
    sums = EdgeSums.zeros(1, 2, 3, errors=False)
    blocks = {"s": torch.arange(2), "t": torch.arange(3)}
    table = EdgeTable.empty(["a"], blocks, {("s", "t"): sums})
    assert [tuple(tensor.shape) for tensor in (table + table).tensors()] == [(1,), (1,), (1, 2, 3)]
    with pytest.raises(ValueError, match="different kinds"):
        table + EdgeTable.empty(["b"], blocks, {("s", "t"): sums})
    with pytest.raises(ValueError, match="site 's' into different blocks"):
        table + EdgeTable.empty(["a"], {**blocks, "s": torch.tensor([1, 0])}, {("s", "t"): sums})
    with pytest.raises(ValueError, match=r"s -> t must be \[1, 3, 2\], got \[1, 2, 3\]"):
        EdgeTable.empty(["a"], {"s": torch.arange(3), "t": torch.arange(2)}, {("s", "t"): sums})
    with pytest.raises(ValueError, match="no edges t -> s in the table; it has s -> t"):
        table.taylor("t", "s")
