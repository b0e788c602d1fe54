"""Short runs that go through all that a run may do, on any device; as a program, on the pretend one."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.result import Result
from moeify.store import FolderStore
from moeify.task import Task
from moeify.world import Solo
from tests.pictures import pictures, pictures_config
from tests.toy import CONFIG, TEXT_CONFIG, ToyTask, ToyTextTask

_SHORT: dict[str, Any] = {
    "training": {**CONFIG["training"], "steps": 12},
    "rounds": [{"train": 4, "recover": 2, "separation": 0.3}, {"train": 2, "recover": 2, "separation": 0.45}],
    "checkpoints": {"every": 3, "keep": 2},
}
_PARTS = {"multiple": 2, "min_units": 2}
_ONCE = {"rounds": _SHORT["rounds"][:1]}
_EXPERTS = [{"categories": ["a", "d"], "units": 0.25}, {"categories": ["b"], "fresh": 6}]
CASES: dict[str, dict[str, Any]] = {
    "controls": {"controls": ["told", "random"]},
    "tested": {
        "partition": {**_PARTS, "null_test": {"permutations": 4, "level": 0.5}},
        "evaluation": {"validation_rows": 16, "test_rows": 32, "rows_at_once": 16, "null_draws": 1},
    },
    "settled": {"attribution": {"rows": 64, "rows_at_once": 16, "settled": 0.8}},
    "rolled back": {"budget": {"tax": 0.5}},
    "learned owners": {"partition": {**_PARTS, "owners": {"kind": "learned", "steps": 5}}},
    "followed": {"partition": {**_PARTS, "compensation": {"follow": True}}},
    "gradients": {"routing": {"gradients": "both", "labelled": 0.5, "core": "frozen", "experts": _EXPERTS}},
    "soft routes": {"routing": {"gradients": "parameters", "routes_after_cut": "soft"}},
}
"""Of autoencoders, by name: what is not as in ``CONFIG``."""
TEXTS: dict[str, dict[str, Any]] = {
    "text": {"controls": ["told", "random"], "training": {**_SHORT["training"], "accumulate": 2}, **_ONCE},
    "recomputed": {"training": {**_SHORT["training"], "checkpoint_activations": True}, "controls": [], **_ONCE},
    "heads": {"partition": {**_PARTS, "units": ["ffn", "heads"]}, **_ONCE},
}
"""Of language models."""
PICTURES = pictures_config(training={"steps": 6, "rows": 20}, rounds=[{"train": 2, "recover": 2, "separation": 0.25}])
"""A residual network's, with the statistics that it gathers."""


class OutOfPowerError(Exception):
    """Stands for the power going off."""


class Store(FolderStore):
    """Has the power go off in the middle of its third checkpoint."""

    lives = 2

    def save(self, *args: Any, **kwargs: Any) -> None:
        if self.lives == 0:
            self.lives = -1
            raise OutOfPowerError
        self.lives -= 1
        super().save(*args, **kwargs)


def outcomes(device: torch.device, folder: Path) -> dict[str, Any]:
    """Return case -> how its run ended on a device, in what does not depend on the clock."""
    found = {"pictures": _told(run(PICTURES, pictures(PICTURES), world=Solo(device)))}
    for name, changes in {**CASES, **TEXTS}.items():
        config = RunConfig.model_validate({**(TEXT_CONFIG if name in TEXTS else CONFIG), **_SHORT, **changes})
        task: Task = ToyTextTask(config) if name in TEXTS else ToyTask(config)
        found[name] = _told(run(config, task, world=Solo(device)))
    config, store = RunConfig.model_validate({**CONFIG, **_SHORT}), Store(folder, 2)
    try:
        run(config, ToyTask(config), world=Solo(device), store=store)
    except OutOfPowerError:
        found["resumed"] = _told(run(config, ToyTask(config), world=Solo(device), store=store))
    return found


def _told(result: Result) -> dict[str, Any]:
    told = result.model_dump(mode="json", include={"tree", "test_loss", "own_other", "modules", "tax"})
    return {**told, "rounds": [[each.accepted, each.predicted, each.tax_cut] for each in result.rounds]}


if __name__ == "__main__":
    from tests import pretend

    told = outcomes(pretend.DEVICE, Path(sys.argv[1]))
    here, there = torch.ones(2), torch.ones(2, device=pretend.DEVICE)
    wrong = {
        "mixed": lambda: there + here,
        "mixed numbers": lambda: torch.stack([there[0], here[0]]),
        "mixed indices": lambda: there.index_select(0, torch.tensor([1])),
        "generator": lambda: torch.multinomial(there, 1, generator=torch.Generator()),
    }
    refused = []
    for name, run_wrong in wrong.items():
        try:
            run_wrong()
        except RuntimeError:
            refused.append(name)
    told["let through"] = sorted(wrong.keys() - set(refused))
    json.dump({**told, "operations": pretend.Held.operations}, sys.stdout)
