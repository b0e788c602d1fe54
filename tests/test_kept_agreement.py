"""What ``benchmarks.agreement`` found of a network and seed is kept, and told from the kept file as it was."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attribution.agreement import ESTIMATES
from benchmarks import agreement
from benchmarks.agreement import QUICK, Found, cut_rows, figures, find_units, known_or_found, site_rows, unit_rows
from benchmarks.partitions import Cuts, correlations
from benchmarks.studies import Study
from moeify.kept_results import KeptResults
from tests.subjects import subject_of

SUBJECT, BATCHES = subject_of("mlp")
STUDY = Study("text", SUBJECT, BATCHES, BATCHES, BATCHES, lambda _: BATCHES[0], 1e-3)
CUTS = Cuts({"fisher": [1.0, 2.0, 3.0, 9.0], "J": [1.0, 2.0, 3.0, 4.0]}, [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.5])


def test_a_network_and_seed_are_asked_once_and_told_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {name: ESTIMATES[name] for name in ("report", "report8", "random", "magnitude")}
    units, asked = find_units(STUDY, methods, QUICK, 0), list[str]()

    def answering(name: str, answer: Any) -> Any:
        return lambda *_, **__: (asked.append(name), answer)[1]

    monkeypatch.setitem(agreement.STUDIES, "text", answering("study", STUDY))
    monkeypatch.setattr(agreement, "find_units", answering("units", units))
    monkeypatch.setattr(agreement, "compare_cuts", answering("cuts", CUTS))
    kept, everything = KeptResults(tmp_path), ["study", "units", "cuts"]
    first, again = (known_or_found(kept, "text", 0, QUICK, quick=True) for _ in range(2))
    assert again == first == Found(units, CUTS)
    assert asked == everything
    for other in (replace(QUICK, sets=9), replace(QUICK, cuts=replace(QUICK.cuts, steps=3))):
        known_or_found(kept, "text", 0, other, quick=True)
    known_or_found(kept, "text", 1, QUICK, quick=True)
    assert asked == everything * 4
    for file in tmp_path.glob("text-1-units-*"):
        file.unlink()
    known_or_found(kept, "text", 1, QUICK, quick=True)
    assert asked == [*everything * 4, "study", "units"]
    check_tables({"text": [first]})


def check_tables(found: dict[str, list[Found]]) -> None:
    rows = unit_rows(found)
    assert {row["what"] for row in rows} == {"channels"}
    assert {"report8", "random", "kfac", "J"} < {row["method"] for row in rows}
    sites = site_rows(found)
    assert [(row["site"], row["of"], row["items"]) for row in sites] == [
        ("first", "units", 7), ("first", "sets", 8), ("second", "units", 8), ("second", "sets", 8)
    ]  # fmt: skip
    assert all("[" in str(row["report8"]) for row in sites)
    assert {row["method"]: row["retrained spearman"] for row in cut_rows(found)}["fisher"] == "1.000"
    told = {figure.name: figure.value for figure in figures(found)}
    assert told["pearson_sets"] == pytest.approx(correlations([1, 2, 3, 4], [1, 2, 3, 5], False)[0])
    assert told["pearson_sets_best_third"] == pytest.approx(1.0)


def test_code_that_changed_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = agreement.fingerprint("text", 0, QUICK, quick=True)
    assert now == agreement.fingerprint("text", 0, QUICK, quick=True)
    monkeypatch.setattr(sys, "version", "4.0")
    other_python = agreement.fingerprint("text", 0, QUICK, quick=True)
    monkeypatch.setattr(agreement, "_code", lambda: "changed")
    assert len({now, other_python, agreement.fingerprint("text", 0, QUICK, quick=True)}) == 3
