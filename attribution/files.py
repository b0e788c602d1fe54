"""Tables on disk: one safetensors file with JSON in its header, whole or not there; and Parquet for analysis elsewhere.

The header's hash covers everything that was written, so a file that was changed or cut off is never read as a table.
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from attribution.moments import ExactMoment, SketchedMoment
from attribution.table import AttributionTable, Score, SiteSums
from attribution.tensor_files import save_file

FORMAT = 2
"""Version of the file's layout. In version 1 the report was not kept: it was always signed Taylor + 1/2 Fisher."""


class CorruptTableError(ValueError):
    """A file is not a table as it was written."""


def save(table: AttributionTable, path: str | Path) -> None:
    """Write a table with all its sums, moments included, to one file, which appears whole or not at all.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "table.safetensors"
    >>> save(table, path)
    >>> load(path).score("first", "taylor").equal(table.score("first", "taylor"))
    True
    """
    path = Path(path)
    facts: dict[str, Any] = {"format": FORMAT, "categories": table.categories, "sites": []}
    tensors = {"counts": table.counts, "rows": table.rows, "sampled": table.sampled}
    for number, (site, sums) in enumerate(table.sites.items()):
        kinds = {which: type(m).__name__ for which in ("inputs", "outputs") if (m := getattr(sums, which))}
        facts["sites"].append({"name": site, "moments": kinds})
        names = [*_plain(), *(f"{which}.{i}" for which in kinds for i in range(len(getattr(sums, which).tensors())))]
        tensors |= {f"{number}/{name}": tensor for name, tensor in zip(names, sums.tensors(), strict=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = json.dumps(facts)
    draft = path.with_name(f".{path.name}.draft")
    save_file(tensors, draft, {"table": content, "sha256": _digest(content, tensors)})
    draft.replace(path)


def load(path: str | Path) -> AttributionTable:
    """Return the table that ``save`` wrote, bit for bit. Raises CorruptTableError, or OSError where no file is.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "table.safetensors"
    >>> path.write_bytes(b"something else") and load(path)
    Traceback (most recent call last):
    attribution.files.CorruptTableError: ... cannot be read as a table ...
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    except SafetensorError as error:
        raise CorruptTableError(f"{path} cannot be read as a table ({error}); measure again") from error
    content = header.get("table", "")
    if not content or _digest(content, tensors) != header.get("sha256"):
        raise CorruptTableError(f"{path} is not a table as it was written (its hash differs); measure again")
    facts = json.loads(content)
    if facts["format"] not in (1, FORMAT):
        raise ValueError(f"{path} has format {facts['format']}; this version reads formats 1 and {FORMAT}")
    sites = {}
    for number, site in enumerate(facts["sites"]):
        inputs, outputs = (
            _MOMENTS[kind](*_moment(tensors, f"{number}/{which}.")) if (kind := site["moments"].get(which)) else None
            for which in ("inputs", "outputs")
        )
        if facts["format"] == 1:
            tensors[f"{number}/report"] = tensors[f"{number}/taylor"] + tensors[f"{number}/fisher"]
        plain = {name: tensors[f"{number}/{name}"] for name in _plain()}
        sites[site["name"]] = SiteSums(**plain, inputs=inputs, outputs=outputs)
    return AttributionTable(tuple(facts["categories"]), tensors["counts"], tensors["rows"], tensors["sampled"], sites)


def to_parquet(table: AttributionTable, path: str | Path) -> None:
    """Write one row for every site, unit and category: each score, and its standard error, in nats per token.

    Columns ``site``, ``unit``, ``category``, then of each score its name and (not for ``rate``) ``<name>_se``, then
    ``dead`` and ``without_gradient``. Scores that need labels of the model's own are left out without them.

    >>> import tempfile
    >>> from pyarrow import parquet
    >>> path = Path(tempfile.mkdtemp()) / "table.parquet"
    >>> to_parquet(table, path)
    >>> parquet.read_table(path).select(["site", "unit", "category", "taylor"]).to_pylist()[0]
    {'site': 'first', 'unit': 0, 'category': 'left', 'taylor': 2.0}
    """
    import pyarrow
    from pyarrow import parquet

    path = Path(path)
    kinds = [kind for kind in get_args(Score) if kind not in ("fisher", "report") or bool(table.sampled.any())]
    columns: dict[str, list[Any]] = {"site": [], "unit": [], "category": []}
    for site, sums in table.sites.items():
        columns["site"] += [site] * (sums.units * len(table.categories))
        columns["unit"] += [unit for unit in range(sums.units) for _ in table.categories]
        columns["category"] += list(table.categories) * sums.units
        for kind in kinds:
            columns.setdefault(kind, []).extend(table.score(site, kind).flatten().tolist())
            if kind != "rate":
                error_UC = table.standard_error(site, kind)
                columns.setdefault(f"{kind}_se", []).extend(error_UC.flatten().tolist())
        for name, flags_U in (("dead", table.dead(site)), ("without_gradient", table.without_gradient(site))):
            repeated = flags_U.repeat_interleave(len(table.categories))
            columns.setdefault(name, []).extend(repeated.tolist())
    draft = path.with_name(f".{path.name}.draft")
    parquet.write_table(pyarrow.table(columns), draft)
    draft.replace(path)


_MOMENTS: dict[str, type[ExactMoment] | type[SketchedMoment]] = {
    kind.__name__: kind for kind in (ExactMoment, SketchedMoment)
}


def _plain() -> list[str]:
    return [field.name for field in fields(SiteSums) if field.name not in ("inputs", "outputs")]


def _moment(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    count = sum(name.startswith(prefix) for name in tensors)
    return [tensors[f"{prefix}{i}"] for i in range(count)]


def _digest(content: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(content.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
