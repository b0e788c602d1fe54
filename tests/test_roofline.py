import math

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.random_splits import Size, mixed_rows, pair
from moeify.roofline import Machine, Operation, flops, operations, this_machine

SIZE = Size(16, 64, 4, 2, vocabulary=32, length=8)


class Tied(nn.Module):
    """Looks tokens up in the table that its outputs are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(self.table(tokens)) @ self.table.weight.t()


@torch.no_grad()
def test_each_operation_reads_the_weights_that_it_multiplies_by_and_no_activation() -> None:
    network, tokens = Tied(), torch.tensor([[3, 4, 5]])
    looked_up, normed, product = operations(lambda: network(tokens), network)
    assert looked_up == Operation(0, 3 * 8)
    assert normed == Operation(0, 2 * 8)
    assert product == Operation(2 * 3 * 8 * 50, 50 * 8)
    assert flops(lambda: network(tokens)) == product.flops


@torch.no_grad()
def test_an_attention_reads_its_keys_and_values_and_a_shape_is_read_from_nothing() -> None:
    network = nn.Linear(4, 4, bias=False)
    query, key, value = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    run = {"attention": lambda: scaled_dot_product_attention(query, key, value)}
    (found,) = operations(run["attention"], network)
    assert found == Operation(2 * 2 * 2 * 3 * 9 * 4, 2 * 2 * 3 * 9 * 4)
    assert (
        operations(lambda: (network.weight.new_zeros(4), torch.ones_like(network.weight), network.weight.t()), network)
        == []
    )


@torch.no_grad()
def test_channels_are_counted_as_a_convolution() -> None:
    network = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    (found,) = operations(lambda: network(torch.randn(5, 2, 6, 6)), network)
    assert found == Operation(2 * 5 * 36 * 3 * 2 * 9, 3 * 2 * 9)


@pytest.mark.parametrize("widths", ["equal", "ragged"])
def test_what_a_split_model_runs_are_the_operations_of_active_units(widths: str) -> None:
    dense, split = pair(SIZE, widths, ("ffn", "heads"))
    tokens, categories = mixed_rows(SIZE, 8)
    shares = split.active_flops(SIZE.length).values()
    heads = [site.name for site in split.space.sites if site.kind == "heads"]
    active = [float(split.partition.active(name, c).double().mean()) for name in heads for c in split.categories]
    whole = flops(torch.no_grad()(lambda: dense(tokens)))
    routed = flops(torch.no_grad()(lambda: split(tokens, categories)))
    half = SIZE.layers * 2 * SIZE.hidden * SIZE.length * tokens.numel()
    """Of attention, which is whole where it is counted, and the half that is causal in ``active_flops``."""
    assert routed == pytest.approx((whole - half) * sum(shares) / 4 + half * sum(active) / len(active))


def test_a_step_runs_what_the_backward_pass_of_active_units_needs() -> None:
    dense, split = pair(SIZE, "ragged")
    tokens, categories = mixed_rows(SIZE, 8)
    split(tokens, categories)
    name = "model.layers.0.mlp"
    x = torch.randn(8, SIZE.length, SIZE.hidden, requires_grad=True)
    blocks = (dense.get_submodule(name), split.network.get_submodule(name))
    whole, routed = (flops(lambda block=block: block(x).sum().backward()) for block in blocks)
    site = split.space.sites[0].name
    shares = [float(split.partition.active(site, c).double().mean()) for c in split.categories]
    assert whole == 3 * 3 * 2 * x.numel() * SIZE.ffn
    assert routed == pytest.approx(whole * sum(shares) / 4)


def test_a_machine_takes_as_long_as_what_is_slower_of_each_operation() -> None:
    machine = Machine(flops=10.0, reads=2.0)
    computes, reads = Operation(100, 2), Operation(10, 40)
    assert machine.seconds([computes, reads]) == 10.0 + 20.0
    assert machine.reads_most([computes, reads])
    assert not machine.reads_most([computes, computes, computes, reads])
    assert Machine(1.0, math.inf).seconds([computes, reads]) == 110.0
    assert not machine.reads_most([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_machine_is_measured_once(dtype: torch.dtype) -> None:
    machine = this_machine(dtype, torch.get_num_threads())
    assert min(machine.flops, machine.reads) > 0
    assert this_machine(dtype, torch.get_num_threads()) is machine
