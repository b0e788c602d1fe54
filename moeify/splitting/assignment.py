"""Exact balanced assignment of units to bins: a transportation problem, solved through its dual prices.

Prices that make every bin about as popular as it has room come from a smoothed dual (entropic transport at falling
temperature, first on a sample of the units). At any prices, giving each unit to the bin with the best value minus price
is optimal for the counts that come out; then units move along shortest paths in the graph of bins, which keeps the
assignment optimal for its counts at every step (successive shortest paths; Ahuja, Magnanti and Orlin, "Network Flows",
1993, chapter 9), until the counts are the capacities. The dual bound proves the result.

Axes: units U, bins B, units M that are now in one bin.
"""

import heapq
import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int

_SAMPLE = 4096
"""Units on which the first prices are found."""
_CANDIDATES = 64
"""Best movers that a bin holds ready for each other bin."""
_MANY = 8
"""Equal movers at a heap's top from which they are moved in bulk."""
_COOLING = 4.0
"""Each temperature over the next."""
_STEPS = 4
"""Most steps at one temperature."""
_LONGEST = 4.0
"""Longest step of a price, in temperatures."""


@dataclass(frozen=True)
class Assignment:
    """Which bin each unit went to, and the proof that no other way is worth more."""

    owner: Int[np.ndarray, " units"]
    """Bin of each unit."""
    value: float
    """Sum of the values that were chosen."""
    bound: float
    """No assignment within the capacities is worth more (up to rounding); equal to ``value`` up to rounding."""

    @property
    def gap(self) -> float:
        """What the bound leaves open, as a share of the value: 0 up to rounding, which proves the value best."""
        return abs(self.bound - self.value) / max(abs(self.bound), abs(self.value), np.finfo(np.float64).tiny)


def assign(value: Float64[np.ndarray, "units bins"], capacity: Int[np.ndarray, " bins"]) -> Assignment:
    """Give each unit to one bin, exactly ``capacity`` units to each, so that the sum of ``value`` is the largest.

    The result is a function of the arguments alone. Which of several best assignments comes out is not specified.
    """
    _check(value, capacity)
    units = len(value)
    open_bins = np.flatnonzero(capacity)
    if units == 0:
        return Assignment(np.zeros(0, dtype=np.int64), 0.0, 0.0)
    # By a power of two, hence exact: sums and differences of huge values stay finite.
    exponent = int(np.frexp(np.abs(value).max())[1])
    scaled_UB = np.ldexp(value[:, open_bins], -exponent)
    room_B = capacity[open_bins].astype(np.int64)
    price_B = _prices(scaled_UB, room_B)
    owner_U = _best(scaled_UB, price_B)
    _settle_ties(scaled_UB, room_B, price_B, owner_U)
    _Repair(scaled_UB, room_B, price_B, owner_U).run()
    total = float(scaled_UB[np.arange(units), owner_U].sum())
    bound = float((scaled_UB - price_B).max(1).sum() + price_B @ room_B)
    return Assignment(open_bins[owner_U], float(np.ldexp(total, exponent)), float(np.ldexp(bound, exponent)))


def _check(value_UB: np.ndarray, capacity_B: np.ndarray) -> None:
    if value_UB.ndim != 2 or value_UB.shape[1:] != capacity_B.shape:
        raise ValueError(
            f"value must be [units bins] and capacity [bins], got {list(value_UB.shape)} and {list(capacity_B.shape)}"
        )
    if (capacity_B < 0).any() or capacity_B.sum() != len(value_UB):
        raise ValueError(
            f"capacities must not be negative and add up to the {len(value_UB)} units, "
            f"got {capacity_B.tolist()}, in all {capacity_B.sum()}"
        )
    bad = np.argwhere(~np.isfinite(value_UB))
    if len(bad):
        unit, bin_ = bad[0].tolist()
        raise ValueError(
            f"the value of unit {unit} in bin {bin_} is {value_UB[unit, bin_]}; values must be finite "
            f"({len(bad)} are not)"
        )


def _best(value_UB: Float64[np.ndarray, "units bins"], price_B: Float64[np.ndarray, " bins"]) -> np.ndarray:
    return (value_UB - price_B).argmax(1)


# --- prices -------------------------------------------------------------------------------------------


def _prices(value_UB: Float64[np.ndarray, "units bins"], room_B: Int[np.ndarray, " bins"]) -> np.ndarray:
    """Return prices at which the bins are nearly as popular as they have room. Any prices would do, if slower."""
    units, bins = value_UB.shape
    price_B = np.zeros(bins)
    temperature = float(np.median(value_UB.max(1) - value_UB.min(1))) or float(np.ptp(value_UB))
    if bins == 1 or temperature == 0.0:
        return price_B
    if units > 4 * _SAMPLE:
        sample_UB = value_UB[:: units // _SAMPLE]
        price_B, coldest = _cool(sample_UB, room_B * (len(sample_UB) / units), price_B, temperature, bins)
        temperature = min(temperature, 16 * coldest)
    return _cool(value_UB, room_B.astype(np.float64), price_B, temperature, max(bins, units // 1000))[0]


def _cool(
    value_UB: Float64[np.ndarray, "units bins"],
    room_B: Float64[np.ndarray, " bins"],
    price_B: Float64[np.ndarray, " bins"],
    temperature: float,
    enough: int,
) -> tuple[np.ndarray, float]:
    """Follow the smoothed dual's optimum as its temperature falls, until only ``enough`` units are out of place.

    Returns the best prices met and their temperature. Units that are settled at a temperature, whatever the steps that
    remain at it, are settled at all lower ones: from then on they are only counted.
    """
    settled_B = np.zeros(len(room_B))
    best, misplaced = (price_B, temperature), np.inf
    while temperature > 1e-15:
        net_UB = value_UB - price_B
        owner_U = net_UB.argmax(1)
        counts_B = settled_B + np.bincount(owner_U, minlength=len(room_B))
        now = float(np.maximum(counts_B - room_B, 0).sum())
        if now < misplaced:
            best, misplaced = (price_B, temperature), now
        if misplaced <= enough:
            break
        top_U = net_UB[np.arange(len(net_UB)), owner_U]
        net_UB[np.arange(len(net_UB)), owner_U] = -np.inf
        open_U = top_U - net_UB.max(1) < (2 * _STEPS * _LONGEST + 16) * temperature
        settled_B += np.bincount(owner_U[~open_U], minlength=len(room_B))
        value_UB = value_UB[open_U]
        for _ in range(_STEPS):
            step_B = _step(value_UB, room_B, settled_B, price_B, temperature)
            price_B = price_B + np.clip(step_B, -_LONGEST * temperature, _LONGEST * temperature)
            if np.abs(step_B).max() < temperature / 16:
                break
        temperature /= _COOLING
    return best


def _step(
    value_UB: Float64[np.ndarray, "units bins"],
    room_B: Float64[np.ndarray, " bins"],
    settled_B: Float64[np.ndarray, " bins"],
    price_B: Float64[np.ndarray, " bins"],
    temperature: float,
) -> np.ndarray:
    """Return a Newton step (far away: a Sinkhorn step) towards prices at which the soft counts fill the room."""
    soft_UB = value_UB - price_B
    soft_UB -= soft_UB.max(1, keepdims=True)
    soft_UB *= 1 / temperature
    np.exp(soft_UB, out=soft_UB)
    soft_UB /= soft_UB.sum(1, keepdims=True)
    moving_B = soft_UB.sum(0)
    count_B = settled_B + moving_B
    ratio_B = np.maximum(count_B, 1e-9) / room_B
    if ratio_B.max() > 2 or ratio_B.min() < 0.5:
        return temperature * np.log(ratio_B)
    slope_BB = np.diag(moving_B) - soft_UB.T @ soft_UB
    slope_BB[np.diag_indices(len(room_B))] += 1e-6 * moving_B + 1e-3
    return temperature * np.linalg.solve(slope_BB, count_B - room_B)


def _settle_ties(
    value_UB: Float64[np.ndarray, "units bins"],
    room_B: Int[np.ndarray, " bins"],
    price_B: Float64[np.ndarray, " bins"],
    owner_U: Int[np.ndarray, " units"],
) -> None:
    """Move units that are indifferent at these prices out of overfull bins, in bulk and in place."""
    counts_B = np.bincount(owner_U, minlength=len(room_B))
    slack = 8 * np.finfo(np.float64).eps * (1.0 + float(np.abs(price_B).max()))
    for i in np.flatnonzero(counts_B > room_B):
        units_M = np.flatnonzero(owner_U == i)
        loss_MB = (value_UB[units_M, i] - price_B[i])[:, None] - (value_UB[units_M] - price_B)
        free_M = np.ones(len(units_M), dtype=bool)
        for j in np.flatnonzero(counts_B < room_B):
            number = min(counts_B[i] - room_B[i], room_B[j] - counts_B[j])
            moved_M = np.flatnonzero(free_M & (loss_MB[:, j] <= slack))[: max(number, 0)]
            owner_U[units_M[moved_M]] = j
            free_M[moved_M] = False
            counts_B[i] -= len(moved_M)
            counts_B[j] += len(moved_M)


# --- repair -------------------------------------------------------------------------------------------


class _Repair:
    """Moves units along shortest paths from overfull to underfull bins; changes ``price_B`` and ``owner_U`` in place.

    The length of an arc i -> j is the least loss of value if some unit of i goes to j. For each arc a heap holds the
    best movers known; what is worse than ``limit`` of its bin may be missing from it and is looked up when needed.
    """

    def __init__(self, value_UB: np.ndarray, room_B: np.ndarray, price_B: np.ndarray, owner_U: np.ndarray) -> None:
        self.value_UB, self.price_B, self.owner_U = value_UB, price_B, owner_U
        self.excess_B = np.bincount(owner_U, minlength=len(room_B)) - room_B
        bins = len(room_B)
        self.heaps: list[list[list[tuple[float, int]]]] = [[[] for _ in range(bins)] for _ in range(bins)]
        self.limit_BB = np.full((bins, bins), np.inf)
        self.loss_BB = np.full((bins, bins), np.inf)
        self.mover_BB = np.full((bins, bins), -1)

    def run(self) -> None:
        """Move units until no bin is overfull."""
        if not self.excess_B.any():
            return
        for i in range(len(self.excess_B)):
            self._look_up(i)
        while (self.excess_B > 0).any():
            path = self._path()
            arcs = list(itertools.pairwise(path))
            ties = [self._tied(i, j) for i, j in arcs]
            number = min(int(self.excess_B[path[0]]), int(-self.excess_B[path[-1]]), *map(len, ties))
            self.excess_B[path[0]] -= number
            self.excess_B[path[-1]] += number
            for movers, (_, j) in zip(ties, arcs, strict=True):
                self.owner_U[movers[:number]] = j
            if number > 1:
                for touched in path:
                    self._look_up(touched)
                continue
            for movers, (_, j) in zip(ties, arcs, strict=True):
                self._enter(int(movers[0]), j)
            for movers, (i, _) in zip(ties, arcs, strict=True):
                for other in np.flatnonzero(self.mover_BB[i] == movers[0]).tolist():
                    self._refresh(i, other)

    def _tied(self, i: int, j: int) -> Int[np.ndarray, " movers"]:
        """Return the units of bin i that can go to bin j at the least loss: all of them if there seem to be many."""
        best = self.mover_BB[i, j : j + 1]
        heap, loss = self.heaps[i][j], self.loss_BB[i, j]
        if len(heap) < _MANY or heap[_MANY - 1][0] != loss:
            return best.copy()
        units_M = np.flatnonzero(self.owner_U == i)
        return units_M[self.value_UB[units_M, i] - self.value_UB[units_M, j] == loss]

    def _path(self) -> list[int]:
        """Return a shortest path from an overfull to an underfull bin, and lower the prices so that it costs nothing.

        With prices, arcs are never negative: a unit is in the bin that is best at them.
        """
        reduced_BB = np.maximum(self.loss_BB + self.price_B - self.price_B[:, None], 0.0)
        far_B = np.where(self.excess_B > 0, 0.0, np.inf)
        before_B = np.full(len(far_B), -1)
        while True:
            via_BB = far_B[:, None] + reduced_BB
            from_B = via_BB.argmin(0)
            new_B = via_BB[from_B, np.arange(len(far_B))]
            closer_B = new_B < far_B
            if not closer_B.any():
                break
            far_B[closer_B] = new_B[closer_B]
            before_B[closer_B] = from_B[closer_B]
        end = int(np.where(self.excess_B < 0, far_B, np.inf).argmin())
        self.price_B -= np.minimum(far_B, far_B[end])
        path = [end]
        while before_B[path[-1]] >= 0:
            path.append(int(before_B[path[-1]]))
        return path[::-1]

    def _look_up(self, i: int) -> None:
        """Find the best movers out of bin i anew."""
        units_M = np.flatnonzero(self.owner_U == i)
        if len(units_M) == 0:
            self.limit_BB[i], self.loss_BB[i], self.mover_BB[i] = np.inf, np.inf, -1
            self.heaps[i] = [[] for _ in self.excess_B]
            return
        loss_MB = self.value_UB[units_M, i][:, None] - self.value_UB[units_M]
        if len(units_M) > _CANDIDATES:
            chosen_MB = np.argpartition(loss_MB, _CANDIDATES - 1, axis=0)[:_CANDIDATES]
        else:
            chosen_MB = np.broadcast_to(np.arange(len(units_M))[:, None], loss_MB.shape)
        losses_MB = np.take_along_axis(loss_MB, chosen_MB, 0)
        self.limit_BB[i] = losses_MB.max(0) if len(units_M) > _CANDIDATES else np.inf
        for j in range(len(self.excess_B)):
            if j != i:
                heap = list(zip(losses_MB[:, j].tolist(), units_M[chosen_MB[:, j]].tolist(), strict=True))
                heapq.heapify(heap)
                self.heaps[i][j] = heap
                self.loss_BB[i, j], self.mover_BB[i, j] = heap[0]

    def _enter(self, unit: int, i: int) -> None:
        """Offer a unit that has come into bin i to all other bins."""
        losses = (self.value_UB[unit, i] - self.value_UB[unit]).tolist()
        for j, loss in enumerate(losses):
            if j != i:
                heapq.heappush(self.heaps[i][j], (loss, unit))
                if (loss, unit) < (self.loss_BB[i, j], self.mover_BB[i, j]) or self.mover_BB[i, j] < 0:
                    self.loss_BB[i, j], self.mover_BB[i, j] = loss, unit

    def _refresh(self, i: int, j: int) -> None:
        """Find the best mover from bin i to bin j after the last one has left."""
        heap = self.heaps[i][j]
        while heap and self.owner_U[heap[0][1]] != i:
            heapq.heappop(heap)
        if heap and heap[0][0] <= self.limit_BB[i, j]:
            self.loss_BB[i, j], self.mover_BB[i, j] = heap[0]
        else:
            self._look_up(i)
