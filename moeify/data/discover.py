"""Categories from documents without labels: clusters of what their tokens say.

Everything is fitted on the train split (weights of tokens, singular vectors, centroids); a held-out document goes to
the nearest centroid. Knows tokens as numbers only.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.metrics import normalized_mutual_info_score, silhouette_score
from sklearn.utils.extmath import randomized_svd

import moeify.splitting.clusters
from moeify.data.documents import SPLITS, Split
from moeify.recipe.data import Discover, cluster_names
from moeify.splitting.clusters import k_means, unit_rows

_TELLING = 10
"""Tokens that are reported of each cluster."""
_SAMPLE = 2000
"""Documents that a silhouette looks at, at most."""


class TooSmallError(ValueError):
    """A cluster is so small that a held-out split has none of it: fewer clusters may do."""


@dataclass(frozen=True)
class Clusters:
    """The cluster of each document, the largest cluster (in train documents) first."""

    of: Mapping[Split, Int[np.ndarray, " documents"]]
    """Every cluster has a document in every split."""
    telling: tuple[tuple[int, ...], ...]
    """Tokens whose mean weight in the cluster's train documents is furthest above that in all others."""
    silhouettes: Mapping[int, float]
    """Mean silhouette, -1..1, of each number that was tried; none where the number was given."""

    @property
    def names(self) -> tuple[str, ...]:
        """One a cluster."""
        return cluster_names(len(self.telling))


def fingerprint() -> str:
    """Return a hash of this code and the versions of what it calls."""
    code = [
        hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (__file__, moeify.splitting.clusters.__file__)
    ]
    return f"{code} {np.__version__} {scipy.__version__} {sklearn.__version__}"


def cluster(settings: Discover, ids: Mapping[Split, Sequence[Sequence[int]]], vocabulary: int) -> Clusters:
    """Return clusters of documents, given as lists of tokens below ``vocabulary``.

    Raises:
        TooSmallError: A cluster is empty in a split.
        ValueError: There are too few documents, or they are too much alike.
    """
    least = settings.number or 2
    if (count := len(ids["train"])) < 2 * least:
        raise ValueError(
            f"data.discover: got {count} documents to train on, wanted at least {2 * least}, two a cluster; add "
            f"documents{', or lower data.discover.number' if least > 2 else ''}"
        )
    weights = TfidfTransformer(sublinear_tf=True)
    train = csr_array(weights.fit_transform(_counts(ids["train"], vocabulary)))
    dimensions = min(settings.embedding.dimensions, *train.shape)
    _, _, directions = randomized_svd(train, dimensions, n_iter=7, random_state=settings.seed)
    points = unit_rows(train @ directions.T)
    centroids, silhouettes = _fit(settings, points)
    number = len(centroids)
    centroids = centroids[_by_size(_nearest(points, centroids), number)]
    of: dict[Split, np.ndarray] = {"train": _nearest(points, centroids)}
    for split in SPLITS[1:]:
        held_out = weights.transform(_counts(ids[split], vocabulary))
        of[split] = _nearest(unit_rows(held_out @ directions.T), centroids)
        if empty := sorted(set(range(number)) - set(of[split].tolist())):
            raise TooSmallError(
                f"data.discover: {cluster_names(number)[empty[0]]} of {number}, with {np.sum(of['train'] == empty[0])} "
                f"documents to train on, has none in the {split} split; raise data.{split}, add documents, or lower "
                f"data.discover.{'most' if settings.number is None else 'number'}"
            )
    return Clusters(of, _telling(train, of["train"], number), silhouettes)


def report(
    clusters: Clusters,
    sizes: Mapping[Split, Sequence[int]],
    labels: Mapping[Split, Sequence[str]] | None,
    telling: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """Return what is told of clusters, as JSON: ``sizes`` are bytes of documents, ``telling`` are tokens as text.

    Purity (the share of documents that have their cluster's most frequent label), normalised mutual information and
    the confusion table are over all splits; None where there are no ``labels``.
    """
    found: dict[str, Any] = {
        "clusters": {
            name: {
                "documents": {split: int(np.sum(clusters.of[split] == place)) for split in SPLITS},
                "bytes": {split: int(np.array(sizes[split])[clusters.of[split] == place].sum()) for split in SPLITS},
                "telling": list(telling[place]),
            }
            for place, name in enumerate(clusters.names)
        },
        "silhouettes": {str(number): score for number, score in clusters.silhouettes.items()},
        "purity": None,
        "normalised_mutual_information": None,
        "confusion": None,
    }
    if labels is not None:
        of = np.concatenate([clusters.of[split] for split in SPLITS])
        given = np.array([label for split in SPLITS for label in labels[split]])
        table = {
            name: {str(label): int(np.sum((of == place) & (given == label))) for label in np.unique(given)}
            for place, name in enumerate(clusters.names)
        }
        found |= {
            "purity": sum(max(row.values()) for row in table.values()) / len(of),
            "normalised_mutual_information": float(normalized_mutual_info_score(given, of)),
            "confusion": table,
        }
    return found


# --- points -------------------------------------------------------------------------------------------


def _counts(ids: Sequence[Sequence[int]], vocabulary: int) -> csr_array:
    """Return how often each document has each token."""
    rows = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
    tokens = np.concatenate([np.asarray(each, dtype=np.int64) for each in ids])
    return csr_array((np.ones(len(tokens)), (rows, tokens)), shape=(len(ids), vocabulary))


def _telling(train: csr_array, of: Int[np.ndarray, " documents"], number: int) -> tuple[tuple[int, ...], ...]:
    found = []
    for place in range(number):
        inside = of == place
        above = train[inside].mean(axis=0) - train[~inside].mean(axis=0)
        order = np.argsort(-np.asarray(above).ravel(), kind="stable")
        found.append(tuple(int(token) for token in order[:_TELLING]))
    return tuple(found)


# --- clusters --------------------------------------------------------------------------------


def _fit(
    settings: Discover, points: Float[np.ndarray, "documents dimensions"]
) -> tuple[Float[np.ndarray, "clusters dimensions"], dict[int, float]]:
    """Return centroids, and the silhouette of each number of them that was tried."""
    if settings.number is not None:
        centroids = _centroids(points, settings.number, settings)
        if (got := len(np.unique(_nearest(points, centroids)))) < settings.number:
            raise ValueError(
                f"data.discover.number: got {settings.number}, and the train documents are so alike that they form "
                f"{got}; lower it"
            )
        return centroids, {}
    sample = np.random.default_rng(settings.seed).permutation(len(points))[:_SAMPLE]
    tried: dict[int, np.ndarray] = {}
    silhouettes: dict[int, float] = {}
    for number in range(2, min(settings.most, len(points) // 2) + 1):
        tried[number] = _centroids(points, number, settings)
        of = _nearest(points, tried[number])
        if len(np.unique(of)) == number and len(np.unique(of[sample])) > 1:
            silhouettes[number] = float(silhouette_score(points[sample], of[sample], metric="cosine"))
    if not silhouettes:
        raise ValueError("data.discover: all train documents are alike, wanted some that differ; add others")
    return tried[max(silhouettes, key=lambda number: (silhouettes[number], -number))], silhouettes


def _centroids(
    points: Float[np.ndarray, "documents dimensions"], number: int, settings: Discover
) -> Float[np.ndarray, "clusters dimensions"]:
    """Return directions: at length 1, points are the nearer the larger their cosine."""
    centres, _ = k_means(points, number, starts=settings.restarts, seed=settings.seed)
    return unit_rows(centres)


def _nearest(
    points: Float[np.ndarray, "documents dimensions"], centroids: Float[np.ndarray, "clusters dimensions"]
) -> Int[np.ndarray, " documents"]:
    return (points @ centroids.T).argmax(1)


def _by_size(of: Int[np.ndarray, " documents"], number: int) -> Int[np.ndarray, " clusters"]:
    """Return clusters from the largest to the smallest; of two as large, the one of the earlier document first."""
    first = [int(np.argmax(of == place)) for place in range(number)]
    return np.lexsort((np.array(first), -np.bincount(of, minlength=number)))
