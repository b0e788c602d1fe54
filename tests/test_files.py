import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attribution.files import CorruptTableError, _digest, load, save, to_parquet
from attribution.heatmap import draw, plot
from attribution.measure import Moments, measure
from attribution.table import AttributionTable
from tests.subjects import subject_of


def measured(kind: str = "conv", moments: Moments | None = None) -> AttributionTable:
    subject, batches = subject_of(kind)
    return measure(subject, batches, seed=1, moments=moments)


@pytest.mark.parametrize("moments", [None, Moments(), Moments(3)])
@pytest.mark.parametrize("kind", ["mlp", "conv", "llama"])
def test_a_table_comes_back_bit_for_bit(tmp_path: Path, kind: str, moments: Moments | None) -> None:
    table = measured(kind, moments)
    save(table, tmp_path / "t.safetensors")
    again = load(tmp_path / "t.safetensors")
    assert (again.categories, list(again.sites)) == (table.categories, list(table.sites))
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), table.tensors(), strict=True))
    for site in table.sites:
        assert [type(m) for m in again.sites[site].moments] == [type(m) for m in table.sites[site].moments]
    assert all(torch.equal(a, 2 * b) for a, b in zip((again + table).tensors(), table.tensors(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_table_of_format_1_is_read(tmp_path: Path) -> None:
    """It kept no report, which was the sum of two others."""
    table, path = measured("mlp"), tmp_path / "t.safetensors"
    save(table, path)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["table"])
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("/report")}
    content = json.dumps(facts | {"format": 1})
    save_file(tensors, path, {"table": content, "sha256": _digest(content, tensors)})
    again = load(path)
    for one, other in zip(again.tensors(), table.tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    content = json.dumps(facts | {"format": 3})
    save_file(tensors, path, {"table": content, "sha256": _digest(content, tensors)})
    with pytest.raises(ValueError, match="has format 3; this version reads formats 1 and 2"):
        load(path)


def test_a_changed_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save(measured(), path)
    whole = path.read_bytes()
    for at in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CorruptTableError, match="measure again"):
            load(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(CorruptTableError, match="cannot be read"):
        load(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(CorruptTableError, match="not a table"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def test_parquet_has_a_row_for_every_site_unit_and_category(tmp_path: Path) -> None:
    table = measured("mlp")
    to_parquet(table, tmp_path / "t.parquet")
    frame = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pandas()
    assert len(frame) == sum(sums.units for sums in table.sites.values()) * 3
    for site in table.sites:
        wide = frame[frame.site == site].pivot(index="unit", columns="category", values="report")
        assert wide[list(table.categories)].to_numpy().tolist() == table.score(site, "report").tolist()
        wide = frame[frame.site == site].pivot(index="unit", columns="category", values="fisher_se")
        assert wide[list(table.categories)].to_numpy().tolist() == table.standard_error(site, "fisher").tolist()
    assert set(frame[frame.dead].unit) == {u for s in table.sites for u in table.dead(s).nonzero().flatten().tolist()}


@pytest.mark.parametrize("kind", ["fisher", "report", "rate"])
def test_a_heatmap_is_drawn(tmp_path: Path, kind: str) -> None:
    path = draw(measured("llama"), tmp_path / "picture.png", kind)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


def test_names_with_dollars_are_drawn_as_they_are() -> None:
    subject, batches = subject_of("mlp")
    table = measure(replace(subject, categories=("$a_1$ $", "$\\nothing$", "c")), batches)
    figure = plot(table)
    figure.canvas.draw()
    texts = [*figure.axes[0].get_xticklabels(), figure.axes[0].title]
    assert not any(text.get_parse_math() for text in texts)


def test_the_umask_says_who_may_read_a_table(tmp_path: Path) -> None:
    table = measured()
    before = os.umask(0o027)
    try:
        save(table, tmp_path / "t.safetensors")
        to_parquet(table, tmp_path / "t.parquet")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "t.safetensors": 0o640,
        "t.parquet": 0o640,
    }
