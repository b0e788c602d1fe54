"""The tree that a recipe may give: names of categories in nested lists, such as ``[[python, c], [prose, web]]``.

A list's members part from each other and each stays whole, until a later round divides it in its turn. A flat list is a
group that attribution divides. A category that is not named goes where attribution puts it: into a given group, or
into one of its own while the round has more branches than groups were given. So a given group is held together for as
long as its expert serves anything else.
"""

import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    Nested = tuple["str | Nested", ...]
else:  # what checks types at run time cannot take a recursive one
    Nested = tuple


def read_tree(value: object) -> Nested:
    """Return lists as tuples. Raises ValueError with a line for each thing that is wrong, its place in front."""
    if not isinstance(value, list | tuple):
        raise ValueError(f": got {value!r:.60}, wanted a list of groups, each the name of a category or a list")
    if problems := list(_problems(value, "", set())):
        raise ValueError("\n".join(problems))
    if value and not any(isinstance(item, list | tuple) for item in value):
        raise ValueError(
            ": got one flat list, which divides nothing, wanted groups within it such as [[a, b], [c, d]]; "
            "without tree, attribution makes rounds.branching groups"
        )
    return _frozen(value)


def _problems(items: Sequence[object], path: str, seen: set[str]) -> Iterator[str]:
    if len(items) < (2 if path else 1):
        yield f"{path}: got {'an empty group' if not items else 'a group of one'}, wanted at least two members" + (
            "; a category that is alone is written without brackets" if items else ""
        )
    for i, item in enumerate(items):
        here = f"{path}[{i}]"
        if isinstance(item, list | tuple):
            yield from _problems(item, here, seen)
        elif not isinstance(item, str):
            yield f"{here}: got {item!r:.60}, wanted the name of a category, in quotes if it is a number, or a list"
        elif item in seen:
            yield f"{here}: got {item!r:.60} again, wanted every category once"
        else:
            seen.add(item)


def _frozen(items: Sequence[object]) -> Nested:
    return tuple(item if isinstance(item, str) else _frozen(cast(Sequence[object], item)) for item in items)


def names(item: str | Nested) -> tuple[str, ...]:
    """Return all names in a tree or a part of one, in order."""
    return (item,) if isinstance(item, str) else tuple(name for each in item for name in names(each))


def strangers(where: str, given: Collection[str], categories: Sequence[str]) -> Iterator[str]:
    """Yield a line for each given name that is no category; ``where`` is the key that gave it."""
    for name in given:
        if name not in categories:
            close = difflib.get_close_matches(name, categories, 1)
            nearest = f"; nearest: {close[0]!r}" if close else ""
            yield f"{where}: got {name!r}, which is no category of the data, wanted some of {list(categories)}{nearest}"


def given_groups(tree: Nested | None, categories: Collection[str]) -> list[tuple[str, ...]]:
    """Return the groups in which the tree gives an expert's categories; none where it says nothing about them."""
    if tree is None or not any(isinstance(item, tuple) for item in tree):
        return []
    held = [(item, tuple(name for name in names(item) if name in categories)) for item in tree]
    for item, mine in held:
        if len(mine) == len(categories):
            return [] if isinstance(item, str) else given_groups(item, categories)
    return [mine for _, mine in held if mine]


def branches(given: int, free: int, branching: int) -> int:
    """Return how many groups come of given ones and free categories: as many as the round asks, if possible."""
    return min(max(branching, given), given + free)


def foreseen(tree: Nested | None, categories: Sequence[str], branching: int) -> list[tuple[str, ...]]:
    """Return groups of the sizes to expect: those given, and free categories wherever the fewest are."""
    given = given_groups(tree, categories)
    free = [c for c in categories if not any(c in group for group in given)]
    groups = [*given, *[()] * (branches(len(given), len(free), branching) - len(given))]
    for category in free:
        smallest = min(range(len(groups)), key=lambda k: len(groups[k]))
        groups[smallest] = (*groups[smallest], category)
    return groups
