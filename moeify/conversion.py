"""A recipe that splits a checkpoint: sized to data, network and machine, so that it recovers in minutes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.data import given_tokenizer
from moeify.data.survey import Survey
from moeify.models.families import streams, unit_space
from moeify.models.pretrained import Checkpoint, look
from moeify.recipe import strict_yaml
from moeify.recipe.config import RunConfig
from moeify.recipe.data import ImageData
from moeify.recipe.load import parse_recipe
from moeify.recipe.model import PretrainedModel
from moeify.recipe.plan import check_categories
from moeify.starter import SPEED, Machine, Starter, of_size, rows_a_step, rows_of
from moeify.tasks.images import ImagesTask
from moeify.tasks.masked import mask_token

_HEAD = "# Written by moeify split; every field: docs/recipes.md, or moeify schema --markdown.\n"
_ARMS = 5.0
"""What all models train, in trainings of one: four, each with the teacher's forward pass."""
_MINUTES = 5.0
"""What training may take, as far as that can be foreseen."""
_EPOCHS = 4
"""How often the train split is read at most."""
_STEPS = (60, 2000)
"""Optimizer steps, from and to."""
_RATES = ((100_000_000, 5e-5), (10_000_000, 2e-4), (2_000_000, 5e-4), (1_000_000, 1e-3), (0, 2e-3))
"""From so many parameters on: the learning rate of recovery. Below two millions it was tried (benchmarks/LOG.md)."""
_STREAM = 3.0
"""How much arms keep to the residual stream, where there is one: from .3 to 10 were tried (benchmarks/LOG.md)."""
_FASTER = ((2_000_000, 1.0), (0, 2.0))
"""From so many parameters on: how many times that rate they recover at then, as far as it was tried."""
_DEEPEST = (0.75, 0.7, 0.65, 0.6, 0.55)
"""Separations to try first where a budget limits the tax."""
_USUAL = (0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
_STAGES: dict[int, tuple[tuple[float, ...], ...]] = {
    1: ((1.0,),),
    2: ((0.7, 1.0), (0.6, 1.0), (0.5, 1.0), (0.8, 1.0)),
    3: ((0.5, 0.8, 1.0), (0.4, 0.7, 1.0), (0.6, 0.9, 1.0)),
}
"""How many rounds -> how much of the last separation each of them asks for, the best first."""


@dataclass(frozen=True)
class Wish:
    """What a person asks of a conversion; what is None is chosen."""

    separation: float | None = None
    budget: dict[str, str | float] | None = None
    """As in a recipe; cuts then go as deep as it allows, up to ``separation``."""
    steps: int | None = None
    distill: bool = True


@dataclass(frozen=True)
class _Learned:
    """What a checkpoint is retrained on."""

    data: dict[str, Any]
    """A recipe's section."""
    model: dict[str, Any]
    categories: tuple[str, ...]
    train: tuple[int, ...]
    """Tokens, or images, of each category."""
    length: int
    """Tokens of a row, or images: one."""
    tokens: int
    """That the network runs a row."""


def conversion(folder: Path, survey: Survey, name: str, wish: Wish, machine: Machine, cache: Path) -> Starter:
    """Return a recipe that splits the language model in ``folder`` by texts; all its paths are absolute.

    Raises:
        ValueError: The checkpoint cannot be used, the data is too small, or no tree reaches the separation.
    """
    checkpoint = look(folder.absolute()).text()
    given = given_tokenizer.of_checkpoint(checkpoint)
    if checkpoint.hides:
        mask_token(checkpoint, checkpoint.tokenizer())  # raises where there is none
    data, prepared = rows_of(survey, cache, None, given, checkpoint.positions())
    learned = _Learned(
        data.model_dump(mode="json", exclude={"vocabulary"}),
        {"kind": "pretrained", "path": str(checkpoint.folder)},
        tuple(prepared.categories),
        tuple(len(stream) for stream in prepared.streams["train"]),
        data.length,
        data.length,
    )
    return _conversion(checkpoint, learned, name, wish, machine)


def conversion_by_images(
    folder: Path, given: RunConfig, base: Path, name: str, wish: Wish, machine: Machine
) -> Starter:
    """Return a recipe that splits the image classifier in ``folder`` by the images that the recipe ``given`` reads.

    ``base``: where relative paths of that recipe start. Raises ValueError as ``conversion`` does.
    """
    checkpoint = look(folder.absolute()).images()
    model = PretrainedModel(kind="pretrained", path=checkpoint.folder)
    task = ImagesTask.prepare(given.model_copy(update={"model": model}), base)
    assert isinstance(given.data, ImageData)
    root = given.data.root
    data = given.data if root is None else given.data.model_copy(update={"root": (base / root).absolute()})
    network = checkpoint.network()
    learned = _Learned(
        data.model_dump(mode="json"),
        {"kind": "pretrained", "path": str(checkpoint.folder)},
        task.categories,
        tuple(task.sizes()["train"].values()),
        1,
        unit_space(network).sites[0].places,
    )
    return _conversion(checkpoint, learned, name, wish, machine)


def _conversion(checkpoint: Checkpoint, learned: _Learned, name: str, wish: Wish, machine: Machine) -> Starter:
    network = checkpoint.network()
    number, rows = len(learned.categories), rows_a_step(len(learned.categories))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    a_minute = 60 * SPEED * machine.cores / (parameters * rows * learned.tokens * _ARMS)
    fitting = min(_MINUTES * a_minute, _EPOCHS * sum(learned.train) / (rows * learned.length))
    steps = wish.steps or round(min(max(_STEPS[0], fitting), _STEPS[1]) / 20) * 20
    multiple = _multiple(min(site.units for site in unit_space(network).sites))
    stream = _STREAM if wish.distill and streams(network) else 0.0
    rate = of_size(_RATES, parameters) * (of_size(_FASTER, parameters) if stream else 1.0)
    workers, threads = machine.workers
    settings: dict[str, Any] = {
        "name": name,
        "data": learned.data,
        "model": learned.model,
        "training": {"steps": steps, "rows": rows, "learning_rate": rate},
        "attribution": {"rows": 64, "rows_at_once": rows},
        # No floor under the core: a trained network's layers differ, and the knapsack knows by how much.
        "partition": {"multiple": multiple, "min_units": multiple, "min_core": 0.0},
        "controls": ["random", "told"],
        "budget": wish.budget,
        "distillation": {"weight": 0.5, "temperature": 1.0, "stream": stream} if wish.distill else None,
        "evaluation": {"validation_rows": 64, "test_rows": 256, "rows_at_once": 32},
        "cluster": {"workers": workers, "threads": threads},
    }

    def written(separations: tuple[float, ...]) -> str:
        return _HEAD + strict_yaml.write({**settings, "rounds": _rounds(number, steps, separations)})

    parse_recipe(written((0.01,)), where="the new recipe")  # raises for all that is wrong but the separation
    for separations in _depths(number, wish):
        text = written(separations)
        try:
            config = parse_recipe(text, where="the new recipe")
            check_categories(config, learned.categories)
        except ValueError as error:
            problem = str(error).split("\n")[-1]
            continue
        return Starter(text, config, learned.categories, learned.train, 1.0 + steps / a_minute)
    raise ValueError(f"{number} categories cannot be split so far apart ({problem}); give a lower --separation")


def _depths(number: int, wish: Wish) -> Iterator[tuple[float, ...]]:
    """Yield separations, one a round, that may reach a leaf for each of so many categories, the best first."""
    # One cut leaves everybody all steps to recover (benchmarks/LOG.md); what a budget allows is felt out in rounds.
    rounds = 1 if number <= (3 if wish.budget else 9) else 2 if number <= 9 else 3
    for last in (wish.separation,) if wish.separation else (*(_DEEPEST if wish.budget else ()), *_USUAL):
        for stages in _STAGES[rounds]:
            found = tuple(round(last * stage, 4) for stage in stages)
            yield (*found, found[-1]) if wish.budget else found


def _rounds(number: int, steps: int, separations: tuple[float, ...]) -> list[dict[str, Any]]:
    """Return rounds that share six tenths of the steps; the first cut comes when a tenth of them is over."""
    places = len(dict.fromkeys(separations))
    recover = max(1, round(0.6 * steps / len(separations)))
    return [
        {
            "train": round(steps * 0.1) if place == 0 else 0,
            "recover": recover,
            "branching": 2 if place < places - 1 else max(2, -(-number // 2 ** (places - 1))),
            "separation": separation,
        }
        for place, separation in enumerate(separations)
    ]


def _multiple(units: int) -> int:
    """Return a power of 2 that leaves experts of a site with so many units at least 32 widths to choose from."""
    return max(1, min(16, 1 << max(0, (units // 32).bit_length() - 1)))
