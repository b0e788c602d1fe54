"""A recipe to start with, sized to data and machine: complete, commented, and one that can be run."""

import itertools
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.data import tokens
from moeify.data.given_tokenizer import GivenTokenizer
from moeify.data.prepared import Tokens
from moeify.data.survey import Survey
from moeify.recipe import strict_yaml
from moeify.recipe.config import RunConfig
from moeify.recipe.data import Discover, JsonLines, Table, TextData, TextFolders
from moeify.recipe.load import parse_recipe
from moeify.recipe.plan import check_categories

_LENGTHS = (128, 64, 32, 16, 8)
"""Tokens a row, the longest first."""
_WINDOWS = 8
"""Rows of each category that held-out data should have at least, where a shorter row gives them."""
_EPOCHS = 8
"""How often the train split is read at most."""
SPEED = 4e9
"""Parameters times tokens that one core trains in a second: the shipped recipe ``text`` on two cores."""
_MINUTES = 5.0
"""What a first run may take, as far as that can be foreseen."""
_START = 1.0
"""Minutes before the first step and after the last one."""
_ENOUGH = 600
"""Steps that a larger network must come to in that time, or a smaller one is taken."""
_ARMS = 3.7
"""What all models train, in trainings of one: two twins, and two that are cut a little later."""
_STEPS = (240, 4000)
"""Optimizer steps, from and to."""
_SMALL = 2_000_000
"""Bytes of a category below which more of it is held out, so that there is something to judge by."""
_SHAPES = ((50_000_000, (256, 8, 1024)), (10_000_000, (128, 6, 512)), (0, (64, 4, 384)))
"""From so many bytes on: hidden, layers, ffn."""
_VOCABULARIES = ((50_000_000, 8192), (10_000_000, 2048), (0, 1024))
"""From so many bytes on: tokens."""
_CLUSTERS = (8, 6, 4, 3)
"""How many clusters are looked for at most, tried in this order."""
_WORKER_GB = 1.5
"""Memory of a worker, with what the run itself takes spread over them."""


@dataclass(frozen=True)
class Machine:
    """What a run may use."""

    cores: int
    memory: float
    """GB that are free."""

    @property
    def workers(self) -> tuple[int, int]:
        """Processes that a run may have here, and the cores of each."""
        workers = 1 << int(math.log2(max(1, min(8, self.cores, self.memory // _WORKER_GB))))
        return workers, max(1, self.cores // workers)


@dataclass(frozen=True)
class Starter:
    """The recipe and what is known about the data it was made for."""

    text: str
    config: RunConfig
    categories: tuple[str, ...]
    train_tokens: tuple[int, ...]
    """Of each category; images, where the data is images."""
    minutes: float
    """What a run may take, roughly."""


def starter(survey: Survey, name: str, machine: Machine, cache: Path, base: Path) -> Starter:
    """Return a recipe for the data, whose tokens are prepared in ``cache`` on the way, where a run finds them.

    ``base`` is the folder that the recipe will be in: what lies below it is named by relative paths.

    Raises:
        ValueError: The data is too small.
    """
    total = sum(amount.size for amount in survey.amounts.values())
    data, prepared = rows_of(survey, cache, base, vocabulary=of_size(_VOCABULARIES, total))
    train = tuple(len(stream) for stream in prepared.streams["train"])
    workers, threads = machine.workers
    number = len(prepared.categories)
    rows = rows_a_step(number)
    shape, a_minute = _shape(total, prepared.vocabulary, rows * data.length, machine.cores)
    most = min(_MINUTES * a_minute, _EPOCHS * sum(train) / (rows * data.length), _STEPS[1])
    steps = max(_STEPS[0], round(most / 40) * 40)
    settings: dict[str, Any] = {
        "name": name,
        "data": data.model_dump(mode="json"),
        "model": shape,
        "steps": steps,
        "rows": rows,
        "multiple": 8 if number <= 12 else 4,
        "workers": workers,
        "threads": threads,
    }
    for separations in _depths(number):
        text = _written({**settings, "rounds": _rounds(number, steps, separations)})
        try:
            config = parse_recipe(text, where="the new recipe")
            check_categories(config, prepared.categories)
        except ValueError as error:
            problem = " ".join(str(error).split())
            continue
        assert config.data == data, (config.data, data)
        return Starter(text, config, prepared.categories, train, _START + steps / a_minute)
    raise ValueError(
        f"found no recipe that reaches a leaf for each of {number} categories; put some together ({problem})"
    )


def rows_of(
    survey: Survey,
    cache: Path,
    base: Path | None,
    given: GivenTokenizer | None = None,
    most: int = _LENGTHS[0],
    **more: Any,
) -> tuple[TextData, Tokens]:
    """Return the data section for what was found, rows as long as they may be, ``most`` at most, and its tokens.

    ``base``: None leaves absolute paths as they are. ``more``: fields of the section. ValueError for too little text.
    """
    small = min(amount.size for amount in survey.amounts.values()) < _SMALL
    data = TextData(
        kind="text",
        source=survey.source if base is None else _relative(survey.source, base),
        discover=None if survey.labelled else Discover(),
        validation=0.1 if small else 0.05,
        test=0.15 if small else 0.1,
        **more,
    )
    data, prepared = _prepared(data, cache, base or Path(), given)
    return data.model_copy(update={"length": _length(prepared, most)}), prepared


def rows_a_step(categories: int) -> int:
    """Return rows of a step that hold every category."""
    return max(16, 2 ** math.ceil(math.log2(categories)))


def _prepared(data: TextData, cache: Path, base: Path, given: GivenTokenizer | None) -> tuple[TextData, Tokens]:
    """Prepare the tokens; where clusters are too small to hold any of them out, look for fewer clusters."""
    if data.discover is None:
        return data, tokens.prepare(data, cache, base, given)
    from moeify.data.discover import TooSmallError

    for most in _CLUSTERS:
        asked = data.model_copy(update={"discover": data.discover.model_copy(update={"most": most})})
        with suppress(TooSmallError):
            return asked, tokens.prepare(asked, cache, base, given)
    asked = data.model_copy(update={"discover": data.discover.model_copy(update={"number": 2})})
    return asked, tokens.prepare(asked, cache, base, given)


def _shape(size: int, vocabulary: int, tokens_a_step: int, cores: int) -> tuple[tuple[int, int, int], float]:
    """Return the largest network that so many bytes call for and that gets far here, and its steps a minute."""
    for least, shape in _SHAPES:
        hidden, layers, ffn = shape
        parameters = vocabulary * hidden + layers * (4 * hidden**2 + 3 * hidden * ffn)
        a_minute = 60 * SPEED * cores / (parameters * tokens_a_step * _ARMS)
        if size >= least and _MINUTES * a_minute >= _ENOUGH:
            break
    return shape, a_minute


def of_size(table: Sequence[tuple[int, Any]], size: int) -> Any:
    """Return what the first row has whose number is no more than ``size``; the last row's number is 0."""
    return next(value for least, value in table if size >= least)


def _relative(source: TextFolders | JsonLines | Table, base: Path) -> TextFolders | JsonLines | Table:
    match source:
        case TextFolders(categories=categories):
            return source.model_copy(update={"categories": {name: _below(p, base) for name, p in categories.items()}})
        case JsonLines(path=path) | Table(path=path):
            return source.model_copy(update={"path": _below(path, base)})


def _below(path: Path, base: Path) -> Path:
    relative = Path(os.path.relpath(path, base))
    return path if ".." in relative.parts else relative


def _length(prepared: Tokens, most: int) -> int:
    """Return the longest row, of ``most`` tokens, that leaves enough rows to judge by."""
    category, split, least = min(
        (
            (c, s, len(stream))
            for s, each in prepared.streams.items()
            for c, stream in zip(prepared.categories, each, strict=True)
        ),
        key=lambda each: each[2],
    )
    for length in _LENGTHS:
        if length <= most and least > _WINDOWS * length:
            return length
    raise ValueError(
        f"the {split} split of category {category!r} has {least} tokens, wanted more than {_WINDOWS * _LENGTHS[-1]}; "
        f"give the category more text or more documents, or leave it out"
    )


def _depths(number: int) -> list[tuple[float, ...]]:
    """Return separations, one a round, that may reach a leaf for each of so many categories, the best first."""
    rounds = 1 if number <= 3 else 2 if number <= 9 else 3
    most = {2: 7, 3: 9}.get(number, 10)
    found = itertools.combinations(range(3, most + 1), rounds)
    ordered = sorted(found, key=lambda each: (-each[-1], abs(each[0] - 7), each))
    return [tuple(twentieth / 20 for twentieth in each) for each in ordered]


def _rounds(number: int, steps: int, separations: tuple[float, ...]) -> list[dict[str, Any]]:
    """Return rounds that halve, and a last one that divides what is left; wide experts first leave room for it."""
    last = len(separations) - 1
    least = math.ceil(number / 2**last)
    return [
        {
            "train": round(steps * (0.15 if place == 0 else 0.05)),
            "recover": round(steps * (0.125 if place == last else 0.075)),
            "branching": least if place == last else 2,
            "separation": separation,
        }
        for place, separation in enumerate(separations)
    ]


def _written(settings: dict[str, Any]) -> str:
    """Return the recipe as text."""
    data = settings["data"]
    hidden, layers, ffn = settings["model"]
    discover = strict_yaml.write_flow(data["discover"]) if data["discover"] else "null"
    rounds = "\n".join(f"  - {strict_yaml.write_flow(each)}" for each in settings["rounds"])
    return f"""\
# Written by moeify init; every field: docs/recipes.md, or moeify schema --markdown.
{strict_yaml.write_flow({"name": settings["name"]})[1:-1]}
seed: 0
data:
  kind: text
  # Where documents and their categories come from; paths start at this file's folder.
{_source(data["source"])}
  # null: the labels are the categories; {{}}: clusters of documents are.
  discover: {discover}
  vocabulary: {data["vocabulary"]}  # tokens of the BPE, which is trained on the train split
  length: {data["length"]}  # tokens a row
  validation: {data["validation"]}  # shares of each category's bytes, by whole documents
  test: {data["test"]}
model:  # a Llama from scratch
  kind: llama
  hidden: {hidden}
  layers: {layers}
  heads: 4
  ffn: {ffn}  # FFN neurons a layer: the units that are split
training:
  steps: {settings["steps"]}  # more of them is the first thing to change once this has run
  rows: {settings["rows"]}  # a step, categories in equal shares
  learning_rate: 0.003
attribution:
  score: fisher  # what chooses sets of units
  rows: 64  # of each category
  rows_at_once: {settings["rows"]}
partition:
  units: [ffn]  # or [ffn, heads]
  budget: knapsack  # layers are cut where that costs least
  owners: {{kind: attribution}}
  multiple: {settings["multiple"]}  # experts' widths, units
  min_units: {settings["multiple"]}
  min_core: 0.1  # of each layer stays with all categories
  told: false  # true: the split model learns a bias for each category, as the told twin does
  compensation: {{ridge: 0.01}}  # least squares for what stays, at each cut
  null_test: null  # {{permutations: 8}}: divide only what splits better than with permuted labels
tree: null  # or your own groups, e.g. [[a, b], c]
rounds:  # deeper each round; separation: the share of units that is off
{rounds}
controls: [random, told]  # a split at random; a dense twin that is given the category, as routing tells a split model
budget: null  # {{tax: 0.02}}: nats per token above the dense twin; a round beyond it is rolled back
routing: {{gradients: none}}  # {{gradients: both, core: frozen}}: after a cut, rows teach their experts, not the core
distillation: null  # {{}}, where model is a pretrained one: arms also learn from it as it was loaded
evaluation:
  validation_rows: 64  # of each category, after each round
  test_rows: 256  # at the end
  rows_at_once: 32
checkpoints: {{every: 250, keep: 2}}
cluster:
  workers: {settings["workers"]}  # processes that share each step's rows
  threads: {settings["threads"]}  # cores of each
tracking: {{experiment: moeify, every: 10}}
"""


def _source(source: dict[str, Any]) -> str:
    lines = strict_yaml.write({"source": source}).rstrip("\n").split("\n")
    return "\n".join(f"  {line}" for line in lines)
