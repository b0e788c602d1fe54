"""What a round leaves in the run's folder: who owns which unit, and which unit matters to which category."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict

from pipelines.runs import RunFolder

# Axes of arrays: U units, C categories.


class OwningNode(BaseModel):
    """An expert of ``partition.json``."""

    model_config = ConfigDict(extra="ignore")

    name: str
    parent: int | None
    categories: tuple[str, ...]


class Ownership(BaseModel):
    """``partition.json``: who owns which unit."""

    model_config = ConfigDict(extra="ignore")

    nodes: tuple[OwningNode, ...]
    """Depth first; node 0 is the root."""
    owners: dict[str, list[int]]
    """Site, in the network's order -> node of each unit, in tree order."""


@dataclass(frozen=True)
class RoundMap:
    """A round's attribution, measured before its cut, and the owners after it."""

    ownership: Ownership
    tables_UC: dict[str, Float[np.ndarray, "units categories"]]
    """Site, in the network's order -> nats; units in tree order, categories as the leaves stand."""
    score: str
    """What was measured: ``fisher``, ``empirical``, ``absolute``."""

    @property
    def leaves(self) -> tuple[str, ...]:
        """The categories in leaf order, that of the tables' columns."""
        return self.ownership.nodes[0].categories


def attribution_file(folder: RunFolder, round_: int) -> Path:
    """Return where a round's attribution is."""
    return folder.rounds / str(round_) / "attribution.safetensors"


def read_ownership(folder: RunFolder, round_: int) -> Ownership:
    """Read a round's ``partition.json``; raises FileNotFoundError, or ValueError where it is damaged."""
    return Ownership.model_validate_json((folder.rounds / str(round_) / "partition.json").read_bytes())


def read_map(folder: RunFolder, round_: int) -> RoundMap:
    """Read both files of a round; raises ValueError where they are damaged or do not fit each other."""
    tables_UC, categories, score = read_attribution(folder, round_)
    ownership = read_ownership(folder, round_)
    leaves = ownership.nodes[0].categories
    if sorted(leaves) != sorted(categories) or set(ownership.owners) != set(tables_UC):
        raise ValueError(
            f"round {round_}: partition.json and attribution.safetensors speak of different categories or sites "
            f"({list(leaves)} and {categories}; {sorted(ownership.owners)} and {sorted(tables_UC)})"
        )
    for site, owners in ownership.owners.items():
        if len(owners) != len(tables_UC[site]):
            raise ValueError(
                f"round {round_}: site {site!r} has {len(tables_UC[site])} units of attribution and owners for "
                f"{len(owners)}"
            )
    columns = [categories.index(category) for category in leaves]
    return RoundMap(ownership, {site: tables_UC[site][:, columns] for site in ownership.owners}, score)


def read_attribution(
    folder: RunFolder, round_: int
) -> tuple[dict[str, Float[np.ndarray, "units categories"]], list[str], str]:
    """Return site -> attribution in nats, the categories of its columns, and the score that it is."""
    from safetensors import SafetensorError, safe_open

    path = attribution_file(folder, round_)
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            tables = {site: file.get_tensor(site) for site in file.keys()}  # noqa: SIM118 - the file is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not tables or "categories" not in facts:
        raise ValueError(f"{path} holds {len(tables)} sites and facts {sorted(facts)}; wanted sites and 'categories'")
    return tables, json.loads(facts["categories"]), facts.get("score", "score")
