"""Networks without an adapter: what is found in them, what is refused, and how an adapter is proved."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.fitting import fit
from moeify.models.detect import feed_forward_blocks
from moeify.models.families import describe, detected, entries, example_inputs, rebuild, unit_space
from moeify.routed.proof import prove
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from tests.networks import tiny_decoder

TREE = ExpertTree.undivided(("a", "b")).split({0: [("a",), ("b",)]})


class Plain(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu, drop: float = 0.0, early: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 6)
        self.act, self.early, self.drop = act, early, nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.first(x))
        return self.second(self.drop(hidden)) if self.early else self.drop(self.second(hidden))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Normed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.layer_norm(self.act(self.first(x)), (12,)))


class Mixed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)).flip(-1))


class Residual(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Network(nn.Module):
    """Blocks between norms, on rows or on rows of tokens; a class for each row."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in blocks)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x)


def made(*blocks: nn.Module) -> Network:
    torch.manual_seed(0)
    return Network(*blocks).double()


SEQUENTIAL = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))


def test_plain_gated_and_sequential_blocks_are_found_with_their_activations() -> None:
    found = list(feed_forward_blocks(made(Plain(), Gated(), SEQUENTIAL, Plain(F.silu), Plain(nn.GELU("tanh")))))
    assert [(each.module, each.gate, each.up, each.down, each.activation, each.units) for each in found] == [
        ("blocks.0", None, "first", "second", "gelu", 12),
        ("blocks.1", "w1", "w3", "w2", "silu", 10),
        ("blocks.2", None, "0", "2", "relu", 8),
        ("blocks.3", None, "first", "second", "silu", 12),
        ("blocks.4", None, "first", "second", "gelu_tanh", 12),
    ]
    assert [(each.gate_bias, each.up_bias) for each in found[:2]] == [(False, True), (False, True)]


@pytest.mark.parametrize(
    "block", [Normed(), Mixed(), Residual(), Plain(torch.tanh), Plain(F.relu6), Plain(drop=0.2, early=True)], ids=str
)
def test_what_computes_something_else_is_left_alone(block: nn.Module) -> None:
    network = made(block)
    assert list(feed_forward_blocks(network)) == []
    with pytest.raises(
        ValueError, match=r"^no adapter for Network, and no module .* block by itself; an adapter names"
    ):
        unit_space(network)


def test_zeroed_weights_hide_no_difference() -> None:
    odd = Mixed()
    nn.init.zeros_(odd.second.weight)
    assert list(feed_forward_blocks(made(odd))) == []


def test_dropout_behind_a_block_is_known() -> None:
    (found,) = feed_forward_blocks(made(Plain(drop=0.3)))
    assert found.after == "drop"


def test_blocks_that_share_weights_are_left_alone() -> None:
    one, other = Plain(), Plain()
    other.first = one.first
    network = made(one, other, Gated())
    assert [each.module for each in feed_forward_blocks(network)] == ["blocks.2"]


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
def test_found_blocks_route_like_the_masked_oracle_and_are_proved(shape: tuple[int, ...]) -> None:
    network, x = made(Plain(), Gated(), SEQUENTIAL), torch.randn(*shape, dtype=torch.float64)
    assert detected(network)
    assert entries(network) == ()
    prove(network, x)
    widths = {site.name: (2, 2, site.units - 4) for site in unit_space(network).readers}
    model = SplitModel(copy.deepcopy(network), ("a", "b"), Partition(TREE, widths))
    assert unit_space(model.network) == unit_space(network)
    categories = torch.tensor([1, 0, 0, 1])
    routed = model(x, categories)
    with model.masked():
        torch.testing.assert_close(routed, model(x, categories), rtol=1e-9, atol=1e-10)
    assert (routed - network(x)).abs().max() > 1e-3


def test_what_cannot_be_done_without_an_adapter_says_what_one_needs() -> None:
    network = made(Plain())
    for refused in (lambda: rebuild(describe(network)), lambda: example_inputs(network, 1, 0)):
        with pytest.raises(ValueError, match="an adapter names the network's class, how it is described and rebuilt"):
            refused()


class Peeking(Network):
    """Looks at the weights of a block from outside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.blocks[0].first.weight[0, 0]


def test_what_a_network_does_with_a_blocks_weights_from_outside_is_seen_by_the_proof() -> None:
    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"^site 'blocks\.0\.hidden': another order of its units changes what comes out"
    ):
        prove(Peeking(Plain()), torch.randn(4, 6))


def test_a_network_without_an_adapter_is_fitted() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(80, 6)
    data = {"left": (inputs[:40], torch.arange(40) % 2), "right": (inputs[40:], 2 + torch.arange(40) % 2)}
    network = Network(Plain(), Gated())
    found = fit(network, data, loss="classes", steps=30, rounds=1, separation=0.3, partition={"min_units": 1})
    assert found.partition.separation == pytest.approx(0.3, abs=0.1)
    rows, categories = inputs[38:42], torch.tensor([0, 0, 1, 1])
    alone = found.extract("left")
    assert sum(p.numel() for p in alone.parameters()) < sum(p.numel() for p in network.parameters())
    torch.testing.assert_close(alone(rows[:2]), found.model(rows, categories)[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "bert", "vit"])
def test_adapters_of_all_shapes_are_proved(family: str) -> None:
    network = tiny_decoder(family)
    prove(network, example_inputs(network, 3, 0))
