"""What a run ends with: one file of numbers that a reader needs no other file to understand."""

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from moeify.events import NestedTree, RoundEnded, Stop
from moeify.recipe import closed
from moeify.recipe.arms import Arm

LEVEL = 0.05
"""Of the test against random removals: 19 draws are the fewest that can reach it."""
MOST_LEAK = 1 / 3
"""Of what a clean module's removal costs its own categories, what it may cost others."""
MEAN = closed.MEAN
"""The key that stands beside the categories for their unweighted mean."""


class ModuleTest(BaseModel):
    """What an expert's removal costs on test data beside the removal of as many units at random; nats per unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")

    expert: str
    """Removed with all below it."""
    own: float
    """Rise of the loss of the categories that it serves, their mean."""
    own_low: float
    """Ends of its 95 % interval, from rows drawn again (bootstrap)."""
    own_high: float
    other: float
    """The same of all other categories."""
    drawn_own: tuple[float, ...]
    """``own`` of as many units of each site, drawn from all that its categories run; one a draw."""
    drawn_other: tuple[float, ...]
    """``other`` of the same."""

    @property
    def leak(self) -> float:
        """What others lose for what its own lose; infinite where those lose nothing."""
        return _leak(self.own, self.other)

    @property
    def p(self) -> float:
        """Share of removals, the expert's among them, that leak as little as the expert's."""
        drawn = zip(self.drawn_own, self.drawn_other, strict=True)
        return (1 + sum(_leak(own, other) <= self.leak for own, other in drawn)) / (1 + len(self.drawn_own))

    @property
    def verdict(self) -> Literal["clean", "no rise", "hurts others", "no more than random", "too few draws"]:
        """Whether the expert is a clean module, or the first reason why not."""
        if self.own_low <= 0.0:
            return "no rise"
        if self.leak > MOST_LEAK:
            return "hurts others"
        if 1 / (1 + len(self.drawn_own)) > LEVEL:
            return "too few draws"
        return "clean" if self.p <= LEVEL else "no more than random"


def _leak(own: float, other: float) -> float:
    return other / own if own > 0.0 else math.inf


class Result(BaseModel):
    """Held-out figures of all arms, and the tree that the split arm ended with."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")

    categories: tuple[str, ...]
    """In the recipe's order."""
    unit: Literal["token", "example"]
    """What a loss in nats is counted by."""
    tree: NestedTree
    active_fraction: dict[str, float]
    """Category -> units on its route over all units, 0..1; and ``mean``."""
    active_flops: dict[str, float] | None = None
    """Category -> share of the whole network's floating-point operations a token (or example) that its route runs,
    0..1, what is never split among them; and ``mean``. None in results from before that was kept."""
    rounds: tuple[RoundEnded, ...]
    """Every round, those that were rolled back included."""
    stopped: Stop | None = None
    """Why it was not split any further; None in results from before that was kept."""
    test_loss: dict[Arm, dict[str, float]]
    """Arm -> category -> nats per unit on test data."""
    bits_per_byte: dict[Arm, dict[str, float]] | None
    """Arm -> category -> bits per byte of text on test data; None where bytes mean nothing."""
    accuracy: dict[Arm, dict[str, float]] | None = None
    """Arm -> category -> share of test rows that the model gets right, 0..1; and ``mean``. None where a row is not
    right or wrong."""
    own_other: dict[str, dict[str, float]]
    """Category -> expert -> rise of the category's test loss, in nats per unit, when that expert is ablated."""
    own_other_error: dict[str, dict[str, float]] = {}
    """Category -> expert -> standard error of that rise over the category's test rows, which are the same with and
    without the expert; left out where it is not known, as in results from before it was kept."""
    modules: tuple[ModuleTest, ...] = ()
    """Whether each expert is a clean module; empty where the recipe does not ask (``evaluation.null_draws``)."""
    tax: dict[str, float]
    """Category -> nats per unit of the split model above the dense twin on test data; and ``mean``."""
    tax_error: float | None = None
    """Standard error of the mean tax over the test rows, which both models read; None where it is not known."""
    tax_error_by_category: dict[str, float] = {}
    """The same of each category's tax; categories it is not known of are left out."""
    tax_random: dict[str, float] | None
    """The same of the random split; None without that control."""
    tax_told: dict[str, float] | None = None
    """Category -> nats per unit of the split model above the told twin on test data; and ``mean``; None without it."""
    error_over: dict[Arm, float] = {}
    """Control -> standard error of the split model's mean loss above that control's over the test rows, which both
    read; controls it is not known of are left out."""
    steps: PositiveInt
    """Optimizer steps of every arm."""
    seconds: float
    """Wall time of the run, all attempts together."""

    @model_validator(mode="after")
    def _names_every_category(self) -> Self:
        told = {name: getattr(self, name) for name in ("active_fraction", "tax", "tax_random", "tax_told")}
        for name, figures in (told | {f"test_loss.{arm}": each for arm, each in self.test_loss.items()}).items():
            if lost := [category for category in self.categories if figures is not None and category not in figures]:
                raise ValueError(f"{name} lacks {', '.join(lost)}")
        return self
