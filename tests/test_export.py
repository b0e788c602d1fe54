from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import moeify
from moeify.config import RunConfig
from moeify.export import TOLERANCE, export_category, export_split, extract
from moeify.loop import run
from moeify.partition import Partition
from moeify.split_folder import load_from_run
from moeify.split_model import SplitModel
from moeify.store import CorruptCheckpointError, FolderStore
from moeify.tree import ExpertTree
from tests.networks import grouped_llama, rows_for
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "run"
    config = RunConfig.model_validate(TEXT_CONFIG)
    run(config, ToyTextTask(config), store=FolderStore(folder, 2))
    return folder


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "run"
    run(toy_config(), ToyTask(toy_config()), store=FolderStore(folder, 2))
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(300, (5, 12), generator=torch.Generator().manual_seed(1))


def test_an_exported_category_is_a_smaller_stock_llama_with_the_split_models_logits(
    text_run: Path, tmp_path: Path
) -> None:
    split = load_from_run(text_run)
    for index, category in enumerate(split.categories):
        export_category(text_run, category, tmp_path / category)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / category)
        assert type(dense) is LlamaForCausalLM
        assert dense.config.intermediate_size < 32
        with torch.no_grad():
            difference = dense(tokens()).logits - split(tokens(), torch.full((5,), index))
        assert difference.abs().max() <= TOLERANCE
        assert (tmp_path / category / "tokenizer_config.json").read_bytes() == b"{}"


def test_an_extracted_expert_equals_the_masked_dense_model(text_run: Path) -> None:
    split = load_from_run(text_run).double()
    for index, category in enumerate(split.categories):
        dense = extract(split, category).double()
        with torch.no_grad(), split.masked():
            masked = split(tokens(), torch.full((5,), index))
            torch.testing.assert_close(dense(tokens()).logits, masked, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def heads_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "run"
    model = {"kind": "llama", "hidden": 24, "layers": 2, "heads": 6, "ffn": 24}
    partition = {"multiple": 2, "min_units": 2, "units": ["ffn", "heads"], "cost": "flops"}
    config = RunConfig.model_validate({**TEXT_CONFIG, "model": model, "partition": partition})
    run(config, ToyTextTask(config), store=FolderStore(folder, 2))
    return folder


def test_a_category_is_exported_with_the_heads_on_its_route(heads_run: Path, tmp_path: Path) -> None:
    split = load_from_run(heads_run)
    for index, category in enumerate(split.categories):
        export_category(heads_run, category, tmp_path / category)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / category)
        widest = max(int(split.partition.active(f"layers.{i}.heads", category).sum()) for i in range(2))
        least = next(count for count in (1, 2, 3, 4, 6) if count >= widest)  # a divisor of the width, as Llama wants
        assert dense.config.num_attention_heads == dense.config.num_key_value_heads == least
        assert dense.config.head_dim == 4
        with torch.no_grad():
            difference = dense(tokens()).logits - split(tokens(), torch.full((5,), index))
        assert difference.abs().max() <= TOLERANCE
    export_split(heads_run, tmp_path / "split")
    assert moeify.load_split(tmp_path / "split").partition == split.partition


def test_groups_of_heads_leave_together() -> None:
    network = grouped_llama(heads=6, groups=3, bias=True)
    tree = ExpertTree.undivided("ab").split({0: [("a",), ("b",)]})
    widths = {"heads": (1, 1, 1), "ffn": (10, 4, 6)}
    split = SplitModel(
        network, "ab", Partition(tree, {f"layers.{i}.{k}": w for i in (0, 1) for k, w in widths.items()})
    )
    inputs = rows_for(network, 3)
    for index, category in enumerate("ab"):
        dense = extract(split, category).double()
        assert (dense.config.num_attention_heads, dense.config.num_key_value_heads) == (4, 2)
        with torch.no_grad():
            torch.testing.assert_close(
                dense(inputs).logits, split(inputs, torch.full((3,), index)), rtol=1e-5, atol=1e-6
            )


def test_a_split_export_gives_the_split_model_back(text_run: Path, tmp_path: Path) -> None:
    export_split(text_run, tmp_path / "split")
    back, split = moeify.load_split(tmp_path / "split"), load_from_run(text_run)
    assert back.partition == split.partition
    categories = torch.tensor([3, 1, 0, 2, 1])
    with torch.no_grad():
        assert torch.equal(back(tokens(), categories), split(tokens(), categories))


def test_an_autoencoder_category_is_an_undivided_split_folder(digits_run: Path, tmp_path: Path) -> None:
    split = load_from_run(digits_run)
    export_category(digits_run, "c", tmp_path / "c")
    back = moeify.load_split(tmp_path / "c")
    assert back.categories == ("c",)
    assert back.partition.separation == 0
    images = torch.rand(4, 10)
    with torch.no_grad():
        wanted = split(images, torch.full((4,), split.categories.index("c")))
        torch.testing.assert_close(back(images, torch.zeros(4, dtype=torch.long)), wanted)


def test_a_damaged_export_is_refused(text_run: Path, tmp_path: Path) -> None:
    export_split(text_run, tmp_path / "split")
    path = tmp_path / "split" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CorruptCheckpointError, match="is not what was written"):
        moeify.load_split(tmp_path / "split")


def test_an_occupied_folder_an_unknown_category_and_an_unsplit_run_are_refused(text_run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export_category(text_run, "a", tmp_path / "full")
    with pytest.raises(ValueError, match="no category 'rust'; the model has a, b, c, d"):
        export_category(text_run, "rust", tmp_path / "new")
    with pytest.raises(ValueError, match="no checkpoint yet"):
        export_split(tmp_path / "run", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
