import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import CATEGORIES, NODES, fake_run, finish, leave_rounds, story, tell
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from safetensors.numpy import load_file, save_file

from attribution.heatmap import thinned
from moeify import pictures
from moeify.events import RoundEnded
from pipelines import plots, round_files
from pipelines.runs import RunFolder
from tests.figures import kept


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = fake_run(tmp_path)
    tell(folder, story())
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they were saved."""
    return kept(monkeypatch, plots)


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


def test_the_map_has_a_panel_for_each_site_and_one_scale(folder: RunFolder, figures: list[Figure]) -> None:
    leave_rounds(folder, sites=11)
    path = plots.attribution_map(folder, 2)
    assert path == folder.plots / "attribution-round-2.png"
    *panels, scale = figures[0].axes
    assert [panel.get_title().split()[0] for panel in panels] == [f"layers.{i}.ffn" for i in range(11)]
    assert "nats" in scale.get_ylabel()
    width, height = png_size(path)
    assert 1000 < width < 5000
    assert 500 < height < 3000


def test_every_expert_is_the_rectangle_of_its_units_and_categories(folder: RunFolder, figures: list[Figure]) -> None:
    leave_rounds(folder, sites=1, units=100)
    plots.attribution_map(folder, 1)
    panel = figures[0].axes[0]
    leaves = NODES[0]["categories"]
    assert [label.get_text() for label in panel.get_xticklabels()] == leaves
    assert [label.get_text() for label in panel.get_yticklabels()] == [node["name"] for node in NODES]
    boxes = [patch for patch in panel.patches if isinstance(patch, Rectangle)][::2]
    first = 0
    for node, box, height in zip(NODES, boxes, [22, 10, 18, 16, 14, 20], strict=True):
        assert box.get_xy() == (leaves.index(node["categories"][0]), first)
        assert (box.get_width(), box.get_height()) == (len(node["categories"]), height)
        first += height


def test_columns_follow_the_leaves_and_rows_their_owners(folder: RunFolder, figures: list[Figure]) -> None:
    leave_rounds(folder, sites=1, units=60)
    plots.attribution_map(folder, 1)
    drawn = np.asarray(figures[0].axes[0].images[0].get_array())
    tables, categories, score = round_files.read_attribution(folder, 1)
    assert (tuple(categories), score) == (CATEGORIES, "fisher")
    table = tables["layers.0.ffn"][:, [0, 2, 3, 1]]  # python, c, web, prose
    core = table[:13]  # 22 % of 60 units
    assert np.array_equal(drawn[:13], core[np.argsort(-core.sum(axis=1), kind="stable")])


def test_more_units_than_pixels_are_averaged_not_skipped() -> None:
    table = np.random.default_rng(0).random((1003, 3))
    thin = thinned(table)
    assert thin.shape == (400, 3)
    assert thin[0] == pytest.approx(table[:2].mean(axis=0))
    assert thin[-1] == pytest.approx(table[1000:].mean(axis=0))
    assert np.array_equal(thinned(table[:7]), table[:7])


def test_an_expert_without_units_in_a_site_is_left_out(folder: RunFolder, figures: list[Figure]) -> None:
    leave_rounds(folder, sites=1, units=100, shares=[0.5, 0.0, 0.2, 0.1, 0.1, 0.1])
    plots.attribution_map(folder, 1)
    names = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert names == ["core", "python", "c", "web", "prose"]


def test_names_that_would_overlap_stand_apart_around_their_experts() -> None:
    assert pictures._spread([10.0, 50.0], 5.0, 100.0) == [10.0, 50.0]
    assert pictures._spread([20.0, 21.0, 22.0], 4.0, 100.0) == pytest.approx([17.0, 21.0, 25.0])
    assert pictures._spread([97.0, 99.0], 6.0, 98.0) == pytest.approx([92.0, 98.0])
    places = pictures._spread([1.0, 1.0, 3.0, 40.0, 41.0], 5.0, 100.0)
    assert all(after - before >= 5.0 - 1e-9 for before, after in pairwise(places))


def test_every_one_of_many_small_experts_is_named(folder: RunFolder, figures: list[Figure]) -> None:
    leave_rounds(folder, sites=1, units=400, shares=[0.95, 0.01, 0.01, 0.01, 0.01, 0.01])
    plots.attribution_map(folder, 1)
    panel = figures[0].axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == [node["name"] for node in NODES]
    gaps = [after - before for before, after in pairwise(panel.get_yticks())]
    assert min(gaps) >= 0.03 * 400


def test_what_is_exactly_zero_is_off_the_scale(folder: RunFolder, figures: list[Figure]) -> None:
    leave_rounds(folder, sites=1, units=60)
    path = folder.rounds / "1" / "attribution.safetensors"
    table = load_file(path)["layers.0.ffn"]
    table[table < np.median(table)] = 0.0
    save_file({"layers.0.ffn": table}, path, {"categories": json.dumps(CATEGORIES), "score": "fisher"})
    plots.attribution_map(folder, 1)
    drawn = figures[0].axes[0].images[0].get_array()
    assert np.ma.count_masked(drawn) == (table == 0.0).sum()
    (legend,) = figures[0].legends
    assert [text.get_text().split(":")[0] for text in legend.get_texts()][1] == "exactly 0"


def test_files_that_speak_of_different_sites_are_refused(folder: RunFolder) -> None:
    leave_rounds(folder, sites=2)
    partition = folder.rounds / "1" / "partition.json"
    partition.write_text(partition.read_text().replace("layers.1.ffn", "layers.9.ffn"))
    with pytest.raises(ValueError, match=r"different categories or sites.*layers\.9\.ffn"):
        plots.attribution_map(folder, 1)


def test_tax_is_drawn_for_both_splits_with_the_rolled_back_hollow(folder: RunFolder, figures: list[Figure]) -> None:
    path = plots.tax_separation(folder)
    assert png_size(path) == (990, 660)
    (axis,) = figures[0].axes
    lines: dict[str, Any] = {line.get_label(): line for line in axis.lines}
    assert list(lines["dense twin"].get_ydata()) == [0.0, 0.0]
    assert list(lines["split model, after recovery"].get_ydata()) == [0.01]
    rolled_back = lines["split model, rolled back"]
    assert (list(rolled_back.get_xdata()), list(rolled_back.get_ydata())) == ([0.4], [0.04])
    assert rolled_back.get_markerfacecolor() == "white"
    assert list(lines["random split, same sizes, after recovery"].get_ydata()) == [0.04]


def test_the_told_twin_is_a_line_at_its_last_tax(tmp_path: Path, figures: list[Figure]) -> None:
    folder = fake_run(tmp_path)
    tell(folder, story(["random", "told"]))
    plots.tax_separation(folder)
    (line,) = (line for line in figures[0].axes[0].lines if str(line.get_label()).startswith("told twin"))
    assert line.get_label() == "told twin, round 2"
    assert list(line.get_ydata()) == pytest.approx([-0.03, -0.03])
    finish(folder, ["random", "told"])
    plots.tax_separation(folder)
    (line,) = (line for line in figures[1].axes[0].lines if str(line.get_label()).startswith("told twin"))
    assert line.get_label() == "told twin, end of the run (test)"
    assert list(line.get_ydata()) == pytest.approx([-0.05, -0.05])


def test_what_was_not_controlled_for_is_not_drawn(folder: RunFolder, tmp_path: Path, figures: list[Figure]) -> None:
    plots.tax_separation(folder)
    bare = fake_run(tmp_path, 2)
    tell(bare, story([]))
    plots.tax_separation(bare)
    finish(bare, [])
    plots.tax_separation(bare)
    usual, *others = ([str(line.get_label()) for line in figure.axes[0].lines] for figure in figures)
    assert not any(label.startswith("told") for label in usual)
    for labels in others:
        assert not any(label.startswith(("random", "told")) for label in labels)
        assert "split model, after recovery" in labels


def test_the_end_of_the_run_is_drawn_beside_its_rounds(folder: RunFolder, figures: list[Figure]) -> None:
    finish(folder)
    plots.tax_separation(folder)
    lines: dict[str, Any] = {line.get_label(): line for line in figures[0].axes[0].lines}
    end = lines["split model, end of the run (test)"]
    assert (list(end.get_xdata()), list(end.get_ydata())) == ([0.5], [0.02])


def test_a_round_without_attribution_still_gets_the_tax_plot(folder: RunFolder) -> None:
    assert plots.draw(folder, 1) == [plots.tax_path(folder)]
    leave_rounds(folder, sites=1)
    assert plots.draw(folder, 1) == [plots.tax_path(folder), plots.attribution_path(folder, 1)]
    assert not list(folder.plots.glob(".*"))


def test_drawing_needs_no_display_and_no_global_figure(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    monkeypatch.setenv("MPLBACKEND", "tkagg")
    assert plots.tax_separation(folder).is_file()


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ("[0.05]", None),
        ("{per: mean}", None),
        ("{tax: [1]}", None),
        ("null", None),
        ("{tax: 0.02}", 0.02),
        ("{tax: 1 %}", 0.05),
        ("{tax: 0.02, per: category}", None),
    ],
)
def test_the_budgets_line_is_where_rounds_are_judged(tmp_path: Path, budget: str, line: float | None) -> None:
    folder = fake_run(tmp_path)
    folder.resolved.write_text(f"name: fake\nbudget: {budget}\n")
    rounds = [event for event in story() if isinstance(event, RoundEnded)]
    judged = [event.model_copy(update={"budget_used": event.tax / 0.05}) for event in rounds]
    assert plots.budget_of(folder, judged) == (None if line is None else pytest.approx(line))
    if "%" in budget:  # no round has said yet how much that is
        assert plots.budget_of(folder, rounds) is None


@pytest.mark.parametrize(("budget", "drawn"), [(0.05, True), (5.0, False)])
def test_a_budget_far_away_is_told_and_not_drawn(budget: float, drawn: bool) -> None:
    rounds = [event for event in story() if isinstance(event, RoundEnded)]
    axis = plots.tax_figure(rounds, None, "token", budget).axes[0]
    (line,) = (line for line in axis.lines if str(line.get_label()).startswith("budget"))
    assert list(line.get_ydata()) == ([budget, budget] if drawn else [])
    assert axis.get_ylim()[1] < 1.0
