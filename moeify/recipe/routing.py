"""What a recipe may say about gradient routing: which units learn from which rows while the split model trains."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field

from moeify.recipe.closed import Closed, Name
from moeify.recipe.partition import Pattern

Gradients = Literal["none", "parameters", "activations", "both"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class GivenExpert(Closed):
    """Units that are set aside for some categories before there is a cut; what no expert has is the core."""

    categories: Annotated[tuple[Name, ...], Field(min_length=1)]
    """They are routed to these units and the core; a category has one such expert at most."""
    units: Share = 0.0
    """Fraction of each site; the experts follow one another in the order given, at the end of the site. 0, and nothing
    ``fresh``: the core alone."""
    fresh: Annotated[int, Field(ge=0)] = 0
    """Units added to each site for it, which the dense twin does not have; they write nothing at first. Fractions, such
    as separation, count them. Removed with the expert (``moeify export --without``), this is Expand-Route-Ablate."""
    expand: dict[Pattern, Annotated[int, Field(ge=0)]] = Field(default={})
    """Names of sites, or patterns such as ``layers.0.*``, to the units that are added there instead; the first that
    matches holds."""
    sites: dict[Pattern, Share] = Field(default={})
    """Names of sites, or patterns such as ``layers.0.*``, to the fraction there instead; the first that matches holds.
    """

    def share(self, site: str) -> float:
        """Return the fraction of a site's own units."""
        return next((share for pattern, share in self.sites.items() if fnmatchcase(site, pattern)), self.units)

    def added(self, site: str) -> int:
        """Return the units that are added to a site."""
        return next((units for pattern, units in self.expand.items() if fnmatchcase(site, pattern)), self.fresh)


class Routing(Closed):
    """Gradient routing: rows of a category teach the units on its route only (Cloud et al. 2024, arXiv 2410.04332).

    It acts in training alone, on the arms that are cut. What lies between the units' sites (embeddings, attention,
    norms) learns from every row, but for those of categories that are ``apart``.
    """

    gradients: Gradients = "none"
    """What does not reach a unit off the row's route. ``parameters``: the gradients of its own weights and biases; what
    flows through it to units below stays. ``activations``: the gradient of its activation, so that nothing reaches its
    input weights, nor units below through it; its output weights learn. ``both``: all of these. ``none``: no gradient
    routing, and nothing else may be said here. Once a model is cut, its hard routes keep all of these from such units
    anyway: it takes ``experts``, soft ``routes_after_cut``, a frozen ``core``, ``apart`` or ``labelled`` to act."""
    routes: Literal["soft", "hard"] = "soft"
    """Until the first cut. ``soft``: units off the row's route run in training. ``hard``: they do not, so that no
    gradient of any kind reaches them. What is measured before the first cut runs every unit."""
    routes_after_cut: Literal["soft", "hard"] = "hard"
    """The same from the first cut on, when what is evaluated runs the units on the route alone. ``soft`` trains what
    is not run so, for labels that are partial or may be wrong."""
    hard: tuple[Name, ...] = ()
    """Categories whose routes are hard all the same. E.g. SGTM (arXiv 2512.05648): soft routes of what is to be
    forgotten, hard ones of what is to be kept."""
    experts: tuple[GivenExpert, ...] = ()
    """Routes until the first cut, given by hand; categories that none of them names teach everything. The split model
    then trains by itself from the first step on. From the first cut on, routes are those of the expert tree. Empty: no
    gradient is routed before the first cut."""
    labelled: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Fraction of each category's examples whose label is known in training, always the same ones; the others run, and
    teach, every unit."""
    strength: dict[Name, Share] = Field(default={})
    """Category to the share of its gradients that is kept from units off its route, where routes are soft, and from a
    frozen core; 1 where it is not named."""
    core: Literal["learns", "frozen"] = "learns"
    """Whether the core's units learn from labelled rows of categories that have an expert; ``frozen``: the same is kept
    from them as from units off the route."""
    apart: tuple[Name, ...] = ()
    """Categories whose labelled rows teach their own experts' units and nothing else in the network: neither the core's
    units nor embeddings, attention, norms. What they alone could teach then leaves with their expert (``moeify export
    --without``). A category that has no expert yet teaches everything: before the first cut, name it in ``experts``."""

    def is_hard(self, category: str, *, cut: bool) -> bool:
        """Say whether units off the category's route do not run, before the first cut or after it."""
        return (self.routes_after_cut if cut else self.routes) == "hard" or category in self.hard

    @property
    def early(self) -> bool:
        """Whether gradients are routed before the first cut."""
        return self.gradients != "none" and bool(self.experts)

    @property
    def _acts(self) -> bool:
        """Whether there is anything that routed gradients change."""
        soft = self.routes_after_cut == "soft"
        return bool(self.experts or soft or self.core == "frozen" or self.apart or self.labelled < 1.0)

    def added(self, site: str) -> int:
        """Return the units that are added to a site for all experts together."""
        return sum(expert.added(site) for expert in self.experts) if self.early else 0

    def misfits(self) -> Iterator[str]:
        """Yield a line for each thing that does not fit the others, or would do nothing."""
        if self.gradients == "none":
            if idle := [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]:
                yield (
                    f"routing: got {', '.join(idle)} beside gradients 'none', with which no gradient is routed, wanted "
                    f"gradients 'parameters', 'activations' or 'both', or none of them"
                )
            return
        if not self._acts:
            yield (
                f"routing.gradients: got {self.gradients!r}, which acts on nothing: after a cut units off a row's "
                f"route do not run, wanted experts, routes_after_cut 'soft', core 'frozen', apart or labelled below 1, "
                f"or gradients 'none'"
            )
            return
        named = [category for expert in self.experts for category in expert.categories]
        for category in dict.fromkeys(c for c in named if named.count(c) > 1):
            yield f"routing.experts: got {category!r} more than once, wanted every category once at most"
        if (total := sum(expert.units for expert in self.experts)) > 1 + 1e-9:
            yield f"routing.experts: got units {total:g} in all, wanted at most 1, of which the core is what is left"
        moments = (False, True) if self.experts else (True,)
        for category in self.strength if self.core == "learns" else ():
            if all(self.is_hard(category, cut=cut) for cut in moments):
                yield (
                    f"routing.strength: got {category!r}, whose routes are hard: nothing reaches units off them, "
                    f"wanted categories with soft routes"
                )
        if self.apart and self.gradients == "activations":
            yield (
                f"routing.apart: got {list(self.apart)} beside gradients {self.gradients!r}, with which other units "
                f"learn from their rows, wanted gradients 'parameters' or 'both'"
            )
        for category in self.apart:
            if (share := self.strength.get(category, 1.0)) < 1:
                yield f"routing.apart: got {category!r}, whose strength is {share:g}, wanted strength 1"

    @property
    def categories(self) -> dict[str, tuple[str, ...]]:
        """Key -> the categories that are named there."""
        return {
            "routing.experts": tuple(c for expert in self.experts for c in expert.categories),
            "routing.hard": self.hard,
            "routing.strength": tuple(self.strength),
            "routing.apart": self.apart,
        }
