"""Whether experts have room for each round's separation, said before anything is trained.

Counts in fractions of a site, with the groups to expect and every expert as wide as its siblings; the cut itself counts
in whole units, and goes as far as they give room.
"""

from collections.abc import Mapping, Sequence

from moeify.config import RunConfig
from moeify.given_tree import foreseen

_HALVINGS = 60


def check_reachable(config: RunConfig, categories: Sequence[str], cores: Mapping[float, float] | None = None) -> None:
    """Raise ValueError for a round whose separation its experts have no room for.

    ``cores``: the least fraction of a site that stays with the root -> the share of all units, or of their cost, in
    sites where it is so; not given: ``partition.min_core`` everywhere.
    """
    unrouted, frozen = config.partition.unrouted, config.partition.frozen or config.partition.floors
    routed = tuple(category for category in categories if category not in unrouted)
    shares = cores or {config.partition.min_core: 1.0}
    reached = 0.0
    # What a leaf serves, and the fraction of each kind of site that it may give.
    leaves = [(routed, [1.0 - core for core in shares])]
    for place, round_ in enumerate(config.rounds):
        if round_.separation <= reached:  # tries again what the budget may not have allowed the round before
            continue
        splits = [(foreseen(config.tree, serves, round_.branching), rooms) for serves, rooms in leaves]
        alone = len(unrouted) if place == 0 else 0  # they leave the routed at the first cut, and spare every expert
        spared = [
            (sum(map(len, parts)) * (len(parts) - 1) + alone * len(parts)) / len(categories) for parts, _ in splits
        ]  # by a unit of the experts' width
        widest = [[room / len(parts) for room in rooms] for parts, rooms in splits]
        most = reached + _saved(spared, shares, widest, 1.0)
        if round_.separation > most + 1e-9:
            raise ValueError(
                f"rounds.{place}.separation: got {round_.separation}, at most {most:.3f} can be reached there; "
                f"lower it, raise the separation of the round before, or lower partition.min_core"
                + (", or freeze less (partition.frozen, partition.floors)" if frozen else "")
            )
        width = _width(spared, shares, widest, round_.separation - reached)
        leaves = [
            (part, [min(width, most) for most in each] if len(parts) > 1 or alone else rooms)
            for (parts, rooms), each in zip(splits, widest, strict=True)
            for part in parts
        ]
        reached = round_.separation


def _saved(
    spared: Sequence[float], shares: Mapping[float, float], widest: Sequence[Sequence[float]], width: float
) -> float:
    """Return the separation that experts of this width gain, as far as they have room."""
    return sum(
        each * share * min(width, most)
        for each, mine in zip(spared, widest, strict=True)
        for share, most in zip(shares.values(), mine, strict=True)
    )


def _width(
    spared: Sequence[float], shares: Mapping[float, float], widest: Sequence[Sequence[float]], wanted: float
) -> float:
    """Return the width, the same everywhere where there is room, that gains the separation wanted."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _saved(spared, shares, widest, middle) >= wanted else (middle, high)
    return high
