"""The README.md beside exported weights: what they are, what they cost in loss and units, how to load them."""

import inspect
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from moeify.export import fresh_check, onnx_file
from moeify.export.card_measures import FileForm, recovered, routed, table, timed
from moeify.export.card_origin import origin
from moeify.export.recovery import Recovery
from moeify.export.speeds import Speeds
from moeify.export.stock import Form, Stock, counted_sites, ffn_sites
from moeify.export.verification import Source
from moeify.models.families import transformer_of
from moeify.models.transformer import config_of
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.result import Result
from moeify.routed.split_model import SplitModel
from moeify.routers.by_layer import LayerRouterReport
from moeify.store import FORMAT


@dataclass(frozen=True)
class About:
    """What is known of the run."""

    run: str | None = None
    """Its id."""
    recipe: RunConfig | None = None
    result: Result | None = None
    moeify: str | None = None
    """The version that exports."""


NOTHING = About()


@dataclass(frozen=True)
class Checked:
    """How an export compares with the split model."""

    rounding: float | None
    """Largest change of an output from rounding the weights to the file's dtype; None in float32."""
    differences: dict[str, float] | None
    """Category -> largest difference of an output in float32, weights equal; None where it was not checked."""
    recovery: Recovery | None = None
    """What was learned after experts were taken out."""
    speed: Speeds | None = None
    """What it was timed at, where it was."""
    routers: LayerRouterReport | None = None
    """How well a mixture's own routers route, where it has any."""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        speed = self.speed and self.speed.as_json()
        recovery = self.recovery and asdict(self.recovery)
        routers = self.routers and self.routers.model_dump()
        known = {"rounding": self.rounding, "differences": self.differences, "recovery": recovery, "speed": speed}
        return known | {"routers": routers}


def card(
    about: About,
    source: Source,
    checked: Checked,
    *,
    dtype: str,
    stock: Stock | None = None,
    file: FileForm | None = None,
    cache: bool = False,
) -> str:
    """Return the model card of a stock export, ``file`` where that is one, or without ``stock`` of a split folder."""
    parts = [
        _head(stock, file),
        _what(about, source, dtype, stock),
        _loading(source.part, stock, file, cache=cache),
        origin(about.recipe, source.whole),
        _losses(about.result, source, stock, dtype),
        recovered(source.recovery, source.part),
        routed(checked.routers, about.result),
        _size(source, stock),
        timed(checked.speed, stock, file),
        _format(stock, file),
        _checked(checked, source.removed, stock, file),
        _versions(about, file),
    ]
    return "\n\n".join("\n".join(part) for lines in parts if (part := list(lines))) + "\n"


def _head(stock: Stock | None, file: FileForm | None) -> Iterator[str]:
    if stock is None:
        yield from ("---", "tags: [moeify]", "---")
        return
    tasks = {"tokens": "text-generation", "masked tokens": "fill-mask", "images": "image-classification"}
    tasks["texts"] = "text-classification"
    task = tasks.get(onnx_file.Signature.of(stock.network).takes)
    yield from ("---", f"library_name: {file or 'transformers'}", *([f"pipeline_tag: {task}"] if task else []))
    yield from ("tags: [moeify]", "---")


def _what(about: About, source: Source, dtype: str, stock: Stock | None) -> Iterator[str]:
    served = list(stock.price.routes) if stock else list(source.part.categories)
    yield f"# {about.run or 'A split model'}: {', '.join(served)}"
    yield ""
    made = "moeify split a network into experts, one for each category of its data, while it trained."
    if stock is None:
        yield f"{made} This is the split model ({dtype}), whose rows run the units on their category's route alone."
    elif stock.form is None:
        yield f"{made} This is one route of it as a smaller dense `{type(stock.network).__name__}` ({dtype})."
    else:
        yield (
            f"{made} This is the split model as a stock mixture of experts, `{type(stock.network).__name__}` "
            f"({dtype}): the shared core is the shared expert, every category's route below it is a routed expert."
        )
    left_out = [category for category in source.whole.categories if category not in served]
    if left_out:
        yield f"It holds nothing that only {', '.join(left_out)} would run."
    if source.removed:
        yield from ("", *_removal(source, about.recipe))


def _removal(source: Source, recipe: RunConfig | None) -> Iterator[str]:
    """Say what was taken out, and what is left for its categories."""
    old = source.whole.partition.tree
    for name in source.removed:
        node = old.nodes[old.index(name)]
        assert node.parent is not None
        theirs = ", ".join(node.categories)
        yield (
            f"**Taken out: the expert `{name}` and all below it.** None of its units is in the files. "
            f"Rows of {theirs} run on what is left of their route, down to `{old.nodes[node.parent].name}`, "
            f"which others share: {_traces(node.categories, recipe)}"
        )
    gone = {category for name in source.removed for category in old.nodes[old.index(name)].categories}
    if kept := [category for category in source.part.categories if category not in gone]:
        yield f"As before run the units of {', '.join(kept)}."


def _traces(categories: Sequence[str], recipe: RunConfig | None) -> str:
    """Say what units that others share know of categories whose expert was taken out."""
    theirs = ", ".join(categories)
    if recipe is None or not set(categories) <= set(recipe.routing.apart):
        return f"what those units know of {theirs} is still there."
    routing = recipe.routing
    said = [f"in training, labelled rows of {theirs} were kept apart and taught none of those"]
    if not set(categories) <= {category for expert in routing.experts for category in expert.categories}:
        said.append("but before the first cut they taught everything")
    if routing.labelled < 1:
        said.append(f"but {1 - routing.labelled:.0%} of them had no label and taught everything")
    return "; ".join(said) + "."


def _loading(part: SplitModel, stock: Stock | None, file: FileForm | None, *, cache: bool) -> Iterator[str]:
    yield from ("## Load", "")
    if stock is None:
        yield from ("```python", "import moeify, torch", "", 'model = moeify.load_split("FOLDER")')
        yield f"categories = {part.categories}"
        yield f'rows = ["{part.categories[0]}", "{part.categories[-1]}"]  # the category of each row of inputs'
        yield "outputs = model(inputs, torch.tensor([categories.index(category) for category in rows]))"
        yield "```"
        return
    if file == "onnx":
        yield from onnx_file.loading(stock.network, cache=cache)
    elif file == "gguf":
        yield from ("```bash", 'llama-completion -m FOLDER/model.gguf -p "TEXT"  # or any other llama.cpp', "```")
    else:
        family = transformer_of(stock.network)
        auto = family.auto if family else "AutoModelForCausalLM"
        reads = ["AutoTokenizer"] if family is None or family.learns != "class of an image" else []
        yield from ("```python", f"from transformers import {', '.join([auto, *reads])}")
        yield from ("", f'model = {auto}.from_pretrained("FOLDER")')
        yield from (*(f'tokenizer = {each}.from_pretrained("FOLDER")' for each in reads), "```")
        if stock.form and config_of(stock.network).head_dim >= 32:  # vLLM has no narrower heads
            yield from ("", "vLLM serves it as it is: `vllm serve FOLDER`.")
    if stock.form is not None:
        yield from ("", *_routing(stock, stock.form, file))


def _routing(stock: Stock, form: Form, file: FileForm | None) -> Iterator[str]:
    """Say how to send tokens along another category's route, in the very code that the check runs."""
    route: Callable[..., None] = fresh_check.ROUTE[form]
    imports, what = ["import torch"], "model"
    if file == "gguf":
        from moeify.export import fresh_gguf

        route = fresh_gguf.ROUTE[form]
        imports, what = ["import numpy as np", "from gguf import GGUFReader"], '"FOLDER/model.gguf"'
    other = next(category for category in stock.experts if category != stock.forced)
    source = inspect.getsource(route).replace("model: Any, expert: int) -> None", "model, expert)").rstrip()
    if stock.forced:
        yield f"There is no trained router: as written, **every token runs the expert of `{stock.forced}`**."
        yield f"To send all tokens along another category's route (here {other}):"
    else:
        back = "set the bias to 0 to undo it" if form == "glm4_moe" else "load it anew to undo it"
        yield "**It routes by itself**: each layer has a trained router, which chooses an expert for every token."
        yield f"To send all tokens along one category's route instead (here {other}; {back}):"
    yield from ("", "```python", *imports, "", "", *source.split("\n"), "", "", f"experts = {dict(stock.experts)}")
    yield from (f'{route.__name__}({what}, experts["{other}"])', "```")


def _losses(result: Result | None, source: Source, stock: Stock | None, dtype: str) -> Iterator[str]:
    """Give the run's test figures for the categories that are served, where the run has them."""
    if result is None:
        return
    served = list(stock.price.routes) if stock else list(source.part.categories)
    arms: list[Arm] = [arm for arm in ("dense", "told", "split", "random") if arm in result.test_loss]
    taxes = {"tax": result.tax, "random's tax": result.tax_random, "tax over told": result.tax_told}
    shown = {name: tax for name, tax in taxes.items() if tax is not None}
    yield from (f"## Test loss of the run (nats per {result.unit}, lower is better)", "")
    yield from table(
        ["category", "active units", *arms, *shown],
        [
            [
                category,
                f"{result.active_fraction[category]:.1%}",
                *[f"{result.test_loss[arm][category]:.4f}" for arm in arms],
                *[f"{tax[category]:+.4f}" for tax in shown.values()],
            ]
            for category in served
        ],
    )
    yield ""
    meant = {
        "dense": "the same network, data and steps, never split",
        "told": "dense, and given the category",
        "random": "split into the same sizes, owners drawn",
    }
    yield f"{'; '.join(f'{arm}: {text}' for arm, text in meant.items() if arm in arms)}; tax: above dense."
    if not source.removed:
        yield f"This export is of *split*{'' if dtype == 'float32' else ', which had float32 weights there'}."
        return
    yield "This export is of *split* without what was taken out, which raises test loss by:"
    tree = source.whole.partition.tree
    rows = [
        [name, category, _rise(result.own_other[category].get(name))]
        for name in source.removed
        for category in tree.nodes[tree.index(name)].categories
    ]
    yield from ("", *table(["taken out", "category", "rise"], rows), "", "and that of no other category.")
    if source.recovery:
        yield "All this is from before the recovery."


def _rise(nats: float | None) -> str:
    return "-" if nats is None else f"{nats:+.4f}"


def _size(source: Source, stock: Stock | None) -> Iterator[str]:
    yield from ("## Size", "")
    if stock is None:
        parameters = sum(parameter.numel() for parameter in source.part.network.parameters())
        held, whole = source.part.space.units, source.whole.space.units
        yield f"{parameters:,} parameters; {held:,} units of the {whole:,} in the whole model."
        yield from ("", *table(["expert", "own units"], _owned(source.part)))
        return
    parameters = sum(parameter.numel() for parameter in stock.network.parameters())
    whole = sum(site.units for site in counted_sites(source.whole))
    units = "FFN units of all layers" if ffn_sites(source.whole) else "Inner channels of all blocks"
    yield f"{parameters:,} parameters. {units} (the dense twin has and runs {whole:,}):"
    yield from ("", *table(["", "units"], _priced(stock, whole)))
    if stock.price.padded:
        yield ""
        yield (
            "Stock formats have one width for all layers, and for all experts; what is narrower is filled with zeros. "
            "`partition: {budget: equal}` in a recipe makes layers equal from the start."
        )


def _owned(part: SplitModel) -> Iterator[list[str]]:
    for node, units in zip(part.partition.tree.nodes, part.partition.owned, strict=True):
        yield [node.name, f"{units:,}"]


def _priced(stock: Stock, whole: int) -> Iterator[list[str]]:
    price = stock.price
    yield ["of the split model, each once", f"{price.own:,}"]
    if stock.form is not None:
        yield ["copies of what several experts need", f"{price.copied:,}"]
    spare = " and the spare expert" if stock.form == "granitemoeshared" else ""
    yield [f"zeros for padding{spare}", f"{price.padded:,} ({price.padded / price.stored:.1%} of the stored)"]
    yield ["**stored**", f"{price.stored:,}"]
    yield ["**run by every token**", f"{price.runs:,} ({price.runs / whole:.1%} of the dense twin's)"]
    for category, units in price.routes.items():
        yield [f"of these on the route of {category}", f"{units:,} (padding costs {price.runs / units - 1:.1%})"]


def _format(stock: Stock | None, file: FileForm | None) -> Iterator[str]:
    if stock is None:
        yield from (
            f"## Format {FORMAT}",
            "",
            "- `manifest.json`: `body`, and the SHA-256 of its JSON with sorted keys; all below lies in it.",
            "- `files`: size and SHA-256 of each.",
            "- `facts.network`: the shape; `facts.categories`: in the order of category indices.",
            "- `facts.partition`: `nodes`, the expert tree, depth first; `widths`, by site the units that each node",
            "  owns; `owners`, the same spelled out: by site the node of each unit.",
            "- `model.safetensors`: parameters under the stock names, units of a site in the order of nodes, each site",
            "  as wide as its widths add up to. A row runs the units of the nodes that serve its category, no others.",
        )
    elif file == "onnx":
        yield from ("## Format", "")
        yield "One ONNX graph; weights of a large model are in `model.onnx.data` beside it. Each block has the units of"
        yield "the route and no more: none is padded. It computes in float32; other weights are cast as it loads."
    elif file == "gguf":
        yield from (
            "## Format",
            "",
            "One GGUF file, weights and tokenizer. Where layers of a dense model have different",
        )
        yield "widths, its architecture is `deci`, a Llama whose feed-forward length is a list: nothing is padded."


def _checked(checked: Checked, removed: Sequence[str], stock: Stock | None, file: FileForm | None) -> Iterator[str]:
    yield from ("## Checked", "")
    if checked.rounding is not None:
        yield f"- Rounding the weights moves the split model's outputs by up to {checked.rounding:.2e}."
    if checked.differences is None:
        yield "- The outputs of this export were not compared with the split model's."
        return
    how, output = "by moeify", "an output"
    if stock:
        how = "by plain transformers in a process of its own"
    if file == "gguf":
        how, output = "by llama.cpp, with its cache", "a log probability"
    elif file == "onnx":
        how = "by onnxruntime in a process of its own"
    what = f" with {', '.join(removed)} ablated" if removed else ""
    if checked.recovery:
        what = f" without {', '.join(removed)} as it was recovered"
    yield f"- Loaded {how}, in float32: largest difference of {output} to the split model{what}, equal weights:"
    yield from ("", *table(["category", "difference"], [[c, f"{d:.1e}"] for c, d in checked.differences.items()]))


def _versions(about: About, file: FileForm | None) -> Iterator[str]:
    known = {"moeify": about.moeify or "unknown", "Python": platform.python_version()}
    known |= {name: version(name) for name in ("torch", "transformers", "safetensors")}
    known |= {name: version(name) for name in ("onnx", "onnxscript")} if file == "onnx" else {}
    yield from ("## Versions", "", ", ".join(f"{name} {number}" for name, number in known.items()))
