"""Results of comparisons that nobody ran."""

from collections.abc import Mapping

from moeify.comparison import Job
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.result import Result

CONFIG = RunConfig.model_validate(
    {
        "name": "fake",
        "data": {"kind": "digits"},
        "model": {"kind": "autoencoder"},
        "training": {"steps": 60},
        "rounds": [{"train": 10, "recover": 10, "separation": 0.5}],
        "cluster": {"workers": 2},
    }
)
DENSE = {0: 3.0, 1: 3.2, 2: 3.1}
TOLD = {0: 2.9, 1: 3.0, 2: 3.0}
SPLIT = {"loop": {0: 3.01, 1: 3.20, 2: 3.12}, "random": {0: 3.05, 1: 3.30, 2: 3.15}}
"""Method -> seed -> mean test loss at a separation of one half."""


def result(split: float, dense: float, told: float | None = None, active: float = 0.5) -> Result:
    means: dict[Arm, float] = {"dense": dense, "split": split}
    if told is not None:
        means["told"] = told
    losses = {arm: {"a": mean - 0.5, "b": mean + 0.5} for arm, mean in means.items()}
    tax = split - dense
    return Result(
        categories=("a", "b"),
        unit="example",
        tree={"name": "core", "categories": ["a", "b"], "units": 8, "children": []},
        active_fraction={"a": active, "b": active, "mean": active},
        rounds=(),
        test_loss=losses,
        bits_per_byte=None,
        own_other={},
        tax={"a": tax, "b": tax, "mean": tax},
        tax_error=0.01,
        tax_random=None,
        tax_told=None if told is None else {"a": split - told, "b": split - told, "mean": split - told},
        steps=60,
        seconds=30.0,
    )


def results(split: Mapping[str, Mapping[int, float]] = SPLIT, separation: float = 0.5) -> dict[Job, Result]:
    return {
        Job(method, separation, seed): result(loss, DENSE[seed], TOLD[seed] if method == "loop" else None)
        for method, losses in split.items()
        for seed, loss in losses.items()
    }
