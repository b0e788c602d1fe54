"""Two gloo workers that each measure a shard, against one process that measures everything."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from attribution.edge_table import EdgeTable
from attribution.edge_taps import Entry, Writer
from attribution.edges import measure_edges
from attribution.gradients import measure_gradients
from attribution.interactions import Neighbours, measure_interactions
from attribution.measure import Moments, measure
from attribution.methods import Ablation, Method, Wanda, WeightMagnitude, scores
from attribution.sites import Site
from attribution.stability import Stability, strongest_category
from attribution.subject import Rows, Subject
from attribution.table import AttributionTable
from benchmarks.gloo import run_together
from moeify.world import Group

NAMES = ("a", "b", "c")
ROWS = 18


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(6, 9), Block(6, 10)])
        self.norm, self.drop, self.head = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(self.norm(x.transpose(1, 2)).transpose(1, 2))) + 0


SITES = (Site("first", "blocks.0.down", 9), Site("second", "blocks.1.down", 10))
ENTRY = Entry("second", (Writer("blocks.1.up"),))
METHODS: dict[str, Method] = {"wanda": Wanda(), "magnitude": WeightMagnitude(), "ablation": Ablation("mean")}
"""Those that need whole weights, and the one without a backward pass."""


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = Net().double()
    made.head.bias.requires_grad_(False)
    return made


def nats(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(outputs), -1).sum(1)


def sample(outputs: Tensor, seeds: Sequence[int]) -> Tensor:
    drawn = [
        torch.multinomial(row.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))
        for row, seed in zip(outputs, seeds, strict=True)
    ]
    return torch.stack(drawn).view(outputs.shape[:-1])


def subject(network: nn.Module, *, through_wrapper: bool = False) -> Subject:
    run = (lambda x, _: network(x)) if through_wrapper else None
    return Subject(network, SITES, NAMES, nats, sample, run)


def data() -> Rows:
    generator = torch.Generator().manual_seed(5)
    return Rows(
        torch.randn(ROWS, 3, 6, generator=generator, dtype=torch.float64),
        torch.randint(4, (ROWS, 3), generator=generator),
        torch.arange(ROWS) * 3 // ROWS,
        torch.arange(ROWS) + 100,
    )


def batches(starts: Sequence[Sequence[int]]) -> list[Rows]:
    """Batches of the rows that are named."""
    return [data().take(torch.tensor(rows)) for rows in starts]


# Two ways to shard: uneven, and in different numbers of batches; a rank without category "c".
UNEVEN = {0: [list(range(5)), [5, 6], [12, 7]], 1: [[8, 9, 10, 11, 13, 14, 15, 16, 17]]}
MIXED = {0: [list(range(0, 18, 4)), list(range(2, 18, 4))], 1: [list(range(1, 18, 2))]}
# FSDP's collectives need as many batches on each rank, not as many rows.
EQUAL_NUMBERS = {0: [list(range(5)), [12, 7]], 1: [[8, 9, 10, 11, 13, 14, 15, 16, 17], [5, 6]]}


def measured(one: Subject, shard: Sequence[Sequence[int]]) -> AttributionTable:
    return measure(one, batches(shard), seed=9, moments=Moments())


def state(network: nn.Module) -> tuple[list[Tensor | None], list[object]]:
    """All that measuring could touch: this rank's part of parameters, gradients, buffers; flags and hooks."""
    parameters = list(network.parameters())
    tensors = [*parameters, *(p.grad for p in parameters), *network.buffers()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    flags: list[object] = [[p.requires_grad for p in parameters], [m.training for m in network.modules()]]
    flags.append([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()])
    flags.append([type(p).__name__ for p in parameters])
    return [None if t is None else t.detach().clone() for t in local], flags


def assert_untouched(network: nn.Module, before: tuple[list[Tensor | None], list[object]]) -> None:
    tensors, flags = state(network)
    assert flags == before[1]
    for now, then in zip(tensors, before[0], strict=True):
        assert (now is None) == (then is None)
        assert now is None or then is None or torch.equal(now, then)


def backward(network: nn.Module, rank: int) -> list[Tensor]:
    """One step's gradients, added to those there are; whole ones returned."""
    network.eval()
    rows = data().take(slice(rank, None, 2))
    nats(network(rows.inputs), rows.targets).sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return [(g.full_tensor() if isinstance(g, DTensor) else g).clone() for g in gradients]


def under_ddp(rank: int, folder: Path) -> None:
    network = DistributedDataParallel(net())
    once = backward(network, rank)
    network.train()
    before = state(network)
    for name, shards in (("uneven", UNEVEN), ("mixed", MIXED)):
        table = measured(subject(network), shards[rank])
        assert_untouched(network, before)
        through = measured(subject(network, through_wrapper=True), shards[rank])
        assert_untouched(network, before)
        for mine, other in zip(table.tensors(), through.tensors(), strict=True):
            assert torch.equal(mine, other)
        keep(table, rank, folder / f"ddp-{name}")
    for twice, single in zip(backward(network, rank), once, strict=True):
        torch.testing.assert_close(twice, 2 * single)
    keep(edges(network, UNEVEN[rank]), rank, folder / "ddp-edges")
    sketch = measure_gradients(subject(network), batches(UNEVEN[rank]), size=64)
    Group().sum(sketch.tensors())
    neighbours = measure_interactions(subject(network), batches(UNEVEN[rank]), k=9, kind="attribution")
    parts: list[dict[str, Neighbours] | None] = [None, None]
    dist.all_gather_object(parts, neighbours)
    assert parts[0] is not None
    assert parts[1] is not None
    both = parts[0]["second"] + parts[1]["second"]
    if rank == 0:
        save_file({"sketch": sketch.sums, "totals": both.totals, "lower": both.lower}, folder / "others")


def under_fsdp(rank: int, folder: Path) -> None:
    for name, parts in (("root", False), ("blocks", True)):
        network = net()
        for block in network.blocks if parts else ():
            fully_shard(block)
        fully_shard(network)
        network.eval()
        with torch.no_grad():
            network(data().inputs)  # Leaves the root's parameters gathered, as an evaluation does.
        table = measured(subject(network), EQUAL_NUMBERS[rank])
        assert all(p.grad is None for p in network.parameters())
        keep(edges(network, EQUAL_NUMBERS[rank]), rank, folder / f"fsdp-{name}-edges")
        found = {method: torch.cat(list(by_method(network, method).values())) for method in METHODS}
        if rank == 0:
            save_file(found, folder / f"fsdp-{name}-methods")
        neighbours = measure_interactions(subject(network), batches(EQUAL_NUMBERS[rank]), k=9)
        assert all(n.rows == sum(map(len, EQUAL_NUMBERS[rank])) for n in neighbours.values())
        once = backward(network, rank)
        assert len(once) == sum(p.requires_grad for p in network.parameters())
        network.train()
        before = state(network)
        assert "DTensor" in str(before[1])
        again = measured(subject(network), EQUAL_NUMBERS[rank])
        assert_untouched(network, before)
        for mine, other in zip(table.tensors(), again.tensors(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
        keep(table, rank, folder / f"fsdp-{name}")
        for twice, single in zip(backward(network, rank), once, strict=True):
            torch.testing.assert_close(twice, 2 * single)
        with pytest.raises(ValueError, match="sharded over workers"):
            measure_gradients(subject(network), batches(EQUAL_NUMBERS[rank]))


def stopping(rank: int, folder: Path) -> None:
    """Rank 1's rows would make it stop later than rank 0's, if each looked at its own."""
    network = net()
    taken = {"alone": 0, "together": 0}

    def stream(name: str) -> Iterator[Rows]:
        for number in range(40):
            taken[name] += 1
            yield data().take(slice(None, None, 3)) if rank == 0 else noise(number)

    def implied(table: AttributionTable) -> Mapping[str, Int[Tensor, " units"]]:
        return strongest_category(table)

    reduces: dict[str, Callable[[Sequence[Tensor]], None] | None] = {"alone": None, "together": Group().sum}
    for name, reduce in reduces.items():
        measure(subject(network), stream(name), stability=Stability(implied, 1.0, 2, 2, reduce))
    (folder / f"stop-{rank}.json").write_text(json.dumps(taken))


def noise(number: int) -> Rows:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(6, 3, 6, generator=generator, dtype=torch.float64) * (3 if number < 9 else 0.1)
    return Rows(inputs, torch.randint(4, (6, 3), generator=generator), torch.arange(6) // 2, torch.arange(6))


def edges(network: nn.Module, shard: Sequence[Sequence[int]]) -> EdgeTable:
    return measure_edges(subject(network), batches(shard), [ENTRY])


def by_method(network: nn.Module, method: str) -> dict[str, Tensor]:
    return scores(METHODS[method], subject(network), [data()])


def keep(table: AttributionTable | EdgeTable, rank: int, path: Path) -> None:
    """Add up the shards; rank 0 writes."""
    Group().sum(table.tensors())
    if rank == 0:
        save_file({f"{i:03d}": tensor for i, tensor in enumerate(table.tensors())}, path)


def worker(rank: int, folder: Path) -> None:
    warnings.simplefilter("error")
    under_ddp(rank, folder)
    under_fsdp(rank, folder)
    stopping(rank, folder)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    run_together(worker, folder)
    return folder


@pytest.mark.parametrize(
    "name", ["ddp-uneven", "ddp-mixed", "fsdp-root", "fsdp-blocks", "ddp-edges", "fsdp-root-edges", "fsdp-blocks-edges"]
)
def test_tables_of_two_workers_add_up_to_the_one_of_a_single_process(workers: Path, name: str) -> None:
    found = load_file(workers / name)
    rows = [list(range(ROWS))]
    whole = (edges(net(), rows) if "edges" in name else measured(subject(net()), rows)).tensors()
    assert len(found) == len(whole)
    for tensor, wanted in zip((found[key] for key in sorted(found)), whole, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-9, atol=1e-13 * float(1 + wanted.abs().max()))


@pytest.mark.parametrize("name", ["root", "blocks"])
def test_methods_that_read_weights_read_them_whole_where_they_are_sharded(workers: Path, name: str) -> None:
    found = load_file(workers / f"fsdp-{name}-methods")
    for method in METHODS:
        wanted = torch.cat(list(by_method(net(), method).values()))
        torch.testing.assert_close(found[method], wanted, rtol=1e-9, atol=1e-12)


def test_gradients_and_interactions_of_two_workers_add_up_too(workers: Path) -> None:
    found = load_file(workers / "others")
    sketch = measure_gradients(subject(net()), [data()], size=64)
    torch.testing.assert_close(found["sketch"], sketch.sums, rtol=1e-9, atol=1e-12)
    neighbours = measure_interactions(subject(net()), [data()], k=9, kind="attribution")["second"]
    torch.testing.assert_close(found["totals"], neighbours.totals, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found["lower"].sum(1), neighbours.totals, rtol=1e-9, atol=1e-14)


def test_workers_that_look_together_stop_at_the_same_batch(workers: Path) -> None:
    stops = [json.loads((workers / f"stop-{rank}.json").read_text()) for rank in range(2)]
    assert stops[0]["alone"] != stops[1]["alone"]
    assert stops[0]["together"] == stops[1]["together"] < 40
