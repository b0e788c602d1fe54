"""The report as a file: whole, of one piece, with nothing to fetch and nothing unescaped, whatever the run recorded."""

import base64
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_runs import CATEGORIES, fake_run, finish, leave_rounds, story, tell
from safetensors.numpy import load_file, save_file

from moeify.events import Evaluated, Event, Failed, RoundEnded, Started, Step
from moeify.recipe.arms import Control
from moeify.result import Result
from pipelines.cli import main
from pipelines.report.page import build, write, write_or_warn
from pipelines.runs import RunFolder

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

SECTIONS = [
    *("headline", "tree", "experts", "ownership", "attribution", "tax", "training", "removal", "affinity"),
    *("router", "cost"),
]
CONTROLS: tuple[Control, ...] = ("random", "told")
FETCHING = ("src", "href", "srcset", "data", "action", "poster", "xlink:href")
VOID = {"meta", "img", "br", "link", "input", "hr"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a browser would see: ids, tags, attributes and text; raises where tags do not close as they opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def fetches(html: str) -> list[str]:
    """Return everything in a page that a browser would go and get."""
    page = Page(html)
    found = [
        f"{tag} {name}={value[:60]}"
        for tag, name, value in page.attributes
        if name in FETCHING and not value.startswith(("#", "data:"))
    ]
    found += [address for address in re.findall(r"url\(([^)]*)\)", html) if not address.startswith("#")]
    return (
        found
        + re.findall(r"@import[^;]*", html)
        + [tag for tag in ("link", "iframe", "object", "base") if page.tags[tag]]
    )


def full_run(home: Path, events: list[Event] | None = None) -> RunFolder:
    folder = fake_run(home)
    leave_rounds(folder, sites=3)
    tell(folder, story(CONTROLS) if events is None else events)
    finish(folder, CONTROLS)
    result = json.loads(folder.result.read_text())
    tree = tree_of_nodes(folder)
    names = [node["name"] for node in walk(tree)][1:]
    result["tree"] = tree
    result["own_other"] = {c: {n: 0.5 if c in n.split("+") else 0.0 for n in names} for c in CATEGORIES}
    folder.result.write_text(json.dumps(result))
    return folder


def leave_portraits(folder: RunFolder, text: str = "def", category: str = "python", pixels: int = 0) -> None:
    """Write examples of two experts, as a run does at its end: of text, or of pictures with so many pixels a side."""
    example: dict[str, Any] = {"category": category, "activity": 0.25, "rise": 1.5}
    if pixels:
        grey = base64.b64encode(np.random.default_rng(0).integers(0, 256, pixels**2, dtype=np.uint8).tobytes()).decode()
        example |= {"kind": "picture", "size": (pixels, pixels, 1), "pixels": grey}
    else:
        pieces = [text, " x", "\n", "\u202eback\x07"]
        each = {"activity": [0.1, 0.2, 0.3, 0.3], "rise": [0.0, 2.5, 0.2, -0.1]}
        example |= {"kind": "text", "pieces": pieces, **each}
    token = {"text": text, "count": 3, "rise": 2.25}
    expert = {"activity": 0.3, "rise": 0.12, "active": [example] * 3, "missed": [example] * 2, "tokens": [token]}
    known = {"rows": 16, "experts": [{"expert": name, **expert} for name in ("core", "python")]}
    folder.portraits.write_text(json.dumps(known))


def leave_router(folder: RunFolder, text: str = "def", name: str = "python") -> None:
    """Write what ``moeify route`` writes, as far as the report reads it."""
    experts = ["python", "c", "web", "prose"]
    figures = {"loss": 3.6, "router_tax": 0.01, "loss_all": 3.7, "router_tax_all": 0.02}
    by_category = {**dict.fromkeys(CATEGORIES, 0.01), "mean": 0.01}
    compared = {
        "loss": {arm: {**dict.fromkeys(CATEGORIES, 3.5), "mean": 3.5} for arm in ("label", "router", "dense")},
        "router_tax": by_category,
        "router_tax_error": 0.001,
        "over_dense": by_category,
        "over_dense_error": 0.001,
        "over_told": None,
    }
    known = {
        "kind": "token",
        "threshold": 0.9,
        "experts": experts,
        "unit": "token",
        "prefix": 32,
        "choices": [{"kind": "token", "threshold": 0.9, "asked": 0.2, **figures}],
        "asked": 0.2,
        "accuracy": 0.91,
        "accuracy_sure": 0.97,
        "accuracy_unsure": 0.6,
        "accuracy_after": {"1": 0.5, "2": 0.75},
        "confusion": {c: {e: 0.85 if e == c else 0.05 for e in experts} for c in CATEGORIES},
        "calibration_error": 0.01,
        "whole": compared,
        "later": None,
        "texts": [
            {
                "categories": [name, "prose"],
                "pieces": [text, "", " that", " is"],
                "experts": [0, 0, 0, 3],
                "probabilities": [0.5, 0.95, 0.95, 0.8],
            }
        ],
    }
    folder.router.parent.mkdir()
    folder.router.write_text(json.dumps(known))


def walk(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [tree, *(node for child in tree["children"] for node in walk(child))]


def tree_of_nodes(folder: RunFolder) -> dict[str, Any]:
    """Return the nested tree of the last round's partition, as a real run has it in its result."""
    partition = json.loads((folder.rounds / "2" / "partition.json").read_text())
    owned = sum(np.array(widths) for widths in partition["widths"].values())

    def nest(index: int) -> dict[str, Any]:
        node = partition["nodes"][index]
        below = [i for i, other in enumerate(partition["nodes"]) if other["parent"] == index]
        return {
            "name": node["name"],
            "categories": node["categories"],
            "units": int(owned[index]),
            "children": [nest(child) for child in below],
        }

    return nest(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = full_run(tmp_path_factory.mktemp("home"))
    leave_portraits(folder)
    leave_router(folder)
    return folder


@pytest.fixture(scope="module")
def html(folder: RunFolder) -> str:
    return build(folder)


def test_a_full_run_has_every_section_once_and_in_order(html: str) -> None:
    page = Page(html)
    assert [each for each in page.ids if each in (*SECTIONS, "provenance")] == [*SECTIONS, "provenance"]
    targets = {value.removeprefix("#") for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert targets == {*SECTIONS[1:], "provenance"}
    assert len(set(page.ids)) == len(page.ids)


def test_nothing_is_fetched_and_the_browser_is_told_so(html: str) -> None:
    assert fetches(html) == []
    assert "http://" not in html
    assert "https://" not in html
    policy = next(value for tag, _, value in Page(html).attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none'")


def test_what_would_be_fetched_is_noticed() -> None:
    assert fetches('<img src="x.png"><p style="background:url(a.png)"></p>') == ["img src=x.png", "a.png"]


def test_the_page_says_what_the_run_did(html: str) -> None:
    text = Page(html).text
    assert "50.0% separated at a tax of +0.0200 nats per token" in text
    assert "Level with a random split of the same sizes; above a dense twin that is told" in text
    assert "Round 2 was rolled back" in text
    assert "python+c+web" in text
    assert "+0.5000" in text
    assert "name: fake" in text


@pytest.mark.parametrize("count", [0, 1, 2, 7, 16, 21, 29, 100])
def test_an_unfinished_run_has_a_page_of_what_is_there(tmp_path: Path, count: int) -> None:
    folder = fake_run(tmp_path)
    leave_rounds(folder, sites=1)
    tell(folder, story(CONTROLS)[:count])
    page = Page(build(folder))
    assert {"headline", "provenance"} <= set(page.ids)
    assert ("training" in page.ids) == any(isinstance(event, Step) for event in story(CONTROLS)[:count])
    assert ("tax" in page.ids) == any(isinstance(event, RoundEnded) for event in story(CONTROLS)[:count])
    assert "removal" not in page.ids
    assert f"Go on with: moeify resume {folder.id}" in page.text


def test_what_was_foreseen_stands_beside_what_was_measured(tmp_path: Path) -> None:
    foreseen = {"expected": 0.015, "budget_used": 0.5, "budget_error": 0.05, "gap": 3e-16}
    judged = [e.model_copy(update=foreseen) if isinstance(e, RoundEnded) else e for e in story()]
    folder = full_run(tmp_path, judged)
    page = Page(build(folder))
    assert "Expected and measured tax" in page.text
    assert "round 2, rolled back: expected +0.0150, measured +0.0400" in page.text
    assert page.texts.count("50.0% ± 9.8%") >= 2
    assert "the dual bound of the assignments leaves at most 3.0e-16 of their value open" in page.text


def test_a_run_without_its_rounds_files_has_a_page_without_maps(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    tell(folder, story())
    finish(folder)
    page = Page(build(folder))
    assert {"tree", "ownership", "tax", "training", "cost"} <= set(page.ids)
    assert not {"attribution", "affinity"} & set(page.ids)


def test_a_damaged_file_is_left_out_and_told(tmp_path: Path) -> None:
    folder = full_run(tmp_path)
    (folder.rounds / "1" / "attribution.safetensors").write_bytes(b"rubbish")
    page = Page(build(folder))
    assert "Left out:" in page.text
    assert "attribution.safetensors is damaged" in page.text
    assert "attribution" in page.ids


def test_an_expert_is_shown_with_its_tokens_and_excerpts(html: str) -> None:
    page = Page(html)
    text = page.text
    assert "core activity 30.0% · loss +0.1200 without it" in text
    assert "colour: 10% to 30%" in text
    assert "def +2.25" in text
    spans = [value for tag, name, value in page.attributes if (tag, name) == ("span", "title") and "activity" in value]
    assert spans.count("activity 20%, +2.50 nats without the expert") == 2 * 5
    assert ("span", "class", "missed") in page.attributes
    assert "\u202e" not in html
    assert "\x07" not in html
    assert "\N{REPLACEMENT CHARACTER}back" in text


def test_a_router_shows_whom_it_sends_where_and_colours_text_by_who_serves_it(html: str) -> None:
    page = Page(html)
    assert "right 91.0% of decisions" in page.text
    assert "router tax +1.00% ± 0.20% of the loss by label" in page.text
    own = [value for tag, name, value in page.attributes if (tag, name) == ("td", "class") and value == "rise own"]
    assert len(own) == len(CATEGORIES)
    assert page.texts.count("85%") == len(CATEGORIES)
    assert page.texts.count("5%") == len(CATEGORIES) * 3
    served = html[html.index('class="served"') :]
    assert "python → prose" in served
    runs = re.findall(r'<span class="run tint (hue\d)"><b>(\w+)</b>(.*?)</span></span>', served)
    assert [(look, expert) for look, expert, _ in runs] == [("hue1", "python"), ("hue4", "prose")]
    assert runs[0][2].count("<span") == 2
    assert '<span class="missed" title="python 50%">def</span>' in served


def test_a_rise_without_an_expert_stands_with_its_interval(tmp_path: Path) -> None:
    folder = full_run(tmp_path)
    assert "95 % interval over the category's test rows" not in build(folder)
    result = json.loads(folder.result.read_text())
    result["own_other_error"] = {c: dict.fromkeys(rises, 0.01) for c, rises in result["own_other"].items()}
    result["own_other_error"]["prose"] = {}
    folder.result.write_text(json.dumps(result))
    html = build(folder)
    assert "95 % interval over the category's test rows" in html
    assert html.count("+0.5000 <small>± 0.0196</small>") == 6  # three categories, each with its leaf and its group
    assert html.count(">+0.5000</td>") == 1


def test_the_tree_tells_operations(tmp_path: Path) -> None:
    folder = full_run(tmp_path)
    sites = {f"layers.{site}.ffn": 384 for site in range(3)}
    told = {"sites": sites, "unit_parameters": dict.fromkeys(sites, 100)}
    folder.journal.unlink()
    tell(folder, [each.model_copy(update=told) if isinstance(each, Started) else each for each in story(CONTROLS)])
    result = json.loads(folder.result.read_text())
    result["active_flops"] = {**dict.fromkeys(CATEGORIES, 0.75), "mean": 0.75}
    folder.result.write_text(json.dumps(result))
    text = Page(build(folder)).text
    own = [node["units"] for node in walk(tree_of_nodes(folder)) if node["name"] == "prose"]
    assert f"Owns {own[0]} units, which take {2 * 100 * own[0] / 1e3:.3g} k operations a token" in text
    assert text.count("and 75.0% of the whole network's operations") == len(CATEGORIES)


def test_a_damaged_router_is_left_out_and_told(tmp_path: Path) -> None:
    folder = full_run(tmp_path)
    leave_router(folder)
    whole = folder.router.read_text()
    for broken, told in (("[0, 0, 0, 3]", "[0, 0, 0, 4]"), ('"accuracy"', '"accurate"')):
        folder.router.write_text(whole.replace(broken, told))
        page = Page(build(folder))
        assert "router" not in page.ids
        assert "router/report.json is damaged" in page.text


def test_images_of_an_expert_are_drawn_and_stay_small_when_they_are_many(tmp_path: Path) -> None:
    folder = full_run(tmp_path)
    leave_portraits(folder, pixels=8)
    page = Page(build(folder))
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt") and "activity" in value]
    assert pictures == ["python: activity 25.0%, +1.500 nats without the expert"] * 10
    leave_portraits(folder, pixels=500)
    assert len(build(folder).encode()) < 4e6


def test_damaged_examples_are_left_out_and_told(tmp_path: Path) -> None:
    folder = full_run(tmp_path)
    leave_portraits(folder, pixels=8)
    folder.portraits.write_text(folder.portraits.read_text().replace("[8, 8, 1]", "[9, 8, 1]"))
    assert "pixels are not those of a picture of size (9, 8, 1)" in Page(build(folder)).text
    folder.portraits.write_text('{"rows": 16}')
    page = Page(build(folder))
    assert "experts" not in page.ids
    assert (
        f"portraits.json is damaged (Field required); make it anew: moeify report {folder.id} --examples" in page.text
    )


def test_a_damaged_result_is_an_error_in_one_line(tmp_path: Path) -> None:
    folder = full_run(tmp_path)
    folder.result.write_text("{}")
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        write(folder)
    assert not folder.report.exists()


def test_names_and_recipes_are_text_wherever_they_stand(tmp_path: Path) -> None:
    bad = "</script><img src=x onerror=alert(1)>\"' $x$ & {{ 7*7 }}"
    folder = full_run(tmp_path)
    for path in (folder.journal, folder.result, *folder.rounds.glob("*/partition.json")):
        data = path.read_text().replace("prose", json.dumps(bad, ensure_ascii=False)[1:-1])
        path.write_text(data)
    for path in folder.rounds.glob("*/attribution.safetensors"):
        categories = [bad if category == "prose" else category for category in CATEGORIES]
        save_file(load_file(path), path, {"categories": json.dumps(categories), "score": "fisher<b>"})
    leave_portraits(folder, text=bad, category=bad)
    leave_router(folder, text=bad, name=bad)
    folder.recipe.write_text("name: fake # </pre><script>alert(2)</script>\n")
    html = build(folder)
    page = Page(html)
    assert page.tags["script"] == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert bad in "".join(page.texts)
    assert "</pre><script>alert(2)</script>" in "".join(page.texts)
    assert fetches(html) == []


def test_numbers_that_are_not_finite_are_no_trouble(tmp_path: Path) -> None:
    infinite = [
        event.model_copy(update={"tax": float("inf"), "tax_error": None, "predicted": float("nan")})
        if isinstance(event, RoundEnded)
        else event.model_copy(update={"loss": dict.fromkeys(CATEGORIES, float("inf"))})
        if isinstance(event, Evaluated | Step)
        else event
        for event in story(CONTROLS)
    ]
    folder = full_run(tmp_path, infinite)
    result = Result.model_validate_json(folder.result.read_bytes())
    own_other = {c: dict.fromkeys(rises, float("inf")) for c, rises in result.own_other.items()}
    endless = dict.fromkeys((*CATEGORIES, "mean"), float("inf"))
    folder.result.write_text(result.model_copy(update={"own_other": own_other, "tax": endless}).model_dump_json())
    page = Page(build(folder))
    assert "A question mark: not measured, or not finite." in page.text


def test_the_report_is_written_whole_to_the_run_or_where_it_is_asked(tmp_path: Path, folder: RunFolder) -> None:
    out = write(folder, tmp_path / "page.html")
    assert Page(out.read_text()).tags["main"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_what_ended_a_run_is_on_the_page(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    tell(folder, [*story()[:20], Failed(id="failed", time=1_700_000_050.0, reason="disk <full>")])
    assert "An error ended it: disk <full>" in Page(build(folder)).text
    assert "Still running: round" in Page(build(folder, "running")).text


def test_a_report_that_cannot_be_made_costs_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = full_run(tmp_path)
    folder.result.write_text("{}")
    write_or_warn(folder)
    told = capsys.readouterr().err
    assert told.startswith(f"moeify: warning: the report of {folder.id} was not written (ValueError")
    assert told.count("\n") == 1


def test_the_command_writes_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    folder = full_run(home)
    monkeypatch.setenv("MOEIFY_HOME", str(home))
    done = CliRunner().invoke(main, ["report", "last"])
    assert (done.exit_code, done.output) == (0, f"report:  {folder.report}\n")
    out = tmp_path / "mine.html"
    assert CliRunner().invoke(main, ["report", folder.id, "--out", str(out)]).exit_code == 0
    assert out.read_text().startswith("<!doctype html>")
    lost = CliRunner().invoke(main, ["report", folder.id, "--out", str(tmp_path / "none" / "x.html")])
    assert lost.exit_code == 2
    assert lost.output.count("\n") == 1


def large_run(home: Path, sites: int = 32, units: int = 8192, categories: int = 24) -> RunFolder:
    """Return a run of two rounds on many sites and units, with a tree of two levels."""
    names = [f"category-{number:02d}" for number in range(categories)]
    nodes: list[dict[str, Any]] = [{"name": "core", "parent": None, "categories": names}]
    for group in np.array_split(names, 5):
        parent = len(nodes)
        nodes.append({"name": "+".join(group), "parent": 0, "categories": list(group)})
        nodes += [{"name": name, "parent": parent, "categories": [str(name)]} for name in group]
    random = np.random.default_rng(0)
    folder = fake_run(home)
    tables, owners = {}, {}
    total = np.zeros(len(nodes), dtype=int)
    for site in range(sites):
        widths = np.floor(units * np.append(0.3, 0.7 * random.dirichlet(np.full(len(nodes) - 1, 5.0)))).astype(int)
        widths[0] += units - widths.sum()
        total += widths
        owners[f"layers.{site}.ffn"] = np.repeat(np.arange(len(nodes)), widths).tolist()
        tables[f"layers.{site}.ffn"] = random.gamma(0.5, 1e-4, (units, categories)).astype(np.float32)

    def nest(index: int) -> dict[str, Any]:
        below = [nest(i) for i, node in enumerate(nodes) if node["parent"] == index]
        return {**nodes[index], "units": int(total[index]), "children": below}

    for round_ in (1, 2):
        place = folder.rounds / str(round_)
        place.mkdir(parents=True)
        save_file(tables, place / "attribution.safetensors", {"categories": json.dumps(names), "score": "fisher"})
        (place / "partition.json").write_text(json.dumps({"nodes": nodes, "owners": owners}))
    events: list[Event] = []
    for event in story(CONTROLS):
        if isinstance(event, Started):
            sites_ = dict.fromkeys(tables, units)
            per_unit = dict.fromkeys(tables, 3 * 4096)
            changed: dict[str, Any] = {"categories": tuple(names), "sites": sites_, "unit_parameters": per_unit}
            events.append(event.model_copy(update={**changed, "parameters": 7_000_000_000}))
        elif isinstance(event, RoundEnded):
            events.append(event.model_copy(update={"tree": nest(0)}))
        elif isinstance(event, Step | Evaluated):
            events.append(event.model_copy(update={"loss": dict.fromkeys(names, 3.0)}))
    numbered = next(event for event in events if isinstance(event, Step))
    for step in range(1000, 6000):
        events.append(numbered.model_copy(update={"id": f"more/{step}", "step": step}))
    tell(folder, events)
    finish(folder, CONTROLS)
    result = json.loads(folder.result.read_text())
    experts = [node["name"] for node in nodes[1:]]
    result |= {"categories": names, "tree": nest(0), "active_fraction": {**dict.fromkeys(names, 0.4), "mean": 0.4}}
    result |= {key: {**dict.fromkeys(names, 0.1), "mean": 0.1} for key in ("tax", "tax_random", "tax_told")}
    result["test_loss"] = {arm: dict.fromkeys(names, 3.0) for arm in result["test_loss"]}
    result["own_other"] = {name: {e: float(name in e.split("+")) for e in experts} for name in names}
    result["own_other_error"] = {name: dict.fromkeys(experts, 0.1) for name in names}
    folder.result.write_text(json.dumps(result))
    return folder


@pytest.mark.slow
def test_thirty_two_layers_of_eight_thousand_units_stay_below_five_megabytes(tmp_path: Path) -> None:
    folder = large_run(tmp_path)
    leave_portraits(folder, category="category-00", pixels=64)
    known = json.loads(folder.portraits.read_text())
    known["experts"][1]["expert"] = "category-00"
    folder.portraits.write_text(json.dumps(known))
    html = build(folder)
    assert len(html.encode()) < 3e6
    page = Page(html)
    assert [each for each in page.ids if each in SECTIONS] == [each for each in SECTIONS if each != "router"]
    assert page.tags["img"] == 2 * 32 + 2 * 5
    assert "262,144 units in 32 sites" in page.text


def in_chromium(page: Path, place: Path, *more: str) -> tuple[str, list[str]]:
    """Load a page; return the document that its scripts left and what it wrote on the console."""
    assert CHROMIUM
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=3000"
    profile = f"--user-data-dir={place / 'profile'}"
    command = [CHROMIUM, *flags.split(), profile, *more, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ})
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the path")
def test_a_browser_renders_it_without_a_word_on_its_console(tmp_path: Path, html: str) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><script>nowhere()</script>")
    assert any("nowhere is not defined" in line for line in in_chromium(broken, tmp_path)[1])

    plain = tmp_path / "page.html"
    plain.write_text(html)
    document, said = in_chromium(plain, tmp_path)
    assert said == []
    seen = Page(document)
    assert set(SECTIONS) <= set(seen.ids)
    assert ("div", "hidden", "") not in seen.attributes  # the script has shown its bar

    # As MLflow shows it: in a frame that may run scripts and nothing else. A click follows a category.
    click = "<script>document.querySelector('[data-follow-bar] button').click();</script></body>"
    framed = tmp_path / "framed.html"
    framed.write_text(html.replace("</body>", click))
    document, said = in_chromium(framed, tmp_path)
    assert said == []
    assert 'class="tint depth' not in document
    assert len(re.findall(r'class="[^"]*\boff\b', document)) > 3
    outer = tmp_path / "outer.html"
    outer.write_text(f'<!doctype html><iframe sandbox="allow-scripts" src="{framed.as_uri()}"></iframe>')
    assert in_chromium(outer, tmp_path)[1] == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the path")
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_sideways(tmp_path: Path, html: str, width: int) -> None:
    """Measured in a frame, since a window is never narrower than 500."""
    page = tmp_path / "page.html"
    probe = "<script>parent.postMessage([document.documentElement.scrollWidth, innerWidth], '*')</script></body>"
    page.write_text(html.replace("</body>", probe))
    outer = tmp_path / "outer.html"
    hear = "onmessage = (event) => { document.body.dataset.said = event.data.join(' '); }"
    frame = f'<iframe src="{page.as_uri()}" width="{width}" height="900"></iframe>'
    outer.write_text(f"<!doctype html><body><script>{hear}</script>{frame}")
    document, _ = in_chromium(outer, tmp_path, "--window-size=1500,1000")
    said = re.search(r'data-said="(\d+) (\d+)"', document)
    assert said is not None, document[:500]
    assert int(said[1]) <= int(said[2])
