"""A matplotlib figure as SVG that is part of the page: its text, its colours in light and in dark, nothing fetched."""

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from pipelines.plots import BUDGET, DENSE, RANDOM, SPLIT, TOLD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    SPLIT: "split",
    RANDOM: "random",
    DENSE: "dense",
    TOLD: "told",
    BUDGET: "budget",
    "#000000": "ink",
    "#ffffff": "paper",
    "#b0b0b0": "rule",
}
"""matplotlib's and the plots' colours -> variables of the style sheet, which knows light and dark."""
_FONT = re.compile(r"font-family:[^;]*;?")
_DECIMALS = re.compile(r"(\d+\.\d)\d+")


def inline(figure: "Figure", name: str, label: str, tips: Mapping[str, str] | None = None) -> str:
    """Return the figure as an ``<svg>``; its ids start with ``name``, which no other figure of the page has.

    ``label`` says in a sentence what is seen, for who does not see it; ``tips`` maps an artist's gid to what is told
    where the pointer rests on it.
    """
    from matplotlib import rc_context

    figure.patch.set_visible(False)
    for axis in figure.axes:
        axis.patch.set_visible(False)
    written = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(written.getvalue())
    _plain(root, name, tips or {})
    size = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {"viewBox": size, "class": "chart", "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _plain(node: ElementTree.Element, name: str, tips: Mapping[str, str]) -> None:
    """Make an element fit into HTML: no namespaces, metadata or style sheets, ids of its own, the page's colours."""
    for child in list(node):
        tag = child.tag.rpartition("}")[2]
        if tag in ("metadata", "style"):
            node.remove(child)
        else:
            _plain(child, name, tips)
    node.tag = node.tag.rpartition("}")[2]
    node.text, node.tail = (node.text or "").strip() or None, None
    tip = tips.get(node.attrib.get("id", ""))
    attributes = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
    node.attrib.clear()
    for key, value in attributes.items():
        node.attrib[key] = _attribute(key, value, name)
    if tip is not None:
        title = ElementTree.Element("title")
        title.text = tip
        node.insert(0, title)


def _attribute(key: str, value: str, name: str) -> str:
    match key:
        case "id":
            return f"{name}-{value}"
        case "href":
            return f"#{name}-{value.removeprefix('#')}"
        case "clip-path":
            return value.replace("url(#", f"url(#{name}-")
        case "style":
            value = _FONT.sub("", value)
            for colour, variable in _COLOURS.items():
                value = value.replace(colour.lower(), f"var(--{variable})")
            return value
        case "d" | "transform" | "x" | "y":
            return " ".join(_DECIMALS.sub(r"\1", value).split())
    return value
