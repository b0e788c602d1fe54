"""What is taken from a checkpoint, and what is refused, in one line each."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from moeify.data import given_tokenizer
from moeify.data.tokens import END
from moeify.models.pretrained import look
from moeify.recipe.config import RunConfig
from moeify.task import Task
from moeify.tasks.build import build_task
from tests.checkpoints import SIZES, save_checkpoint, save_words
from tests.texts import write_texts
from tests.toy import toy_config


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "llama", "llama", begin=True)


def config_for(path: str, **data: object) -> RunConfig:
    source = {"kind": "jsonl", "path": "texts.jsonl"}
    return toy_config(
        data={"kind": "text", "source": source, "length": 12, "test": 0.2, **data},
        model={"kind": "pretrained", "path": path},
    )


def task_for(base: Path, path: str = "llama", **data: object) -> Task:
    write_texts(base)
    return build_task(config_for(path, **data), cache=base / "cache", base=base)


def test_the_network_is_the_checkpoints_own_each_time(llama: Path) -> None:
    checkpoint = look(llama)
    mine, other, stock = checkpoint.network(), checkpoint.network(), AutoModelForCausalLM.from_pretrained(llama)
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, mine.get_parameter(name))
        assert torch.equal(parameter, other.get_parameter(name))


def test_half_precision_is_read_as_float32_and_dropout_is_off(tmp_path: Path) -> None:
    config = GPT2Config(**SIZES, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.3, attn_pdrop=0.2)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    network = look(tmp_path).network()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert not network.config.use_cache
    tokens = torch.arange(10)[None]
    assert torch.equal(network.train()(tokens).logits, network.train()(tokens).logits)


# --- tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [True, False])
def test_text_becomes_the_checkpoints_own_tokens_each_document_behind_its_boundary(begin: bool, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "llama", "llama", begin=begin)
    given = given_tokenizer.of_checkpoint(look(tmp_path / "llama"))
    stock = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert given.end == stock.convert_tokens_to_ids("<s>" if begin else END)
    task = task_for(tmp_path)
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    known = {tuple(stock(text, add_special_tokens=False)["input_ids"]) for text in texts}
    stream = np.concatenate([np.asarray(each) for split in task._tokens.streams.values() for each in split])
    documents = [tuple(part[:-1].tolist()) for part in np.split(stream, np.flatnonzero(stream == given.end) + 1)[:-1]]
    assert set(documents) == known
    assert stream.dtype == np.uint16


def test_how_text_is_written_comes_along_and_ends_where_documents_do(llama: Path, tmp_path: Path) -> None:
    written = {"eos_token_id": [2, 7], "temperature": 0.6, "max_new_tokens": 9}
    (llama / "generation_config.json").write_text(json.dumps(written))
    given = given_tokenizer.of_checkpoint(look(llama))
    said = json.loads(given.assets["generation_config.json"])
    assert said == {**written, "eos_token_id": [2, 7, given.end], "use_cache": True}
    assert given.ends == {2, 7, given.end}
    (llama / "generation_config.json").unlink()
    said = json.loads(given_tokenizer.of_checkpoint(look(llama)).assets["generation_config.json"])
    assert said["eos_token_id"] == [0, given.end]
    (llama / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json that cannot be read"):
        given_tokenizer.of_checkpoint(look(llama))
    bert = save_checkpoint(tmp_path / "bert", "bert", masks=True)
    assert "generation_config.json" not in given_tokenizer.of_checkpoint(look(bert)).assets


def test_a_special_token_inside_of_a_text_is_text(llama: Path) -> None:
    given = given_tokenizer.of_checkpoint(look(llama))
    ids = given.tokenizer.encode("a <s> b", add_special_tokens=False).ids
    assert given.end not in ids
    assert given.tokenizer.decode(ids) == "a <s> b"


def test_an_assets_folder_gives_the_same_boundary_as_the_checkpoint(llama: Path, tmp_path: Path) -> None:
    given = given_tokenizer.of_checkpoint(look(llama))
    for name, content in given.assets.items():
        (tmp_path / name).write_bytes(content)
    found = given_tokenizer.of_folder(tmp_path)
    assert found is not None
    assert (found.end, found.tokenizer.to_str()) == (given.end, given.tokenizer.to_str())
    assert given_tokenizer.of_folder(tmp_path / "nothing") is None


def test_another_tokenizer_is_another_entry_of_the_cache(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "llama", "llama")
    one = task_for(tmp_path).train_batch(0).inputs
    save_words(tmp_path / "llama", vocabulary=270)
    assert not torch.equal(task_for(tmp_path).train_batch(0).inputs, one)


# --- what is refused ----------------------------------------------------------------------------------


def read_all(folder: Path) -> None:
    checkpoint = look(folder)
    given_tokenizer.of_checkpoint(checkpoint)
    checkpoint.network()


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return str(caught.value)


def changed(folder: Path, **config: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_no_checkpoint_is_told(tmp_path: Path) -> None:
    assert "holds no config.json" in refused(tmp_path)
    assert "holds no config.json" in refused(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("[")
    assert "is no JSON object" in refused(tmp_path)


def test_an_unknown_family_and_a_model_without_the_language_models_head_are_told(llama: Path) -> None:
    head = refused(changed(llama, architectures=["LlamaForSequenceClassification"]))
    assert "architectures LlamaForSequenceClassification; wanted one of LlamaForCausalLM" in head
    assert "model_type 'bloom'" in refused(changed(llama, model_type="bloom", architectures=["BloomForCausalLM"]))


def test_pickles_are_never_read(llama: Path) -> None:
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert "as a pickle, pytorch_model.bin, which is never read; wanted safetensors" in refused(llama)
    (llama / "pytorch_model.bin").unlink()
    assert "holds no weights" in refused(llama)


def test_weights_that_are_missing_or_of_another_shape_are_not_made_up(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, llama / "model.safetensors", metadata={"format": "pt"})
    assert f"lacks 1 of its network's tensors, or has them in another shape, such as {lost}" in refused(llama)
    save_file({**tensors, lost: torch.zeros(3, 3)}, llama / "model.safetensors", metadata={"format": "pt"})
    assert f"such as {lost}" in refused(llama)


def test_a_tokenizer_that_is_missing_or_does_not_fit_is_told(llama: Path, tmp_path: Path) -> None:
    small = save_checkpoint(tmp_path / "small", "llama", vocab_size=280)
    assert "the tokenizer's tokens go up to 289, the network's vocabulary up to 279" in refused(small)
    for file in llama.glob("tokenizer*"):
        file.unlink()
    assert "holds no tokenizer that can be read" in refused(llama)


def test_rows_longer_than_the_models_positions_are_told(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.length: got 20, wanted at most 16, the positions of .*llama"):
        task_for(tmp_path, length=20)


def test_a_recipe_distils_from_a_pretrained_model_alone() -> None:
    with pytest.raises(ValueError, match=r"distillation: got a mapping, wanted null beside model\.kind 'autoencoder'"):
        toy_config(distillation={})
