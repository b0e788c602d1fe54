"""Pictures and outlines: what is drawn is what the run's files say."""

import base64
import io
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from fake_runs import CATEGORIES, NODES, fake_run, finish, leave_rounds, story, tell
from PIL import Image

from attribution.heatmap import figure as figure_of
from moeify.events import RoundEnded, Started
from pipelines.report import boxes, maps, ownership
from pipelines.report.affinity import affinities
from pipelines.report.cost import costs, in_words
from pipelines.report.experts import removals
from pipelines.report.figures import thinned
from pipelines.report.recorded import Recorded
from pipelines.report.svg import inline
from pipelines.round_files import Ownership, OwningNode, RoundMap, read_map
from pipelines.runs import RunFolder

TREE = {
    "name": "core",
    "categories": ["a", "b", "c"],
    "units": 50,
    "children": [
        {
            "name": "a+b",
            "categories": ["a", "b"],
            "units": 10,
            "children": [
                {"name": "a", "categories": ["a"], "units": 10, "children": []},
                {"name": "b", "categories": ["b"], "units": 0, "children": []},
            ],
        },
        {"name": "c", "categories": ["c"], "units": 30, "children": []},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = fake_run(tmp_path)
    leave_rounds(folder, sites=2, units=100)
    tell(folder, story())
    return folder


def pixels(data: str) -> np.ndarray:
    head, _, body = data.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGBA"))


def test_shades_are_logarithms_and_zero_is_apart() -> None:
    values = np.array([[1.0, 0.1, 1e-2], [1e-4, 1e-9, 0.0]])
    assert maps.shade(values, 1.0).tolist() == [[255, 191, 128], [1, 1, 0]]
    assert maps.shade(np.array([[np.nan, np.inf]]), 1.0).tolist() == [[0, 255]]


def test_a_png_holds_every_shade_and_lets_zero_through() -> None:
    seen = pixels(maps.png(np.array([[0, 1], [128, 255]])))
    assert seen[0, 0, 3] == 0
    assert (seen[..., 3].ravel()[1:] == 255).all()
    assert seen[0, 1, :3].tolist() == [68, 1, 84]  # viridis from its first
    assert seen[1, 1, :3].tolist() == [253, 231, 37]  # to its last


def test_a_map_has_its_units_in_tree_order_and_its_experts_outlined(folder: RunFolder) -> None:
    found = read_map(folder, 1)
    picture, _ = maps.pictures(found, {"core": "core"})
    assert (picture.title, picture.units, picture.columns) == ("layers.0.ffn", 100, 4)
    table_UC = found.tables_UC["layers.0.ffn"]
    order_U = np.lexsort((-table_UC.sum(axis=1), found.ownership.owners["layers.0.ffn"]))
    top = max(float(table.max()) for table in found.tables_UC.values())
    shown = pixels(picture.data)
    assert shown.shape == (100, 4, 4)
    assert ((shown[..., 3] == 0) == (maps.shade(table_UC[order_U], top) == 0)).all()
    assert (
        picture.frames
        == "M0 0h4v220h-4zM0 220h3v100h-3zM0 320h1v180h-1zM1 500h1v160h-1zM2 660h1v140h-1zM3 800h1v200h-1z"
    )
    assert [name.name for name in picture.names] == [str(node["name"]) for node in NODES]


def test_the_last_round_kept_is_on_the_page_however_many_came_after(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    leave_rounds(folder, sites=1, units=20)
    first, second = (event for event in story() if isinstance(event, RoundEnded))
    later = []
    for number in range(3, 8):
        later.append(second.model_copy(update={"id": f"round/{number}", "round": number}))
        shutil.copytree(folder.rounds / "2", folder.rounds / str(number))
    uncut = second.model_copy(update={"id": "round/8", "round": 8, "uncut": "no step left", "accepted": True})
    tell(folder, [story()[0], first, second, *later, uncut])
    shown = [(each.head, each.is_open) for each in maps.maps_by_round(Recorded.read(folder), {})]
    assert shown == [*((f"round {n}, rolled back", False) for n in (7, 6, 5)), ("round 1", True)]


def test_many_units_and_categories_become_few_pixels() -> None:
    nodes = (OwningNode(name="core", parent=None, categories=tuple(f"c{i}" for i in range(400))),)
    sites = {f"s{i}": np.ones((2000, 400)) for i in range(20)}
    found = RoundMap(Ownership(nodes=nodes, owners={site: [0] * 2000 for site in sites}), sites, "fisher")
    seen = [pixels(picture.data) for picture in maps.pictures(found, {}, share=0.5)]
    assert sum(each.shape[0] * each.shape[1] for each in seen) <= 500_000
    assert min(each.shape[0] for each in seen) >= 40


def test_siblings_share_a_hue_below_their_parent_and_children_of_the_core_do_not() -> None:
    assert boxes.looks(TREE) == {
        "core": "core",
        "a+b": "hue1 depth1",
        "a": "hue1 depth2",
        "b": "hue1 depth2",
        "c": "hue2 depth1",
    }
    assert boxes.served(TREE, ["c", "a", "b"]) == {"core": "1 2 0", "a+b": "1 2", "a": "1", "b": "2", "c": "0"}


def test_columns_stack_what_every_expert_owns(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    events = []
    for event in story():
        if isinstance(event, Started):
            events.append(event.model_copy(update={"categories": ("a", "b", "c"), "sites": {"s": 100}}))
        elif isinstance(event, RoundEnded):
            events.append(event.model_copy(update={"tree": TREE}))
    tell(folder, events)
    dense, first, second = ownership.ownership_by_round(Recorded.read(folder), boxes.looks(TREE))
    assert [(column.head, column.kept) for column in (dense, first, second)] == [
        ("dense", True),
        ("round 1", True),
        ("round 2", False),
    ]
    assert second.note == "rolled back"
    assert [(box.top, box.height) for box in dense.owners] == [(0, 100)]
    stacked = [(box.title.split(":")[0], box.top, box.height, box.serves) for box in first.owners]
    assert stacked == [("core", 0, 50, "0 1 2"), ("a+b", 50, 10, "0 1"), ("a", 60, 10, "0"), ("c", 70, 30, "2")]


def test_strips_hold_every_unit_and_lump_experts_where_they_are_very_many() -> None:
    nodes = [OwningNode(name="core", parent=None, categories=("x",))]
    for group in range(2):
        nodes.append(OwningNode(name=f"g{group}", parent=0, categories=("x",)))
        above = len(nodes) - 1
        nodes += [OwningNode(name=f"g{group}.{i}", parent=above, categories=("x",)) for i in range(20)]
    owners = list(range(len(nodes)))
    few = ownership.ownership_by_site(Ownership(nodes=tuple(nodes), owners={"s": owners}), {})
    assert len(few[0].owners) == len(nodes)
    many = ownership.ownership_by_site(Ownership(nodes=tuple(nodes), owners={f"s{i}": owners for i in range(40)}), {})
    assert [box.title for box in many[0].owners] == ["core: 1 units", "g0: 21 units", "g1: 21 units"]
    assert sum(box.width for box in many[0].owners) == pytest.approx(100)


def test_affinities_stand_in_the_dendrograms_order() -> None:
    random = np.random.default_rng(0)
    one, other = random.random((2, 60, 1)) ** 4
    table = np.hstack([one, other, one, other]) * (1 + 0.05 * random.random((60, 4)))
    nodes = (OwningNode(name="core", parent=None, categories=("a", "b", "c", "d")),)
    found = affinities(RoundMap(Ownership(nodes=nodes, owners={"s": [0] * 60}), {"s": table}, "fisher"))
    assert found is not None
    assert sorted(map(set, (found.categories[:2], found.categories[2:])), key=min) == [{"a", "c"}, {"b", "d"}]
    assert np.allclose(np.diag(found.values), 1.0)
    assert found.values[0][1] > 0.9 > 0 > found.values[0][2]
    assert found.merges.count("M") == 3
    alone = RoundMap(
        Ownership(nodes=(OwningNode(name="core", parent=None, categories=("a",)),), owners={"s": [0] * 60}),
        {"s": table[:, :1]},
        "fisher",
    )
    assert affinities(alone) is None


def test_costs_are_those_of_the_route(folder: RunFolder) -> None:
    plan = story()[0]
    assert isinstance(plan, Started)
    changed = {"unit_parameters": {"layers.0.ffn": 30, "layers.1.ffn": 10}, "parameters": 5000}
    changed |= {"sites": {"layers.0.ffn": 100, "layers.1.ffn": 100}}
    folder.journal.unlink()
    tell(folder, [plan.model_copy(update=changed), *story()[1:]])
    finish(folder)
    dense, *rows, mean = costs(Recorded.read(folder))
    assert (dense.flops, dense.flops_share, dense.parameters, dense.parameters_share) == (8000, 1.0, 5000, 1.0)
    route = {"python": 0.22 + 0.1 + 0.18, "prose": 0.22 + 0.2, "c": 0.22 + 0.1 + 0.16, "web": 0.22 + 0.1 + 0.14}
    assert {row.category: row.flops for row in rows} == {c: pytest.approx(8000 * route[c]) for c in CATEGORIES}
    assert {row.category: row.parameters for row in rows} == {
        c: pytest.approx(1000 + 4000 * route[c]) for c in CATEGORIES
    }
    assert mean.flops == pytest.approx(8000 * sum(route.values()) / 4)


def test_a_run_that_did_not_record_its_units_parameters_tells_units_alone(folder: RunFolder) -> None:
    finish(folder)
    dense, *rows = costs(Recorded.read(folder))
    assert (dense.flops, dense.parameters) == (None, 1000)
    assert {(row.units, row.flops, row.parameters) for row in rows} == {(0.5, None, None)}


def test_large_numbers_have_a_unit() -> None:
    assert [in_words(n) for n in (0.0, 950.0, 1234.0, 7e9, 2.5e13)] == ["0", "950", "1.23 k", "7 G", "25 T"]


def test_the_matrix_tells_zero_from_never_and_from_unknown(folder: RunFolder) -> None:
    finish(folder)
    run = Recorded.read(folder)
    run.known["tree"] = TREE
    run.known["own_other"] = {
        "a": {"a+b": 0.5, "a": None, "b": 0.0, "c": 0.0},
        "b": {"a+b": -0.25, "a": 0.0, "b": 0.0, "c": 0.0},
        "c": {"a+b": 0.0, "a": 0.0, "b": 0.0, "c": 1.0},
    }
    found = removals(run, boxes.looks(TREE), boxes.served(TREE, ["a", "b", "c"]))
    assert found is not None
    columns, rows, left_out = found
    assert (columns, left_out) == (["a", "b", "c"], 0)
    seen = {row.name: [(cell.kind, cell.text, cell.strength) for cell in row.cells] for row in rows}
    never = ("never", "·", 0.0)
    assert seen == {
        "a+b": [("rise", "+0.5000", 0.5), ("fall", "-0.2500", 0.25), never],
        "a": [("unknown", "?", 0.0), never, never],
        "b": [never, ("rise", "+0.0000", 0.0), never],
        "c": [never, never, ("rise", "+1.0000", 1.0)],
    }


def test_a_thinned_curve_keeps_its_ends_and_averages_the_rest() -> None:
    steps, losses = np.arange(1000.0), np.linspace(5.0, 1.0, 1000)
    few_steps, few_losses = thinned((steps, losses), 50)
    assert len(few_steps) == len(few_losses) <= 51
    assert (few_steps[0], few_steps[-1], few_losses[-1]) == (0.0, 999.0, 1.0)
    assert np.allclose(few_losses, 5.0 - 4.0 * few_steps / 999.0)
    assert thinned((steps[:9], losses[:9]), 50)[0] is not None


def test_a_figure_becomes_a_part_of_the_page() -> None:
    figure = figure_of(3.0, 2.0)
    axis = figure.subplots()
    axis.plot([1, 2], [3, 4], color="#0072B2", gid="line")
    axis.set_title("a <b> & c", parse_math=False)
    text = inline(figure, "mine", 'a "label"', {"line": "told <here>"})
    root = ElementTree.fromstring(text)
    assert root.tag == "svg"
    assert root.attrib["aria-label"] == 'a "label"'
    assert "http" not in text
    assert "xmlns" not in text
    assert not list(root.iter("style"))
    ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
    assert ids
    assert all(each.startswith("mine-") for each in ids)
    known = {f"#{each}" for each in ids}
    assert {node.attrib["href"] for node in root.iter("use")} <= known
    line = next(node for node in root.iter("g") if node.attrib.get("id") == "mine-line")
    assert [title.text for title in line.iter("title")] == ["told <here>"]
    assert "var(--split)" in text
    assert "#0072b2" not in text
    assert "a &lt;b&gt; &amp; c" in text
