"""Dense networks as ONNX files, for onnxruntime and what else reads them.

A graph has no single width for all layers, so every layer stays as wide as it is and nothing is padded, but for heads
of families whose attention counts on one number of them (Phi-3). The number of rows is free, and for text their length.
A call reads its rows from the start, or, with ``cache``, goes on behind the keys and values that an earlier one gave.

Needs the ``onnx`` and ``onnxscript`` packages; checking a file needs ``onnxruntime``: all come with ``moeify[onnx]``.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moeify.models.build import logits
from moeify.models.families import example_inputs, transformer_of

Takes = Literal["tokens", "masked tokens", "texts", "images", "rows"]
"""What a network is given: tokens; tokens, some hidden, or whole texts, and a mask of those that are there; images;
rows of numbers, or maps."""


@dataclass(frozen=True)
class Signature:
    """What the graph of a network is given; it gives ``logits``, rows first."""

    takes: Takes

    @classmethod
    def of(cls, network: nn.Module) -> "Signature":
        """Return that of a network."""
        family = transformer_of(network)
        if family is None:
            return cls("rows")
        match family.learns:
            case "next token":
                return cls("tokens")
            case "masked token":
                return cls("masked tokens")
            case "class of a text":
                return cls("texts")
            case "class of an image":
                return cls("images")

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs' names, as ``transformers`` has them where it knows such a network."""
        match self.takes:
            case "tokens":
                return ("input_ids",)
            case "masked tokens" | "texts":
                return ("input_ids", "attention_mask")
            case "images":
                return ("pixel_values",)
            case "rows":
                return ("inputs",)

    @property
    def text(self) -> bool:
        """Whether inputs are rows of tokens, of any length."""
        return self.takes in ("tokens", "masked tokens", "texts")

    def of_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the inputs that rows make. The last row's second half is told to be padding, where there is a mask."""
        found = {self.names[0]: rows.clone()}
        if "attention_mask" in self.names:
            mask = torch.ones_like(rows)
            mask[-1, (rows.shape[1] + 1) // 2 :] = 0
            found["attention_mask"] = mask
        return found


class _Graph(nn.Module):
    """A network as its graph is: tensors in, logits out, no cache."""

    def __init__(self, network: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.network = network
        self.plain: dict[str, Any] = {"use_cache": False} if signature.takes == "tokens" else {}

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits."""
        more: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
        return logits(self.network, inputs, **self.plain, **more)


class _CachedGraph(nn.Module):
    """A causal language model as its graph with a cache is: keys and values of earlier tokens in, those of all out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the logits of ``inputs``, then every layer's keys and values [batch heads all size]."""
        from moeify.models.caches import empty_cache

        cache, keyword = empty_cache(self.network)
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        found = logits(self.network, inputs, use_cache=True, **{keyword: cache})
        return found, *_held(cache)


def _held(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


@torch.no_grad()
def _past(network: nn.Module) -> tuple[Tensor, ...]:
    """Return keys and values of a few tokens, as an example; ValueError for a network that keeps none, or not all."""
    family = transformer_of(network)
    if family is None or family.learns != "next token":
        raise ValueError("a cache is for models that write text, and this is another; export without it")
    from moeify.models.caches import empty_cache

    cache, keyword = empty_cache(network)
    logits(network, example_inputs(network, rows=2, seed=0)[:, :4], use_cache=True, **{keyword: cache})
    if odd := {type(layer).__name__ for layer in cache.layers} - {"DynamicLayer"}:
        raise ValueError(f"layers keep a part of the earlier tokens alone ({', '.join(odd)}); export without a cache")
    return tuple(_held(cache))


def require(*, runs: bool) -> None:
    """Raise ValueError where a package is missing that writing needs, or, where it ``runs``, checking and timing."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(f"writing an ONNX file needs the {missing[0]} package; pip install 'moeify[onnx]'")
    if runs and find_spec("onnxruntime") is None:
        raise ValueError(
            "checking or timing an ONNX file needs the onnxruntime package; pip install 'moeify[onnx]', "
            "or do without both (--no-verify, no --speed)"
        )


def write(network: nn.Module, path: Path, *, dtype: torch.dtype, name: str, cache: bool = False) -> None:
    """Write a network to an ONNX file that computes in float32, whatever the dtype of the weights in it.

    ``cache``: the graph is also given ``past_key_values.<layer>.key`` and ``.value``, empty at first, and gives
    ``present...``, to be given with the tokens that follow. ValueError for networks that keep no such thing.
    Weights that ``dtype`` holds exactly are stored in it. Those of a large network lie in a second file, ``.data``
    behind the first one's name, which belongs beside it.
    """
    signature = Signature.of(network)
    examples: tuple[Any, ...] = tuple(signature.of_rows(example_inputs(network, rows=2, seed=0)).values())
    free: dict[int, str] = {0: "batch", 1: "sequence"} if signature.text else {0: "batch"}
    shapes: tuple[Any, ...] = (free,) * len(examples)
    given, told = list(signature.names), ["logits"]
    graph: nn.Module
    if cache:
        past = _past(network)
        each = [f"{layer}.{what}" for layer in range(len(past) // 2) for what in ("key", "value")]
        examples, shapes = (examples[0][:, :3], past), (free, ({0: "batch", 2: "past"},) * len(past))
        given, told = given + [f"past_key_values.{n}" for n in each], told + [f"present.{n}" for n in each]
        graph = _CachedGraph(network)
    else:
        graph = _Graph(network, signature)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph.eval(),
            examples,
            dynamo=True,
            verbose=False,
            input_names=given,
            output_names=told,
            dynamic_shapes=shapes,
        )
        assert program is not None
        _strip(program.model, name)
        if dtype != torch.float32:
            _store_as(program.model, dtype)
        program.save(str(path))


def loading(network: nn.Module, *, cache: bool = False) -> Iterator[str]:
    """Say on a model card how onnxruntime runs the graph of a network."""
    signature = Signature.of(network)
    first, *_ = signature.names
    yield from ("```python", "import numpy as np", "import onnxruntime")
    if signature.text:
        yield from ("from tokenizers import Tokenizer", "", 'tokenizer = Tokenizer.from_file("FOLDER/tokenizer.json")')
        yield f'{first} = np.array([tokenizer.encode("TEXT").ids])  # rows of tokens, int64'
        if "attention_mask" in signature.names:
            yield f"attention_mask = np.ones_like({first})  # 0 where a row is padded"
    else:
        sizes = ", ".join(str(size) for size in example_inputs(network, rows=1, seed=0).shape[1:])
        yield from ("", f"{first} = np.zeros((1, {sizes}), np.float32)  # yours")
    yield 'session = onnxruntime.InferenceSession("FOLDER/model.onnx", providers=["CPUExecutionProvider"])'
    if cache:
        yield "empty = {each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)"
        yield '         for each in session.get_inputs() if each.name != "input_ids"}'
        yield 'logits, *present = session.run(None, {"input_ids": input_ids, **empty})'
        yield "past = dict(zip(empty, present))  # give it in place of empty, with the tokens that follow alone"
        yield from ("```", "", "Keys and values of earlier tokens go in and out, so that tokens are read once.")
        return
    given = ", ".join(f'"{name}": {name}' for name in signature.names)
    yield from (f'(logits,) = session.run(["logits"], {{{given}}})', "```", "")
    yield "Any number of rows" + (", of any length up to the positions named below." if signature.text else ".")
    if signature.takes == "tokens":
        yield "Shorter rows are padded behind, where no token before looks. There is no cache: a call reads whole rows."


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what torch says of its own workings, and of operators of packages that are not installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _strip(model: Any, name: str) -> None:
    """Name the graph, and take out where in which source files its nodes come from."""
    model.graph.name = name
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _store_as(model: Any, dtype: torch.dtype) -> None:
    """Store in a dtype what it holds exactly: constants that the graph casts to float32 before it uses them."""
    import onnx_ir

    graph, casts = model.graph, []
    for value in list(graph.initializers.values()):
        if value.const_value is None or value.dtype != onnx_ir.DataType.FLOAT:
            continue
        held = torch.from_numpy(value.const_value.numpy().copy())
        small = held.to(dtype)
        if not torch.equal(small.float(), held):
            continue
        weight = onnx_ir.tensor_adapters.TorchTensor(small, name=f"{value.name}.stored")
        stored = onnx_ir.Value(
            name=weight.name, type=onnx_ir.TensorType(weight.dtype), shape=value.shape, const_value=weight
        )
        cast = onnx_ir.node("Cast", [stored], {"to": onnx_ir.DataType.FLOAT})
        onnx_ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        del graph.initializers[value.name]
        cast.outputs[0].name = value.name
        graph.register_initializer(stored)
        casts.append(cast)
    if casts:
        graph.insert_before(graph[0], casts)
