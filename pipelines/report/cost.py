"""What runs for a category: units, parameters and floating-point operations, beside the dense model."""

from dataclasses import dataclass

from moeify.events import Started
from moeify.result import MEAN
from pipelines.report.recorded import Recorded
from pipelines.round_files import Ownership

_PER_WEIGHT = 2
"""Operations a parameter of a unit in a forward pass: a product and a sum."""


@dataclass(frozen=True)
class Cost:
    """One category's forward pass."""

    category: str
    units: float
    """Fraction 0..1 of all units that run."""
    flops: float | None
    """Operations of the sites' units, per token or example; None where units' parameters were not recorded."""
    flops_share: float | None
    """The same, as a fraction of the dense model's."""
    network: float | None
    """Fraction 0..1 of the whole network's operations, what is never split and attention's products among them; None
    where it was not recorded, as before the run has ended."""
    parameters: float | None
    """All that are needed: of the units that run, and everything that is no unit."""
    parameters_share: float | None
    """The same, as a fraction of the dense model's."""


def costs(run: Recorded) -> list[Cost]:
    """Return the cost of every category and of their mean, the dense model's first; empty before the plan is known."""
    started = run.started
    if started is None or run.known["active_fraction"] is None:
        return []
    fractions: dict[str, float] = run.known["active_fraction"]
    weights = {site: units * started.unit_parameters.get(site, 0) for site, units in started.sites.items()}
    ownership = run.ownership()
    known = all(weights.values()) and (not run.kept or ownership is not None)
    whole: dict[str, float] = run.known["active_flops"] or {}
    dense = _cost("dense", 1.0, 1.0, sum(weights.values()), sum(weights.values()), started) if known else None
    rows = [dense or Cost("dense", 1.0, None, None, 1.0, float(started.parameters), 1.0)]
    if not run.kept:
        return rows
    active = _active_weights(ownership, started) if known and ownership else {}
    if active:
        active[MEAN] = sum(active.values()) / len(active)
    for category in (*started.categories, MEAN):
        if category in active:
            shares = fractions[category], whole.get(category)
            rows.append(_cost(category, *shares, active[category], sum(weights.values()), started))
        else:
            rows.append(Cost(category, fractions[category], None, None, whole.get(category), None, None))
    return rows


def _cost(category: str, units: float, network: float | None, weights: float, of: float, started: Started) -> Cost:
    parameters = started.parameters - of + weights
    share = parameters / started.parameters
    return Cost(category, units, _PER_WEIGHT * weights, weights / of, network, parameters, share)


def _active_weights(ownership: Ownership, started: Started) -> dict[str, float]:
    """Return category -> parameters of the units on its route."""
    active = dict.fromkeys(started.categories, 0.0)
    for site, counts in owned(ownership).items():
        for node, count in zip(ownership.nodes, counts, strict=True):
            for category in node.categories:
                active[category] += count * started.unit_parameters[site]
    return active


def operations_of(run: Recorded) -> dict[str, float]:
    """Return expert -> operations of its own units in a forward pass, per token or example; empty where not known."""
    started, ownership = run.started, run.ownership()
    if started is None or not all(started.unit_parameters.get(site) for site in started.sites):
        return {}
    if ownership is None:
        whole = _PER_WEIGHT * sum(units * started.unit_parameters[site] for site, units in started.sites.items())
        return {} if run.kept or run.tree is None else {run.tree["name"]: float(whole)}
    found = dict.fromkeys((node.name for node in ownership.nodes), 0.0)
    for site, counts in owned(ownership).items():
        for node, count in zip(ownership.nodes, counts, strict=True):
            found[node.name] += _PER_WEIGHT * count * started.unit_parameters[site]
    return found


def owned(ownership: Ownership) -> dict[str, list[int]]:
    """Return site -> units that each expert owns itself, experts in the tree's order."""
    found = {}
    for site, owners in ownership.owners.items():
        counts = [0] * len(ownership.nodes)
        for owner in owners:
            counts[owner] += 1
        found[site] = counts
    return found


def in_words(number: float) -> str:
    """Return a large number with a unit that people read: 1.2 M."""
    for name, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.3g}"
