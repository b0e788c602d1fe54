"""Draws the pictures of concepts.md from a small run.

python docs/pictures.py         draws docs/*.svg from docs/pictures.json, what the run left
python docs/pictures.py --run   runs first: four handwritten digits, under a minute on one core
"""

import json
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
FACTS = HERE / "pictures.json"
DIGITS = {"zero": 0, "six": 6, "one": 1, "seven": 7}
STEPS = 400
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.soft { fill: #59636e } .small { font-size: 11px }
.line { stroke: #59636e; fill: none } .off { fill: none; stroke: #b9c0c8; stroke-dasharray: 3 3 }
.core { fill: #cfd6dd }
.hue1 { fill: #8fc1ec } .hue2 { fill: #f3b98a } .leaf1 { fill: #c3dff5 } .leaf2 { fill: #f9dcc4 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .soft { fill: #9198a1 } .line { stroke: #9198a1 } .off { stroke: #3d444d }
  .core { fill: #4a525c }
  .hue1 { fill: #1f5f99 } .hue2 { fill: #94541d } .leaf1 { fill: #2f7cc0 } .leaf2 { fill: #b8702f }
}
"""


class Picture:
    """An SVG that is built up piece by piece."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
        self.pieces = [f"<title>{escape(label)}</title>", f"<style>{STYLE}</style>"]

    def box(
        self, x: float, y: float, width: float, height: float, look: str, label: str = "", least: float = 11
    ) -> None:
        self.pieces.append(f'<rect class="{look}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>')
        if label and height >= least and width >= 6.2 * len(label):
            self.text(x + width / 2, y + height / 2 + 4, label, "middle", "small" if height < 15 else "")

    def text(self, x: float, y: float, content: str, anchor: str = "start", look: str = "") -> None:
        self.pieces.append(
            f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'
        )

    def line(self, *points: tuple[float, float], dashed: bool = False) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.pieces.append(f'<polyline class="line" points="{path}"{dashes}/>')

    def svg(self) -> str:
        return "\n".join([self.head, *self.pieces, "</svg>"]) + "\n"


def run(steps: int = STEPS) -> dict[str, Any]:
    """Fit an autoencoder of four digits in two rounds, and return what the pictures need."""
    import torch
    from sklearn.datasets import load_digits

    import moeify
    from moeify.models.build import Autoencoder

    images, labels = load_digits(return_X_y=True)
    data = {name: torch.from_numpy(images[labels == digit] / 16).float() for name, digit in DIGITS.items()}
    torch.manual_seed(0)
    split = moeify.fit(
        Autoencoder(inputs=64, hidden=96, code=12),
        data,
        loss="pixels",
        steps=steps,
        separation=0.5,
        rows=64,
        controls=["random"],
        training={"learning_rate": 4e-3, "weight_decay": 0.0},
        partition={"min_units": 4},
    )
    assert split.trained is not None
    partition, result = split.partition, split.trained.result
    first, second = partition.widths
    return {
        "steps": steps,
        "nodes": partition.as_json()["nodes"],
        "widths": partition.as_json()["widths"],
        "live": round(partition.live(first, second).float().mean().item(), 4),
        "rounds": [
            {
                "separation": round(each.separation, 4),
                "cut": round(each.tax_cut or 0.0, 3),
                "tax": round(each.tax, 3),
                "accepted": each.accepted,
                "units": units_of(each.tree),
            }
            for each in result.rounds
        ],
        "loss": {arm: round(sum(losses.values()) / len(losses), 3) for arm, losses in result.test_loss.items()},
    }


def units_of(tree: Any) -> dict[str, int]:
    """Return expert -> the units that it owns, depth first."""
    found = {tree["name"]: tree["units"]}
    for child in tree["children"]:
        found |= units_of(child)
    return found


def draw(facts: dict[str, Any]) -> dict[str, str]:
    """Return name -> picture."""
    return {
        name: make(facts).svg() for name, make in (("tree", tree), ("rows", rows), ("edges", edges), ("rounds", rounds))
    }


def looks(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Return expert -> its colour: the core's, one for each child of the core, a paler one below it."""
    found, hue = {}, 0
    for node in nodes:
        if node["parent"] is None:
            found[node["name"]] = "core"
        elif node["parent"] == 0:
            hue = hue % 2 + 1
            found[node["name"]] = f"hue{hue}"
        else:
            found[node["name"]] = f"leaf{hue}"
    return found


def spans(nodes: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Return the half-open range of leaves that each expert serves."""
    leaves = nodes[0]["categories"]
    return [(leaves.index(n["categories"][0]), leaves.index(n["categories"][-1]) + 1) for n in nodes]


def related(nodes: list[dict[str, Any]], one: int, other: int) -> bool:
    """Say whether one expert lies above, or is, the other."""
    return set(nodes[one]["categories"]) <= set(nodes[other]["categories"]) or set(nodes[other]["categories"]) <= set(
        nodes[one]["categories"]
    )


def tree(facts: dict[str, Any]) -> Picture:
    """The tree as boxes: as wide as what an expert serves, as high as it owns units."""
    nodes, look = facts["nodes"], looks(facts["nodes"])
    owned = [sum(column) for column in zip(*facts["widths"].values(), strict=True)]
    total, leaves = sum(owned), nodes[0]["categories"]
    left, bottom, column, scale = 150.0, 300.0, 130.0, 260.0 / total
    made = Picture(700, 345, "An expert tree: every column of boxes is the route of a category")
    tops: list[float] = []
    for node, (first, behind), units in zip(nodes, spans(nodes), owned, strict=True):
        base = bottom if node["parent"] is None else tops[node["parent"]]
        tops.append(base - units * scale)
        width = column * (behind - first) - 4
        label = f"{node['name']} · {units} units" if behind - first > 1 else f"{node['name']} · {units}"
        made.box(left + column * first, tops[-1], width, units * scale - 2, look[node["name"]], label)
    made.line((left, bottom - total * scale), (left + column * len(leaves), bottom - total * scale), dashed=True)
    made.text(left - 8, bottom - total * scale + 4, f"dense: {total} units", "end", "soft")
    for place, leaf in enumerate(leaves):
        top = tops[[n["name"] for n in nodes].index(leaf)]
        made.text(left + column * (place + 0.5), bottom + 18, leaf, "middle")
        share = (bottom - top) / scale / total
        made.text(left + column * (place + 0.5), bottom + 34, f"runs {share:.0%}", "middle", "soft small")
    made.text(left - 8, bottom - owned[0] * scale / 2 + 4, "shared core", "end", "soft")
    return made


def rows(facts: dict[str, Any]) -> Picture:
    """A batch through one site: rows by leaf, units by expert; what runs is rectangles."""
    site, widths = next(iter(facts["widths"].items()))
    nodes, look, leaves = facts["nodes"], looks(facts["nodes"]), facts["nodes"][0]["categories"]
    left, top, high, across = 80.0, 40.0, 46.0, 580.0 / sum(widths)
    made = Picture(700, 270, "A batch through one site: rows by leaf, units by expert, and what runs is rectangles")
    for node, (first, behind), start, units in zip(nodes, spans(nodes), accumulate([0, *widths]), widths, strict=False):
        x, width = left + start * across, units * across - 2
        made.box(x, top, width, high * len(leaves), "off")
        label = f"{node['name']} · {units}" if width > 90 else str(units)
        made.box(x, top + high * first, width, high * (behind - first) - 2, look[node["name"]], label)
    for place, leaf in enumerate(leaves):
        made.text(left - 8, top + high * (place + 0.5) + 4, leaf, "end")
    made.text(left, top - 12, f"{sum(widths)} units of {site}, in tree order →", "start", "soft")
    made.text(8, top - 12, "rows ↓", "start", "soft")
    made.text(left, top + high * len(leaves) + 22, "dashed: units that these rows do not run", "start", "soft small")
    return made


def edges(facts: dict[str, Any]) -> Picture:
    """Edges between the units of two sites: blocks of related owners live."""
    (one, ones), (other, others) = list(facts["widths"].items())[:2]
    nodes, look = facts["nodes"], looks(facts["nodes"])
    left, top, side = 150.0, 44.0, 330.0
    down, across = side / sum(ones), side / sum(others)
    made = Picture(700, 410, "Edges between two sites: those between related experts live")
    for i, y, tall in zip(range(len(nodes)), accumulate([0, *ones]), ones, strict=False):
        for j, x, wide in zip(range(len(nodes)), accumulate([0, *others]), others, strict=False):
            deeper = nodes[max(i, j)]["name"] if related(nodes, i, j) else None
            place = left + x * across, top + y * down, wide * across - 1, tall * down - 1
            made.box(*place, look[deeper] if deeper else "off")
        if tall * down > 12:
            made.text(left - 8, top + (y + tall / 2) * down + 4, nodes[i]["name"], "end", "small")
    made.text(left, top - 12, f"units of {other} →", "start", "soft")
    made.text(left - 8, top - 12, "experts ↓", "end", "soft")
    made.text(left + side + 24, top + 40, f"down: units of {one}", "start", "soft small")
    made.text(left + side + 24, top + 60, f"{facts['live']:.0%} of the edges live", "start")
    made.text(left + side + 24, top + 80, "coloured: alive", "start", "soft small")
    made.text(left + side + 24, top + 96, "dashed: pruned", "start", "soft small")
    return made


def rounds(facts: dict[str, Any]) -> Picture:
    """Who owns the units after each round, and what that cost."""
    total = sum(facts["rounds"][0]["units"].values())
    stages = [{"units": {"core": total}}, *facts["rounds"]]
    look = looks(facts["nodes"])
    wide, left, top, high = 130.0, 30.0, 40.0, 260.0
    made = Picture(700, 370, "Who owns the units after each round, and what that cost")
    for place, stage in enumerate(stages):
        x, y = left + place * (wide + 90), top
        for name, units in stage["units"].items():
            made.box(x, y, wide, units / total * high - 1, look.get(name, "core"), f"{name} · {units}")
            y += units / total * high
        made.text(x + wide / 2, top - 14, "before" if place == 0 else f"round {place}", "middle")
        said = ["dense"] if place == 0 else told(stage)
        for number, words in enumerate(said):
            made.text(x + wide / 2, top + high + 20 + 17 * number, words, "middle", "soft small")
    return made


def told(stage: dict[str, Any]) -> list[str]:
    """Return what is said below a round."""
    end = f"after recovery {stage['tax']:+.2f} nats" if stage["accepted"] else "rolled back"
    return [f"separation {stage['separation']:.0%}", f"tax at the cut {stage['cut']:+.2f} nats", end]


def main() -> None:
    """Draw, from a new run where it is asked for."""
    if "--run" in sys.argv[1:]:
        FACTS.write_text(json.dumps(run(), indent=1) + "\n", encoding="utf-8")
    for name, picture in draw(json.loads(FACTS.read_text(encoding="utf-8"))).items():
        (HERE / f"{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
