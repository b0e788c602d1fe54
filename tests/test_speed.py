import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import moeify
from moeify.export import speed
from moeify.export.limits import limit_of
from moeify.export.publish import How, Origin, export_dense, export_moe, export_split
from moeify.export.stock import to_dense
from moeify.export.works import Work, works_of
from moeify.models.units import UnitSpace
from moeify.roofline import Machine
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from tests.networks import CATEGORIES, grouped_llama, tiny_autoencoder, tiny_decoder, tiny_llama, tiny_resnet

TIMED = How(verify=False, speed=True)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "TURNS", 1)
    monkeypatch.setattr(speed, "AT_LEAST", 0.0)


def split_of(network: nn.Module, *, heads: bool = False) -> SplitModel:
    """A core, and of each category's experts one unit more than of the one before."""
    split = SplitModel(network.float(), CATEGORIES, kinds=("ffn", "heads") if heads else ("ffn",)).eval()
    tree = ExpertTree.undivided(CATEGORIES).split({0: [(category,) for category in CATEGORIES]})
    split.repartition(Partition(tree, {site.name: _widths(split.space, site.name) for site in split.space.sites}))
    return split


def _widths(space: UnitSpace, site: str) -> tuple[int, ...]:
    units = space[site].units
    return (units - 4, 1, 1, 1, 1) if units < 8 or space[site].kind == "heads" else (units - 10, 1, 2, 3, 4)


READS, COMPUTES = Machine(math.inf, 1.0), Machine(1.0, math.inf)
"""A machine that computes in no time, and one that reads in none."""


@pytest.mark.parametrize("heads", [False, True])
def test_what_a_route_reads_are_the_weights_keys_and_values_of_its_dense_model_without_padding(heads: bool) -> None:
    whole, split = grouped_llama().float(), split_of(grouped_llama(), heads=heads)
    work = Work("decode", 1, prompt=6, new=2)
    for category in CATEGORIES:
        own = to_dense(split, [category], padded=False).network
        embedding = 0 if whole.config.tie_word_embeddings else whole.config.vocab_size - 1
        numbers = [
            2 * (sum(p.numel() for p in network.parameters()) - embedding * 24) + 2 * 2 * groups * 4 * (7 + 8)
            for network, groups in ((own, 3 if heads else 6), (whole, 6))
        ]
        limit = limit_of(whole, split, work, [category], READS)
        assert (limit.times, limit.bound) == (pytest.approx(numbers[1] / numbers[0]), "bytes")


@pytest.mark.parametrize("make", [tiny_llama, tiny_autoencoder, tiny_resnet])
def test_the_operations_that_a_route_needs_are_those_of_its_active_units(make: Callable[[], nn.Module]) -> None:
    split, whole = split_of(make()), make().float().eval()
    work = next(work for work in works_of(whole) if work.batch > 1)

    def share(categories: Sequence[str]) -> float:
        limit = limit_of(whole, split, work, categories, COMPUTES)
        assert limit.bound == "FLOPs"
        return 1 / limit.times

    shares, costs = {category: share([category]) for category in CATEGORIES}, split.active_flops(work.prompt)
    rises = [shares["d"] - shares["a"], costs["d"] - costs["a"]]  # what is never split, attention, is counted unlike
    assert rises[0] == pytest.approx(rises[1], rel=0.1)
    assert share(CATEGORIES) == pytest.approx(sum(shares.values()) / 4)


def test_a_row_alone_is_limited_by_bytes_where_each_weight_is_read_once() -> None:
    balanced = Machine(10.0, 1.0)
    found = {}
    for make in (tiny_llama, tiny_autoencoder, tiny_resnet):
        dense, split = make().float().eval(), split_of(make())
        for work in works_of(dense):
            limit = limit_of(dense, split, work, CATEGORIES[:1], balanced)
            found[type(dense).__name__, work.kind, work.batch] = limit.bound
    assert found == {
        ("LlamaForCausalLM", "prefill", 1): "FLOPs",
        ("LlamaForCausalLM", "prefill", 32): "FLOPs",
        ("LlamaForCausalLM", "decode", 1): "bytes",
        ("LlamaForCausalLM", "decode", 32): "FLOPs",
        ("Autoencoder", "rows", 1): "bytes",
        ("Autoencoder", "rows", 32): "FLOPs",
        ("ResNet", "rows", 1): "FLOPs",
        ("ResNet", "rows", 32): "FLOPs",
    }


def test_an_export_is_timed_against_the_dense_model_on_the_card_and_in_a_file(tmp_path: Path) -> None:
    run = Origin(split_of(tiny_llama()))
    done = export_dense(run, ["b"], tmp_path / "b", TIMED)
    assert done.speed is not None
    assert [(row.work, row.batch, row.route) for row in done.speed.rows] == [
        (kind, batch, "b") for kind in ("prefill", "decode") for batch in (1, 32)
    ]
    for row in done.speed.rows:
        assert row.limit > 1.0
        assert row.over_dense == pytest.approx(row.export / row.dense)  # of one turn
    assert json.loads((tmp_path / "b" / "speed.json").read_text()) == json.loads(json.dumps(done.speed.as_json()))
    assert "| decode | 32 | b | " in (tmp_path / "b" / "README.md").read_text()
    mixture = export_moe(run, "glm4_moe", tmp_path / "moe", TIMED, forced="c").speed
    assert mixture is not None
    assert {row.route for row in mixture.rows} == {"c"}


def test_a_split_model_is_timed_with_rows_of_one_category_and_of_all(tmp_path: Path) -> None:
    done = export_split(Origin(split_of(tiny_llama())), tmp_path / "split", TIMED).speed
    assert done is not None
    asked = [(row.work, row.batch, row.route) for row in done.rows]
    assert asked == [
        (kind, batch, route) for kind in ("prefill", "decode") for batch, route in ((1, "d"), (32, "d"), (32, "mixed"))
    ]
    assert moeify.load_split(tmp_path / "split").categories == CATEGORIES


@pytest.mark.parametrize("make", [tiny_autoencoder, tiny_resnet, lambda: tiny_decoder("bert")])
def test_models_that_write_no_text_are_timed_in_rows(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    done = export_dense(Origin(split_of(make())), ["a"], tmp_path / "a", TIMED).speed
    assert done is not None
    assert (done.unit, done.prompt) == ("row", None)
    assert [(row.work, row.batch) for row in done.rows] == [("rows", 1), ("rows", 32)]
    assert "## Speed (rows a second)" in (tmp_path / "a" / "README.md").read_text()
    assert torch.get_num_threads() == done.threads


def test_a_gguf_file_is_timed_only_where_llama_cpp_and_a_dense_file_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the xllamacpp package; pip install 'moeify\\[gguf\\]', or do without"):
        speed.refuse_gguf(split_of(tiny_llama()))
    with pytest.raises(ValueError, match="and knows llama, not mistral"):
        speed.refuse_gguf(split_of(tiny_decoder("mistral")))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "work"), [(tiny_llama, "prefill"), (lambda: tiny_decoder("bert"), "rows")])
def test_an_onnx_graph_is_timed_in_onnxruntime_reading_rows(
    make: Callable[[], nn.Module], work: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    how = How(verify=False, speed=True, onnx=True)
    done = export_dense(Origin(split_of(make())), ["a"], tmp_path / "a", how).speed
    assert done is not None
    assert [(row.work, row.batch, row.route) for row in done.rows] == [(work, 1, "a"), (work, 32, "a")]
    assert all(row.limit > 1.0 and row.dense > 0 and row.export > 0 for row in done.rows)
    assert "In onnxruntime, float32" in (tmp_path / "a" / "README.md").read_text()
