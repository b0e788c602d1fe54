import math
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from tables import empty_table

from attribution.moments import ExactMoment
from attribution.table import AttributionTable, SiteSums


def random_table(seed: int) -> AttributionTable:
    generator = torch.Generator().manual_seed(seed)
    table = empty_table(["a", "b"], {"first": (3, 2), "second": (4, 5)})
    for tensor in table.tensors():
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 1)
    table.sampled.copy_(table.counts)
    return table


def test_zeros_is_the_neutral_element_and_adding_adds_every_tensor() -> None:
    table = random_table(0)
    same = table + empty_table(table.categories, {"first": (3, 2), "second": (4, 5)})
    for got, wanted in zip(same.tensors(), table.tensors(), strict=True):
        assert torch.equal(got, wanted)
    other = random_table(1)
    for got, a, b in zip((table + other).tensors(), table.tensors(), other.tensors(), strict=True):
        assert torch.equal(got, a + b)


def test_an_all_reduce_of_the_tensors_in_place_changes_the_table() -> None:
    table = random_table(0)
    before = table.score("second", "fisher")
    for tensor in table.tensors()[3:]:
        tensor *= 2
    assert torch.allclose(table.score("second", "fisher"), 2 * before)


def test_means_divide_by_the_tokens_of_each_category() -> None:
    table = empty_table(["a", "b"], {"s": (2, 1)})
    table.counts.copy_(torch.tensor([4.0, 8.0]))
    table.sampled.copy_(table.counts)
    table.rows.copy_(torch.tensor([2.0, 2.0]))
    sums = table.sites["s"]
    sums.fisher.copy_(torch.tensor([[4.0, 4.0], [8.0, 0.0]]))
    sums.absolute.fill_(16)
    sums.taylor.copy_(torch.tensor([[-8.0, 8.0], [0.0, 0.0]]))
    sums.report.copy_(torch.tensor([[-4.0, 12.0], [8.0, 0.0]]))
    sums.empirical.fill_(2)
    sums.rate.fill_(2)
    sums.power.fill_(32)
    for moment in sums.moments:
        moment.tensors()[0].fill_(8)
    assert table.score("s", "fisher").tolist() == [[1, 0.5], [2, 0]]
    assert table.score("s", "absolute").tolist() == [[4, 2], [4, 2]]
    assert table.report("s").tolist() == [[-1, 1.5], [2, 0]]
    assert table.score("s", "empirical").tolist() == [[0.5, 0.25]] * 2
    assert table.score("s", "taylor").tolist() == [[-2, 1], [0, 0]]
    assert table.score("s", "rate").tolist() == [[0.5, 0.25]] * 2
    assert table.power("s").tolist() == [[8, 4], [8, 4]]
    for moment, of_b in ((table.second_moment, [[1, 1], [1, 1]]), (table.curvature, [[1]])):
        second = moment("s", "b")
        assert isinstance(second, torch.Tensor)
        assert second.tolist() == of_b


def test_the_standard_error_is_that_of_the_mean_over_rows() -> None:
    rows_R = torch.tensor([1.0, 3.0, 8.0, 0.0], dtype=torch.float64)
    positions = 5
    table = empty_table(["a"], {"s": (1, 1)})
    table.counts.fill_(positions * len(rows_R))
    table.sampled.copy_(table.counts)
    table.rows.fill_(len(rows_R))
    table.sites["s"].fisher.fill_(float(rows_R.sum()))
    table.sites["s"].fisher_squares.fill_(float(rows_R.square().sum()))
    wanted = float((rows_R / positions).std()) / math.sqrt(len(rows_R))
    assert table.standard_error("s", "fisher").item() == pytest.approx(wanted, rel=1e-12)
    table.rows.fill_(1)
    assert table.standard_error("s", "fisher").item() == math.inf


def test_a_unit_is_dead_only_if_no_category_ever_activates_it() -> None:
    table = empty_table(["a", "b"], {"s": (3, 1)})
    table.sites["s"].power[1, 1] = 1e-30
    assert table.dead("s").tolist() == [True, False, True]
    assert table.without_gradient("s").tolist() == [False, True, False]
    table.sites["s"].absolute[1, 0] = 1e-30
    assert table.without_gradient("s").tolist() == [False, False, False]


def test_means_of_a_category_without_examples_are_refused_by_name() -> None:
    table = empty_table(["code", "biology"], {"s": (1, 1)})
    table.counts[0] = 3
    with pytest.raises(ValueError, match="no examples of category 'biology'"):
        table.score("s", "fisher")


def test_an_unknown_site_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no site 'third' in the table; it has first, second"):
        random_table(0).report("third")


def test_tables_and_sums_of_different_shapes_do_not_add() -> None:
    with pytest.raises(ValueError, match="cannot add tables"):
        random_table(0) + empty_table(["a", "c"], {"first": (3, 2), "second": (4, 5)})
    with pytest.raises(ValueError, match="different units, categories or moments"):
        SiteSums.zeros(3, 3, 2) + SiteSums.zeros(3, 6, 2)


def test_a_table_that_contradicts_itself_cannot_be_made() -> None:
    table = random_table(0)
    with pytest.raises(ValueError, match="distinct"):
        AttributionTable(("a", "a"), table.counts, table.rows, table.sampled, table.sites)
    with pytest.raises(ValueError, match="site 'first' has 2 categories, the table 1"):
        AttributionTable(("a",), table.counts[:1], table.rows[:1], table.sampled[:1], table.sites)
    with pytest.raises(ValueError, match="not negative"):
        AttributionTable(("a", "b"), -table.counts, table.rows, table.sampled, table.sites)
    with pytest.raises(ValueError, match="at least one site"):
        AttributionTable(("a", "b"), table.counts, table.rows, table.sampled, {})
    with pytest.raises((ValueError, TypeCheckError), match="absolute"):
        replace(table.sites["first"], absolute=table.sites["second"].absolute)
    with pytest.raises(ValueError, match="second moments must have 2 categories"):
        replace(table.sites["first"], inputs=ExactMoment.zeros(3, 3))


def test_what_was_not_measured_is_refused_with_the_way_to_measure_it() -> None:
    table = AttributionTable.empty(["a"], {"s": SiteSums.zeros(2, 2, 1)})
    table.counts.fill_(4)
    table.rows.fill_(2)
    assert table.score("s", "absolute").tolist() == [[0], [0]]
    with pytest.raises(ValueError, match=r"'report' needs labels .* give the subject 'root' or 'sample'"):
        table.report("s")
    with pytest.raises(ValueError, match="measured without second moments; give measure"):
        table.second_moment("s", "a")
    with pytest.raises(ValueError, match="no category 'z' in the table; it has a"):
        table.second_moment("s", "z")
    with pytest.raises(ValueError, match="a rate carries no squares"):
        table.standard_error("s", "rate")
