from collections.abc import Callable

import pytest
from torch import nn

from moeify.families import unit_space
from moeify.units import unit_parameters
from tests.networks import tiny_autoencoder, tiny_llama


def test_a_units_parameters_are_what_it_reads_and_writes_through() -> None:
    llama = tiny_llama()
    assert [unit_parameters(llama, site) for site in unit_space(llama).sites] == [3 * 16, 3 * 16]  # gate, up, down
    autoencoder = tiny_autoencoder()  # 10 pixels - 24 - code of 3 - 24 - 10 pixels; a bias of its own each
    wanted = {"encoder.hidden": 10 + 1 + 3, "decoder.hidden": 3 + 1 + 10}
    assert {s.name: unit_parameters(autoencoder, s) for s in unit_space(autoencoder).sites} == wanted


@pytest.mark.parametrize("make", [tiny_llama, tiny_autoencoder])
def test_all_units_together_own_no_more_than_there_is(make: Callable[[], nn.Module]) -> None:
    network = make()
    owned = sum(site.units * unit_parameters(network, site) for site in unit_space(network).sites)
    assert 0 < owned < sum(p.numel() for p in network.parameters())
