"""The run as a flat list of phases. A checkpoint lies between any two, so a resumed run just goes on down the list."""

from dataclasses import dataclass
from typing import Literal

from moeify.config import RunConfig

Kind = Literal["train", "cut", "recover", "judge", "finish"]


@dataclass(frozen=True)
class PlannedPhase:
    """One phase; training phases say up to which step of every arm."""

    kind: Kind
    round: int
    """From 1; in the phase after the last round, that round's number."""
    until: int
    """Optimizer steps that every arm has behind it when the phase ends."""


def plan(config: RunConfig) -> tuple[PlannedPhase, ...]:
    """Return a run's phases: train, cut, recover, judge for each round, then train to the end."""
    phases: list[PlannedPhase] = []
    step = 0
    for number, round_ in enumerate(config.rounds, start=1):
        step += round_.train
        phases += [PlannedPhase("train", number, step), PlannedPhase("cut", number, step)]
        step += round_.recover
        phases += [PlannedPhase("recover", number, step), PlannedPhase("judge", number, step)]
    return (*phases, PlannedPhase("finish", len(config.rounds), config.training.steps))


def training_work(config: RunConfig) -> int:
    """Return the optimizer steps of all arms together: up to the first cut twins alone, from there every arm."""
    steps = config.training.steps
    return len(config.twins) * steps + len(config.cut_arms) * (steps - config.rounds[0].train)


def check_reachable(config: RunConfig, categories: int | None) -> None:
    """Raise ValueError for a round whose separation its experts have no room for; pass where categories are unknown.

    Counts in fractions of a site with groups of equal size and every expert as wide as its siblings; the cut itself
    counts in whole units.
    """
    if categories is None:
        return
    reached = 0.0
    leaves = [(categories, 1.0 - config.partition.min_core)]  # categories of the leaf, fraction of units it may give
    for number, round_ in enumerate(config.rounds, start=1):
        parts = [(size, width, min(round_.branching, size)) for size, width in leaves]
        most = reached + sum(size * (k - 1) * width / k for size, width, k in parts) / categories
        if round_.separation > most + 1e-9:
            raise ValueError(
                f"rounds.{number - 1}.separation: got {round_.separation}, at most {most:.3f} can be reached there; "
                f"lower it, raise the separation of the round before, or lower partition.min_core"
            )
        saved = round_.separation - reached
        per_width = sum(size * (k - 1) for size, _, k in parts) / categories
        width = saved / per_width if per_width else 0.0
        leaves = [
            (share, min(width, room / k) if k > 1 else room)
            for size, room, k in parts
            for share in (size // k + (i < size % k) for i in range(k))
        ]
        reached = round_.separation
