"""Whether experts have room for each round's separation, said before anything is trained.

Counts what can be reached at best, with the groups to expect and every expert as wide as its siblings. Neurons are many
and count in fractions of a site, heads and channels are few and count whole; the cut itself counts in whole units, and
goes as far as they give room.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from moeify.recipe.config import RunConfig
from moeify.recipe.given_tree import foreseen

_HALVINGS = 60


class Stake(NamedTuple):
    """Sites that are alike; fractions are of one of them."""

    share: float
    """Of all units, or of what all cost."""
    core: float
    """Least fraction that stays with the root."""
    grain: float = 0.0
    """An expert's width is a multiple of it; 0: any."""


def check_reachable(config: RunConfig, categories: Sequence[str], stakes: Sequence[Stake] | None = None) -> None:
    """Raise ValueError for a round whose separation its experts have no room for.

    ``stakes``: all sites; not given: ``partition.min_core`` everywhere. Where earlier rounds may choose, they take what
    leaves the most room for later ones.
    """
    partition = config.partition
    unrouted, held = partition.unrouted, partition.frozen or partition.floors
    routed = tuple(category for category in categories if category not in unrouted)
    stakes = stakes or [Stake(1.0, partition.min_core)]
    reached = 0.0
    # What a leaf serves, and the fraction of each stake that it may give.
    leaves = [(routed, [1.0 - stake.core for stake in stakes])]
    for place, round_ in enumerate(config.rounds):
        if round_.separation <= reached:  # tries again what the budget may not have allowed the round before
            continue
        splits = [(foreseen(config.tree, serves, round_.branching), rooms) for serves, rooms in leaves]
        alone = len(unrouted) if place == 0 else 0  # they leave the routed at the first cut, and spare every expert
        spared = [
            (sum(map(len, parts)) * (len(parts) - 1) + alone * len(parts)) / len(categories) for parts, _ in splits
        ]  # by a unit of the experts' width
        widest = [
            [_whole(room / len(parts), stake.grain) for room, stake in zip(rooms, stakes, strict=True)]
            for parts, rooms in splits
        ]
        most = reached + sum(_saved(spared, stakes, widest, [1.0] * len(stakes)))
        if round_.separation > most + 1e-9:
            more = ", or freeze less (partition.frozen, partition.floors)" if held else ""
            raise ValueError(
                f"rounds.{place}.separation: got {round_.separation}, at most {most:.3f} can be reached there; "
                f"lower it, raise the separation of the round before, or lower partition.min_core{more}"
            )
        widths = _widths(spared, stakes, widest, round_.separation - reached)
        leaves = [
            (part, list(map(min, widths, mine)) if len(parts) > 1 or alone else rooms)
            for (parts, rooms), mine in zip(splits, widest, strict=True)
            for part in parts
        ]
        reached = round_.separation


def _whole(width: float, grain: float) -> float:
    return math.floor(width / grain + 1e-9) * grain if grain else width


def _saved(
    spared: Sequence[float], stakes: Sequence[Stake], widest: Sequence[Sequence[float]], widths: Sequence[float]
) -> list[float]:
    """Return the separation that experts of these widths gain in each stake, as far as they have room."""
    return [
        stake.share * sum(each * min(widths[i], mine[i]) for each, mine in zip(spared, widest, strict=True))
        for i, stake in enumerate(stakes)
    ]


def _widths(
    spared: Sequence[float], stakes: Sequence[Stake], widest: Sequence[Sequence[float]], wanted: float
) -> list[float]:
    """Return the width in each stake that gains the separation wanted, finest grain first, the same within a grain.

    What is fine can be divided again, so this leaves the most room for later rounds.
    """
    found = [0.0] * len(stakes)
    order = sorted(range(len(stakes)), key=lambda i: stakes[i].grain)
    for grain, alike in itertools.groupby(order, key=lambda i: stakes[i].grain):
        mine = list(alike)
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            for i in mine:
                found[i] = (low + high) / 2
            enough = sum(_saved(spared, stakes, widest, found)) >= wanted
            low, high = (low, found[mine[0]]) if enough else (found[mine[0]], high)
        for i in mine:
            found[i] = math.ceil(high / grain - 1e-9) * grain if grain else high
    return found
