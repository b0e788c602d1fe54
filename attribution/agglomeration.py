"""Agglomeration: from small groups to a few, two of them merging at a time, so that the rest can still be placed."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

Pick = Callable[[Sequence[Sequence[int]], Callable[[int, int], bool]], tuple[int, int]]
"""Chooses the next merge: of the present groups, and a test whether groups i < j may merge, to such a pair."""


def agglomerate(
    start: Sequence[Sequence[int]], count: int, room: int, pick: Pick, apart: Collection[int] = ()
) -> list[list[int]]:
    """Merge the groups of ``start`` until ``count`` are left, none with more than ``room`` members.

    No two members of ``apart`` come into one group. Groups are sorted, and in order of their smallest member.
    Raises ValueError where no way to finish is found.
    """
    groups = [list(members) for members in start]
    plan = _pack(groups, count, room, apart)
    if not 1 <= count <= len(groups) or plan is None:
        raise ValueError(
            f"cannot make {count} groups of up to {room} members from {len(groups)}, the largest of "
            f"{max(map(len, groups), default=0)}, {len(apart)} to be kept apart; ask for other numbers"
        )
    state = _State(groups, plan, count, room, apart)
    while len(state.groups) > count:
        state = state.after(*pick(state.groups, state.allows))
    return sorted(sorted(members) for members in state.groups)


@dataclass(frozen=True)
class _State:
    groups: list[list[int]]
    plan: list[int]
    """A way to finish: which of the final groups each group could end up in."""
    count: int
    room: int
    apart: Collection[int]

    def allows(self, i: int, j: int) -> bool:
        return self._plan_after(i, j) is not None

    def after(self, i: int, j: int) -> "_State":
        plan = self._plan_after(i, j)
        assert plan is not None
        return replace(self, groups=_merged(self.groups, i, j), plan=plan)

    def _plan_after(self, i: int, j: int) -> list[int] | None:
        plan = _pack(_merged(self.groups, i, j), self.count, self.room, self.apart)
        if plan is None and self.plan[i] == self.plan[j]:
            return self.plan[:j] + self.plan[j + 1 :]
        return plan


def _merged(groups: Sequence[list[int]], i: int, j: int) -> list[list[int]]:
    return [*groups[:i], groups[i] + groups[j], *groups[i + 1 : j], *groups[j + 1 :]]


def _pack(groups: Sequence[Sequence[int]], count: int, room: int, apart: Collection[int]) -> list[int] | None:
    """Place groups into ``count`` final ones of ``room``, if it succeeds.

    Those with members to be kept apart get a final one each; the others go by first fit, largest first.
    """
    left, places = [room] * count, [0] * len(groups)
    lone = [i for i, members in enumerate(groups) for member in members if member in apart]
    if len(set(lone)) < len(lone) or len(lone) > count:
        return None
    for place, i in enumerate(lone):
        places[i] = place
        left[place] -= len(groups[i])
    if min(left, default=0) < 0:
        return None
    for i in sorted(set(range(len(groups))) - set(lone), key=lambda i: (-len(groups[i]), i)):
        fitting = [place for place in range(count) if left[place] >= len(groups[i])]
        if not fitting:
            return None
        places[i] = fitting[0]
        left[fitting[0]] -= len(groups[i])
    return places
