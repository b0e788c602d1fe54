"""What a recipe may say: frozen, closed models, the only home of defaults.

A variant is a class here with its own ``kind``, a function where it is used and a ``case`` that calls it.
This module imports nothing heavier than pydantic, so that schema and validation need no torch.
"""

import itertools
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)

from moeify.recipe.arms import Arm, Control, cut, twins
from moeify.recipe.closed import Closed, Fraction, Name
from moeify.recipe.data import (
    Data,
    DigitsData,
    Discover,
    GivenData,
    ImageData,
    InstalledText,
    MixedText,
    StreamedText,
    TextData,
    TextFolders,
    cluster_names,
)
from moeify.recipe.given_tree import Nested, names, read_tree
from moeify.recipe.model import Model, called, traits_of
from moeify.recipe.parallel import Parallel, Replicate
from moeify.recipe.partition import PLAIN, AttributionOwners, Partition
from moeify.recipe.rounds import Budget, Round
from moeify.recipe.routing import Routing
from moeify.recipe.training import Distillation, Training

Tree = Annotated[
    Nested,
    BeforeValidator(read_tree),
    WithJsonSchema(
        {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 2}]}}
    ),
]
"""Names of categories in nested lists; see ``moeify.recipe.given_tree``."""

# --- the loop -----------------------------------------------------------------------------------------


class Attribution(Closed):
    """One pass over rows of the train split that measures every unit against every category."""

    score: Literal["fisher", "empirical", "absolute"] = "fisher"
    """What chooses sets of units: ``fisher`` = 1/2 E[(g a)^2] with labels of the model's own, ``empirical`` = the
    same with true labels, ``absolute`` = E|g a|. All unsigned; nats."""
    rows: PositiveInt = 64
    """Rows of each category."""
    rows_at_once: PositiveInt = 16
    """Rows of one forward pass over all workers."""
    settled: Fraction | None = None
    """Stop before all rows are measured when two looks in a row find that this share of units still matters most to the
    same category as at the look before; a look is every 4 batches. ``null``: measure all rows."""
    columns: PositiveInt | None = 2048
    """Second moments of sites with more units are random sketches of so many columns; ``null``: always exact."""


class Evaluation(Closed):
    """How much held-out data is read."""

    validation_rows: PositiveInt = 32
    """Rows of each category, at the end of each round."""
    test_rows: PositiveInt = 128
    """Rows of each category, at the end of the run (fewer where the split holds fewer)."""
    example_rows: NonNegativeInt = 16
    """Validation rows of each category that the report's examples of what each expert does are picked from; each is run
    once for every expert on its route. 0: no examples."""
    rows_at_once: PositiveInt = 32
    """Rows of one forward pass over all workers."""
    null_draws: Annotated[int, Field(ge=0)] = 0
    """Random removals that each expert's is held against at the end of the run, to say whether it is a clean module: 19
    are the fewest that can. Each costs a pass of the test split for every expert; 0: no verdict."""


class Checkpoints(Closed):
    """Written at every phase boundary and every so many steps."""

    every: PositiveInt = 250
    """Steps of one arm."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""


class Cluster(Closed):
    """What the run asks of Ray."""

    workers: PositiveInt = 1
    """Training processes; they share each step's rows."""
    threads: PositiveInt = 1
    """CPU cores, and torch threads, of each worker."""
    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs of each worker. 1: networks, training, attribution and losses are on one that is its own, partitioning on
    its cores. 0: all is on its cores."""
    parallel: Parallel = Replicate()
    """How they share each arm's training. Held-out losses and attribution are always shared by rows."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often the workers are started again, from the last checkpoint, after one of them died."""


class Tracking(Closed):
    """What goes to MLflow."""

    experiment: str = "moeify"
    """MLflow's experiment that the run goes to."""
    every: PositiveInt = 10
    """Steps between two points of a curve."""
    models: NonNegativeInt = 256
    """Megabytes: at the end the dense twin and the split model, if no larger than this, are logged and registered under
    the recipe's name, with aliases ``dense`` and ``split``. 0: neither."""


class RunConfig(Closed):
    """One complete description of a run."""

    name: Name
    """Starts the ids of its runs."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of initial weights, the order of rows, the signs that attribution draws, and owners that are drawn."""
    data: Data
    """What is learned from, in categories."""
    model: Model
    """The network, before any split."""
    training: Training
    attribution: Attribution = Attribution()
    partition: Partition = Partition()
    routing: Routing = Routing()
    tree: Tree | None = None
    """The expert tree, or as much of it as is wanted, e.g. ``[[python, c], [prose, web]]``: each round makes the groups
    of one more level, whatever its branching. Flat groups, and categories that are not named, are left to attribution.
    ``null``: all is."""
    rounds: Annotated[tuple[Round, ...], Field(min_length=1)]
    controls: tuple[Control, ...] = ("random",)
    """What is trained beside the dense twin and the split model, on the same rows. ``random``: a split into the same
    tree and widths with owners drawn; ``told``: a dense twin that is given the category, as a split model is by its
    routes. ``told`` costs a whole arm, ``random`` one from the first cut on."""
    budget: Budget | None = None
    """``null`` keeps every round whatever its tax."""
    distillation: Distillation | None = None
    """For a pretrained model: what all arms learn besides, twins too, since it lowers their losses as well, so that a
    tax against other twins would be flattered. ``null``: arms learn from the rows alone."""
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if misfits := [
            *self._controls_misfits(),
            *self._data_misfits(),
            *self._model_misfits(),
            *self._rounds_misfits(),
            *self._rows_misfits(),
            *self._training_misfits(),
            *self._unrouted_misfits(),
            *self._units_misfits(),
            *self._null_test_misfits(),
            *self._routing_misfits(),
        ]:
            raise ValueError("\n".join(misfits))
        return self

    def _controls_misfits(self) -> Iterator[str]:
        if len(set(self.controls)) < len(self.controls):
            yield f"controls: got {list(self.controls)}, wanted each control once"

    def _data_misfits(self) -> Iterator[str]:
        if isinstance(self.data, GivenData):
            return
        held_out = self.data.validation + (0.0 if self.data.kind == "images" else self.data.test)
        if held_out >= 1.0:
            yield f"data: got validation + test {held_out:g}, wanted less than 1, so that something is left to train on"
        if self.data.kind == "text" and self.data.source.kind == "installed":
            sources = self.data.source.sources
            if len(set(sources)) < len(sources):
                yield f"data.source.sources: got {list(sources)}, wanted each source once"

    def _model_misfits(self) -> Iterator[str]:
        wanted: tuple[str, ...]
        match self.data:
            case ImageData(objective="classify"):
                wanted, needs = ("resnet", "pretrained"), "data.objective 'classify'"
            case ImageData():
                wanted, needs = ("autoencoder",), "data.objective 'reconstruct'"
            case DigitsData():
                wanted, needs = ("autoencoder",), "data.kind 'digits'"
            case TextData():
                wanted, needs = ("llama", "pretrained"), "data.kind 'text'"
            case GivenData():
                wanted, needs = ("given",), "data.kind 'given'"
        if self.model.kind not in wanted:
            known = " or ".join(map(repr, wanted))
            yield f"model.kind: got {self.model.kind!r}, wanted {known}, which {needs} needs"
        if self.distillation and self.model.kind not in ("pretrained", "given"):
            yield f"distillation: got a mapping, wanted null beside model.kind {self.model.kind!r}, which is untrained"

    def _rounds_misfits(self) -> Iterator[str]:
        spent = sum(r.train + r.recover for r in self.rounds)
        if spent > self.training.steps:
            yield (
                f"rounds: got {spent} steps (train + recover of each), wanted at most training.steps, "
                f"{self.training.steps}; raise training.steps or shorten the rounds"
            )
        separations = [r.separation for r in self.rounds]
        if any(b < a or (b == a and not self.budget) for a, b in itertools.pairwise(separations)):
            same = ", or with a budget stay the same" if self.budget else ""
            yield f"rounds: got separation {separations}, wanted it to rise from round to round{same}"

    def _unrouted_misfits(self) -> Iterator[str]:
        unrouted = self.partition.unrouted
        if len(set(unrouted)) < len(unrouted):
            yield f"partition.unrouted: got {list(unrouted)}, wanted each category once"
        for name in names(self.tree or ()):
            if name in unrouted:
                yield f"partition.unrouted: got {name!r}, which tree gives an expert; name it in one of the two"
        if unrouted and self.partition.min_core == 0.0:
            yield "partition.min_core: got 0, wanted more, since partition.unrouted categories have the core alone"

    def _units_misfits(self) -> Iterator[str]:
        units = self.partition.units
        if "ffn" not in units or len(set(units)) < len(units):
            yield (
                f"partition.units: got {list(units)}, wanted [ffn] or [ffn, heads]; "
                f"to split heads alone, freeze the rest: partition.frozen: ['*.ffn']"
            )
        if "heads" in units and "heads" not in traits_of(self.model).units:
            yield f"partition.units: got 'heads', which {called(self.model)} has none of, wanted [ffn]"

    def _null_test_misfits(self) -> Iterator[str]:
        if self.partition.null_test and self.attribution.settled:
            yield (
                f"attribution.settled: got {self.attribution.settled:g}, wanted null beside partition.null_test, "
                f"whose passes must all measure the same rows"
            )

    def _routing_misfits(self) -> Iterator[str]:
        yield from self.routing.misfits()
        if self.routing.gradients != "none" and self.partition.units != PLAIN:
            yield (
                f"routing.gradients: got {self.routing.gradients!r} beside partition.units "
                f"{list(self.partition.units)}, wanted units [ffn]; gradients of heads are not routed"
            )
        if self.routing.gradients != "none" and traits_of(self.model).channels:
            yield (
                f"routing.gradients: got {self.routing.gradients!r} beside {called(self.model)}, wanted 'none'; "
                f"gradients of channels are not routed"
            )
        if self.routing.apart and self.partition.compensation:
            yield (
                f"partition.compensation: got a mapping beside routing.apart, wanted null: what is shared would be "
                f"fitted to the rows of {', '.join(self.routing.apart)} too"
            )
        owners = self.partition.owners
        if isinstance(owners, AttributionOwners) and owners.hand_over and not self.routing.early:
            yield "partition.owners.hand_over: got true, wanted false where routing.experts are not given"

    def _training_misfits(self) -> Iterator[str]:
        share, parts = self.training.rows // self.cluster.workers, self.training.accumulate
        if share % parts:
            yield (
                f"training.accumulate: got {parts}, wanted a divisor of {share}, the rows of a step that each "
                f"worker has (training.rows / cluster.workers)"
            )
        traits = traits_of(self.model)
        if parts > 1 and traits.batch_norm:
            yield (
                f"training.accumulate: got {parts}, wanted 1 beside {called(self.model)}, whose batch norm would see "
                f"each part of a step by itself"
            )
        if self.training.checkpoint_activations and not traits.layers:
            yield (
                f"training.checkpoint_activations: got true, wanted false beside {called(self.model)}, which "
                f"has no decoder layers"
            )

    def _rows_misfits(self) -> Iterator[str]:
        for path, rows in (
            ("training.rows", self.training.rows),
            ("attribution.rows_at_once", self.attribution.rows_at_once),
            ("evaluation.rows_at_once", self.evaluation.rows_at_once),
        ):
            if rows % self.cluster.workers:
                yield (
                    f"{path}: got {rows}, which {self.cluster.workers} workers cannot share equally, "
                    f"wanted a multiple of cluster.workers"
                )

    @property
    def told_arms(self) -> tuple[Arm, ...]:
        """The arms that are given the category."""
        return ("told", *(self.cut_arms if self.partition.told else ()))

    @property
    def category_names(self) -> tuple[str, ...] | None:
        """The categories of the data; None where only the data itself says."""
        match self.data:
            case DigitsData():
                return tuple(map(str, range(10)))
            case ImageData(categories=categories):
                return tuple(categories)
            case TextData(discover=Discover(number=number)):
                return None if number is None else cluster_names(number)
            case TextData(source=InstalledText(sources=sources)):
                return sources
            case TextData(source=TextFolders() | MixedText() | StreamedText() as source):
                return tuple(source.categories)
            case _:
                return None

    @property
    def early_arms(self) -> tuple[Arm, ...]:
        """The arms that train by themselves from the first step on."""
        return (*self.twins, "split") if self.routing.early else self.twins

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Every model that is trained, in this order."""
        return self.twins + self.cut_arms

    @property
    def twins(self) -> tuple[Arm, ...]:
        """The arms that train from the first step on and are never cut; the dense twin first."""
        return twins(self.controls)

    @property
    def cut_arms(self) -> tuple[Arm, ...]:
        """The arms that are cut, forks of the dense twin up to the first cut; the split model first.

        Where gradients are routed before that (``routing.experts``), the split model is its own, and the others fork
        from it.
        """
        return cut(self.controls)
