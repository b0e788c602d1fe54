"""Times of rivals that take turns.

On one thread a turn is timed by the processor time of that thread, which neighbours on a shared machine disturb least;
on several by the wall clock, since threads that wait for one another spin and would be counted; and so on a GPU, each
turn up to where it has done all that it was asked.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from moeify.device import finish
from moeify.world import CPU

Run = Callable[[], object]


def seconds(
    rivals: Mapping[str, Run], *, turns: int, at_least: float, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Return rival -> seconds of one run, a value a turn; all rivals run once in each turn, in alternating order.

    ``at_least``: seconds that one rival's turn lasts; it runs as often as that takes. ``device``: where they run.
    """
    alone = device == CPU and torch.get_num_threads() == 1

    def clock() -> float:
        finish(device)
        return time.thread_time() if alone else time.perf_counter()

    often = {}
    for name, run in rivals.items():  # the first run warms up
        run()
        began = clock()
        run()
        often[name] = max(1, round(at_least / max(1e-9, clock() - began)))
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(turns):
        for name in reversed(list(rivals)) if turn % 2 else rivals:
            began = clock()
            for _ in range(often[name]):
                rivals[name]()
            found[name].append((clock() - began) / often[name])
    return found


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> float:
    """Return the median over turns of one rival's seconds over the other's."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))
