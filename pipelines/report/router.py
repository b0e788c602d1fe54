"""What a router does: who serves whom, what that costs, and text coloured by the expert that serves it."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from pipelines.report.boxes import HUES
from pipelines.report.portraits import readable
from pipelines.report.recorded import Recorded
from pipelines.show import walk
from pipelines.wording import STANDARD_ERRORS, nats, percent

if TYPE_CHECKING:
    from moeify.routers.report import Compared, RouterReport
    from moeify.routers.served import ServedText

_MOST_COLUMNS = 48
"""Experts, and categories, in the matrix."""
_MOST_NUMBERS = 24
"""Experts up to which numbers stand in it."""


@dataclass(frozen=True)
class Cell:
    """How many of a category's decisions an expert gets."""

    expert: str
    share: float
    text: str
    own: bool
    """Whether the expert is the one that serves the category."""


@dataclass(frozen=True)
class Run:
    """Tokens in a row that one expert serves."""

    expert: str
    look: str
    pieces: tuple[tuple[str, bool, str], ...]
    """Text, whether a second opinion is asked, and what is told of it."""


@dataclass(frozen=True)
class Losses:
    """A table of losses."""

    title: str
    arms: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...], str], ...]
    """Category, loss of every arm, router tax."""


@dataclass(frozen=True)
class Routing:
    """The section."""

    use: str
    figures: tuple[tuple[str, str], ...]
    experts: tuple[tuple[str, str], ...]
    """Name and colour: one of its own for each, since those of the tree are alike where experts are near."""
    matrix: tuple[tuple[str, tuple[Cell, ...]], ...]
    numbers: bool
    left_out: int
    decided: str
    losses: tuple[Losses, ...]
    after: tuple[tuple[int, float], ...]
    """Tokens read, fraction of rows that are right then."""
    texts: tuple[tuple[str, tuple[Run, ...]], ...]
    threshold: str


def routing(run: Recorded) -> Routing | None:
    """Return what the run's router does; None without one."""
    known = run.router
    if known is None or run.tree is None:
        return None
    shown = known.experts[:_MOST_COLUMNS]
    look = {expert: f"hue{place % HUES + 1}" for place, expert in enumerate(known.experts)}
    order = [category for category in run.tree["categories"] if category in known.confusion]
    serves = {node["name"]: node["categories"] for node, _ in walk(run.tree)}
    matrix = tuple(
        (category, tuple(_cell(e, known.confusion[category].get(e, 0.0), category in serves.get(e, ())) for e in shown))
        for category in order[:_MOST_COLUMNS]
    )
    return Routing(
        use={"token": "one decision a token, from the tokens up to it", "document": _once(known)}[known.kind],
        figures=tuple(_figures(known)),
        experts=tuple((expert, look[expert]) for expert in shown),
        matrix=matrix,
        numbers=len(shown) <= _MOST_NUMBERS,
        left_out=max(0, len(known.experts) - len(shown)) + max(0, len(order) - len(matrix)),
        decided={"token": "tokens", "document": "rows"}[known.kind],
        losses=tuple(_losses(known)),
        after=tuple(known.accuracy_after.items()) if known.unit == "token" else (),
        texts=tuple((" → ".join(text.categories), tuple(_runs(text, known, look))) for text in known.texts),
        threshold=percent(known.threshold) if known.threshold else "",
    )


def _once(known: "RouterReport") -> str:
    return f"one decision a row, after {known.prefix} tokens" if known.unit == "token" else "one decision an example"


def _figures(known: "RouterReport") -> list[tuple[str, str]]:
    compared = known.whole or known.later
    found = [("right", f"{percent(known.accuracy)} of decisions")]
    if compared:
        error = compared.router_tax_error
        reach = f" ± {STANDARD_ERRORS * error:.2%}" if error is not None else ""
        found.append(("router tax", f"{compared.router_tax['mean']:+.2%}{reach} of the loss by label"))
        found.append(("above the dense twin", f"{nats(compared.over_dense['mean'], signed=True)} nats"))
    if known.threshold:
        found.append(("second opinions", f"{percent(known.asked)} of {known.unit}s, below {percent(known.threshold)}"))
    found.append(("calibration error", percent(known.calibration_error)))
    return found


def _cell(expert: str, share: float, own: bool) -> Cell:
    return Cell(expert, share, f"{share:.0%}" if share >= 0.005 else "·", own)


def _losses(known: "RouterReport") -> list[Losses]:
    found = []
    if known.whole:
        found.append(_table(known.whole, "Test loss" + (", all tokens" if known.later else "")))
    if known.later:
        found.append(_table(known.later, f"Test loss, behind the first {known.prefix} tokens of a row"))
    return found


def _table(compared: "Compared", title: str) -> Losses:
    names = {"label": "by label", "router": "by router", "dense": "dense twin", "told": "told twin"}
    rows = tuple(
        (category, tuple(nats(loss[category]) for loss in compared.loss.values()), f"{tax:+.2%}")
        for category, tax in compared.router_tax.items()
    )
    return Losses(title, tuple(names.get(arm, arm) for arm in compared.loss), rows)


def _runs(text: "ServedText", known: "RouterReport", look: Mapping[str, str]) -> list[Run]:
    found = []
    tokens = zip(text.pieces, text.experts, text.probabilities, strict=True)
    for place, group in groupby(tokens, key=lambda token: token[1]):
        expert = known.experts[place]
        pieces = tuple(
            (readable(piece), share < known.threshold, f"{expert} {share:.0%}") for piece, _, share in group if piece
        )
        if pieces:
            found.append(Run(expert, look[expert], pieces))
    return found
