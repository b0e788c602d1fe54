"""Whether there is anything to split: planted structure is found, meaningless labels are not."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from attribution.sites import Site
from attribution.table import AttributionTable
from moeify.events import MemoryTracker, Phase
from moeify.loop import run
from moeify.rows import generator
from moeify.splitting.null_test import Measure, Relabel, Verdict, null_test, permuted
from moeify.splitting.partition import Partition
from moeify.task import Batch
from tests.tables import empty_table
from tests.toy import ToyTask, toy_config

UNITS, DIM = 24, 3
CATEGORIES = tuple("abcd")


def batches(seed: int, strength: float, rows: int = 240) -> list[Batch]:
    """Rows of activations; each category works a quarter of the units harder by ``strength``."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 4
    home_U = torch.arange(UNITS) * 4 // UNITS
    scale_RU = 1 + strength * (labels[:, None] == home_U).double()
    inputs = torch.randn(rows, UNITS, generator=random, dtype=torch.float64) * scale_RU
    whole = Batch(inputs, inputs, labels, torch.arange(rows))
    return [whole.take(part[torch.argsort(labels[part], stable=True)]) for part in torch.arange(rows).split(40)]


def table_of(rows: Iterable[Batch]) -> AttributionTable:
    table = empty_table(CATEGORIES, {"s": (UNITS, DIM)})
    sums = table.sites["s"]
    inputs, outputs = (moment.tensors()[0] for moment in sums.moments)
    for batch in rows:
        for c in range(4):
            a_RU = batch.inputs[batch.categories == c]
            for counts in (table.counts, table.sampled, table.rows):
                counts[c] += len(a_RU)
            inputs[c] += a_RU.T @ a_RU
            outputs[c] += torch.eye(DIM, dtype=torch.float64) * len(a_RU)
            sums.fisher[:, c] += a_RU.square().sum(0) / 2
    return table


def verdict(seed: int, strength: float, number: int = 0, **partition: object) -> Verdict:
    rows = batches(seed, strength)
    config = toy_config(partition={"multiple": 1, "min_units": 1, **partition})

    def measure(relabel: Relabel) -> AttributionTable:
        return table_of(relabel(rows))

    asked: Measure = measure
    return null_test(
        Partition.undivided(CATEGORIES, [Site("s", "x", UNITS)]),
        table_of(rows),
        {"s": torch.ones(DIM, UNITS) + torch.eye(DIM, UNITS)},
        config,
        config.rounds[0],
        8,
        asked,
        number,
    )[0]


@pytest.mark.parametrize("grouping", ["affinity", "residual"])
def test_planted_structure_is_found_and_meaningless_labels_are_not(grouping: str) -> None:
    changes = {"grouping": {"kind": grouping}}
    found = [verdict(seed, 1.0, **changes) for seed in range(3)]
    assert all(each.p < 0.01 and each.statistic > 0 for each in found)
    noise = [verdict(seed, 0.0, **changes).p for seed in range(16)]
    assert 0.2 < median(noise) < 0.8
    assert sum(p < 0.05 for p in noise) <= 3


def test_the_test_holds_for_given_groups_and_beside_unrouted_categories() -> None:
    for strength, most in ((1.0, 0.02), (0.0, 1.0)):
        p = verdict(1, strength, unrouted=["d"]).p
        assert p < most
    assert verdict(1, 0.0, unrouted=["d"]).p > 0.02


def test_the_same_seed_gives_the_same_verdict_and_another_round_other_permutations() -> None:
    first, again, other = verdict(0, 0.3), verdict(0, 0.3), verdict(0, 0.3, number=2)
    assert first == again
    assert first.predicted == other.predicted
    assert set(first.null).isdisjoint(other.null)
    assert len(set(first.null)) == 8


def test_p_is_that_of_students_t_and_has_its_edges() -> None:
    logs = [0.1, 0.4, 0.2, 0.6]
    each = Verdict("core", math.exp(-0.5), tuple(math.exp(x) for x in logs))
    mean = sum(logs) / 4
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / 3 * (1 + 1 / 4))
    assert each.p == pytest.approx(student.sf((mean + 0.5) / spread, 3))
    assert Verdict("core", 1.0, (1.0, 1.0)).p == 1.0
    assert Verdict("core", 0.0, (0.0, 0.0)).p == 1.0
    assert Verdict("core", 0.5, (1.0, 1.0)).p == 0.0
    with pytest.raises(ValueError, match="expert 'core': got 1 permutations, wanted at least 2"):
        Verdict("core", 1.0, (1.0,))


@given(
    labels=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=4),
    groups=st.sampled_from([[[0, 1, 2, 3, 4]], [[0, 1], [2, 4]], [[3]], []]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_labels_move_within_their_group_only_and_rows_stay_what_they_are(
    labels: Sequence[Sequence[int]], groups: list[list[int]], seed: int
) -> None:
    numbers = itertools.count()
    given_rows = []
    for part in labels:
        ids = torch.tensor([next(numbers) for _ in part])
        given_rows.append(Batch(ids * 10.0, ids * 100.0, torch.tensor(sorted(part)), ids))
    got = permuted(iter(given_rows), groups, generator(seed, "permute"))
    before = {int(i): int(c) for batch in given_rows for i, c in zip(batch.ids, batch.categories, strict=True)}
    after = {int(i): int(c) for batch in got for i, c in zip(batch.ids, batch.categories, strict=True)}
    assert sorted(before.values()) == sorted(after.values())
    for row, label in before.items():
        mine = next((group for group in groups if label in group), [label])
        assert after[row] in mine
    for old, new in zip(given_rows, got, strict=True):
        assert torch.equal(new.inputs, new.ids * 10.0)
        assert torch.equal(new.targets, new.ids * 100.0)
        assert sorted(new.ids.tolist()) == old.ids.tolist()
        assert new.categories.tolist() == sorted(new.categories.tolist())
    again = permuted(iter(given_rows), groups, generator(seed, "permute"))
    assert all(torch.equal(a.categories, b.categories) for a, b in zip(got, again, strict=True))


class MeaninglessTask(ToyTask):
    """Rows of every category come from all patterns alike."""

    def _rows(self, purpose: list[int], rows: int, first_id: int = 0) -> Batch:
        batch = super()._rows(purpose, rows, first_id)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(sum(purpose) * 1000 + rows))
        return Batch(batch.inputs[order], batch.targets[order], batch.categories, batch.ids)


def notes(tracker: MemoryTracker) -> Iterator[str]:
    yield from (event.note for event in tracker.events.values() if isinstance(event, Phase) and event.note)


def test_a_run_divides_what_has_structure_and_says_so_where_nothing_has() -> None:
    partition = {"multiple": 2, "min_units": 2, "null_test": {}}
    first, _ = toy_config().rounds
    for task, parts in ((ToyTask, 2), (MeaninglessTask, 0)):
        config, tracker = toy_config(partition=partition, rounds=[first]), MemoryTracker()
        result = run(config, task(config), tracker=tracker)
        assert len(result.tree["children"]) == parts
        said = list(notes(tracker))
        assert said[0].startswith("core: J ")
        assert said[1:] == ([] if parts else ["no leaf's split beats permuted labels; nothing is worth splitting"])
        assert [r.outcome for r in result.rounds] == ["kept" if parts else "not cut"]
        assert result.stopped == ("target reached" if parts else "nothing to split")
