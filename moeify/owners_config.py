"""How units find their owners, as a recipe says it: a class for each method."""

from typing import Annotated, Literal

from pydantic import Field

from moeify.closed import Closed


class AttributionOwners(Closed):
    """Where the most attribution mass stays active, by an exact assignment; the score is ``attribution.score``."""

    kind: Literal["attribution"]


class RandomOwners(Closed):
    """Drawn."""

    kind: Literal["random"]


class MagnitudeOwners(Closed):
    """Blind to categories: units with the largest output weights stay shared, the others are dealt out at random."""

    kind: Literal["magnitude"]


class MoeficationOwners(Closed):
    """Balanced clusters of units by k-means on their input weights (MoEfication, Zhang et al. 2022, arXiv 2110.01786).

    Clusters become experts and core as they hold the most attribution mass; the paper trains a router instead.
    """

    kind: Literal["moefication"]


class CMoeOwners(Closed):
    """The most active units over all categories stay shared, the others go where their activation is, balanced (CMoE,
    Pei et al. 2025, arXiv 2502.04416). Activity is the mean square activation; the paper counts how often a unit is
    among the largest of a token."""

    kind: Literal["cmoe"]


class LlamaMoeOwners(Closed):
    """By sum of abs(g a): units important to every child stay shared, each child takes the most important of the rest
    (LLaMA-MoE, Zhu et al. 2024, arXiv 2406.16554, whose experts may share units; here one owner each)."""

    kind: Literal["llama_moe"]


Owners = Annotated[
    AttributionOwners | RandomOwners | MagnitudeOwners | MoeficationOwners | CMoeOwners | LlamaMoeOwners,
    Field(discriminator="kind"),
]
