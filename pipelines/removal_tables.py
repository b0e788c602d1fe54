"""What is lost without an expert: the matrix of removals, and whether each expert is a clean module."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console

from pipelines.tables import Block, table_for
from pipelines.wording import nats


def removal_blocks(
    matrix: Mapping[str, Mapping[str, float | None]],
    tree: Mapping[str, Any],
    experts: Sequence[tuple[Mapping[str, Any], int]],
    console: Console,
) -> Iterator[Block]:
    """Yield the matrix expert x category in the tree's order, in as many blocks of columns as the width asks for.

    A category that does not run an expert cannot lose by its removal. Such an exact zero is a dot, and where there
    are several blocks, a row of nothing but dots is left out.
    """
    names = ["  " * (depth - 1) + node["name"] for node, depth in experts]
    room = console.width - max(map(len, [*names, "without"])) - 2
    top = [child["categories"] for child in tree["children"]]
    parts = list(_chunks(top, room))
    for number, part in enumerate(parts, start=1):
        table = table_for(console, "without", *part)
        for name, (node, _) in zip(names, experts, strict=True):
            rises = {category: matrix[category].get(node["name"]) for category in part}
            never = [rise == 0.0 and category not in node["categories"] for category, rise in rises.items()]
            if len(parts) > 1 and all(never):
                continue
            cells = (nats(rise, signed=True) for rise in rises.values())
            table.add_row(name, *("·" if dot else cell for dot, cell in zip(never, cells, strict=True)))
        of = f" ({number} of {len(parts)})" if len(parts) > 1 else ""
        title = f"Rise of test loss (nats) without an expert and all below it{of}"
        last = number == len(parts)
        yield Block(title, table, "·: exactly 0, the category never runs that expert" if last else "")


def module_block(modules: Sequence[Mapping[str, Any]], order: Sequence[str], console: Console) -> Block:
    """Return the verdict on each expert, in the tree's order."""
    table = table_for(console, "without", "own", "at least", "leak", "random own", "leak", "p", "verdict", text=(0, 7))
    known = {each["expert"]: each for each in modules}
    for each in (known[name] for name in order if name in known):
        whole = None not in (*each["drawn_own"], *each["drawn_other"])
        own, other = (fmean(each[key]) if whole else None for key in ("drawn_own", "drawn_other"))
        table.add_row(
            each["expert"],
            *(nats(each[key], signed=True) for key in ("own", "own_low")),
            _leak(each["own"], each["other"]),
            nats(own, signed=True),
            _leak(own, other),
            f"{each['p']:.2f}",
            each["verdict"],
        )
    note = (
        "own: of the categories that it serves, and the lower end of its 95 % interval; leak: what "
        "others rise, as a share of own; random: without as many units drawn from what its "
        f"categories run, mean of {len(modules[0]['drawn_own'])} draws; p: share of removals that leak as little"
    )
    return Block("Clean modules (rise of test loss, nats)", table, note)


def _chunks(groups: Sequence[Sequence[str]], room: int) -> Iterator[list[str]]:
    """Yield lists of categories whose columns fit into the room: whole groups together where they can be."""
    part: list[str] = []
    for group in groups:
        if part and _columns(part) + _columns(group) > room:
            yield part
            part = []
        for category in group:
            if part and _columns(part) + _columns([category]) > room:
                yield part
                part = []
            part.append(category)
    if part:
        yield part


def _columns(categories: Sequence[str]) -> int:
    """Return how wide the columns of those categories are, the gaps included."""
    return sum(max(len(category), len("+00.0000")) + 2 for category in categories)


def _leak(own: float | None, other: float | None) -> str:
    return "-" if own is None or other is None or own <= 0.0 else f"{other / own:.0%}"
