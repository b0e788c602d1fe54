from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4MoeForCausalLM, LlamaForCausalLM

import moeify
from moeify.export import publish as export
from moeify.export.model_card import About
from moeify.export.publish import How, export_dense, export_moe, export_split
from moeify.export.stock import Form, Stock, extract, to_dense
from moeify.export.stock_moe import to_moe
from moeify.export.verification import ROUTED, TOLERANCE, Source
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.routed.split_model import SplitModel
from moeify.routers.by_layer import Distil
from moeify.routers.joint import Joint
from moeify.split_folder import load_from_run
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.store import CorruptCheckpointError, FolderStore
from tests.networks import grouped_llama, rows_for
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

UNCHECKED = How(verify=False)
"""The tests compare by themselves: starting a process takes seconds."""


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


def along(split: SplitModel, category: str) -> torch.Tensor:
    with torch.no_grad():
        return split(tokens(), torch.full((5,), split.categories.index(category)))


def test_an_exported_category_is_a_smaller_stock_llama_with_the_split_models_logits(
    text_run: Path, tmp_path: Path
) -> None:
    split = load_from_run(text_run)
    for category in split.categories:
        export_dense(text_run, [category], tmp_path / category, UNCHECKED)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / category)
        assert type(dense) is LlamaForCausalLM
        assert dense.config.intermediate_size < 32
        assert dense.config.use_cache
        with torch.no_grad():
            difference = dense(tokens()).logits - along(split, category)
        assert difference.abs().max() <= TOLERANCE
        assert (tmp_path / category / "tokenizer_config.json").read_bytes() == b"{}"
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / category).iterdir()} == {0o644}


def test_a_mixture_is_checked_in_a_process_without_moeify_for_every_category(text_run: Path, tmp_path: Path) -> None:
    how = How(dtype="bfloat16")
    done = export_moe(text_run, "glm4_moe", tmp_path / "moe", how, forced="c")
    assert done.differences is not None
    assert done.differences.keys() == set("abcd")
    assert max(done.differences.values()) <= TOLERANCE
    assert done.rounding is not None
    assert TOLERANCE < done.rounding < 0.1
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert (type(moe), moe.dtype) == (Glm4MoeForCausalLM, torch.bfloat16)
    with torch.no_grad():
        difference = moe(tokens()).logits.float() - along(load_from_run(text_run), "c")
    assert difference.abs().max() <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("form", "part"), [("glm4_moe", {"drop": ["c"]}), ("granitemoeshared", {"keep": ["a", "b"]})])
def test_a_mixture_leaves_with_routers_that_are_checked_too(
    text_run: Path, tmp_path: Path, form: Form, part: dict[str, list[str]]
) -> None:
    config = RunConfig.model_validate(TEXT_CONFIG)
    distil = Distil(ToyTextTask(config), config)
    done = export_moe(text_run, form, tmp_path / "moe", How(dtype="bfloat16"), distil=distil, **part)
    assert done.differences is not None
    assert done.differences.keys() == {ROUTED, *part.get("keep", "abcd")}
    assert done.routers is not None
    assert set(done.as_json()["routers"]["label"]) == {*part.get("keep", "abcd"), "mean"}
    assert "**It routes by itself**" in (tmp_path / "moe" / "README.md").read_text()
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    name = {"glm4_moe": "mlp.gate.weight", "granitemoeshared": "block_sparse_moe.router.weight"}[form]
    assert all(weight.abs().max() > 0.01 for key, weight in moe.named_parameters() if key.endswith(name))
    with pytest.raises(ValueError, match="got category 'a' to force and routers to train"):
        export_moe(text_run, form, tmp_path / "other", forced="a", distil=distil)


@pytest.mark.slow
def test_a_mixture_that_learned_with_its_routers_says_what_that_took(text_run: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate(TEXT_CONFIG)
    task = ToyTextTask(config)
    joint, distil = Joint(task, config, 6), Distil(task, config)
    twin = SplitModel(task.build(), "abcd")
    done = export_moe(text_run, "glm4_moe", tmp_path / "moe", distil=distil, join=lambda split: joint(split, twin))
    assert done.differences is not None
    assert done.differences.keys() == {ROUTED, *"abcd"}
    assert done.routers is not None
    assert done.routers.joint is not None
    assert done.routers.joint.label != done.routers.label
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "| category | by label, before | routed by label | by its routers | dense, trained on as long |" in card
    assert "learned together for 6 steps, on 1,152 tokens" in card
    with pytest.raises(ValueError, match="joint training is for the whole mixture and its routers"):
        export_moe(text_run, "glm4_moe", tmp_path / "other", distil=distil, keep=["a", "b"], join=joint)


@pytest.mark.slow
def test_an_export_with_other_outputs_is_refused_and_leaves_nothing(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(split: SplitModel, form: Form, forced: str) -> Stock:
        stock = to_moe(split, form, forced)
        with torch.no_grad():
            stock.network.get_parameter("model.norm.weight").mul_(1.01)
        return stock

    monkeypatch.setattr(export, "to_moe", odd)
    with pytest.raises(RuntimeError, match="the export for 'a' differs from the split model by"):
        export_moe(text_run, "granitemoeshared", tmp_path / "moe", forced="a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_program_that_cannot_load_the_export_says_why(text_run: Path, tmp_path: Path) -> None:
    split = load_from_run(text_run)
    with pytest.raises(RuntimeError, match="does not load in a process of its own"):
        Source.of(split, torch.float32).against_stock(tmp_path / "nothing", to_dense(split, ["a"]))


def test_large_weights_go_to_several_files(text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD", "20KB")
    export_moe(text_run, "granitemoeshared", tmp_path / "moe", UNCHECKED, forced="b")
    assert len(list((tmp_path / "moe").glob("model-*.safetensors"))) > 1
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    with torch.no_grad():
        assert (moe(tokens()).logits - along(load_from_run(text_run), "b")).abs().max() <= TOLERANCE


def test_float16_refuses_weights_that_it_cannot_hold(text_run: Path) -> None:
    split = load_from_run(text_run)
    with torch.no_grad():
        split.network.get_parameter("model.norm.weight")[0] = 1e6
    with pytest.raises(ValueError, match=r"model.norm.weight has values that torch.float16 cannot hold; take bfloat16"):
        Source.of(split, torch.float16)


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
        export_dense(heads_run, [category], tmp_path / category, UNCHECKED)
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


def test_a_part_of_the_split_model_holds_what_serves_its_categories(text_run: Path, tmp_path: Path) -> None:
    split = load_from_run(text_run)
    done = export_split(text_run, tmp_path / "part", keep=["b", "d"])
    assert done.differences is not None
    assert done.differences.keys() == {"b", "d"}
    back = moeify.load_split(tmp_path / "part")
    assert back.categories == ("b", "d")
    assert back.space.units < split.space.units
    for category in back.categories:
        torch.testing.assert_close(along(back, category), along(split, category))
    export_moe(text_run, "glm4_moe", tmp_path / "moe", UNCHECKED, keep=["b", "d"])
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert moe.config.n_routed_experts == 2
    with torch.no_grad():
        assert (moe(tokens()).logits - along(split, "b")).abs().max() <= TOLERANCE


def test_a_split_model_without_a_category_is_the_ablated_one_and_keeps_the_others(
    text_run: Path, tmp_path: Path
) -> None:
    split = load_from_run(text_run)
    export_split(text_run, tmp_path / "part", drop=["c"])
    back = moeify.load_split(tmp_path / "part")
    assert back.space.units < split.space.units
    for category in "abd":
        torch.testing.assert_close(along(back, category), along(split, category))
    with split.ablated("c"):
        wanted = along(split, "c")
    torch.testing.assert_close(along(back, "c"), wanted)
    assert (wanted - along(split, "c")).abs().max() > TOLERANCE
    export_moe(text_run, "glm4_moe", tmp_path / "moe", UNCHECKED, forced="c", drop=["c"])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")(tokens()).logits
    torch.testing.assert_close(logits, wanted, atol=TOLERANCE, rtol=0)
    with pytest.raises(ValueError, match="name one or the other"):
        export_split(text_run, tmp_path / "none", keep=["a"], drop=["c"])


def test_a_split_folder_of_half_precision_gives_back_the_rounded_weights(text_run: Path, tmp_path: Path) -> None:
    done = export_split(text_run, tmp_path / "split", How(dtype="float16"))
    assert done.rounding is not None
    back, split = moeify.load_split(tmp_path / "split"), load_from_run(text_run)
    for name, parameter in split.network.named_parameters():
        assert torch.equal(back.network.get_parameter(name), parameter.half().float())


def test_a_model_card_stands_beside_the_weights(text_run: Path, tmp_path: Path) -> None:
    export_dense(text_run, ["b"], tmp_path / "b", How(verify=False, about=About(run="toy-1")))
    text = (tmp_path / "b" / "README.md").read_text()
    assert "# toy-1: b" in text
    assert "were not compared" in text


def test_an_autoencoder_category_is_an_undivided_split_folder(digits_run: Path, tmp_path: Path) -> None:
    split = load_from_run(digits_run)
    export_dense(digits_run, ["c"], tmp_path / "c")
    back = moeify.load_split(tmp_path / "c")
    assert back.categories == ("c",)
    assert back.partition.separation == 0
    assert back.space.units == split.partition.active_units("c")
    images = torch.rand(4, 10)
    with torch.no_grad():
        wanted = split(images, torch.full((4,), split.categories.index("c")))
        torch.testing.assert_close(back(images, torch.zeros(4, dtype=torch.long)), wanted)


def test_an_empty_folder_that_is_there_is_filled_and_stays_the_same_folder(
    text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, out in (("here", Path()), ("linked", tmp_path / "link")):
        place = tmp_path / name
        place.mkdir()
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(place)
        monkeypatch.chdir(place)
        before = place.stat().st_ino
        export_dense(text_run, ["a"], out, UNCHECKED)
        assert place.stat().st_ino == before
        assert {path.name for path in place.iterdir()} >= {"README.md", "config.json", "model.safetensors"}
        assert not list(place.glob(".*"))
    place = tmp_path / "split"
    place.mkdir()
    export_split(text_run, place, UNCHECKED)
    assert moeify.load_split(place).categories == ("a", "b", "c", "d")
    assert not list(place.glob(".*"))


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
        export_dense(text_run, ["a"], tmp_path / "full")
    with pytest.raises(ValueError, match="no category 'rust'; the model has"):
        export_dense(text_run, ["rust"], tmp_path / "new")
    with pytest.raises(ValueError, match="'a' and 'b' run different units, so no dense model"):
        export_dense(text_run, ["a", "b"], tmp_path / "new")
    with pytest.raises(ValueError, match="no checkpoint yet"):
        export_split(tmp_path / "run", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
