from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.agglomeration import agglomerate


def first(groups: Sequence[Sequence[int]], allowed: Callable[[int, int], bool]) -> tuple[int, int]:
    pairs = [(i, j) for j in range(len(groups)) for i in range(j)]
    return next(pair for pair in pairs if allowed(*pair))


@given(sizes=st.lists(st.integers(1, 4), max_size=3), alone=st.integers(0, 6), more=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_groups_to_be_kept_apart_stay_whole_and_apart(sizes: list[int], alone: int, more: int) -> None:
    number = sum(sizes) + alone
    members = iter(range(number))
    given_groups = [[next(members) for _ in range(size)] for size in sizes]
    start = [*given_groups, *([i] for i in members)]
    count = min(max(1, len(sizes)) + more, len(start))
    if not start:
        return
    room = max(-(-number // count), *sizes, 1)
    parts = agglomerate(start, count, room, first, apart=[group[0] for group in given_groups])
    assert len(parts) == count
    assert sorted(i for part in parts for i in part) == list(range(number))
    assert max(map(len, parts)) <= room
    homes = [next(k for k, part in enumerate(parts) if set(group) <= set(part)) for group in given_groups]
    assert len(set(homes)) == len(homes)


def test_what_cannot_be_is_refused() -> None:
    for count, room, apart in ((3, 2, []), (0, 2, []), (1, 1, []), (1, 2, [0, 1])):
        with pytest.raises(ValueError, match=f"cannot make {count} groups of up to {room} members from 2"):
            agglomerate([[0], [1]], count, room, first, apart)
