"""What the loop says while it runs. One event, one fact; the journal, the terminal and MLflow are its readers.

Every event has an ``id`` that is the same in a resumed run, so that a reader can tell what it has already seen.
"""

from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from moeify.recipe.arms import Arm


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str
    """Unique within the run and the same each time the run is repeated."""
    time: float
    """Seconds since the epoch."""


Stop = Literal["target reached", "rounds used up", "nothing to split", "no step left"]
"""Why a run was not split any further. ``target reached``: it was cut as deep as the recipe asks, but for less than
one multiple of experts' widths, and that was kept; ``rounds used up``: the last round was rolled back, or went less
deep, for the budget's sake or since widths left no more room; ``nothing to split``: at the last round every leaf served
one category, none passed the null test, or widths left no room for a cut; ``no step left``: no cut that is worth a
round was expected to stay in the budget."""


class _Expert(BaseModel):
    name: str
    categories: tuple[str, ...]
    units: Annotated[int, Field(ge=0)]
    children: tuple["_Expert", ...]


def _checked(tree: dict[str, Any]) -> dict[str, Any]:
    _Expert.model_validate(tree)
    return tree


NestedTree = Annotated[dict[str, Any], AfterValidator(_checked)]
"""Nested: name, categories, units (that an expert owns itself, over all sites), children."""


class Started(_Event):
    """The run's plan. Said once, by the first attempt."""

    kind: Literal["started"] = "started"
    categories: tuple[str, ...]
    unit: Literal["token", "example"]
    steps: int
    """Optimizer steps of every arm."""
    parameters: int
    """Of the dense network."""
    sites: dict[str, int]
    """Site -> units."""
    rounds: int
    arms: tuple[Arm, ...] = ("dense", "split", "random")
    """In the order they are trained; the default is for journals from before a recipe chose them."""
    unit_parameters: dict[str, int] = {}
    """Site -> parameters that belong to one unit; empty in journals from before it was said."""
    data_hash: str = ""
    """SHA-256 over rows of the data, see ``moeify.task.data_hash``; empty in journals from before it was said."""
    data_sizes: dict[str, dict[str, int]] = {}
    """Split -> category -> tokens or examples; empty where the task does not count them, or was not asked yet."""


class Phase(_Event):
    """A phase begins."""

    kind: Literal["phase"] = "phase"
    phase: Literal["prepare", "train", "attribute", "partition", "recover", "evaluate", "finish", "test"]
    round: int
    """From 1; 0 before the first round."""
    note: str = ""


class Step(_Event):
    """Training has come this far."""

    kind: Literal["step"] = "step"
    arm: Arm
    round: int
    step: int
    """Optimizer steps this arm has taken, of ``Started.steps``."""
    work: float
    """Fraction 0..1 of the run's training work (all arms) that is done."""
    loss: dict[str, float]
    """Category -> nats per unit on this step's rows."""
    learning_rate: float
    units_per_second: float
    """Tokens or examples."""


class Mishap(_Event):
    """An arm's numbers went wrong, and the run went on as the recipe's ``training.on_divergence`` says."""

    kind: Literal["mishap"] = "mishap"
    arm: Arm
    round: int
    step: int
    """Optimizer steps that the arm had taken."""
    what: str
    """One line: step, category, and what was found."""
    done: str
    """One line: how the run went on."""


class Evaluated(_Event):
    """Losses on held-out data."""

    kind: Literal["evaluated"] = "evaluated"
    arm: Arm
    round: int
    step: int
    moment: Literal["before_cut", "after_cut", "recovered", "test"]
    split: Literal["validation", "test"]
    loss: dict[str, float]
    """Category -> nats per unit."""


class RoundEnded(_Event):
    """A round was kept or rolled back."""

    kind: Literal["round"] = "round"
    round: int
    step: int
    separation: float
    """1 - mean active fraction of units, of what this round cut."""
    asked: float = 1.0
    """The separation that the round went for; or what it came to, where that is less by one multiple of experts' widths
    (with a budget: by ``budget.least_step``) or more by half of one. The default is for journals from before it was
    kept."""
    uncut: Literal["nothing to split", "no step left"] | None = None
    """Why the round cut nothing; None where it did."""
    tax: float
    """Mean over categories of the nats above the dense twin on validation data, after recovery."""
    tax_error: float | None = None
    """Standard error of ``tax`` over the validation rows, which both models read; None where it is not known."""
    tax_by_category: dict[str, float]
    tax_error_by_category: dict[str, float] = {}
    """The standard error of each category's tax; categories it is not known of are left out."""
    tax_before: float | None = None
    """Mean tax right before the cut; None where nothing was cut, or in journals from before it was kept."""
    tax_cut: float | None = None
    """The same right after the cut, before any recovery."""
    expected: float | None = None
    """The tax that was foreseen from the rise at the cut and from what earlier recoveries have left of it."""
    budget_used: float | None = None
    """The part of the budget that the tax takes, 1 = all; None without a budget."""
    budget_error: float | None = None
    """Standard error of ``budget_used`` over the validation rows; None where it is not known."""
    budget_used_before: float | None = None
    """The same right before the cut."""
    budget_used_cut: float | None = None
    """The same right after the cut, before any recovery."""
    tax_random: float | None
    """Mean tax of the random split of equal sizes; None without that control."""
    tax_told: float | None = None
    """Mean over categories of the split model's nats above the told twin; None without that control."""
    predicted: float
    """J of the cut: nats per unit that the kept units cannot make up for, before retraining."""
    predicted_random: float | None
    """J of a random cut of equal sizes on the same network; None without the random control."""
    gap: float | None = None
    """What the dual bound leaves open of the worst assignment of units to experts, as a share of its value: 0 up to
    rounding proves that all are best. None where owners are not assigned by value."""
    accepted: bool
    seconds: float
    tree: NestedTree

    @property
    def outcome(self) -> Literal["kept", "rolled back", "not cut"]:
        """What became of the round, in a word or two."""
        return "not cut" if self.uncut else "kept" if self.accepted else "rolled back"


class Artifact(_Event):
    """A file in the run's folder is ready."""

    kind: Literal["artifact"] = "artifact"
    path: str
    """Relative to the run's folder."""
    round: int | None = None
    """The round that it belongs to; None: the whole run."""


class Exported(_Event):
    """A model left the run, to be registered."""

    kind: Literal["exported"] = "exported"
    folder: str
    """Absolute."""
    alias: str
    """Of the registered version."""


class Finished(_Event):
    """The run's result; see ``moeify.result``."""

    kind: Literal["finished"] = "finished"
    seconds: float


class Failed(_Event):
    """An attempt ended early."""

    kind: Literal["failed"] = "failed"
    reason: str
    """One line."""


Event = Annotated[
    Started | Phase | Step | Mishap | Evaluated | RoundEnded | Artifact | Exported | Finished | Failed,
    Field(discriminator="kind"),
]


@runtime_checkable
class Tracker(Protocol):
    """Takes events. Never raises for reasons of its own: a run does not die because tracking is away."""

    def emit(self, event: Event) -> None:
        """Take one event; an ``id`` that was taken before is ignored."""
        ...


class MemoryTracker:
    """Keeps events in a list: for notebooks and tests."""

    def __init__(self) -> None:
        self.events: dict[str, Event] = {}

    def emit(self, event: Event) -> None:
        """Take one event; an ``id`` that was taken before is ignored."""
        self.events.setdefault(event.id, event)
