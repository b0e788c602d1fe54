"""Clusters of given sizes: k-means whose assignment step is exact (``moeify.assignment``), and points to run it on.

Plain k-means finds centres (Lloyd's steps from k-means++ starts: Arthur and Vassilvitskii, "k-means++", 2007). Then
each point goes where the sum of squared distances is the least within the capacities, and the centres follow.

Axes: points P, coordinates X, clusters K.
"""

import numpy as np
import scipy.linalg
from jaxtyping import Float64, Int

from moeify.assignment import assign

_STARTS = 4
"""Starts of plain k-means, of which the best is taken."""
_STEPS = 20
"""Most steps of plain k-means."""
_FILLED_STEPS = 4
"""Most steps within capacities."""


def k_means(
    point_PX: Float64[np.ndarray, "points x"], number: int, random: np.random.Generator
) -> tuple[Float64[np.ndarray, "clusters x"], Int[np.ndarray, " points"]]:
    """Return centres and the nearest of each point; needs a point at least."""
    found = []
    for _ in range(_STARTS):
        centre_KX = _start(point_PX, number, random)
        nearest_P = np.full(len(point_PX), -1)
        for _ in range(_STEPS):
            before_P, nearest_P = nearest_P, _closeness(point_PX, centre_KX).argmax(1)
            if (before_P == nearest_P).all():
                break
            centre_KX = _means(point_PX, nearest_P, centre_KX)
        found.append((float(_closeness(point_PX, centre_KX).max(1).sum()), centre_KX, nearest_P))
    _, centre_KX, nearest_P = max(found, key=lambda each: each[0])
    return centre_KX, nearest_P


def filled(
    point_PX: Float64[np.ndarray, "points x"],
    centre_KX: Float64[np.ndarray, "clusters x"],
    capacity_K: Int[np.ndarray, " clusters"],
) -> Int[np.ndarray, " points"]:
    """Return each point's cluster, exactly ``capacity`` points in each, from these centres on."""
    owner_P = assign(_closeness(point_PX, centre_KX), capacity_K).owner
    for _ in range(_FILLED_STEPS - 1):
        centre_KX = _means(point_PX, owner_P, centre_KX)
        before_P, owner_P = owner_P, assign(_closeness(point_PX, centre_KX), capacity_K).owner
        if (before_P == owner_P).all():
            break
    return owner_P


def spectral(graph_PP: Float64[np.ndarray, "points points"], number: int) -> Float64[np.ndarray, "points x"]:
    """Return points whose clusters are nearly the least normalized cut of a graph with weights >= 0.

    Rows, of length 1, of the ``number`` largest eigenvectors of D^-1/2 G D^-1/2 (Ng, Jordan and Weiss, "On Spectral
    Clustering", 2001). A node without edges is at the origin.
    """
    degree_P = graph_PP.sum(1)
    scale_P = np.where(degree_P > 0, 1 / np.sqrt(np.where(degree_P > 0, degree_P, 1.0)), 0.0)
    last = len(graph_PP) - 1
    wanted = [max(0, last - number + 1), last]
    _, vector_PX = scipy.linalg.eigh(scale_P[:, None] * graph_PP * scale_P, subset_by_index=wanted)
    return unit_rows(np.where(degree_P[:, None] > 0, vector_PX, 0.0))


def unit_rows(point_PX: Float64[np.ndarray, "points x"]) -> Float64[np.ndarray, "points x"]:
    """Return the points at length 1; the origin stays."""
    norm_P = np.linalg.norm(point_PX, axis=1, keepdims=True)
    return point_PX / np.where(norm_P > 0, norm_P, 1.0)


def _start(point_PX: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
    """Draw centres one by one, a point with odds of its squared distance to the nearest before."""
    chosen = [int(random.integers(len(point_PX)))]
    far_P = np.full(len(point_PX), np.inf)
    while len(chosen) < number:
        far_P = np.minimum(far_P, np.square(point_PX - point_PX[chosen[-1]]).sum(1))
        odds_P = far_P / far_P.sum() if far_P.sum() > 0 else None
        chosen.append(int(random.choice(len(point_PX), p=odds_P)))
    return point_PX[chosen]


def _closeness(point_PX: np.ndarray, centre_KX: np.ndarray) -> Float64[np.ndarray, "points clusters"]:
    """Return minus the squared distances, up to a number of each point's own."""
    return 2 * point_PX @ centre_KX.T - np.square(centre_KX).sum(1)


def _means(point_PX: np.ndarray, owner_P: np.ndarray, centre_KX: np.ndarray) -> np.ndarray:
    """Return the mean of each cluster; an empty one stays where it is."""
    mean_KX = centre_KX.copy()
    for k in np.unique(owner_P):
        mean_KX[k] = point_PX[owner_P == k].mean(0)
    return mean_KX
