"""Every way to find owners: exact capacities, the same answer each time, and planted structure found."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from moeify.owners import Leaf, chooser
from moeify.owners_config import Owners
from tests.tables import empty_table

NAMES = [get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(Owners)[0])]
PARTS = (("a", "b"), ("c",))
BY_ATTRIBUTION = [name for name in NAMES if name not in {"random", "magnitude"}]


def owners(kind: str) -> Owners:
    return TypeAdapter[Owners](Owners).validate_python({"kind": kind})


def leaf(values_UC: np.ndarray, units: slice, inputs_UF: torch.Tensor | None = None, seed: int = 0) -> Leaf:
    """A leaf whose units matter, and are active, as given."""
    number = len(values_UC)
    table = empty_table(("a", "b", "c"), {"site": (number, 5)})
    for tensor in (table.counts, table.sampled, table.rows):
        tensor.fill_(10.0)
    for name in ("fisher", "absolute", "power"):
        getattr(table.sites["site"], name).copy_(torch.from_numpy(values_UC) * 10)
    outputs = torch.randn(5, number, generator=torch.Generator().manual_seed(seed))
    return Leaf(table, "site", units, PARTS, outputs, inputs_UF, (seed,))


@pytest.mark.parametrize("kind", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), units=st.integers(1, 20), data=st.data())
def test_each_bin_takes_exactly_what_it_has_room_for_each_time_the_same(
    kind: str, seed: int, units: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, units - 1))
    mine = units - start
    first = data.draw(st.integers(0, mine))
    second = data.draw(st.integers(0, mine - first))
    capacity = np.array([first, second, mine - first - second])
    random = np.random.default_rng(seed)
    values, inputs = random.random((units, 3)), torch.from_numpy(random.standard_normal((units, 4)))
    found = [chooser(owners(kind), leaf(values, slice(start, units), inputs), "fisher")(capacity) for _ in range(2)]
    assert np.bincount(found[0], minlength=3).tolist() == capacity.tolist()
    assert found[0].tolist() == found[1].tolist()


@pytest.mark.parametrize("kind", BY_ATTRIBUTION)
def test_units_of_a_kind_find_their_expert_and_those_that_all_need_stay(kind: str) -> None:
    """Units 0-3 are another leaf's; then four of a and b, four of c, four of all."""
    home = np.repeat([2, 0, 1, 2], 4)
    values = np.array([[1.0, 1.0, 0.02], [0.02, 0.02, 1.0], [1.5, 1.5, 2.0]])[home]
    inputs = torch.from_numpy(np.eye(3)[home] + np.random.default_rng(0).standard_normal((16, 3)) * 0.05)
    found = chooser(owners(kind), leaf(values, slice(4, 16), inputs), "fisher")(np.array([4, 4, 4]))
    assert found.tolist() == home[4:].tolist()


def test_magnitude_keeps_the_largest_output_weights() -> None:
    one = leaf(np.ones((9, 3)), slice(0, 9))
    found = chooser(owners("magnitude"), one, "fisher")(np.array([3, 3, 3]))
    assert set(np.flatnonzero(found == 2)) == set(one.outputs_DU.norm(dim=0).topk(3).indices.tolist())


def test_random_owners_are_others_with_another_seed() -> None:
    values, capacity = np.ones((30, 3)), np.array([10, 10, 10])
    one, other = (chooser(owners("random"), leaf(values, slice(0, 30), seed=s), "fisher")(capacity) for s in (0, 1))
    assert one.tolist() != other.tolist()


def test_moefication_says_that_it_needs_input_weights() -> None:
    with pytest.raises(ValueError, match="'moefication' need the input weights of site 'site', got none"):
        chooser(owners("moefication"), leaf(np.ones((9, 3)), slice(0, 9)), "fisher")
