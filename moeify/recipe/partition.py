"""What a recipe may say about the partition: which categories part, and how units find their owners."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moeify.recipe.closed import Closed, Fraction, Name

UnitKind = Literal["ffn", "heads"]
"""``ffn``: neurons of feed-forward blocks, hidden units, the inner channels of a ResNet's blocks; ``heads``: attention
heads, those that share keys and values together."""
PLAIN: tuple[UnitKind, ...] = ("ffn",)
"""The units that have owners where nothing else is said."""


class Compensation(Closed):
    """Closed-form least squares for the kept units' output weights at a cut."""

    ridge: PositiveFloat = 0.01
    """Pull towards the weights before the cut, as a fraction of the mean second moment of a unit's activation."""
    follow: bool = False
    """After that, layer after layer makes up for what those before it have lost as well: its output weights are fit to
    what the residual stream lacks behind it (``moeify.following``). Two forward passes a site, as far as the site,
    of the rows of attribution; not of channels."""


class AffinityGrouping(Closed):
    """Categories whose attribution profiles are most alike stay together; costs next to nothing."""

    kind: Literal["affinity"]
    balanced: bool = True
    """Groups as equal in size as can be; ``false``: of any size."""


class ResidualGrouping(Closed):
    """Those categories stay together that lose the least J at equal active budget (``moeify.splitting.grouping``)."""

    kind: Literal["residual"]
    balanced: bool = True
    """Groups as equal in size as can be; ``false``: of any size."""
    candidates: PositiveInt = 48
    """Pairs of groups, those with the most alike profiles, of which each merge tries every one."""


Pattern = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.*?-]{1,100}$")]
"""The name of a site, or one with ``*`` for anything and ``?`` for one character; in quotes where ``*`` comes first."""

Grouping = Annotated[AffinityGrouping | ResidualGrouping, Field(discriminator="kind")]


class AttributionOwners(Closed):
    """Units go where the most attribution stays active, by exact assignment on ``attribution.score``."""

    kind: Literal["attribution"]
    hand_over: bool = False
    """At the first cut, units of ``routing.experts`` go to the expert that is made for all of their categories,
    whatever is measured; attribution finds the owners of the others, and of those whose categories part. Experts are as
    wide as the one that gets most, so that the cut may be much deeper than its round asks."""


class RandomOwners(Closed):
    """Owners are drawn from the recipe's seed."""

    kind: Literal["random"]


class MagnitudeOwners(Closed):
    """The units with the largest input and output weights (sum of squares) stay shared, the others are dealt at random:
    blind to categories and data, as in Han et al., "Learning both Weights and Connections", 2015 (arXiv 1506.02626)."""

    kind: Literal["magnitude"]


class MoeficationOwners(Closed):
    """Balanced k-means on the units' input weights, a cluster an expert: Zhang et al., "MoEfication", 2022 (arXiv
    2110.01786). Here the core is a cluster too, and attribution says which categories' expert a cluster becomes."""

    kind: Literal["moefication"]


class CoactivationOwners(Closed):
    """Units that are active together stay together, a balanced cut of the co-activation graph: MoEfication's second way
    (arXiv 2110.01786). Here the graph is E[a a^T] and the cut spectral, in place of METIS; otherwise as
    ``moefication``. Costs time cubic, and memory square, in the units of a site."""

    kind: Literal["coactivation"]


class CmoeOwners(Closed):
    """The most active units stay shared, the others go by balanced assignment on activation: Pei et al., "CMoE", 2025
    (arXiv 2502.04416). Here activity is the root of E[a^2] in each category, and the categories are the centres."""

    kind: Literal["cmoe"]


class LlamaMoeOwners(Closed):
    """Each expert takes the units with the greatest E|g a| in its categories, those that most would take stay shared:
    Zhu et al., "LLaMA-MoE", 2024 (arXiv 2406.16554). Here its clusters of data are the categories."""

    kind: Literal["llama_moe"]


class LearnedOwners(Closed):
    """Descent on the assignment itself, relaxed to a transport plan, weights as they are: Bamba et al., "DOT-MoE", 2026
    (arXiv 2606.01666). Here it starts from attribution's owners, at their widths, and routes are the categories', not
    learned. Every step is a forward and a backward pass of the rows of a training step to come."""

    kind: Literal["learned"]
    steps: PositiveInt = 100
    """Steps of descent before each cut; no step of training."""
    learning_rate: PositiveFloat = 0.1
    """How far a step goes in the plan's logits, where a slope is as large as slopes are on average."""


Owners = Annotated[
    AttributionOwners
    | RandomOwners
    | MagnitudeOwners
    | MoeficationOwners
    | CoactivationOwners
    | CmoeOwners
    | LlamaMoeOwners
    | LearnedOwners,
    Field(discriminator="kind"),
]


class HeadLimits(Closed):
    """What an expert may own of an attention block; a unit is a group of heads that share keys and values."""

    multiple: PositiveInt = 1
    """Every expert's width is a multiple of this many units."""
    min_units: Annotated[int, Field(ge=0)] = 0
    """Fewest units an expert owns. Heads are few: four of them cannot give one to each of two levels of experts."""


class NullTest(Closed):
    """Whether there is anything to split: an expert is divided only where that costs less J than with labels that are
    permuted across rows (``moeify.splitting.null_test``). Costs one attribution pass a permutation."""

    permutations: Annotated[int, Field(ge=3)] = 8
    """Attribution passes with permuted labels."""
    level: Fraction = 0.05
    """Largest p-value of an expert that is divided."""


class Partition(Closed):
    """How units find their owners."""

    units: tuple[UnitKind, ...] = PLAIN
    """What is split: ``[ffn]``, or ``[ffn, heads]``. What is left out stays whole, and counts in no separation."""
    grouping: Grouping = AffinityGrouping(kind="affinity")
    """Which categories part and which stay together."""
    owners: Owners = AttributionOwners(kind="attribution")
    """How units find their owners at given widths. What parts, and the null test, are attribution's whatever it is."""
    budget: Literal["knapsack", "equal"] = "knapsack"
    """How a round's separation is shared out over sites: by least rise of J, or the same everywhere."""
    cost: Literal["units", "flops"] = "units"
    """What a round's separation counts, and the knapsack spends: active units, or their floating-point operations a
    token at the recipe's row length. What is reported as separation is of units either way."""
    told: bool = False
    """From the first cut on (from the first step, where ``routing.experts`` are given), the split model is given the
    category as the told twin is: every unit learns a bias for each category (``moeify.routed.told``)."""
    refine: bool = False
    """At the widths that the budget made, units change places between experts for as long as that lowers J
    (``moeify.splitting.refine``)."""
    multiple: PositiveInt = 8
    """Every expert's width in a feed-forward site is a multiple of this many units."""
    min_units: Annotated[int, Field(ge=0)] = 8
    """Fewest units an expert owns in a feed-forward site."""
    heads: HeadLimits = HeadLimits()
    """The same for attention heads."""
    min_core: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Least fraction of a site that stays with the root, the shared core."""
    floors: dict[Pattern, Fraction] = Field(default={})
    """Names of sites, or patterns such as ``layers.0.*``, to the least fraction of them that stays with the root. Of
    several that match, ``min_core`` among them, the largest holds."""
    frozen: tuple[Pattern, ...] = ()
    """Names of sites, or patterns such as ``*.heads``, that are never split: the root owns all of them. They count in
    separation like any other."""
    unrouted: tuple[Name, ...] = ()
    """Categories that no expert is made for: from the first cut on they run on the core alone. In the tree they share a
    leaf without units below the core; their active fraction is the core's, and counts in separation like any other."""
    null_test: NullTest | None = None
    """``null`` divides whatever can be divided."""
    compensation: Compensation | None = Compensation()
    """``null`` cuts without correction."""
