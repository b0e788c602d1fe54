"""Every example in the docstrings of the public functions, run; and every public function has one."""

import doctest
import inspect
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attribution
import moeify
from attribution.measure import measure
from attribution.sites import Site
from attribution.subject import Subject, batched
from tests.test_fitting import small_split

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

RECIPES = Path(__file__).parents[1] / "pipelines" / "recipes"
INNER = {"captum_methods", "edge_products", "edge_taps", "reading", "agglomeration", "graph"}
"""Modules of ``attribution`` that others of it are made of, and such as have no functions."""
PARTS = {
    "attribution.agreement": {"cut_sets", "bootstrap", "pearson", "spearman", "top_overlap", "slope"},
    "attribution.heatmap": {"figure", "save_png", "thinned"},
    "attribution.measure": {"unmeasured"},
    "attribution.relp": {"rules"},
    "attribution.sites": {"patches", "whole"},
    "attribution.subject": {"segments", "row_seed"},
}
"""Functions that others of their package are made of."""
MODULES = [f"attribution.{each.name}" for each in pkgutil.iter_modules(attribution.__path__) if each.name not in INNER]
OFFERED = {name: getattr(moeify, name) for name in dir(moeify)}
HOMES = ("moeify.loop", "moeify.recipe.load", "moeify.split_folder", "moeify.tasks.build")
"""Of what ``moeify`` offers; the examples of its other modules are run by tests/test_fitting.py."""


def asked() -> Subject:
    """Two layers of two units that pass on what is positive; each takes its activation off the loss."""
    network = nn.Sequential(*(layer for _ in range(2) for layer in (nn.Linear(2, 2, bias=False), nn.ReLU())))
    network.append(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.eye(2))
    sites = (Site("first", reader="2", units=2), Site("second", reader="4", units=2))
    names = ("left", "right")
    return Subject(network.double(), sites, names, lambda y, t: -(y * t).sum(1), lambda y, _: torch.ones_like(y))


def given(name: str) -> dict[str, Any]:
    """Return what the examples of a module start from."""
    if name.startswith("attribution"):
        inputs = torch.tensor([[2.0, 0.0], [0.0, 1.0]] * 4, dtype=torch.float64)
        rows = batched(inputs, torch.ones_like(inputs), torch.arange(8) % 2, rows_at_once=4)
        return {"asked": asked(), "rows": rows, "table": measure(asked(), rows)}
    return {"model": small_split().model} if name.endswith("split_folder") else {"recipes": RECIPES}


@pytest.mark.filterwarnings("ignore::Warning:captum")
@pytest.mark.parametrize("name", [*MODULES, *HOMES])
def test_the_examples_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = import_module(name)
    done = doctest.testmod(module, extraglobs=given(name), optionflags=doctest.ELLIPSIS)
    assert done.failed == 0
    public = [
        function
        for place, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == name and not place.startswith("_") and place not in PARTS.get(name, ())
    ]
    if name.startswith("attribution"):
        assert [function.__name__ for function in public if ">>>" not in (function.__doc__ or "")] == []


def test_everything_that_moeify_offers_has_an_example() -> None:
    functions = {name: each for name, each in OFFERED.items() if inspect.isfunction(each)}
    assert len(functions) >= 7
    assert [name for name, function in functions.items() if ">>>" not in (function.__doc__ or "")] == []
