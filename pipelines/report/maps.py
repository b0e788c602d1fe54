"""Which unit matters to which category: attribution in tree order as small pictures, experts outlined.

Axes of arrays: U units, R rows of a picture, C categories.
"""

import base64
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from jaxtyping import Float, Int

from attribution.heatmap import DECADES, thinned
from pipelines.report.boxes import LEAST_NAMED, Box, looks
from pipelines.report.recorded import Recorded
from pipelines.round_files import Ownership, RoundMap, attribution_file

_MOST_PIXELS = 900_000
"""Of all pictures of one page: a byte each at worst, and a third more as text."""
_MOST_ROWS = 400
_LEAST_ROWS = 40
_MOST_COLUMNS = 160
"""Categories drawn apart."""
_MOST_OUTLINES = 20_000
"""Experts outlined in all maps of a page."""
FEW = 8
"""Sites up to which a map is large enough to name experts in it."""
MOST_ROUNDS = 4
"""Rounds whose attribution is on the page: the last one kept, and the last ones beside it."""


@dataclass(frozen=True)
class Picture:
    """One site's map."""

    title: str
    units: int
    data: str
    """A PNG as a ``data:`` address."""
    label: str
    frames: str
    """Every expert as the rectangle of its units and its categories: an SVG path, ``columns`` wide, 1000 high."""
    columns: int
    strip: tuple[tuple[str, str], ...]
    """Colour, and an SVG path 1 wide and 1000 high: the experts' units beside the map."""
    names: tuple[Box, ...]
    """Experts with room for a line, to be named in the strip; none where sites are many."""


@dataclass(frozen=True)
class RoundPictures:
    """All sites' maps of one round."""

    head: str
    is_open: bool
    leaves: tuple[str, ...]
    """The maps' columns."""
    score: str
    ends: tuple[str, str]
    """Of the colour scale, in nats."""
    sites: tuple[Picture, ...]


def maps_by_round(run: Recorded, look: Mapping[str, str]) -> list[RoundPictures]:
    """Return the maps of the last round kept, which stands open, and of the last ones beside it; the newest first."""
    newest = run.kept[-1].round if run.kept else None
    events = [event for event in run.rounds if attribution_file(run.folder, event.round).is_file()]
    last = [event for event in events if event.round == newest]
    events = [*last, *(event for event in reversed(events) if event not in last)][:MOST_ROUNDS]
    if (ownership := run.ownership()) and not are_few(ownership, len(events)):
        events = last
    events = sorted(events, key=lambda event: event.round)
    shown = [(event, found) for event in events if (found := run.map_of(event.round)) is not None]
    drawn = []
    for event, found in reversed(shown):
        colours = {**looks(event.tree), **look} if event.accepted else looks(event.tree)
        head = f"round {event.round}" + ("" if event.accepted else ", rolled back")
        sites = tuple(pictures(found, colours, 1.0 / len(shown)))
        is_open = event.round == newest or len(shown) == 1
        drawn.append(RoundPictures(head, is_open, found.leaves, found.score, orders_of_magnitude(found), sites))
    return drawn


def pictures(found: RoundMap, look: Mapping[str, str], share: float = 1.0) -> Iterator[Picture]:
    """Yield every site's attribution as a picture, with ``share`` of the page's pixels for all of them.

    Units stand in tree order, within an expert the strongest first; the scale is logarithmic and one for all sites.
    """
    columns = min(len(found.leaves), _MOST_COLUMNS)
    room = int(share * _MOST_PIXELS / (len(found.tables_UC) * columns))
    rows = max(_LEAST_ROWS, min(_MOST_ROWS, room))
    top = max(float(table.max()) for table in found.tables_UC.values()) or 1.0
    for site, table_UC in found.tables_UC.items():
        owners_U = np.asarray(found.ownership.owners[site], dtype=np.int64)
        order_U = np.lexsort((-table_UC.sum(axis=1), owners_U))
        small = thinned(thinned(table_UC[order_U], rows).T, columns).T
        label = f"Attribution of {len(owners_U):,} units of {site} to {len(found.leaves)} categories"
        data = png(shade(small, top))
        yield _picture(found.ownership, site, owners_U, look, data, label, named=len(found.tables_UC) <= FEW)


def are_few(ownership: Ownership, rounds: int = 1) -> bool:
    """Say whether a page holds an outline of every expert in every site of so many rounds."""
    return len(ownership.nodes) * len(ownership.owners) * rounds <= _MOST_OUTLINES


def shade(values: Float[np.ndarray, "R C"], top: float) -> Int[np.ndarray, "R C"]:
    """Return 0 for what is exactly 0 or not a number, else 1..255: the logarithm, of so many powers of ten below."""
    with np.errstate(divide="ignore", invalid="ignore"):
        height = 1.0 + np.log10(values / top) / DECADES
    shades = 1 + np.rint(np.clip(np.nan_to_num(height, nan=0.0, neginf=0.0), 0.0, 1.0) * 254).astype(np.int64)
    return np.where(values > 0.0, shades, 0)


def orders_of_magnitude(found: RoundMap) -> tuple[str, str]:
    """Return the ends of the colour scale in nats, as text."""
    top = max(float(table.max()) for table in found.tables_UC.values()) or 1.0
    exponent = math.floor(math.log10(top)) if top > 0.0 else 0
    return f"{top / 10**DECADES:.0e}", f"{top:.1e}" if abs(exponent) > 3 else f"{top:.3g}"


def png(shades: Int[np.ndarray, "R C"]) -> str:
    """Return a picture of palette colours, 0 transparent and the others on viridis, as a ``data:`` address."""
    from matplotlib import colormaps
    from PIL import Image

    image = Image.fromarray(shades.astype(np.uint8))
    palette = (colormaps["viridis"](np.linspace(0.0, 1.0, 255))[:, :3] * 255).round().astype(np.uint8)
    image = image.convert("P")
    image.putpalette(np.concatenate([[[217, 217, 217]], palette]).astype(np.uint8).tobytes())
    written = io.BytesIO()
    image.save(written, format="PNG", optimize=True, transparency=0)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"


def scale() -> str:
    """Return the colour scale as a CSS gradient, the smallest value first."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    stops = (to_hex(colormaps["viridis"](place / 8)) for place in range(9))
    return f"linear-gradient(90deg, {', '.join(stops)})"


def _picture(
    ownership: Ownership,
    site: str,
    owners_U: Int[np.ndarray, " U"],
    look: Mapping[str, str],
    data: str,
    label: str,
    *,
    named: bool,
) -> Picture:
    """Put the experts' outlines and colours around a site's map."""
    counts = np.bincount(owners_U, minlength=len(ownership.nodes)).tolist()
    leaves = ownership.nodes[0].categories
    places = {category: place for place, category in enumerate(leaves)}
    strip: dict[str, str] = {}
    frames, names, many = "", [], not are_few(ownership)
    for node, first, count in zip(ownership.nodes, accumulate(counts, initial=0), counts, strict=False):
        if not count:
            continue
        top, height = round(1000 * first / len(owners_U), 1), round(1000 * count / len(owners_U), 1)
        left, width, colour = places[node.categories[0]], len(node.categories), look.get(node.name, "core")
        if many and node.parent not in (None, 0):
            continue
        frames += f"M{left} {top:g}h{width}v{height:g}h-{width}z"
        strip[colour] = strip.get(colour, "") + f"M0 {top:g}h1v{height:g}h-1z"
        if named:
            name = node.name if count >= LEAST_NAMED * len(owners_U) else ""
            names.append(Box(0, top / 10, 100, height / 10, f"{node.name}: {count:,} units", colour, name))
    return Picture(site, len(owners_U), data, label, frames, len(leaves), tuple(strip.items()), tuple(names))
