"""The run as a flat list of phases. A checkpoint lies between any two, so a resumed run just goes on down the list."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moeify.recipe.closed import reserved
from moeify.recipe.config import RunConfig
from moeify.recipe.given_tree import names, strangers
from moeify.recipe.reach import check_reachable

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
    """Return the optimizer steps of all arms together; arms that fork at the first cut have their own from there on."""
    steps, early = config.training.steps, len(config.early_arms)
    return early * steps + (len(config.arms) - early) * (steps - config.rounds[0].train)


def check_categories(config: RunConfig, categories: Sequence[str] | None) -> None:
    """Raise ValueError where the recipe does not fit the data's categories; pass where they are unknown.

    A line for each of them that is reserved and each name that is none of them, or else one for a round whose
    separation its experts have no room for.
    """
    if categories is None:
        return
    unrouted = config.partition.unrouted
    problems = [
        *(f"data: {problem}" for problem in map(reserved, categories) if problem),
        *strangers("tree", names(config.tree or ()), categories),
        *strangers("partition.unrouted", unrouted, categories),
        *(line for key, named in config.routing.categories.items() for line in strangers(key, named, categories)),
    ]
    if not set(categories) - set(unrouted):
        problems.append("partition.unrouted: got all categories, wanted at least one left for an expert of its own")
    if problems:
        raise ValueError("\n".join(problems))
    check_reachable(config, categories)
