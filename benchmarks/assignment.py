"""Exact balanced assignment of units to experts: seconds and share of the optimum.

Values as attribution gives them: log-normal over units, less so over experts; half of the "dead" ones are all zero.
Peers: greedy by gain, random, and scipy's linear_sum_assignment with one slot a place (small problems only).
The full run takes about a minute on one core, the quick one some seconds.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int
from scipy.optimize import linear_sum_assignment

from benchmarks.report import Cell, Figure, arguments, report
from moeify.splitting.assignment import assign

_REPEATS = 5
_Method = Callable[[np.ndarray, np.ndarray], np.ndarray]


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


def _moeify(value: Float64[np.ndarray, "units bins"], capacity: Int[np.ndarray, " bins"]) -> np.ndarray:
    return assign(value, capacity).owner


def _timed(method: _Method, value: np.ndarray, capacity: np.ndarray, repeats: int) -> tuple[float, np.ndarray]:
    """Return the median of the seconds, and the owners."""
    seconds, owner = [], np.zeros(0)
    for _ in range(repeats):
        start = time.perf_counter()
        owner = method(value, capacity)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), owner


def main() -> None:
    """Run the benchmark."""
    args = arguments(__doc__)
    methods = {"moeify": _moeify, "greedy": _greedy, "random": _random, "scipy, a slot a place": _scipy}
    rows: list[dict[str, Cell]] = []
    seconds: dict[int, float] = {}
    optimality = 1.0
    for units, bins in ((2_048, 8), (14_336, 32), (100_000, 32)):
        small = units == 2_048
        capacity = np.full(bins, units // bins)
        for kind in ("lognormal", "uniform", "dead") if small or not args.quick else ("lognormal",):
            value = _values(kind, units, bins)
            result = assign(value, capacity)
            optimality = min(optimality, result.value / result.bound)
            for name, method in methods.items():
                if method is _scipy and not small:
                    continue
                repeats = _REPEATS if method is _moeify and not args.quick else 1
                taken, owner = _timed(method, value, capacity, repeats)
                share = float(value[np.arange(units), owner].sum() / result.bound)
                rows.append(
                    {
                        "problem": f"{units:,} x {bins} {kind}",
                        "method": name,
                        "seconds": taken,
                        "of the optimum": f"{share:.6f}",
                    }
                )
                if method is _moeify and kind == "lognormal":
                    seconds[units] = taken
    figures = [
        Figure("seconds_14336x32", seconds[14_336], "<= 1"),
        Figure("seconds_100000x32", seconds[100_000], "<= 6"),
        Figure("optimality", optimality, ">= 1 - 1e-9"),
    ]
    report("assignment", rows, figures, args.json, quick=args.quick)


if __name__ == "__main__":
    main()
