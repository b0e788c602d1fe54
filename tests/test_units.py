from collections.abc import Callable

import pytest
from torch import nn

from moeify.models.families import unit_space
from moeify.models.units import unit_parameters
from tests.networks import grouped_llama, tiny_autoencoder, tiny_llama


def test_a_units_parameters_are_what_it_reads_and_writes_through() -> None:
    llama = tiny_llama()
    assert [unit_parameters(llama, site) for site in unit_space(llama).sites] == [3 * 16, 3 * 16]  # gate, up, down
    autoencoder = tiny_autoencoder()  # 10 pixels - 24 - code of 3 - 24 - 10 pixels; a bias of its own each
    wanted = {"encoder.hidden": 10 + 1 + 3, "decoder.hidden": 3 + 1 + 10}
    assert {s.name: unit_parameters(autoencoder, s) for s in unit_space(autoencoder).sites} == wanted


def test_a_head_owns_what_its_queries_keys_and_values_read_and_write_through() -> None:
    network = grouped_llama(heads=6, groups=3)  # 24 wide: heads of 4, two queries a unit
    space = unit_space(network, ("heads",))
    rows = 2 * 4 + 4 + 4
    assert {unit_parameters(network, site) for site in space.sites} == {rows * 24 + 2 * 4 * 24}
    attention = {n: p.numel() for n, p in network.named_parameters() if "self_attn" in n}
    assert sum(site.units * unit_parameters(network, site) for site in space.sites) == sum(attention.values())


@pytest.mark.parametrize("make", [tiny_llama, tiny_autoencoder])
def test_all_units_together_own_no_more_than_there_is(make: Callable[[], nn.Module]) -> None:
    network = make()
    owned = sum(site.units * unit_parameters(network, site) for site in unit_space(network).sites)
    assert 0 < owned < sum(p.numel() for p in network.parameters())
