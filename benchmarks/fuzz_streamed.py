"""Spoiled files of streamed sources: rows of odd shapes, in every format and packing, and then bytes."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from benchmarks import mutations
from benchmarks.fuzz_stage import TINY
from moeify.recipe import strict_yaml

Row = dict[str, Any]
PACKINGS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def spoiled_source(draw: random.Random, texts: bytes, folder: Path) -> str:
    """Write files of two categories, some spoiled, into a folder, and return a recipe that streams them.

    ``texts``: JSON lines with ``text`` and ``category``.
    """
    read = [json.loads(line) for line in texts.splitlines()]
    rows: list[Row] = [row | {"text": f"{number} {row['text']}"} for number in range(5) for row in read]
    form = draw.choice(list(FORMS))
    asked = {}
    for category in ("code", "prose"):
        mine = [row for row in rows if row["category"] == category]
        parts = [mine[0::2], mine[1::2]]
        for number, part in enumerate(parts):
            content = _content(draw, form, part, spoil=draw.random() < 0.2)
            packing = draw.choice(("", "", "", *PACKINGS)) if form not in (".parquet", ".arrow") else ""
            if packing and draw.random() < 0.95:  # else it is said to be packed and is not
                content = PACKINGS[packing](content)
            if draw.random() < 0.06:
                content = draw.choice((b"", content[: len(content) // 2], mutations.spoiled_bytes(draw, content)))
            (folder / f"{category}-{number}{form}{packing}").write_bytes(content)
        asked[category] = {"files": [f"{category}-*"], "text": draw.choices(("text", "category", "é"), (20, 1, 1))[0]}
    data = strict_yaml.read(TINY)
    data["data"]["source"] = {"kind": "streamed", "categories": asked}
    return strict_yaml.write(data)


def _content(draw: random.Random, form: str, rows: list[Row], *, spoil: bool) -> bytes:
    whole = list(rows)
    if spoil:
        for _ in range(draw.randint(1, 4)):
            rows[draw.randrange(len(rows))] = mutations.spoiled_tree(draw, rows[0])
    try:
        return FORMS[form](rows)
    except Exception:  # what a format cannot hold: mostly left as it was
        return _json_lines(rows) if draw.random() < 0.2 else FORMS[form](whole)


def _json_lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def _json(rows: list[Row]) -> bytes:
    return json.dumps(rows).encode()


def _csv(rows: list[Row]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _txt(rows: list[Row]) -> bytes:
    return "\n".join(str(row.get("text")) for row in rows).encode()


def _parquet(rows: list[Row]) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def _arrow(rows: list[Row]) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


FORMS: dict[str, Callable[[list[Row]], bytes]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".txt": _txt,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
