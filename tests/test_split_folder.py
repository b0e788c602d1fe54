import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moeify
from moeify.data.given_tokenizer import of_folder
from moeify.recipe.config import RunConfig
from moeify.routed.split_model import SplitModel
from moeify.split_folder import load_split, save_split
from moeify.store import verify_folder
from tests.toy import TEXT_CONFIG, ToyTextTask

FORMAT_1 = Path(__file__).parent / "data" / "split_format_1"
"""As the first version wrote it: sites of unequal width, and category b without an expert of its own."""


def test_folders_of_format_1_stay_readable() -> None:
    verify_folder(FORMAT_1)
    split = moeify.load_split(FORMAT_1)
    assert split.categories == ("a", "b", "c")
    assert split.partition.widths == {"encoder.hidden": (2, 1, 1, 0, 1), "decoder.hidden": (1, 0, 2, 0, 2)}
    images = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    with torch.no_grad():
        outputs = split(images, torch.tensor([2, 0, 1]))
    wanted = [[3.3515625, 2.734375, 3.3359375], [-14.1953125, 10.78125, 1.02734375], [2.4453125, -2.28125, 4.03125]]
    torch.testing.assert_close(outputs, torch.tensor(wanted))


def test_what_is_no_split_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder, wanted what `moeify export RUN --split` wrote$"):
        load_split(tmp_path / "nowhere")
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"manifest.json is not there, wanted what .*; transformers loads what has a"):
        load_split(tmp_path)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a manifest says, with hashes that hold: someone meant it."""
    body = json.loads((folder / "manifest.json").read_text())["body"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, "body": body}))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("files"),
        lambda body: body.update(facts=7),
        lambda body: body["files"].update({"../x.safetensors": {"sha256": "", "bytes": 1}}),
        lambda body: body["facts"].pop("network"),
        lambda body: body["facts"]["network"]["config"].update(intermediate_size="x"),
        lambda body: body["facts"]["network"]["config"].update(hidden_size=7),
        lambda body: body["facts"]["network"]["config"].update(hidden_size=16, vocab_size=301),
        lambda body: body["facts"]["network"]["config"].update(output_hidden_states="x"),
        lambda body: body["facts"]["network"]["config"].update(return_dict=False),
        lambda body: body["facts"].update(categories=7),
        lambda body: body["facts"]["partition"].update(nodes=[1]),
        lambda body: body["facts"]["partition"]["nodes"][0].update(parent="x"),
        lambda body: body["facts"]["partition"]["nodes"][0].update(name=0.5),
        lambda body: body["facts"]["partition"].update(widths={"layers.0.ffn": ["1"]}),
    ],
)
def test_a_folder_that_says_something_odd_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    config = RunConfig.model_validate(TEXT_CONFIG)
    task = ToyTextTask(config)
    save_split(SplitModel(task.build(), task.categories), tmp_path / "split", {})
    load_split(tmp_path / "split")
    rewritten(tmp_path / "split", change)
    with pytest.raises(ValueError, match=r"\w"):
        load_split(tmp_path / "split")


def test_a_tokenizer_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for content in ('"id"', "{", "[]"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="does not describe what it should"):
            of_folder(tmp_path)
