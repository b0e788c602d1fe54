from pathlib import Path

import pytest
from fake_results import DENSE, result, results
from matplotlib.figure import Figure

from moeify.comparison import Job, rows
from pipelines import frontier_plot
from pipelines.frontier_plot import frontier
from tests.figures import kept


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they were saved."""
    return kept(monkeypatch, frontier_plot)


def test_every_method_is_on_it_where_its_tax_and_separation_are(tmp_path: Path, figures: list[Figure]) -> None:
    deep = {Job(job.method, 0.7, job.seed): result(4.0, DENSE[job.seed], active=0.3) for job in results()}
    path = frontier(list(rows(results() | deep)), "fake-1234", "example", tmp_path / "frontier.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (axis,) = figures[0].axes
    named = {container.get_label(): container for container in axis.containers}
    assert list(named) == ["loop", "random"]
    x, y = named["random"].lines[0].get_data()
    assert list(x) == pytest.approx([0.5, 0.7])
    assert list(y) == pytest.approx([0.2 / 3, 0.9])
    assert {line.get_label() for line in axis.lines} >= {"dense twin", "told twin"}
    left, right = axis.get_xlim()
    assert left < 0.5 < 0.7 < right
    bottom, top = axis.get_ylim()
    assert bottom < -0.2 / 3  # the told twin
    assert top > 0.9
    assert "nats per example" in axis.get_ylabel()


def test_a_wide_interval_leaves_the_picture_to_the_means(tmp_path: Path, figures: list[Figure]) -> None:
    wild = results({"loop": {0: 3.0, 1: 3.2}, "random": {0: 13.0, 1: 23.2}})  # t of one degree of freedom
    frontier(list(rows(wild)), "fake", "token", tmp_path / "frontier.png")
    bottom, top = figures[0].axes[0].get_ylim()
    assert -30 < bottom < top < 50


def test_one_seed_at_one_place_is_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    frontier(list(rows(results({"loop": {0: 3.0}}))), "fake", "token", tmp_path / "frontier.png")
    assert "one seed" in figures[0].axes[0].get_title()


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted a job that ended well"):
        frontier([], "fake", "token", tmp_path / "frontier.png")
