import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moeify.export import onnx_file
from moeify.export.publish import Dtype, How, Origin, export_dense, export_moe
from moeify.export.stock import to_dense
from moeify.export.verification import TOLERANCE, Source
from moeify.models.families import transformer_of, unit_space
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from tests.networks import DECODER_CONFIGS, tiny_autoencoder, tiny_decoder, tiny_resnet

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def split_of(network: nn.Module, *, heads: bool = False) -> SplitModel:
    """Two categories, each with about a third of every site's units; sites of one kind are cut into other widths."""
    tree, widths = ExpertTree.undivided("ab").split({0: [("a",), ("b",)]}), {}
    for kind in ("ffn", "heads") if heads else ("ffn",):
        sites = (site for site in unit_space(network, ("ffn", "heads")).sites if site.kind == kind)
        for more, site in enumerate(sites):
            own = site.units // 3
            widths[site.name] = (site.units - 2 * own, own + more, own - more)
    return SplitModel(network, "ab", Partition(tree, widths)).eval()


def written(network: nn.Module, place: Path, dtype: torch.dtype = torch.float32) -> Path:
    onnx_file.write(network, place / "model.onnx", dtype=dtype, name="tiny")
    return place / "model.onnx"


@pytest.mark.parametrize(("build", "dtype"), [(tiny_autoencoder, "float32"), (tiny_resnet, "float16")])
def test_a_category_of_any_network_is_a_graph_that_onnxruntime_runs(
    build: Callable[[], nn.Module], dtype: Dtype, tmp_path: Path
) -> None:
    split = split_of(build().float())
    done = export_dense(Origin(split), ["a"], tmp_path / "out", How(onnx=True, dtype=dtype))
    assert done.differences is not None
    assert done.differences["a"] <= TOLERANCE
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.onnx"]
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)  # no path of a source file
    text = (tmp_path / "out" / "README.md").read_text()
    for said in ("library_name: onnx", 'InferenceSession("FOLDER/model.onnx"', "none is padded", "by onnxruntime"):
        assert said in text
    assert "0 (0.0% of the stored)" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(tmp_path / "out")), names)
    assert np.isfinite(names["logits"]).all()


def test_weights_are_stored_in_the_dtype_and_a_graph_with_other_outputs_is_refused(tmp_path: Path) -> None:
    source = Source.of(split_of(tiny_autoencoder().float()), torch.bfloat16)
    stock = to_dense(source.whole, ["b"], padded=False)
    path = written(stock.network, tmp_path, torch.bfloat16)
    kinds = {onnx.TensorProto.DataType.Name(each.data_type) for each in onnx.load(path).graph.initializer}
    assert kinds - {"INT64"} == {"BFLOAT16"}
    assert source.against_onnx(path, stock)["b"] <= TOLERANCE
    with torch.no_grad():
        next(source.whole.network.parameters()).mul_(1.1)
    with pytest.raises(RuntimeError, match="the export for 'b' differs from the split model"):
        source.against_onnx(path, stock)


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODER_CONFIGS)
def test_every_family_of_transformers_becomes_a_graph_of_layers_of_unequal_width(family: str, tmp_path: Path) -> None:
    network = tiny_decoder(family)
    found = transformer_of(network)
    split = split_of(network, heads=found is not None and found.heads is not None)
    source = Source.of(split, torch.float32)
    stock = to_dense(split, ["a"], padded=False)
    assert stock.price.padded == 0
    assert len({site.units for site in unit_space(stock.network).sites}) == 2
    path = written(stock.network, tmp_path)
    assert source.against_onnx(path, stock)["a"] <= TOLERANCE
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    free = ["batch", "sequence"] if onnx_file.Signature.of(network).text else ["batch"]
    assert all(each.shape[: len(free)] == free for each in session.get_inputs())


@pytest.mark.slow
def test_padding_behind_the_mask_changes_nothing_before_it(tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(written(tiny_decoder("bert"), tmp_path), providers=["CPUExecutionProvider"])
    row = np.arange(1, 6)[None]
    padded, mask = np.pad(row, ((0, 0), (0, 4))), np.pad(np.ones_like(row), ((0, 0), (0, 4)))
    (plain,) = session.run(["logits"], {"input_ids": row, "attention_mask": np.ones_like(row)})
    (behind,) = session.run(["logits"], {"input_ids": padded, "attention_mask": mask})
    assert np.abs(plain - behind[:, :5]).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_graph_with_a_cache_goes_on_behind_what_it_gave(family: str, tmp_path: Path) -> None:
    split = split_of(tiny_decoder(family))
    done = export_dense(Origin(split), ["a"], tmp_path / "out", How(onnx=True, cache=True))
    assert done.differences is not None
    assert done.differences["a"] <= TOLERANCE
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()][:3] == [
        "input_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    row = np.arange(1, 9)[None]
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"np": np, "session": session, "input_ids": row[:, :5]}
    exec(code[code.index("empty =") :], names)
    (rest, *_) = session.run(None, {"input_ids": row[:, 5:], **names["past"]})
    with torch.no_grad():
        wanted = split(torch.from_numpy(row), torch.zeros(1, dtype=torch.long)).numpy()
    assert np.abs(np.concatenate([names["logits"], rest], 1) - wanted).max() <= TOLERANCE


def test_what_keeps_no_cache_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a cache is for models that write text, and this is another"):
        onnx_file.write(tiny_decoder("bert"), tmp_path / "a.onnx", dtype=torch.float32, name="a", cache=True)
    with pytest.raises(ValueError, match=r"layers keep a part of the earlier tokens alone \(DynamicSlidingWindowLayer"):
        onnx_file.write(tiny_decoder("gemma2"), tmp_path / "a.onnx", dtype=torch.float32, name="a", cache=True)
    with pytest.raises(ValueError, match="a cache is for ONNX graphs, which are timed without one"):
        export_dense(Origin(split_of(tiny_decoder("gpt2"))), ["a"], tmp_path / "out", How(cache=True))


def test_a_mixture_is_no_graph(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an ONNX graph is of one category's route"):
        export_moe(Origin(split_of(tiny_autoencoder())), "glm4_moe", tmp_path / "none", How(onnx=True))


def test_a_missing_package_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxruntime" else object())
    onnx_file.require(runs=False)
    with pytest.raises(ValueError, match=r"needs the onnxruntime package; pip install 'moeify\[onnx\]', or do without"):
        onnx_file.require(runs=True)
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^writing an ONNX file needs the onnx package; pip install 'moeify\[onnx\]'$"
    ):
        onnx_file.require(runs=False)
