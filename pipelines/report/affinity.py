"""Which categories use the same units: affinities, and the order in which average linkage would merge them."""

from dataclasses import dataclass

import numpy as np
import torch

from attribution.affinity import affinity_of
from pipelines.round_files import RoundMap

# Axes: C categories.


@dataclass(frozen=True)
class Affinities:
    """Categories in the dendrogram's order, so that those that are alike stand together."""

    categories: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    """Row and column in the same order; -1 to 1, the diagonal 1."""
    largest: float
    """The largest size off the diagonal."""
    merges: str
    """The dendrogram as an SVG path: x from 0 (alike) to 100 (the last merge), category i at y = i + 1/2."""


def affinities(found: RoundMap) -> Affinities | None:
    """Return a round's affinities; None for a single category, or attribution that has a sign."""
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    scores_UC = torch.from_numpy(np.concatenate(list(found.tables_UC.values()))).double()
    if len(found.leaves) < 2 or bool((scores_UC < 0).any()):
        return None
    affinity_CC = affinity_of(scores_UC).numpy()
    merged = linkage(squareform(np.clip(1.0 - affinity_CC, 0.0, None), checks=False), method="average")
    drawn = dendrogram(merged, no_plot=True)
    order = drawn["leaves"]
    farthest = float(merged[-1, 2]) or 1.0
    path = []
    for across, along in zip(drawn["dcoord"], drawn["icoord"], strict=True):
        points = [f"{100 * x / farthest:.2f} {y / 10:.2f}" for x, y in zip(across, along, strict=True)]
        path.append(f"M{'L'.join(points)}")
    ordered = affinity_CC[np.ix_(order, order)]
    largest = float(np.abs(ordered - np.eye(len(order))).max())
    values = tuple(tuple(row) for row in ordered.tolist())
    return Affinities(tuple(found.leaves[place] for place in order), values, largest or 1.0, "".join(path))
