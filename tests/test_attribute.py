"""`moeify attribute` through the real command line, on a small run, on a checkpoint, and on bad input."""

import json
from io import StringIO
from pathlib import Path

import networkx as nx
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from attribution.affinity import profile_affinity
from attribution.files import load
from attribution.graph import UnitGraph
from attribution.measure import measure
from moeify.subjects import Probed
from pipelines.attribute import Found, attribute, print_found
from tests.finished_runs import TINY, call, finish
from tests.networks import tiny_decoder
from tests.subjects import subject_of
from tests.test_families import save_tokenizer

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

FILES = {"affinity.graphml", "edges.graphml", "attribution.parquet", "attribution.png", "attribution.safetensors"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, laid_out: Path) -> Path:
    """A folder with the recipe and, in its runs, a finished run."""
    return finish(tmp_path_factory.mktemp("attribute"), {"tiny": TINY}, laid_out)


def test_a_run_is_measured_and_leaves_files(place: Path, tmp_path: Path) -> None:
    done = call(place, "attribute", "last", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    table = load(tmp_path / "out" / "attribution.safetensors")
    assert table.categories == ("code", "prose")
    assert list(table.sites) == ["layers.0.heads", "layers.0.ffn", "layers.1.heads", "layers.1.ffn"]
    assert table.counts.tolist() == [128, 128]
    assert all(line in done.output for line in ("layers.1.heads", "256 tokens", "Affinity"))
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()[:-1]) <= 80
    graph = nx.read_graphml(tmp_path / "out" / "affinity.graphml")
    facts = graph["code"]["prose"]
    assert set(facts) == {"weight", "lower", "upper", "gradient", "gradient_lower", "gradient_upper"}
    assert facts["gradient_lower"] <= facts["gradient"] <= facts["gradient_upper"]
    edges = UnitGraph.from_graphml((tmp_path / "out" / "edges.graphml").read_text(encoding="utf-8")).graph
    assert "layers.1.ffn/code" in edges["layers.0.ffn/core"]
    assert edges["layers.0.ffn/prose"]["layers.1.ffn/core"]["nats.code"] == 0
    assert edges["layers.0.ffn/prose"]["layers.1.ffn/core"]["nats.prose"] != 0
    frame = pyarrow.parquet.read_table(tmp_path / "out" / "attribution.parquet")
    assert frame.num_rows == (64 + 8) * 2


def test_units_that_do_nothing_are_told_with_what_to_do() -> None:
    subject, batches = subject_of("mlp")
    with torch.no_grad():
        up, down = (subject.network.get_submodule(name) for name in ("up", "down2"))
        up.get_parameter("weight")[2] = 0
        up.get_parameter("bias")[2] = -1
        down.get_parameter("weight")[:, 5] = 0
    table = measure(subject, batches)
    told = StringIO()
    print_found("mlp", Found(table, "fisher", profile_affinity(table, "fisher"), "noise", None), "token", told)
    said = " ".join(told.getvalue().split())
    assert "units never active: first 1, second 4; without them nothing changes, so any split may drop them" in said
    assert "no loss depends on them: second 1; measure more rows before they are dropped" in said


def test_units_off_a_categorys_route_count_for_nothing_in_the_split_arm_alone(place: Path, tmp_path: Path) -> None:
    for arm in ("split", "dense"):
        assert call(place, "attribute", "last", "--arm", arm, "--out", str(tmp_path / arm)).exit_code == 0
    split, dense = (load(tmp_path / arm / "attribution.safetensors") for arm in ("split", "dense"))
    unused = torch.cat([split.score(f"layers.{i}.ffn", "absolute") == 0 for i in range(2)])
    assert unused.double().mean() == pytest.approx(0.4, abs=0.05)
    assert not any(bool((dense.score(site, "absolute") == 0).any()) for site in dense.sites)


def test_agreement_is_told_and_kept(place: Path, tmp_path: Path) -> None:
    done = call(place, "attribute", "last", "--arm", "dense", "--rows", "2", "--agreement", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert all(word in done.stdout for word in ("report", "integrated", "Sets of units", "ablation"))
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()[:-1]) <= 80
    found = json.loads((tmp_path / "agreement.json").read_text())
    kinds = {(row["of"], row["value"]) for row in found["rows"]}
    assert kinds == {(of, value) for of in ("units", "sets") for value in ("zero", "mean")}
    assert all(-1 <= row["spearman"]["value"] <= 1 for row in found["rows"])


def test_a_stock_checkpoint_is_measured_with_its_own_tokenizer(place: Path, tmp_path: Path) -> None:
    assert call(place, "export", "last", "--category", "code", "--out", str(tmp_path / "model")).exit_code == 0
    asked = ("attribute", str(tmp_path / "model"), "--data", str(place / "tiny.yaml"), "--rows", "4", "--json")
    done = call(place, *asked, "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["categories"] == ["code", "prose"]
    assert told["tokens"] == {"code": 64, "prose": 64}
    best = told["sites"]["layers.0.ffn"]["strongest"]["code"][0]
    table = load(tmp_path / "out" / "attribution.safetensors")
    assert best["nats"] == float(table.report("layers.0.ffn")[best["unit"], 0])
    assert best["nats"] == float(table.report("layers.0.ffn")[:, 0].max())


def test_a_checkpoint_whose_edges_cannot_be_followed_is_measured_without_them(place: Path, tmp_path: Path) -> None:
    tiny_decoder("gemma2", max_position_embeddings=32).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    asked = ("attribute", str(tmp_path / "model"), "--data", str(place / "tiny.yaml"), "--rows", "4")
    done = call(place, *asked, "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "no edges.graphml: edges between the sites of Gemma2ForCausalLM cannot be followed" in done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"edges.graphml"}
    assert list(load(tmp_path / "out" / "attribution.safetensors").sites) == ["layers.0.ffn", "layers.1.ffn"]


def test_advice_is_given_of_a_runs_dense_twin_by_its_id_or_its_folder(place: Path) -> None:
    (run,) = [each.parent for each in (place / "runs").glob("*/resolved.yaml")]
    said = [
        call(place, "advise", target, "--permutations", "3", "--json") for target in ("last", "last@dense", str(run))
    ]
    assert [done.exit_code for done in said] == [0, 0, 0], said[0].output
    assert len({done.stdout for done in said}) == 1
    told = json.loads(said[0].stdout)
    assert told["of"] == f"{run.name} (dense)"
    assert (told["categories"], told["separation"], told["tree"]) == (["code", "prose"], 0.4, None)
    assert told["affinity"]["value"][0][1] == pytest.approx(-1.0)  # of two categories, always
    assert told["trained"]


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Probed:
    """A subject whose edges cannot be followed."""
    monkeypatch.setattr("pipelines.attribute.entries", lambda _: ())
    subject, batches = subject_of("mlp")
    return Probed(subject, batches, "token")


def asked(probed: Probed, out: Path, *, agreement: bool, said: list[str] | None = None) -> None:
    say = (said if said is not None else []).append
    attribute(probed, out, score="fisher", seed=0, agreement=agreement, removed=0.5, say=say)


def test_nothing_of_an_earlier_call_stands_beside_new_tables(probed: Probed, tmp_path: Path) -> None:
    for name in ("agreement.json", "edges.graphml", "notes.txt"):
        (tmp_path / name).write_text("old")
    asked(probed, tmp_path, agreement=False)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES - {"edges.graphml"}, "notes.txt"}
    masks = {(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert len(masks) == 1


def test_a_place_that_is_no_folder_is_refused_before_anything_is_measured(probed: Probed, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    for out in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(ValueError, match="/file is a file; give a folder"):
            asked(probed, out, agreement=False, said=said)
    assert not said


def test_mistakes_are_told_in_a_line(place: Path, tmp_path: Path) -> None:
    cases = {
        ("attribute", "nothing"): "nothing",
        ("attribute", "last", "--data", "text"): "--data is for a MODEL",
        ("attribute", "last", "--rows", "0"): "0 is not in the range",
    }
    for asked, told in cases.items():
        done = call(place, *asked)
        assert done.exit_code == 2
        assert told in done.output
    (tmp_path / "config.json").write_text("{}")
    done = call(place, "attribute", str(tmp_path))
    assert done.exit_code == 2
    assert "needs --data RECIPE" in done.output
    done = call(place, "attribute", str(tmp_path), "--data", str(place / "tiny.yaml"))
    assert done.exit_code == 2
    assert "cannot be read: model_type None" in done.output
    assert call(place, "export", "last", "--category", "code", "--out", str(tmp_path / "pickled")).exit_code == 0
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled" / "pytorch_model.bin")
    weights.unlink()
    done = call(place, "attribute", str(tmp_path / "pickled"), "--data", str(place / "tiny.yaml"))
    assert done.exit_code == 2
    assert "safetensors" in done.output
    done = call(place, "attribute", str(tmp_path), "--data", "digits")
    assert done.exit_code == 2
    assert "a MODEL needs 'text' or 'images'" in done.output
