from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float64
from tables import empty_table
from torch import Tensor

from attribution.affinity import affinity_graph, group, profile_affinity, profile_interval
from attribution.table import AttributionTable


def table(score_UC: Tensor, counts: Tensor | None = None) -> AttributionTable:
    """Units split over two sites."""
    units, categories = score_UC.shape
    made = empty_table([f"c{i}" for i in range(categories)], {"a": (2, 1), "b": (units - 2, 1)})
    made.counts.copy_(torch.ones(categories) if counts is None else counts)
    made.sampled.copy_(made.counts)
    made.sites["a"].fisher.copy_(score_UC[:2] * made.counts)
    made.sites["b"].fisher.copy_(score_UC[2:] * made.counts)
    return made


def symmetric(seed: int, number: int, levels: int | None = None) -> Float64[Tensor, "number number"]:
    generator = torch.Generator().manual_seed(seed)
    half = torch.rand(number, number, generator=generator, dtype=torch.float64)
    if levels:
        half = (half * levels).floor()
    return (half + half.T) / 2


def test_planted_pairs_have_high_affinity_and_the_pairs_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    common = 5 * torch.rand(40, 1, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.rand(40, 4, generator=generator, dtype=torch.float64)
    score_UC = common + noise
    score_UC[:5, [0, 2]] += 3
    score_UC[5:10, [1, 3]] += 3
    affinity_CC = profile_affinity(table(score_UC), "fisher")
    assert affinity_CC[0, 2] > 0.9
    assert affinity_CC[1, 3] > 0.9
    assert affinity_CC[0, 1] < 0
    assert group(affinity_CC, 2, balanced=True) == [[0, 2], [1, 3]]


def test_affinity_ignores_how_large_a_categorys_attribution_is_and_how_much_data_it_has() -> None:
    score_UC = torch.rand(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = profile_affinity(table(score_UC), "fisher")
    scaled = profile_affinity(table(score_UC * torch.tensor([1, 10, 1e-3, 7]), torch.tensor([3, 1, 8, 2])), "fisher")
    torch.testing.assert_close(plain, scaled)
    torch.testing.assert_close(plain, plain.T)
    assert plain.diagonal().tolist() == [1] * 4


def test_equal_profiles_and_silent_categories_have_no_affinity() -> None:
    assert profile_affinity(table(torch.ones(6, 3, dtype=torch.float64)), "fisher").tolist() == torch.eye(3).tolist()
    silent = profile_affinity(table(torch.zeros(6, 3, dtype=torch.float64)), "fisher")
    assert silent.tolist() == torch.eye(3).tolist()


def test_two_categories_alone_are_opposites() -> None:
    score_UC = torch.rand(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(
        profile_affinity(table(score_UC), "fisher"), torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    )


def test_the_graph_carries_every_affinity_once() -> None:
    matrix = symmetric(0, 4)
    graph = affinity_graph(matrix, ["a", "b", "c", "d"])
    assert isinstance(graph, nx.Graph)
    assert list(graph.nodes) == ["a", "b", "c", "d"]
    assert graph.number_of_edges() == 6
    assert graph.edges["b", "d"]["weight"] == float(matrix[1, 3])
    with pytest.raises(ValueError, match="distinct names"):
        affinity_graph(matrix, ["a", "b", "c", "a"])


def test_the_graph_carries_intervals_and_can_be_written(tmp_path: Path) -> None:
    matrix = symmetric(0, 3)
    graph = affinity_graph(matrix, ["a", "b", "c"], (matrix - 0.1, matrix + 0.1))
    edge = graph.edges["a", "c"]
    assert edge == {
        "weight": float(matrix[0, 2]),
        "lower": float(matrix[0, 2] - 0.1),
        "upper": float(matrix[0, 2] + 0.1),
    }
    nx.write_graphml(graph, tmp_path / "graph.graphml")
    assert nx.read_graphml(tmp_path / "graph.graphml").edges["a", "c"] == edge
    assert set(affinity_graph(matrix, ["a", "b", "c"]).edges["a", "c"]) == {"weight"}


def table_of_rows(score_RUC: Tensor) -> AttributionTable:
    """A table of rows with one token each."""
    rows, _, categories = score_RUC.shape
    made = table(score_RUC.mean(0), torch.full((categories,), float(rows), dtype=torch.float64))
    made.rows.copy_(made.counts)
    made.sites["a"].fisher_squares.copy_(score_RUC[:, :2].square().sum(0))
    made.sites["b"].fisher_squares.copy_(score_RUC[:, 2:].square().sum(0))
    return made


def drawn(true_UC: Tensor, rows: int, shape: float) -> Tensor:
    """Scores of rows around the true ones, gamma distributed: skewed and never negative."""
    factors = torch._standard_gamma(torch.full((rows, *true_UC.shape), shape, dtype=torch.float64)) / shape
    return true_UC * factors


def true_scores(units: int, likeness: float) -> Tensor:
    """Two pairs of categories on a common heavy-tailed core."""
    pairs_UP = likeness * torch.randn(units, 2, dtype=torch.float64)
    own_UC = 0.4 * torch.randn(units, 4, dtype=torch.float64)
    return (torch.randn(units, 1, dtype=torch.float64) + pairs_UP[:, [0, 0, 1, 1]] + own_UC).exp()


@pytest.mark.parametrize(
    ("rows", "shape", "level", "least", "most"),
    [(20, 1.0, 0.95, 0.9, 1), (40, 0.2, 0.95, 0.9, 1), (200, 1.0, 0.95, 0.9, 1), (40, 1.0, 0.5, 0.4, 0.65)],
)
def test_intervals_hold_the_true_affinity_about_as_often_as_they_say(
    rows: int, shape: float, level: float, least: float, most: float
) -> None:
    repetitions = 25
    with torch.random.fork_rng():
        torch.manual_seed(0)
        true_UC = true_scores(80, 0.7)
        true_CC = profile_affinity(table(true_UC), "fisher")
        above = torch.triu_indices(4, 4, 1).unbind()
        covered = 0.0
        for _ in range(repetitions):
            sampled = table_of_rows(drawn(true_UC, rows, shape))
            lower_CC, upper_CC = profile_interval(sampled, "fisher", level=level, draws=120)
            inside = (lower_CC <= true_CC) & (true_CC <= upper_CC)
            covered += float(inside[above].double().mean()) / repetitions
    assert least <= covered <= most


def test_categories_drowned_in_noise_get_an_interval_that_says_so() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        alike_UC = torch.rand(50, 1, dtype=torch.float64).expand(50, 3)
        lower_CC, upper_CC = profile_interval(table_of_rows(drawn(alike_UC, 5, 0.3)), "fisher")
    off = ~torch.eye(3, dtype=torch.bool)
    assert bool((upper_CC - lower_CC)[off].min() > 1)


def test_intervals_are_deterministic_symmetric_and_narrow_without_noise() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        score_RUC = drawn(true_scores(30, 0.7), 10, 1.0)
    noisy = table_of_rows(score_RUC)
    lower_CC, upper_CC = profile_interval(noisy, "fisher", seed=3)
    again = profile_interval(noisy, "fisher", seed=3)
    assert torch.equal(lower_CC, again[0])
    assert torch.equal(upper_CC, again[1])
    assert not torch.equal(lower_CC, profile_interval(noisy, "fisher", seed=4)[0])
    assert bool((lower_CC <= upper_CC).all())
    assert bool((lower_CC >= -1).all() & (upper_CC <= 1).all())
    for end in (lower_CC, upper_CC):
        torch.testing.assert_close(end, end.T)
        assert end.diagonal().tolist() == [1] * 4
    sure = table_of_rows(score_RUC.mean(0).expand(10, 30, 4))
    for end in profile_interval(sure, "fisher"):
        torch.testing.assert_close(end, profile_affinity(sure, "fisher"), rtol=1e-6, atol=1e-6)


def test_intervals_and_profiles_refuse_what_makes_no_sense() -> None:
    noisy = table_of_rows(torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"between 0 and 1 and draws at least 2, got 1\.5 and 200"):
        profile_interval(noisy, "fisher", level=1.5)
    with pytest.raises(ValueError, match="a rate carries no squares"):
        profile_interval(noisy, "rate")
    noisy.sites["a"].taylor.fill_(-1.0)
    with pytest.raises(ValueError, match="'taylor' is; take an unsigned one"):
        profile_affinity(noisy, "taylor")
    noisy.rows[1] = 1
    with pytest.raises(ValueError, match="category 'c1' has 1 row and so no standard error"):
        profile_interval(noisy, "fisher")


@given(
    seed=st.integers(0, 1000),
    number=st.integers(1, 12),
    part=st.floats(0, 1),
    balanced=st.booleans(),
    levels=st.sampled_from([None, 1, 2, 3]),
)
@settings(max_examples=150, deadline=None)
def test_groups_are_a_partition_into_the_number_asked_for_and_keep_the_size_limit(
    seed: int, number: int, part: float, balanced: bool, levels: int | None
) -> None:
    count = 1 + int(part * (number - 1))
    groups = group(symmetric(seed, number, levels), count, balanced)
    assert len(groups) == count
    assert sorted(i for members in groups for i in members) == list(range(number))
    assert all(members == sorted(members) for members in groups)
    assert [members[0] for members in groups] == sorted(members[0] for members in groups)
    if balanced:
        assert max(map(len, groups)) <= -(-number // count)


def test_the_size_limit_never_leads_into_a_dead_end() -> None:
    # Three close pairs: merging all of them would leave 2 + 2 + 2, which two groups of three cannot hold.
    matrix = torch.eye(6, dtype=torch.float64)
    for i in (0, 2, 4):
        matrix[i, i + 1] = matrix[i + 1, i] = 0.9
    groups = group(matrix, 2, balanced=True)
    assert sorted(map(len, groups)) == [3, 3]
    assert group(matrix, 3, balanced=True) == [[0, 1], [2, 3], [4, 5]]


def test_without_a_limit_an_outlier_stays_alone_and_ties_go_to_the_lowest() -> None:
    matrix = torch.full((4, 4), 0.8, dtype=torch.float64)
    matrix[2, :] = matrix[:, 2] = 0.1
    assert group(matrix, 2, balanced=False) == [[0, 1, 3], [2]]
    assert group(matrix, 2, balanced=True) == [[0, 1], [2, 3]]
    assert group(torch.ones(4, 4), 3, balanced=False) == [[0, 1], [2], [3]]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot make 5 groups of 4 categories"):
        group(symmetric(0, 4), 5, balanced=True)
    with pytest.raises(ValueError, match="cannot make 0 groups"):
        group(symmetric(0, 4), 0, balanced=False)
    crooked = symmetric(0, 3)
    crooked[0, 1] += 1
    with pytest.raises(ValueError, match="finite and symmetric"):
        group(crooked, 2, balanced=False)
