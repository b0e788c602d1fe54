import re
from dataclasses import replace
from typing import get_args

import pytest
import torch

from moeify.export.model_card import About, Checked, card
from moeify.export.stock import Form, to_dense
from moeify.export.stock_moe import to_moe
from moeify.export.verification import Source
from moeify.models.build import build_llama
from moeify.models.resnet import build_resnet
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.recipe.model import LlamaModel
from moeify.result import Result
from moeify.routed.split_model import SplitModel
from moeify.routers.by_layer import LayerRouterReport
from tests.networks import CATEGORIES, rows_for, tiny_llama
from tests.test_by_layer import drawn
from tests.test_pruning import split_of

EACH = (*CATEGORIES, "mean")
LOSS: dict[Arm, dict[str, float]] = {
    arm: dict.fromkeys(CATEGORIES, nats) for arm, nats in (("dense", 3.5), ("split", 3.52), ("random", 3.6))
}
RESULT = Result(
    categories=CATEGORIES,
    unit="token",
    tree={"name": "core", "categories": ["a"], "units": 4, "children": []},
    active_fraction=dict.fromkeys(EACH, 0.5),
    rounds=(),
    test_loss=LOSS,
    bits_per_byte=None,
    own_other={c: {"a": 0.25 if c == "a" else 0.0} for c in CATEGORIES},
    tax=dict.fromkeys(EACH, 0.02),
    tax_random=dict.fromkeys(EACH, 0.1),
    steps=100,
    seconds=60.0,
)
RECIPE = RunConfig.model_validate(
    {
        "name": "mine",
        "seed": 3,
        "data": {"kind": "text", "source": {"kind": "jsonl", "path": "/secret/place.jsonl"}},
        "model": {"kind": "llama"},
        "training": {"steps": 3000},
        "rounds": [{"train": 20, "recover": 10, "separation": 0.4}],
    }
)
ABOUT = About(run="mine-1", recipe=RECIPE, result=RESULT, moeify="1.2.3")


def test_the_card_of_an_image_model_says_how_its_rows_are_made() -> None:
    network = build_resnet((3, 8, 8), classes=10, width=4, blocks=1, stages=2, seed=0)
    data = {"kind": "images", "source": "cifar10", "root": "/secret", "categories": {"a": [0, 1], "b": [2, 3]}}
    recipe = RunConfig.model_validate(RECIPE.model_dump(mode="json") | {"data": data, "model": {"kind": "resnet"}})
    whole = Source.of(SplitModel(network, ("a", "b")), torch.float32)
    text = card(About(run="mine-2", recipe=recipe), whole, Checked(None, None), dtype="float32")
    assert "- network: resnet, image [3, 8, 8], classes 10, width 4, blocks 1, stages 2, inner [4, 8]" in text
    assert "- data: cifar10, to classify; classes by category: a: 0, 1; b: 2, 3" in text
    assert "intensities 0..1, less mean (0.485, 0.456, 0.406), over deviation (0.229, 0.224, 0.225)" in text
    assert "secret" not in text


def test_the_card_of_a_checkpoint_that_was_split_says_what_taught_it() -> None:
    changed = {"model": {"kind": "pretrained", "path": "/secret"}, "distillation": {"weight": 0.25, "stream": 2.0}}
    recipe = RunConfig.model_validate(RECIPE.model_dump(mode="json") | changed)
    text = card(About(run="mine-3", recipe=recipe), source(), Checked(None, None), dtype="float32")
    assert "- begun with: a pretrained model" in text
    assert "- learned by 25% from what the pretrained model predicts, the rest from the data" in text
    assert "- kept to the pretrained model's residual stream, at 2 nats a token" in text
    assert "secret" not in text
    assert "what the pretrained model predicts" not in card(ABOUT, source(), Checked(None, None), dtype="float32")


def test_a_card_in_half_precision_says_that_losses_are_of_float32() -> None:
    for dtype, said in (("float32", "This export is of *split*."), ("float16", "*split*, which had float32 weights")):
        assert said in card(ABOUT, source(), Checked(0.01, None), dtype=dtype)


def source(**part: list[str]) -> Source:
    return Source.of(split_of(tiny_llama().float()), torch.float32, **part)


def test_the_card_of_a_dense_model_gives_origin_losses_price_and_check() -> None:
    of = source(keep=["b", "d"])
    text = card(ABOUT, of, Checked(None, {"b": 1e-6, "d": 2e-6}), dtype="float32", stock=to_dense(of.whole, ["b", "d"]))
    assert "library_name: transformers" in text
    assert "# mine-1: b, d" in text
    assert "It holds nothing that only a, c would run." in text
    assert "- recipe: `mine`, seed 3; 3,000 steps of 16 rows" in text
    assert "| b | 50.0% | 3.5000 | 3.5200 | 3.6000 | +0.0200 | +0.1000 |" in text
    assert "| a |" not in text
    assert "| zeros for padding | 1 (3.3% of the stored) |" in text
    assert "| **run by every token** | 30 (62.5% of the dense twin's) |" in text
    assert "| d | 2.0e-06 |" in text
    assert "moeify 1.2.3, Python 3" in text
    assert "secret" not in text


@pytest.mark.parametrize("form", get_args(Form))
def test_the_code_of_a_mixtures_card_sends_tokens_along_another_route(form: Form) -> None:
    of = source()
    stock = to_moe(of.part, form, "c")
    text = card(ABOUT, of, Checked(0.01, None), dtype="bfloat16", stock=stock)
    assert "every token runs the expert of `c`" in text
    assert "moves the split model's outputs by up to 1.00e-02" in text
    assert "were not compared" in text
    _, code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"model": stock.network}
    exec(code.replace('experts["a"]', 'experts["d"]'), names)
    rows = rows_for(of.whole.network, 3)
    with torch.no_grad():
        wanted = of.whole(rows, torch.full((3,), 3))
        torch.testing.assert_close(stock.network(rows).logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("heads", "served"), [(1, True), (2, False)])
def test_the_card_of_a_mixture_names_vllm_where_its_heads_are_wide_enough(heads: int, served: bool) -> None:
    config = LlamaModel(kind="llama", hidden=32, layers=2, heads=heads, ffn=24)
    whole = split_of(build_llama(config, vocabulary=40, length=12, end=0, seed=0))
    stock = to_moe(whole, "glm4_moe", "c")
    text = card(ABOUT, Source(whole, whole), Checked(None, None), dtype="float32", stock=stock)
    assert ("`vllm serve FOLDER`" in text) == served


def test_the_card_of_a_mixture_with_routers_says_what_they_cost_and_how_to_force_a_category() -> None:
    of = source(keep=["a", "b"])
    losses = {"label": {"a": 3.5, "b": 3.6, "mean": 3.55}, "router": {"a": 3.52, "b": 3.6, "mean": 3.56}}
    report = LayerRouterReport(accuracy={"layers.0.ffn": 0.75, "layers.1.ffn": 0.9}, **losses)
    stock = to_moe(of.part, "glm4_moe", drawn(of.part))
    text = card(ABOUT, of, Checked(None, {"(its own routers)": 1e-6}, routers=report), dtype="float32", stock=stock)
    assert "**It routes by itself**" in text
    assert "(here a; set the bias to 0 to undo it)" in text
    assert "| category | routed by label | by its routers | dense |" in text
    assert "| mean | 3.5500 | 3.5600 | 3.5000 |" in text
    assert "**On text without labels it is +0.0600 nats a token against the dense twin.**" in text
    assert "That is +0.28% above routing by label." in text
    assert "to their label's expert: 75%, 90%." in text
    assert "| (its own routers) | 1.0e-06 |" in text


def test_the_code_of_a_gguf_card_is_that_of_the_check() -> None:
    pytest.importorskip("gguf")
    of = source()
    text = card(ABOUT, of, Checked(None, None), dtype="float32", stock=to_moe(of.part, "glm4_moe", "c"), file="gguf")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    from moeify.export import fresh_gguf

    names: dict[str, object] = {}
    exec(code.rpartition("\n\n")[0], names)
    assert names["route_glm4_moe"].__doc__ == fresh_gguf.route_glm4_moe.__doc__
    assert code.endswith('route_glm4_moe("FOLDER/model.gguf", experts["a"])\n')
    assert "library_name: gguf" in text


def test_the_card_without_a_category_says_what_is_gone_and_where_its_rows_run() -> None:
    text = card(ABOUT, source(drop=["a"]), Checked(None, {"a": 0.0}), dtype="float32")
    assert "**Taken out: the expert `a` and all below it.**" in text
    assert "Rows of a run on what is left of their route, down to `a+c`" in text
    assert "| a | a | +0.2500 |" in text
    assert 'moeify.load_split("FOLDER")' in text
    assert "split model with a ablated" in text


def test_only_categories_that_keep_their_experts_are_said_to_run_as_before() -> None:
    text = card(ABOUT, source(drop=["a"]), Checked(None, {"a": 0.0}), dtype="float32")
    assert text.count("As before run the units of b, c, d.") == 1
    assert "As before" not in card(ABOUT, source(drop=list("abcd")), Checked(None, {"a": 0.0}), dtype="float32")


@pytest.mark.parametrize(
    ("routing", "said"),
    [
        ({}, "what those units know of a is still there."),
        ({"apart": ["b"]}, "what those units know of a is still there."),
        (
            {"apart": ["a"]},
            "kept apart and taught none of those; but before the first cut they taught everything.",
        ),
        ({"apart": ["a"], "experts": [{"categories": ["a"], "fresh": 4}]}, "kept apart and taught none of those."),
        (
            {"apart": ["a"], "experts": [{"categories": ["a"], "fresh": 4}], "labelled": 0.4},
            "taught none of those; but 60% of them had no label and taught everything.",
        ),
    ],
)
def test_the_card_says_what_is_left_of_a_category_that_was_kept_apart(routing: dict[str, object], said: str) -> None:
    asked = {"gradients": "parameters", **routing} if routing else {}
    more = {"routing": asked, "partition": {"compensation": None}}
    about = replace(ABOUT, recipe=RunConfig.model_validate(RECIPE.model_dump(mode="json") | more))
    text = card(about, source(drop=["a"]), Checked(None, {"a": 0.0}), dtype="float32")
    assert said in text
    assert ("what those units know" in text) == ("kept apart" not in text)


@pytest.mark.parametrize(
    ("read", "said"),
    [
        ({"kind": "jsonl", "path": "x.jsonl"}, "- data: JSON lines, "),
        ({"kind": "table", "path": "x.parquet"}, "- data: tables, "),
        (
            {"kind": "streamed", "categories": {name: {"files": [f"{name}.parquet"]} for name in "ab"}},
            "- data: streamed files, ",
        ),
    ],
)
def test_the_card_says_what_the_data_was_read_from(read: dict[str, object], said: str) -> None:
    changed = {"data": {"kind": "text", "source": read}, "model": {"kind": "llama"}}
    about = replace(ABOUT, recipe=RunConfig.model_validate(RECIPE.model_dump(mode="json") | changed))
    assert said in card(about, source(), Checked(None, None), dtype="float32")


def test_a_card_tells_what_is_known_when_the_run_is_not() -> None:
    text = card(About(), source(), Checked(None, None), dtype="float32")
    assert "# A split model: a, b, c, d" in text
    assert "Test loss" not in text
    assert "recipe" not in text
