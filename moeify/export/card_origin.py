"""The section of a model card about what an export was made from: network, data and recipe of the run."""

from collections.abc import Iterator
from typing import Any, assert_never

from moeify.data.images import NORMS
from moeify.export.stock import ffn_sites
from moeify.models.families import describe, transformer_of
from moeify.models.transformer import Transformer, config_of, image_size
from moeify.recipe.config import RunConfig
from moeify.recipe.data import DigitsData, GivenData, ImageData, TextData
from moeify.routed.split_model import SplitModel


def origin(recipe: RunConfig | None, whole: SplitModel) -> Iterator[str]:
    """Say where the weights come from; no path of the recipe is told."""
    yield from ("## Where it comes from", "")
    if family := transformer_of(whole.network):
        config, ffn = config_of(whole.network), max(site.units for site in ffn_sites(whole))
        name = family.config.removesuffix("Config").removesuffix("Text")
        yield (
            f"- network: {name}, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
            f"FFN {ffn}, {config.num_attention_heads} heads, {_takes(family, config)}"
        )
    else:
        description = describe(whole.network)
        sizes = ", ".join(f"{name} {size}" for name, size in description.items() if name != "family")
        yield f"- network: {description['family']}, {sizes}"
    yield f"- categories: {', '.join(whole.categories)}"
    if recipe is not None:
        yield from _recipe(recipe)


def _takes(family: Transformer, config: Any) -> str:
    if family.learns == "class of an image":
        height, width = image_size(config)
        return f"images of {height} x {width}, {config.num_labels} classes"
    classes = f", {config.num_labels} classes" if family.learns == "class of a text" else ""
    return f"vocabulary {config.vocab_size:,}, up to {family.positions(config):,} positions{classes}"


def _recipe(recipe: RunConfig) -> Iterator[str]:
    match recipe.data:
        case TextData(source=source, length=length, discover=discover):
            kind = {
                "installed": "text that Python packages install",
                "folders": "folders of text files",
                "jsonl": "JSON lines",
                "table": "tables",
                "streamed": "streamed files",
                "mixed": "text from several places",
            }
            found = "" if discover is None else "; categories are discovered clusters of documents"
            pretrained = recipe.model.kind == "pretrained"
            tokenizer = "its tokenizer" if pretrained else "byte-level BPE"
            if pretrained:
                yield "- begun with: a pretrained model, and not trained from scratch"
            yield f"- data: {kind[source.kind]}, {tokenizer}, rows of {length} tokens{found}"
        case DigitsData():
            yield "- data: scikit-learn's handwritten digits"
        case GivenData():
            yield "- data: rows at hand, given from Python"
        case ImageData(source=images, objective=objective, categories=groups):
            classes = "; ".join(f"{name}: {', '.join(map(str, numbers))}" for name, numbers in groups.items())
            yield f"- data: {images}, to {objective}; classes by category: {classes}"
            mean, deviation = NORMS[images]
            norm = f", less mean {mean}, over deviation {deviation}" if objective == "classify" else ", in one row"
            yield f"- a row of inputs: an image's channels, height and width, intensities 0..1{norm}"
        case other:
            assert_never(other)
    training = recipe.training
    yield f"- recipe: `{recipe.name}`, seed {recipe.seed}; {training.steps:,} steps of {training.rows} rows"
    separations = ", ".join(f"{r.separation:.0%}" for r in recipe.rounds)
    if (taught := recipe.distillation) is not None:
        yield f"- learned by {taught.weight:.0%} from what the pretrained model predicts, the rest from the data"
        if taught.stream:
            yield f"- kept to the pretrained model's residual stream, at {taught.stream:g} nats a token"
    yield f"- rounds asked for a separation of {separations}; owners by {recipe.partition.owners.kind}"
