import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from attribution.ablation import ablation_rises, single
from attribution.agreement import (
    ESTIMATES,
    agreement,
    bootstrap,
    compare,
    cut_sets,
    pearson,
    slope,
    spearman,
    top_overlap,
)
from attribution.methods import Ablation, Random, Taylor
from attribution.subject import Subject
from tests.subjects import subject_of


def test_correlations_are_scipys() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 3, 30, 4)).round(1)
    for b in range(3):
        for c in range(4):
            assert pearson(x, y)[b, c] == pytest.approx(stats.pearsonr(x[b, :, c], y[b, :, c]).statistic, rel=1e-12)
            assert spearman(x, y)[b, c] == pytest.approx(stats.spearmanr(x[b, :, c], y[b, :, c]).statistic, rel=1e-12)
    assert pearson(np.ones((5, 1)), y[0, :5, :1]).tolist() == [0.0]


def test_overlap_and_slope_by_hand() -> None:
    x = np.array([[5.0], [4], [3], [2], [1], [0], [0], [0], [0], [0]])
    y = np.array([[1.0], [9], [8], [0], [0], [0], [0], [0], [0], [0]])
    assert top_overlap(x, y, 0.3).tolist() == [1.0]
    assert top_overlap(x, y, 0.1).tolist() == [0.0]
    assert top_overlap(x, y, 0.2).tolist() == [0.5]
    assert slope(x, 3 * x) == pytest.approx(3)
    assert math.isnan(slope(0 * x, y))


def test_intervals_hold_the_true_correlation_about_as_often_as_they_say() -> None:
    random, held = np.random.default_rng(1), 0
    for _ in range(200):
        x = random.normal(size=(100, 1))
        y = 0.6 * x + 0.8 * random.normal(size=(100, 1))
        picks = random.integers(100, size=(200, 100))
        found = bootstrap(lambda a, b: pearson(a, b).mean(-1), x, y, picks)
        held += found.low <= 0.6 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_sets_go_from_a_guides_choice_to_chance() -> None:
    guide = torch.arange(40, dtype=torch.float64)[:, None]
    sets = cut_sets([guide], 40, 20, 16, torch.Generator().manual_seed(0))
    assert sets.shape == (16, 40)
    assert (sets.sum(1) == 20).all()
    assert len(sets.unique(dim=0)) == 16
    chosen = sets[:, :20].sum(1)
    assert chosen[0] == 20
    assert chosen[-4:].float().mean() < 14 < chosen[:4].float().mean()
    assert len(cut_sets([guide[:4]], 4, 2, 16, torch.Generator())) == 0
    assert len(cut_sets([guide[:5]], 5, 2, 64, torch.Generator().manual_seed(0))) == 10


def test_the_oracle_agrees_with_itself_and_chance_does_not() -> None:
    subject, batches = subject_of("mlp")
    found = compare(subject, batches, {"oracle": Ablation("zero"), "taylor": Taylor(), "random": Random(0)}, sets=8)
    assert found.mean("oracle", "units", "zero") == pytest.approx((1.0, 1.0, 1.0))
    pooled = found.pooled("oracle", "zero")
    assert pooled is not None
    assert (pooled.items, pooled.spearman.value) == (15, pytest.approx(1.0))
    assert found.pooled("nothing", "zero") is None
    assert abs(found.mean("random", "units", "zero")[0]) < 0.7
    rows = {(row.method, row.site): row for row in found.rows if row.of == "units"}
    assert rows["oracle", "first"].slope is not None
    assert rows["oracle", "first"].slope.value == pytest.approx(1)
    assert rows["random", "first"].slope is None
    renamed = compare(subject, batches, {"mine": Random(0), "magnitude": Taylor()}, sets=8, draws=10)
    slopes = {row.method: row.slope for row in renamed.rows if row.of == "units" and row.site == "first"}
    assert slopes["mine"] is None
    assert slopes["magnitude"] is not None
    assert set(found.costs) == {"oracle", "taylor", "random", "kfac", "J", "ablation"}


def test_every_method_is_held_against_zero_and_mean_ablation_of_units_and_sets() -> None:
    subject, batches = subject_of("llama")
    found = compare(subject, batches, values=("zero", "mean"), sets=8, draws=20)
    assert list(found.refused) == ["linear"]  # a vocabulary at every position
    told = (*(ESTIMATES.keys() - {"linear"}), "kfac", "J")
    asked = {(method, of, value) for method in told for of in ("units", "sets") for value in ("zero", "mean")}
    ffn = {(row.method, row.of, row.value) for row in found.rows if row.site == "layers.0.ffn"}
    assert ffn == asked
    assert all(row.items == 8 for row in found.rows if row.of == "sets")
    truth = ablation_rises(subject, batches, "layers.1.ffn", single(12), value="mean")
    from attribution.methods import scores

    estimate = scores(Taylor(), subject, batches)["layers.1.ffn"]
    mine = next(
        r for r in found.rows if (r.method, r.site, r.of, r.value) == ("taylor", "layers.1.ffn", "units", "mean")
    )
    assert mine == agreement("taylor", "layers.1.ffn", "units", "mean", estimate, truth, 20, 0, nats=True)
    # Two heads: no eight different sets.
    assert not any(row.of == "sets" for row in found.rows if row.site == "layers.0.heads")


def test_what_cannot_be_asked_is_told_and_the_rest_goes_on() -> None:
    subject, batches = subject_of("mlp")
    bare = Subject(subject.network, subject.sites, subject.categories, subject.nats)
    found = compare(bare, batches, sets=8, draws=10)
    drawn = {"fisher", "report", "report8", "fisher sampled", "report sampled", "report8 sampled", "linear"}
    assert set(found.refused) == drawn | {"kfac", "J"}
    assert all("'sample'" in reason for method, reason in found.refused.items() if method != "linear")
    assert "outputs are" in found.refused["linear"]
    assert "taylor" in {row.method for row in found.rows}


def test_the_same_seed_gives_the_same_rows() -> None:
    subject, batches = subject_of("conv")
    one, other = (compare(subject, batches, {"taylor": Taylor()}, sets=8, draws=10, seed=3) for _ in range(2))
    assert one.rows == other.rows


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"values": ()}, "no values .* give 'zero', 'mean' or both"),
        ({"values": ("none",)}, "value must be 'zero' or 'mean', got 'none'"),
        ({"removed": 1.5}, "between 0 and 1, got 1.5"),
        ({"sets": -1}, "got -1 and 10"),
        ({"draws": 0}, "draws at least 1, got 32 and 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_work(settings: dict[str, Any], said: str) -> None:
    subject, batches = subject_of("mlp")
    heard: list[str] = []
    with pytest.raises(ValueError, match=said):
        compare(subject, batches, {"taylor": Taylor()}, said=heard.append, **{"draws": 10, **settings})
    assert not heard
