"""Exact balanced assignment of units to experts: seconds and share of the optimum.

Values as attribution gives them: log-normal over units, less so over experts; half of the "dead" ones are all zero.
Peers: greedy by gain, random, and scipy's linear_sum_assignment with one slot a place (small problems only).
The full run takes about three minutes on one core, the quick one a few seconds.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int
from scipy.optimize import linear_sum_assignment

from benchmarks.report import Cell, Figure, arguments, report
from moeify.assignment import assign

_REPEATS = 5


def _values(kind: str, units: int, bins: int) -> Float64[np.ndarray, "units bins"]:
    generator = np.random.default_rng(0)
    if kind == "uniform":
        return generator.random((units, bins))
    values = np.exp(2 * generator.standard_normal((units, 1)) + generator.standard_normal((units, bins)))
    if kind == "dead":
        values[generator.random(units) < 0.5] = 0.0
    return values


def _greedy(value: Float64[np.ndarray, "units bins"], capacity: Int[np.ndarray, " bins"]) -> np.ndarray:
    """Units with the most to lose choose first, each the best bin that has room."""
    second, best = np.partition(value, -2, axis=1)[:, -2:].T
    wishes = np.argsort(-value, axis=1, kind="stable").tolist()
    room, owner = capacity.tolist(), np.zeros(len(value), dtype=np.int64)
    for unit in np.argsort(second - best, kind="stable").tolist():
        owner[unit] = next(bin_ for bin_ in wishes[unit] if room[bin_])
        room[owner[unit]] -= 1
    return owner


def _random(value: Float64[np.ndarray, "units bins"], capacity: Int[np.ndarray, " bins"]) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(capacity)), capacity))


def _scipy(value: Float64[np.ndarray, "units bins"], capacity: Int[np.ndarray, " bins"]) -> np.ndarray:
    slots = np.repeat(np.arange(len(capacity)), capacity)
    return slots[linear_sum_assignment(value[:, slots], maximize=True)[1]]


def _timed(run: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    seconds, owner = [], np.zeros(0)
    for _ in range(repeats):
        start = time.perf_counter()
        owner = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), owner


def main() -> None:
    """Run the benchmark."""
    args = arguments(__doc__)
    peers = {"greedy": _greedy, "random": _random, "scipy, a slot a place": _scipy}
    shapes = [(2_048, 8), (14_336, 32), (100_000, 32)]
    rows: list[dict[str, Cell]] = []
    seconds: dict[int, float] = {}
    optimality = np.inf
    for units, bins in shapes:
        capacity = np.full(bins, units // bins)
        for kind in ("lognormal",) if args.quick and units > 2_048 else ("lognormal", "uniform", "dead"):
            value = _values(kind, units, bins)
            result = assign(value, capacity)
            ours, _ = _timed(lambda value=value: assign(value, capacity).owner, 1 if args.quick else _REPEATS)  # type: ignore[misc]
            if kind == "lognormal":
                seconds[units] = ours
            optimality = min(optimality, result.value / result.bound)
            problem: dict[str, Cell] = {"problem": f"{units:,} x {bins} {kind}"}
            rows.append(problem | {"method": "moeify", "seconds": ours, "of the optimum": result.value / result.bound})
            for name, peer in peers.items():
                if peer is _scipy and units > 2_048:
                    continue
                taken, owner = _timed(lambda peer=peer, value=value: peer(value, capacity), 1)  # type: ignore[misc]
                share = float(value[np.arange(units), owner].sum() / result.bound)
                rows.append(problem | {"method": name, "seconds": taken, "of the optimum": share})
    figures = [
        Figure("seconds_14336x32", seconds[14_336], "<= 1"),
        Figure("seconds_100000x32", seconds[100_000], "<= 6"),
        Figure("optimality", float(optimality), ">= 1 - 1e-9"),
    ]
    report("assignment", rows, figures, args.json, quick=args.quick)


if __name__ == "__main__":
    main()
