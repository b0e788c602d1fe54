"""Rivals of the loop, as recipes: the same model, data and tokens, split in another way.

A variant changes a recipe's rounds, tree and partition and nothing else, so that runs of several methods on one seed
share their twins (``moeify.twin_cache``) and can be compared pair by pair. Other ways to find owners are held against
the loop as they are, without the exchanges of ``partition.refine``.
"""

import json
from collections.abc import Mapping
from typing import Any

from moeify.recipe.config import RunConfig
from moeify.recipe.partition import Partition

SCHEDULES = ("loop", "oneshot", "init")
"""``loop``: the recipe as it is; ``oneshot``: one cut into all leaves at the first round's step, by the recipe's
owners; ``init``: such a cut before the first step, where there is nothing to measure: equal widths, owners drawn, no
compensation."""

SWITCHES: dict[str, dict[str, Any]] = {
    "equal_widths": {"budget": "equal"},
    "uncompensated": {"compensation": None},
    "closed_form": {"compensation": {"follow": False}},
    "following": {"compensation": {"follow": True}},
    "refined": {"refine": True},
    "unrefined": {"refine": False},
    "told_split": {"told": True},
}
"""The recipe with one switch of its partition thrown, to see what that buys; what a mapping leaves out stays."""


def methods() -> tuple[str, ...]:
    """Return every method's name: schedules, switches, and each kind of ``partition.owners`` in the recipe's rounds."""
    schema = RunConfig.model_json_schema()["$defs"]["Partition"]["properties"]["owners"]
    kinds = schema["discriminator"]["mapping"]
    return (*SCHEDULES, *SWITCHES, *(kind for kind in kinds if kind != "attribution"))


def rivals(config: RunConfig) -> tuple[str, ...]:
    """Return the methods that a recipe can be held against.

    All but itself, switches that stand so already, and those of what the recipe has not at all.
    """
    return tuple(m for m in methods() if m != "loop" and (m not in SWITCHES or _changes(config.partition, m)))


def variant(config: RunConfig, method: str, categories: int) -> RunConfig:
    """Return the recipe for a method; ``categories``: how many the data has. ValueError for an unknown method."""
    if method not in methods():
        raise ValueError(f"method: got {method!r}, wanted one of {', '.join(methods())}")
    data = config.model_dump(mode="json")
    match method:
        case "loop":
            pass
        case "oneshot":
            data |= _single_cut(config, config.rounds[0].train, categories)
        case "init":
            data |= _single_cut(config, 0, categories)
            drawn = {"owners": {"kind": "random"}, "budget": "equal", "refine": False, "compensation": None}
            data["partition"] |= drawn
        case switch if switch in SWITCHES:
            data["partition"] = _thrown(data["partition"], switch)
        case kind:
            data["partition"] |= {"owners": {"kind": kind}, "refine": False}
    return RunConfig.model_validate_json(json.dumps(data), strict=True)


def _changes(partition: Partition, switch: str) -> bool:
    data = partition.model_dump(mode="json")
    there = all(data[key] is not None for key, value in SWITCHES[switch].items() if isinstance(value, dict))
    return there and _thrown(data, switch) != data


def _thrown(partition: Mapping[str, Any], switch: str) -> dict[str, Any]:
    """Return a recipe's section with a switch thrown."""
    new = {k: {**(partition[k] or {}), **v} if isinstance(v, dict) else v for k, v in SWITCHES[switch].items()}
    return {**partition, **new}


def scaled(config: RunConfig, separation: float) -> RunConfig:
    """Return the recipe with all rounds' separations scaled so that the last one is ``separation``."""
    last = config.rounds[-1].separation
    rounds = [r.model_copy(update={"separation": r.separation * separation / last}) for r in config.rounds]
    return config.model_copy(update={"rounds": tuple(rounds)})


def _single_cut(config: RunConfig, at: int, categories: int) -> dict[str, Any]:
    """Return the one round, and no tree, whose groups would need several."""
    spent = sum(r.train + r.recover for r in config.rounds)
    cut = {"train": at, "recover": spent - at, "branching": categories, "separation": config.rounds[-1].separation}
    return {"rounds": [cut], "tree": None}
