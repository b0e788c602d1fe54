"""Experts as coloured boxes: which colour an expert has, and which categories it serves, all over the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.show import Summary, walk

HUES = 8
"""Colours that experts below the core are told apart by; the style sheet has as many."""
LEAST_NAMED = 0.028
"""Share of a picture's height that holds a line of text."""


@dataclass(frozen=True)
class Box:
    """A rectangle of a picture, in percent of its size."""

    left: float
    top: float
    width: float
    height: float
    title: str
    look: str
    """Classes of the style sheet: the expert's colour."""
    name: str = ""
    """Written into it; empty where there is no room."""
    serves: str = ""
    """Numbers of the categories it serves, for who follows one."""


def looks(tree: Summary) -> dict[str, str]:
    """Return expert -> classes of its colour: a hue for each child of the core, paler with each level below it."""
    found = {}
    hue = 0
    for node, depth in walk(tree):
        hue += depth == 1
        found[node["name"]] = f"hue{(hue - 1) % HUES + 1} depth{min(depth, 3)}" if depth else "core"
    return found


def served(tree: Summary, categories: Sequence[str]) -> dict[str, str]:
    """Return expert -> the numbers of its categories, with blanks between."""
    places = {category: str(number) for number, category in enumerate(categories)}
    return {node["name"]: " ".join(places[c] for c in node["categories"] if c in places) for node, _ in walk(tree)}
