"""Which unit goes to which expert: the loop's own way, by attribution, and the ways of others that it is held against.

Every method answers the same question: a leaf's units in one site, the groups of categories that part there, and how
many units each expert takes. So whatever differs in a result, tree, widths and tokens are equal. Deterministic in the
arguments.

Axes: L units that the leaf owns in the site, B bins (the K children, then the leaf itself), C categories, F features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor

from attribution.table import AttributionTable, Unsigned
from moeify.assignment import assign
from moeify.owners_config import (
    AttributionOwners,
    CMoeOwners,
    LlamaMoeOwners,
    MagnitudeOwners,
    MoeficationOwners,
    Owners,
    RandomOwners,
)

Choose = Callable[[Int[np.ndarray, " bins"]], Int[np.ndarray, " leaf_units"]]
"""From the units that each bin takes to the bin of each unit."""


@dataclass(frozen=True)
class Leaf:
    """What there is to know of one leaf's units in one site."""

    table: AttributionTable
    site: str
    units: slice
    """The leaf's units among the site's."""
    parts: Sequence[Sequence[str]]
    """The categories of each child."""
    outputs_DU: Float[Tensor, "dim units"]
    """The site's output weights."""
    inputs_UF: Float[Tensor, "units features"] | None
    """The site's input weights and biases, side by side; None where they are not known."""
    seed: Sequence[int]

    def by_part(self, values_UC: Float[Tensor, "units categories"]) -> Float[np.ndarray, "leaf_units children"]:
        """Add up over each child's categories, weighted by their shares of the data."""
        mine_LC = (values_UC * self.table.shares)[self.units]
        columns = [mine_LC[:, [self.table.categories.index(c) for c in part]].sum(1) for part in self.parts]
        return torch.stack(columns, dim=1).numpy()

    def mass(self, score: Unsigned) -> Float[np.ndarray, "leaf_units bins"]:
        """Return the attribution mass that stays active if a unit goes to a bin, nats."""
        mass_LK = self.by_part(self.table.score(self.site, score))
        return np.column_stack([mass_LK, mass_LK.sum(1)])

    @property
    def norms(self) -> Float[np.ndarray, " leaf_units"]:
        """The norm of each unit's output weights."""
        return self.outputs_DU[:, self.units].double().norm(dim=0).numpy()

    @cached_property
    def power(self) -> Float[np.ndarray, "leaf_units children"]:
        """Mean square activation on each child's categories."""
        power_FC = self.table.power(self.site)
        return self.by_part(power_FC.view(len(power_FC) // self.features, self.features, -1).sum(1))

    @property
    def features(self) -> int:
        """Features of a unit."""
        return len(self.table.power(self.site)) // self.outputs_DU.shape[1] or 1


def chooser(owners: Owners, leaf: Leaf, score: Unsigned) -> Choose:
    """Return the method's answer for one leaf in one site, at any widths.

    Raises ValueError where the method needs input weights and there are none.
    """
    match owners:
        case AttributionOwners():
            return _best(leaf.mass(score))
        case RandomOwners():
            return _dealt(_shuffled(leaf))
        case MagnitudeOwners():
            return _core_first(leaf.norms, _shuffled(leaf))
        case MoeficationOwners():
            return _best(_clusters(leaf, score))
        case CMoeOwners():
            share_LK = leaf.power / np.maximum(leaf.power.sum(1, keepdims=True), np.finfo(float).tiny)
            return _core_first(leaf.power.sum(1), share_LK)
        case LlamaMoeOwners():
            importance_LK = leaf.by_part(leaf.table.score(leaf.site, "absolute"))
            return _core_first(importance_LK.min(1), importance_LK)
        case _:
            assert_never(owners)


def _best(value_LB: Float[np.ndarray, "leaf_units bins"]) -> Choose:
    """Choose so that the sum of values is the largest."""
    return lambda capacity: assign(value_LB, capacity).owner


def _dealt(order: Int[np.ndarray, " leaf_units"]) -> Choose:
    """Fill the bins one after the other in a fixed order of units."""

    def choose(capacity: Int[np.ndarray, " bins"]) -> Int[np.ndarray, " leaf_units"]:
        owner = np.empty(len(order), dtype=np.int64)
        owner[order] = np.repeat(np.arange(len(capacity)), capacity)
        return owner

    return choose


def _core_first(shared_L: Float[np.ndarray, " leaf_units"], rest: np.ndarray) -> Choose:
    """Keep the most shared units in the leaf; the rest go to children, by value [L, K] or dealt in an order [L]."""

    def choose(capacity: Int[np.ndarray, " bins"]) -> Int[np.ndarray, " leaf_units"]:
        children = len(capacity) - 1
        owner = np.full(len(shared_L), children, dtype=np.int64)
        given = np.argsort(-shared_L, kind="stable")[capacity[-1] :]
        if rest.ndim == 1:
            given = rest[np.isin(rest, given)]
            owner[given] = np.repeat(np.arange(children), capacity[:-1])
        else:
            owner[given] = assign(rest[given], capacity[:-1]).owner
        return owner

    return choose


def _shuffled(leaf: Leaf) -> Int[np.ndarray, " leaf_units"]:
    return np.random.default_rng(leaf.seed).permutation(leaf.units.stop - leaf.units.start)


def _clusters(leaf: Leaf, score: Unsigned) -> Float[np.ndarray, "leaf_units bins"]:
    """Return minus the squared distance of each unit's input weights to the cluster that became each bin."""
    if leaf.inputs_UF is None:
        raise ValueError(f"owners of kind 'moefication' need the input weights of site {leaf.site!r}, got none")
    inputs_LF = leaf.inputs_UF[leaf.units].double().numpy()
    mass_LB = leaf.mass(score)
    bins = mass_LB.shape[1]
    if len(inputs_LF) < bins:
        return np.zeros_like(mass_LB)
    seed = int(np.random.default_rng(leaf.seed).integers(2**31))
    found = KMeans(bins, n_init=4, random_state=seed).fit(inputs_LF)
    member_LB = np.eye(bins)[found.labels_]
    _, cluster_B = linear_sum_assignment((member_LB.T @ mass_LB).T, maximize=True)
    distance_LB = ((inputs_LF[:, None] - found.cluster_centers_[cluster_B]) ** 2).sum(2)
    return -distance_LB
