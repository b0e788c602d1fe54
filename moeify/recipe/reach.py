"""Whether experts have room for each round's separation, said before anything is trained.

Counts what can be reached at best, with the groups to expect and every expert as wide as its siblings. The first cut's
widths are whole multiples, as in the cut itself (``moeify.splitting.terms``). How earlier rounds share theirs out over
sites is not known, so that those of later rounds are whole at their widest alone.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from moeify.recipe.config import RunConfig
from moeify.recipe.given_tree import Nested, foreseen
from moeify.recipe.rounds import Round

_HALVINGS = 60


class Stake(NamedTuple):
    """Sites that are alike; fractions are of one of them."""

    share: float
    """Of all units, or of what all cost."""
    core: float
    """Least fraction that stays with the root."""
    grain: float = 0.0
    """An expert's width is a multiple of it; 0: any."""


class _Leaf(NamedTuple):
    """What an expert serves, and the fraction of each stake's sites that it may give."""

    serves: Sequence[str]
    most: Sequence[float]
    """Of any one of them."""
    mean: Sequence[float]
    """Of all, on average."""


def check_reachable(config: RunConfig, categories: Sequence[str], stakes: Sequence[Stake] | None = None) -> None:
    """Raise ValueError for a round whose separation its experts have no room for, or that could gain nothing.

    ``stakes``: all sites; not given: ``partition.min_core`` everywhere. Where earlier rounds may choose, they take what
    leaves the most room for later ones. Less than one multiple too much, where multiples are finest, is rounding.
    """
    partition = config.partition
    unrouted, held = partition.unrouted, partition.frozen or partition.floors
    routed = tuple(category for category in categories if category not in unrouted)
    stakes = stakes or [Stake(1.0, partition.min_core)]
    reached, rounding = 0.0, _rounding(stakes)
    whole = [1.0 - stake.core for stake in stakes]
    leaves = [_Leaf(routed, whole, whole)]
    for place, round_ in enumerate(config.rounds):
        if round_.separation <= reached:  # tries again what the budget may not have allowed the round before
            continue
        splits = [(foreseen(config.tree, leaf.serves, round_.branching), leaf) for leaf in leaves]
        alone = len(unrouted) if place == 0 else 0  # they leave the routed at the first cut, and spare every expert
        spared = [
            (sum(map(len, parts)) * (len(parts) - 1) + alone * len(parts)) / len(categories) for parts, _ in splits
        ]  # by a unit of the experts' width
        tops = [
            [_whole(most / len(parts), stake.grain) for most, stake in zip(leaf.most, stakes, strict=True)]
            for parts, leaf in splits
        ]
        widest = [
            [min(top, mean / len(parts)) for top, mean in zip(mine, leaf.mean, strict=True)]
            for mine, (parts, leaf) in zip(tops, splits, strict=True)
        ]
        most = reached + sum(_saved(spared, stakes, widest, [1.0] * len(stakes)))
        if most <= reached + 1e-9 or round_.separation >= most + max(1e-9, sum(spared) * rounding):
            ways_out = {
                "lower it": True,
                "raise the separation of the round before": place > 0,
                "lower partition.min_core": partition.min_core > 0.0,
                "lower partition.multiple": any(stake.grain for stake in stakes),
                "freeze less (partition.frozen, partition.floors)": bool(held),
            }
            raise ValueError(
                f"rounds.{place}.separation: got {round_.separation:.4g}, at most {most:.3f} can be reached there; "
                + ", or ".join(way for way, helps in ways_out.items() if helps)
            )
        widths = _widths(spared, stakes, widest, round_.separation - reached)
        leaves = [
            _Leaf(part, top, list(map(min, widths, mine)))
            if len(parts) > 1 or alone
            else _Leaf(part, leaf.most, leaf.mean)
            for (parts, leaf), top, mine in zip(splits, tops, widest, strict=True)
            for part in parts
        ]
        reached = max(round_.separation, reached + sum(_saved(spared, stakes, widest, widths)))


def experts_to_come(categories: Sequence[str], later: Sequence[Round], tree: Nested | None) -> int:
    """Return how many experts of the least width an expert of these categories must have room for.

    Those are its children of later rounds and theirs, all as wide as the one that needs most; where there are none, it
    counts itself.
    """
    if len(categories) > 1 and later:
        children = foreseen(tree, categories, later[0].branching)
        return len(children) * max(experts_to_come(child, later[1:], tree) for child in children)
    return 1


def _rounding(stakes: Sequence[Stake]) -> float:
    """Return one multiple in the sites that may be split and where multiples are finest, as a share of all."""
    finest = min((stake.grain for stake in stakes if stake.core < 1.0), default=0.0)
    return sum(stake.share for stake in stakes if stake.core < 1.0 and stake.grain == finest) * finest


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
