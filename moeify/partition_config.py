"""What a recipe may say about the partition: which categories part, and how units find their owners."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moeify.closed import Closed, Fraction, Name
from moeify.owners_config import AttributionOwners, Owners


class Compensation(Closed):
    """Closed-form least squares for the kept units' output weights at a cut."""

    ridge: PositiveFloat = 0.01
    """Pull towards the weights before the cut, as a fraction of the mean second moment of a unit's activation."""


class AffinityGrouping(Closed):
    """Categories whose attribution profiles are most alike stay together; costs next to nothing."""

    kind: Literal["affinity"]
    balanced: bool = True
    """Groups as equal in size as can be; ``false``: of any size."""


class ResidualGrouping(Closed):
    """Those categories stay together that lose the least J at an equal active budget (``moeify.grouping``)."""

    kind: Literal["residual"]
    balanced: bool = True
    """Groups as equal in size as can be; ``false``: of any size."""
    candidates: PositiveInt = 48
    """Pairs of groups, those with the most alike profiles, of which each merge tries every one."""


Grouping = Annotated[AffinityGrouping | ResidualGrouping, Field(discriminator="kind")]


class NullTest(Closed):
    """Whether there is anything to split: an expert is divided only where that costs less J than with labels that are
    permuted across rows (``moeify.null_test``). Costs one attribution pass a permutation."""

    permutations: Annotated[int, Field(ge=3)] = 8
    level: Fraction = 0.05
    """Largest p-value of an expert that is divided."""


class Partition(Closed):
    """How units find their owners."""

    grouping: Grouping = AffinityGrouping(kind="affinity")
    """Which categories part and which stay together."""
    owners: Owners = AttributionOwners(kind="attribution")
    """Which unit goes to which expert. Widths are ``budget``'s, whatever the owners."""
    budget: Literal["knapsack", "equal"] = "knapsack"
    """How a round's separation is shared out over sites: by least rise of J, or the same everywhere."""
    multiple: PositiveInt = 8
    """Every expert's width in a site is a multiple of this many units."""
    min_units: Annotated[int, Field(ge=0)] = 8
    """Fewest units an expert owns in a site."""
    min_core: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Least fraction of a site that stays with the root, the shared core."""
    unrouted: tuple[Name, ...] = ()
    """Categories that no expert is made for: from the first cut on they run on the core alone. In the tree they share a
    leaf without units below the core; their active fraction is the core's, and counts in separation like any other."""
    null_test: NullTest | None = None
    """``null`` divides whatever can be divided."""
    compensation: Compensation | None = Compensation()
    """``null`` cuts without correction."""
