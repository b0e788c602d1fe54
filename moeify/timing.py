"""Times of rivals that take turns, and the floating-point operations that each of them runs.

On one thread a turn is timed by the processor time of that thread, which neighbours on a shared machine disturb least;
on several by the wall clock, since threads that wait for one another spin and would be counted.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Run = Callable[[], object]


def seconds(rivals: Mapping[str, Run], *, turns: int, at_least: float) -> dict[str, list[float]]:
    """Return rival -> seconds of one run, a value a turn; all rivals run once in each turn, in alternating order.

    ``at_least``: seconds that one rival's turn lasts; it runs as often as that takes.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
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


def flops(run: Run) -> int:
    """Return the floating-point operations of a run's matrix products and attentions, 2 a multiplication.

    Causal attention counts as a whole square, as it is commonly counted.
    """
    aten = torch.ops.aten
    forward, backward = (
        getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{end}") for end in ("", "_backward")
    )
    more: dict[Any, Any] = {aten.addmm_: _addmm, forward: _attention, backward: _attention_backward}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        run()
    return counter.get_total_flops()


def _addmm(_: Any, one: Any, other: Any, **__: Any) -> int:
    return 2 * one[0] * one[1] * other[1]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)
