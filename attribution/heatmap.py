"""A picture of a table: which unit matters to which category, site by site.

matplotlib's object interface alone: no display, no global figure. Axes: units U, categories C.
"""

import math
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from attribution.table import AttributionTable, Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECADES = 4.0
"""Powers of ten that the colour scale spans; what matters less has the faintest colour."""
NEVER = "#d9d9d9"
"""Grey, which is on no colour scale: attribution is exactly zero."""
_DPI = 150
_MOST_COLUMNS = 8
"""Sites side by side."""
_MOST_ROWS = 400
"""Units drawn apart in a site: about its height in pixels."""


def draw(table: AttributionTable, path: str | Path, kind: Score = "fisher") -> Path:
    """Write what ``plot`` draws as a PNG, and return its path.

    >>> import tempfile
    >>> draw(table, Path(tempfile.mkdtemp()) / "units.png").stat().st_size > 1000
    True
    """
    return save_png(plot(table, kind), Path(path))


def plot(table: AttributionTable, kind: Score = "fisher") -> "Figure":
    """Draw every site's units x categories.

    Units stand by the category they matter most to, within it the strongest first. The scale is logarithmic, since
    units differ by orders of magnitude; signed scores have a colour for rising and one for falling losses.

    >>> plot(table).axes[0].get_title().splitlines()
    ['first', '2 units']
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, SymLogNorm
    from matplotlib.ticker import MaxNLocator

    tables_UC = {site: table.score(site, kind).numpy() for site in table.sites}
    top = max(float(np.abs(each).max()) for each in tables_UC.values()) or 1.0
    signed = kind in ("taylor", "report")
    norm: Any = LogNorm(top / 10**DECADES, top, clip=True)
    colours = colormaps["viridis"].with_extremes(bad=NEVER)
    if signed:
        norm, colours = SymLogNorm(top / 10**DECADES, vmin=-top, vmax=top), colormaps["RdBu_r"].with_extremes(bad=NEVER)
    down = math.ceil(len(tables_UC) / _MOST_COLUMNS)
    across = math.ceil(len(tables_UC) / down)
    made = figure(max(6.5, (0.3 * len(table.categories) + 0.9) * across + 1.2), 3.8 * down + 0.7)
    axes = list(made.subplots(down, across, squeeze=False).flat)
    for spare in axes[len(tables_UC) :]:
        spare.remove()
    image: Any = None
    for axis, (site, each_UC) in zip(axes, tables_UC.items(), strict=False):
        units, categories = each_UC.shape
        first_U = np.abs(each_UC).argmax(1)
        order_U = np.lexsort((-np.abs(each_UC).max(1), first_U))
        image = axis.imshow(
            np.ma.masked_equal(thinned(each_UC[order_U]), 0.0),
            aspect="auto",
            cmap=colours,
            norm=norm,
            interpolation="nearest",
            extent=(0, categories, units, 0),
        )
        axis.set_title(f"{site}\n{units:,} units", fontsize=9, parse_math=False)
        labels: dict[str, Any] = {"fontsize": 7, "rotation": 60, "ha": "right", "parse_math": False}
        axis.set_xticks(np.arange(categories) + 0.5, table.categories, **labels)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(length=0, labelsize=7)
        axis.spines[:].set_visible(False)
    scale = made.colorbar(image, ax=axes[: len(tables_UC)], aspect=30, pad=0.02, shrink=min(1.0, 1.4 / down))
    scale.set_label(f"{kind}, {'fraction of tokens' if kind == 'rate' else 'nats per token'}", fontsize=8)
    scale.ax.tick_params(labelsize=7)
    made.suptitle("How much each unit matters to each category (grey: exactly 0)", fontsize=10)
    return made


def thinned(
    table_UC: Float[np.ndarray, "units categories"], most: int = _MOST_ROWS
) -> Float[np.ndarray, "rows categories"]:
    """Average neighbouring units where there are more of them than pixels, so that none is skipped."""
    rows = min(len(table_UC), most)
    starts = np.arange(rows) * len(table_UC) // rows
    counts = np.diff(np.append(starts, len(table_UC)))
    return np.add.reduceat(table_UC, starts, axis=0) / counts[:, None]


def figure(width: float, height: float) -> "Figure":
    """Return a figure of so many inches that belongs to no window; notebooks show it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(made)
    setattr(made, "_repr_png_", partial(_png, made))  # noqa: B010  IPython asks for it; without it only pyplot is shown
    return made


def _png(made: "Figure") -> bytes:
    drawn = BytesIO()
    made.savefig(drawn, format="png")
    return drawn.getvalue()


def save_png(made: "Figure", path: Path) -> Path:
    """Write a figure, whole or not at all, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    made.savefig(draft, format="png")
    draft.replace(path)
    return path
