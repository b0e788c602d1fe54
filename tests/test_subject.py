"""What a subject is made of, and what is said of rows, outputs and losses that do not fit."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attribution.measure import measure
from attribution.methods import RelP, scores
from attribution.sites import Site
from attribution.subject import Rows, Subject, batched
from tests.subjects import subject_of

# What is asked here is what is said where nothing checks types and shapes.
pytestmark = pytest.mark.usefixtures("shapes_unchecked")


@pytest.mark.parametrize(
    ("rows", "at_once", "said"),
    [
        ((10, 10, 6), 4, "10 rows of inputs, 10 of targets and 6 categories; give each row one of each"),
        ((5, 10, 10), 4, "5 rows of inputs, 10 of targets and 10 categories"),
        ((10, 10, 10), 0, "rows_at_once must be at least 1, got 0"),
        ((10, 10, 10), -1, "rows_at_once must be at least 1, got -1"),
    ],
)
def test_no_row_is_dropped_in_silence(rows: tuple[int, int, int], at_once: int, said: str) -> None:
    inputs, targets, categories = (torch.zeros(n, dtype=torch.int64) for n in rows)
    with pytest.raises(ValueError, match=said):
        batched(inputs, targets, categories, at_once)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda x: (x, None), "returned tuple, no tensor"),
        (lambda x: {"logits": x}, "returned dict, no tensor"),
        (lambda x: SimpleNamespace(pooler_output=x), "returned SimpleNamespace, no tensor"),
    ],
)
def test_outputs_that_are_no_tensor_are_refused_with_the_way_out(made: Callable[[Tensor], Any], said: str) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = asked.network

        def forward(self, x: Tensor) -> Any:
            return made(self.inner(x))

    asked, batches = subject_of("mlp")
    sites = tuple(replace(site, reader=f"inner.{site.reader}") for site in asked.sites)
    around = Subject(Around(), sites, asked.categories, asked.nats)
    for subject in (around, replace(around, run=lambda x, _: made(asked.network(x)))):
        with pytest.raises(ValueError, match=rf"{said} .*; give Subject\(run=\.\.\.\)"):
            measure(subject, batches)


@pytest.mark.parametrize(("nats", "got"), [(lambda y, t: None, "NoneType"), (lambda y, t: 1.0, "float")])
def test_losses_that_are_no_tensor_are_refused(nats: Any, got: str) -> None:
    subject, batches = subject_of("mlp")
    with pytest.raises(ValueError, match=rf"one loss a row, a tensor \[6\], got {got}"):
        measure(replace(subject, nats=nats), batches)
    with pytest.raises(ValueError, match=rf"one loss a row, a tensor \[6\], got {got}"):
        scores(RelP(), replace(subject, nats=nats), batches)


def test_categories_that_are_no_whole_numbers_are_refused() -> None:
    subject, (batch, _) = subject_of("mlp")
    for categories in (batch.categories.double(), batch.categories.bool(), batch.categories[:, None]):
        changed = Rows(batch.inputs, batch.targets, categories, batch.ids)
        with pytest.raises(
            ValueError, match=r"whole numbers \[rows\], .* among a, b, c, got .*; make them torch\.int64"
        ):
            measure(subject, [changed])


def test_a_module_goes_by_any_of_its_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 4)
            self.head = self.down

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.up(x)))

    asked, batches = subject_of("mlp")
    network = Twice().double()
    tables = [
        measure(replace(asked, network=network, sites=(Site("s", name, 6),)), batches) for name in ("down", "head")
    ]
    assert torch.equal(tables[0].score("s", "taylor"), tables[1].score("s", "taylor"))
    with pytest.raises(ValueError, match="no module 'haed'; nearest: "):
        replace(asked, network=network, sites=(Site("s", "haed", 6),))
