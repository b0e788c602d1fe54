"""Clusters: plain k-means, k-means at given sizes whose assignment step is exact, and points for either.

Axes: points P, coordinates X, clusters K.
"""

import warnings

import numpy as np
import scipy.linalg
from jaxtyping import Float64, Int
from threadpoolctl import threadpool_limits

from moeify.splitting.assignment import assign

_FILLED_STEPS = 4
"""Most steps within capacities."""


def k_means(
    point_PX: Float64[np.ndarray, "points x"], number: int, *, starts: int, seed: int
) -> tuple[Float64[np.ndarray, "clusters x"], Int[np.ndarray, " points"]]:
    """Return the best of several starts' centres, and the nearest of each point; needs ``number`` points.

    The same bits each time: on one thread, since threads add up in the order in which they end. Where fewer points
    differ than there are clusters, some clusters are empty.
    """
    from sklearn.cluster import KMeans  # brings pandas where it is installed: a second that most runs do without
    from sklearn.exceptions import ConvergenceWarning

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said of points that do not differ
        found = KMeans(number, n_init=starts, random_state=seed).fit(point_PX)
    return found.cluster_centers_, found.labels_.astype(np.int64)


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


def _closeness(point_PX: np.ndarray, centre_KX: np.ndarray) -> Float64[np.ndarray, "points clusters"]:
    """Return minus the squared distances, up to a number of each point's own."""
    return 2 * point_PX @ centre_KX.T - np.square(centre_KX).sum(1)


def _means(point_PX: np.ndarray, owner_P: np.ndarray, centre_KX: np.ndarray) -> np.ndarray:
    """Return the mean of each cluster; an empty one stays where it is."""
    mean_KX = centre_KX.copy()
    for k in np.unique(owner_P):
        mean_KX[k] = point_PX[owner_P == k].mean(0)
    return mean_KX
