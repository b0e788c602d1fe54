import copy
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moeify.models.build import logits
from moeify.models.families import unit_space
from moeify.recipe.partition import UnitKind
from moeify.splitting.surgery import permute
from tests.networks import grouped_llama, rows_for, tiny_autoencoder, tiny_llama, tiny_resnet
from tests.trees import random_orders

Make = Callable[[int], nn.Module]
BOTH = get_args(UnitKind)


def shared_keys(seed: int) -> nn.Module:
    return grouped_llama(seed, heads=6, groups=3, bias=True)


@pytest.mark.parametrize("make", [tiny_llama, tiny_autoencoder, tiny_resnet, shared_keys])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_permuting_units_never_changes_the_function(make: Make, seed: int) -> None:
    network = make(1)
    space, inputs = unit_space(network, BOTH), rows_for(network, 4, seed)
    before = logits(network, inputs)
    orders = random_orders(list(space.readers), seed)
    permute(network, None, space, orders)
    torch.testing.assert_close(logits(network, inputs), before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [tiny_llama, tiny_autoencoder, tiny_resnet, shared_keys])
def test_optimizer_state_follows_its_units_so_that_training_goes_on_alike(make: Make) -> None:
    plain = make(2)
    moved = copy.deepcopy(plain)
    space = unit_space(plain, BOTH)
    optimizers = {id(n): torch.optim.AdamW(n.parameters(), lr=1e-2) for n in (plain, moved)}

    def train(network: nn.Module, steps: range) -> None:
        for step in steps:
            inputs = rows_for(network, 3, step)
            logits(network, inputs).square().mean().backward()
            optimizers[id(network)].step()
            optimizers[id(network)].zero_grad()

    for network in (plain, moved):
        train(network, range(3))
    permute(moved, optimizers[id(moved)], space, random_orders(list(space.readers), 5))
    for network in (plain, moved):
        train(network, range(3, 6))
    inputs = rows_for(plain, 4, 99)
    torch.testing.assert_close(logits(moved, inputs), logits(plain, inputs), rtol=1e-8, atol=1e-10)


def test_an_order_that_loses_a_unit_is_refused() -> None:
    network = tiny_autoencoder()
    space = unit_space(network)
    orders = random_orders(list(space.readers), 0)
    orders["encoder.hidden"][0] = orders["encoder.hidden"][1]
    with pytest.raises(ValueError, match="each of 24 units once"):
        permute(network, None, space, orders)
