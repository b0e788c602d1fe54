"""`moeify route` and `moeify generate` through the real command line, on small runs, and on bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from moeify.routers.router import Layer, load_router, save_router
from moeify.store import CorruptCheckpointError, read_manifest, write_folder
from tests.finished_runs import TINY, call, finish

pytestmark = pytest.mark.usefixtures("shapes_unchecked", "few_rows_to_fit")

TEXT = TINY + "controls: [told]\n"
DIGITS = """name: images
data: {kind: digits}
model: {kind: autoencoder, hidden: 40, code: 4}
training: {steps: 20, rows: 20}
attribution: {rows: 8, rows_at_once: 20}
partition: {multiple: 2, min_units: 2}
rounds: [{train: 5, recover: 5, branching: 10, separation: 0.4}]
evaluation: {validation_rows: 16, test_rows: 16, rows_at_once: 20}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, laid_out: Path) -> Path:
    """A folder with a finished run of text and one of images."""
    return finish(tmp_path_factory.mktemp("route"), {"tiny": TEXT, "images": DIGITS}, laid_out)


def folder(place: Path, name: str) -> Path:
    (found,) = (place / "runs").glob(f"{name}-*")
    return found


def test_a_router_is_trained_shown_and_kept(place: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder(place, "tiny") / "checkpoints").rglob("*")}
    done = call(place, "route", "tiny")
    assert done.exit_code == 0, done.output
    for words in ("Ways to use it", "taken", "router tax", "over dense", "over told", "Who serves whom", "calibration"):
        assert words in done.stdout
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()[:-3]) <= 80
    assert {path.name for path in (folder(place, "tiny") / "router").iterdir()} == {
        "manifest.json",
        "report.json",
        "router.safetensors",
    }
    assert before == {path: path.stat().st_mtime_ns for path in (folder(place, "tiny") / "checkpoints").rglob("*")}
    kept = json.loads((folder(place, "tiny") / "router" / "report.json").read_text())
    told = json.loads(call(place, "route", "tiny", "--json").stdout)
    assert told.pop("run").startswith("tiny-")
    assert told == kept
    assert set(kept["confusion"]) == {"code", "prose"}
    assert 'id="router"' in (folder(place, "tiny") / "report.html").read_text()
    texts = kept["texts"]
    wanted = [["code"], ["code", "prose"], ["prose"], ["prose", "code"]]
    assert [text["categories"] for text in texts] == (wanted if kept["kind"] == "token" else [["code"], ["prose"]])
    assert all(len(text["pieces"]) == len(text["experts"]) == 16 for text in texts)
    assert load_router(folder(place, "tiny")).kind == kept["kind"]


@pytest.mark.parametrize("kind", ["document", "token"])
def test_text_is_written_and_says_who_served_it(place: Path, kind: str) -> None:
    assert call(place, "route", "tiny", "--kind", kind, "--threshold", "0.9", "--json").exit_code == 0
    asked = ("generate", "tiny", "--prompt", "def f(x):\n", "--tokens", "12", "--seed", "3")
    one, again = (json.loads(call(place, *asked, "--json").stdout) for _ in range(2))
    assert one == again
    assert "".join(token["text"] for token in one["tokens"] if not token["written"]) == "def f(x):\n"
    assert "".join(token["text"] for token in one["tokens"] if token["written"]) == one["text"]
    assert sum(token["written"] for token in one["tokens"]) <= 12
    assert {token["expert"] for token in one["tokens"]} <= {"code", "prose"}
    written = [token for token in one["tokens"] if token["written"]]
    assert all((token["second"] is not None) == (token["probability"] < 0.9) for token in written)
    if kind == "document":
        assert len({(token["expert"], token["probability"]) for token in one["tokens"]}) == 1
    plain = call(place, *asked).stdout
    assert plain.startswith("def f(x):\n")
    assert "prompt" in plain
    assert "written" in plain
    assert "\x1b" not in plain
    table = plain[plain.index("tokens") :].splitlines()
    assert max(len(line.rstrip()) for line in table) <= 80


def test_colours_are_for_terminals_that_want_them(place: Path) -> None:
    asked = ("generate", "tiny", "--prompt", "The", "--tokens", "3", "--category", "prose")
    coloured = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    shown = call(place, *asked, **coloured).stdout
    assert "\x1b[1;35m" in shown or "\x1b[1;36m" in shown
    assert "tokens by expert" in shown
    assert "\x1b[3" not in call(place, *asked, **coloured, NO_COLOR="1").stdout


def test_a_category_needs_no_router_and_an_empty_prompt_is_a_new_document(place: Path) -> None:
    asked = ("generate", "tiny", "--prompt", "", "--tokens", "4", "--seed", "1", "--category", "code", "--json")
    told = json.loads(call(place, *asked).stdout)
    assert [token["probability"] for token in told["tokens"]] == [None] * len(told["tokens"])
    assert {token["expert"] for token in told["tokens"]} == {"code"}
    assert all(token["written"] for token in told["tokens"])


def test_images_are_routed_one_by_one(place: Path) -> None:
    done = call(place, "route", "images")
    assert done.exit_code == 0, done.output
    assert "nats per example" in done.stdout
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()[:-2]) <= 80
    kept = json.loads((folder(place, "images") / "router" / "report.json").read_text())
    assert kept["accuracy"] > 0.8
    assert kept["later"] is None


@pytest.mark.parametrize("name", ["tiny", "images"])
def test_a_run_keeps_examples_of_its_experts_and_a_report_can_pick_them_anew(place: Path, name: str) -> None:
    run = folder(place, name)
    kept = (run / "portraits.json").read_bytes()
    (run / "portraits.json").unlink()
    assert call(place, "report", name).exit_code == 0
    assert 'id="experts"' not in (run / "report.html").read_text()
    done = call(place, "report", name, "--examples")
    assert done.exit_code == 0, done.output
    assert (run / "portraits.json").read_bytes() == kept
    assert 'id="experts"' in (run / "report.html").read_text()
    assert '"artifact/portraits.json"' in (run / "journal.jsonl").read_text()


def test_a_router_of_another_checkpoint_or_with_a_changed_file_is_refused(place: Path) -> None:
    assert call(place, "route", "tiny", "--kind", "document", "--threshold", "0", "--json").exit_code == 0
    run = folder(place, "tiny")
    router = load_router(run)
    weights = run / "router" / "router.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptCheckpointError, match="not what was written"):
        load_router(run)
    weights.write_bytes(whole)
    shutil.rmtree(folder(place, "images") / "router", ignore_errors=True)
    shutil.copytree(run / "router", folder(place, "images") / "router")
    with pytest.raises(ValueError, match="another checkpoint"):
        load_router(folder(place, "images"))
    save_router(router, run, b"{}")
    again = load_router(run)
    assert again.threshold == 0.0
    for one, other in zip(router.layers, again.layers, strict=True):
        assert torch.equal(one.weight_OI, other.weight_OI)
        assert torch.equal(one.bias_O, other.bias_O)


def test_a_router_of_the_first_version_is_one_layer(place: Path) -> None:
    assert call(place, "route", "tiny", "--kind", "document", "--json").exit_code == 0
    run = folder(place, "tiny")
    facts = read_manifest(run / "router")["facts"]
    line = Layer(torch.randn(2, 33).double(), torch.randn(2).double())
    old = {"router": {"weight": line.weight_OI, "bias": line.bias_O}}
    write_folder(run / "router", facts | {"router": 1}, old, {"report.json": b"{}"})
    (layer,) = load_router(run).layers
    assert all(map(torch.equal, layer, line))
    write_folder(run / "router", facts | {"router": 3}, old, {"report.json": b"{}"})
    with pytest.raises(ValueError, match="has version 3, wanted 2; train it with: moeify route"):
        load_router(run)
    write_folder(run / "router", facts, old, {"report.json": b"{}"})
    with pytest.raises(ValueError, match=r"a router of 2 experts got weights \[\]"):
        load_router(run)


def test_mistakes_are_told_in_a_line(place: Path) -> None:
    cases = {
        ("route", "nothing"): "no run 'nothing'",
        ("route", "tiny", "--threshold", "2"): "2.0 is not in the range",
        ("route", "images", "--kind", "token"): "take 'document'",
        ("route", "images", "--threshold", "0.5"): "single examples",
        ("generate", "images", "--prompt", "x"): "only language models write text",
        ("generate", "tiny", "--prompt", "x", "--category", "cod"): "nearest: code",
        ("generate", "tiny"): "Missing option '--prompt'",
    }
    for asked, told in cases.items():
        done = call(place, *asked)
        assert done.exit_code == 2, done.output
        assert told in done.output
        assert "Traceback" not in done.output
