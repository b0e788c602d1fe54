"""What a recipe may say about rounds: how deep each cuts, and what that may cost."""

import math
import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from moeify.recipe.closed import Closed, Fraction


class Round(Closed):
    """One train -> attribute -> partition -> prune -> recover -> evaluate."""

    train: Annotated[int, Field(ge=0)]
    """Steps before the cut."""
    recover: Annotated[int, Field(ge=0)]
    """Steps after the cut, before it is judged."""
    branching: Annotated[int, Field(ge=2)] = 2
    """Children that every leaf with several categories is split into (fewer where it has fewer categories)."""
    separation: Fraction
    """1 - the mean active fraction of units (or of their operations, see ``partition.cost``) that this round cuts down
    to; deeper each round. With a budget, as far as the tax that is foreseen stays within it, and a round may ask for
    the same as the one before: to try again."""


def _read_tax(value: object) -> float | str:
    """Return nats as they are, and a share as ``1 %``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value.strip()) if isinstance(value, str) else None
    number = float(found[1]) if found else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0.0 < number < math.inf:
        raise ValueError(
            f": got {value!r:.60}, wanted nats above 0 such as 0.02, or a share of the dense twin's loss such as '1 %'"
        )
    return f"{number:g} %" if found else float(number)


Tax = Annotated[
    float | str,
    BeforeValidator(_read_tax),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)? ?%$"}]}
    ),
]
"""Nats, or a share of the dense twin's loss such as ``1 %``."""


class Budget(Closed):
    """When a round is kept, and how far it may go: beyond the budget a round is rolled back and its step halved."""

    tax: Tax
    """Largest tax on validation data at the end of a round: nats per token or example, or a share of the dense twin's
    loss such as ``1 %``."""
    per: Literal["mean", "category"] = "mean"
    """``mean``: the mean over categories counts; ``category``: every category's own tax must stay in the budget."""
    least_step: Fraction = 0.02
    """Smallest step in separation that is worth a round."""

    def limit(self, loss: float) -> float:
        """Return the largest tax in nats above a dense twin's loss."""
        return float(self.tax.removesuffix(" %")) / 100 * loss if isinstance(self.tax, str) else self.tax
