"""Which rows a step reads: arithmetic on the seed, so that any step can be made again at any time, on any worker."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Int

Purpose = Literal["train", "probe", "split", "permute", "null", "resample", "hide"]
_PURPOSES: dict[Purpose, int] = {"train": 1, "probe": 2, "split": 3, "permute": 4, "null": 5, "resample": 6, "hide": 7}


def generator(seed: int, purpose: Purpose, *numbers: int) -> np.random.Generator:
    """Return the random numbers of one purpose, independent of those of every other purpose and number."""
    return np.random.default_rng([seed, _PURPOSES[purpose], *numbers])


def shares(rows: int, categories: int, random: np.random.Generator) -> Int[np.ndarray, " categories"]:
    """Return how many of the rows each category gets: equal shares, what is left over to categories drawn at random."""
    each = np.full(categories, rows // categories)
    each[random.choice(categories, rows % categories, replace=False)] += 1
    return each


def interleaved(available: Int[np.ndarray, " categories"], at_once: int) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of (category, row of that category): every batch mixes categories evenly and lies in their order.

    All available rows come once. Every batch has ``at_once`` rows but the last, which may have fewer.
    """
    ranked = sorted((row / count, category, row) for category, count in enumerate(available) for row in range(count))
    for start in range(0, len(ranked), at_once):
        yield sorted((category, row) for _, category, row in ranked[start : start + at_once])
