"""Whether an export gives the split model's outputs: what it is held against, and how it is asked.

A stock export is loaded by plain ``transformers`` in a process of its own, which never imports moeify
(``moeify.export.fresh_check``). Only moeify loads a split folder, so that is asked here, from what is on disk.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moeify.data.given_tokenizer import beginning
from moeify.export import gguf_file
from moeify.export.onnx_file import Signature
from moeify.export.pruning import only, prune, without
from moeify.export.recovery import Recover, Recovery
from moeify.export.stock import Stock
from moeify.models.families import example_inputs, transformer_of
from moeify.routed.split_model import SplitModel
from moeify.routers.by_layer import LayerRouters, margin

TOLERANCE = 1e-4
"""Largest difference of an output (logit, fp32) between an export and the split model."""
TEXT = "def f(x):\n    return 3.14 * x  # naïve — 東京\n"
"""What a GGUF file's tokenizer is tested with."""
ROUTED = "(its own routers)"
"""Stands for a category where a mixture's routers choose."""
_CLEAR = 1e-5
"""By how much a token's best score leads, of the largest, where rounding cannot choose another expert."""
_PROGRAMS = Path(__file__).parent
"""Where the programs lie that load an export without moeify."""


class Source(NamedTuple):
    """What an export is made of, and held against."""

    whole: SplitModel
    """The run's split model, weights rounded to the export's dtype."""
    part: SplitModel
    """What is left of it to export."""
    removed: tuple[str, ...] = ()
    """Experts that the part lacks though the categories that they served are still there; topmost only."""
    rounding: float | None = None
    """Largest change of an output from rounding the weights; None in float32."""
    recovery: Recovery | None = None
    """What the part learned since it was cut out, after which it is held against itself."""

    @classmethod
    def of(
        cls,
        split: SplitModel,
        dtype: torch.dtype,
        keep: Sequence[str] = (),
        drop: Sequence[str] = (),
        recover: Recover | None = None,
    ) -> "Source":
        """Round a split model's weights in place, and cut out the part that keeps or drops categories.

        ``recover``: what the part without the dropped ones is trained by before its weights are rounded.

        Raises ValueError where the dtype cannot hold a weight, and as ``moeify.export.pruning`` does.
        """
        if keep and drop:
            raise ValueError("got categories to keep and categories to take out; name one or the other")
        source, pruning = cls(split, split), None
        if keep:
            pruning = only(split.partition, keep)
        elif drop:
            pruning = without(split.partition, drop)
        if recover:
            if not drop or pruning is None:
                raise ValueError("a recovery is for a model without a category; name one to take out")
            part = prune(split, pruning)
            source = source._replace(part=part, recovery=recover(split, part, drop))
        if dtype != torch.float32:
            exact = source.outputs()
            _round(source.part.network, dtype)
            rounded = source.outputs()
            source = source._replace(rounding=max(_difference(exact[c], rounded[c]) for c in exact))
        if pruning:
            part = source.part if source.recovery else prune(split, pruning)
            source = source._replace(part=part, removed=pruning.removed)
        return source

    @property
    def inputs(self) -> Tensor:
        """The rows that both sides are given."""
        return example_inputs(self.whole.network, rows=2, seed=0)

    def rows_of(self, stock: Stock) -> Tensor:
        """Return the rows that a mixture is given: ``inputs``, or others where a token's two best scores are equal.

        RuntimeError where they are equal in rows of any seed that is tried.
        """
        if stock.routers is None:
            return self.inputs
        for seed in range(8):
            rows = example_inputs(self.whole.network, rows=2, seed=seed)
            if margin(self.part, stock.routers, rows) > _CLEAR:
                return rows
        raise RuntimeError("the routers score two experts alike, so rounding chooses; force a category instead")

    @torch.no_grad()
    def outputs(self, rows: Tensor | None = None, routers: LayerRouters | None = None) -> dict[str, Tensor]:
        """Return category -> what the export must give, of each category that the part serves; ``ROUTED`` too, where
        there are routers. ``rows``: in place of ``inputs``."""
        rows = self.inputs if rows is None else rows
        own = {ROUTED: self.part.by_layer(rows, routers.weights)} if routers else {}
        with self._wanted() as model:
            return own | {category: self._along(model, category, rows) for category in self.part.categories}

    @contextmanager
    def _wanted(self) -> Iterator[SplitModel]:
        """Give the model whose outputs are wanted, as they are while the context lasts."""
        if self.recovery:
            yield self.part
            return
        with self.whole.ablated(*self.removed):
            yield self.whole

    @torch.no_grad()
    def against_split(self, other: SplitModel) -> dict[str, float]:
        """Return category -> the largest difference to a split model; RuntimeError where one is too large."""
        return _tolerable({c: _difference(wanted, self._along(other, c)) for c, wanted in self.outputs().items()})

    def against_stock(self, folder: Path, stock: Stock) -> dict[str, float]:
        """Return category -> the largest difference to what a new process loads; RuntimeError where one is too large.

        A mixture is asked as it was written first, which its routers answer where it has any (``ROUTED``), and then
        sent along each category's route in turn.
        """
        return _tolerable(self._in_fresh_process(_PROGRAMS / "fresh_check.py", folder, stock, {}, {}))

    @torch.no_grad()
    def against_gguf(
        self, path: Path, stock: Stock, assets: Mapping[str, bytes], dtype: torch.dtype
    ) -> dict[str, float]:
        """Return the same of a GGUF file, which llama.cpp loads: differences of log probabilities.

        llama.cpp rounds activations to the dtype of weights. So where that is not float32, the file is only loaded, and
        what is compared is a file of the same weights in float32.
        """
        from tokenizers import Tokenizer

        known = Tokenizer.from_str(assets["tokenizer.json"].decode())
        begin = beginning(known)
        ids = known.encode(TEXT, add_special_tokens=False).ids
        text = self._after_text(ids if begin is None else [begin, *ids], stock)
        header = {"say": str(known.token_to_id("a"))} | ({"text": TEXT} if text else {})
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / "model.gguf"
            shutil.copyfile(path, copy)
            found = self._in_fresh_process(_PROGRAMS / "fresh_gguf.py", copy, stock, text, header)
            if dtype != torch.float32:
                gguf_file.write(stock.network, assets, copy, dtype=torch.float32, name="check")
                found = self._in_fresh_process(_PROGRAMS / "fresh_gguf.py", copy, stock, text, header)
        return _tolerable(found)

    @torch.no_grad()
    def against_onnx(self, path: Path, stock: Stock) -> dict[str, float]:
        """Return the same of an ONNX file, which onnxruntime loads: for more rows and fewer, and shorter ones."""
        signature, rows = Signature.of(self.whole.network), self.inputs
        batches = [rows, rows.flip(0).repeat_interleave(2, 0)[:3], rows[:1]]
        if signature.text:
            batches = [rows, batches[1][:, : (rows.shape[1] + 1) // 2], rows[:1, :1]]
        tensors: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            given = signature.of_rows(batch)
            tensors |= {f"given/{number}/{name}": tensor for name, tensor in given.items()}
            first, *others = signature.names
            for category in stock.price.routes:
                outputs = self._along(self.whole, category, given[first], **{name: given[name] for name in others})
                tensors[f"wanted/{category}/{number}"] = outputs
        header = {"batches": str(len(batches))}
        return _tolerable(self._in_fresh_process(_PROGRAMS / "fresh_onnx.py", path, stock, tensors, header))

    def _after_text(self, ids: list[int], stock: Stock) -> dict[str, Tensor]:
        """Return what is wanted after these tokens; nothing where they are too many for the network, or are routed by
        a hair's breadth."""
        row = torch.tensor([ids])
        if row.shape[1] >= self.inputs.shape[1]:  # llama.cpp needs a place for what it says
            return {}
        if stock.routers and margin(self.part, stock.routers, row) <= _CLEAR:
            return {}
        return {f"text/{c}": outputs[0, -1] for c, outputs in self.outputs(row, stock.routers).items()}

    def _in_fresh_process(
        self, program: Path, weights: Path, stock: Stock, more: Mapping[str, Tensor], header: Mapping[str, str]
    ) -> dict[str, float]:
        """Ask a program that reads the cases of ``moeify.export.fresh_check``."""
        cases: list[tuple[str, int | None]] = [(stock.forced, None)] if stock.forced else []
        cases += [(ROUTED, None)] if stock.routers else []
        rows = self.rows_of(stock)
        cases += [(category, stock.experts.get(category)) for category in stock.price.routes]
        named = {f"wanted/{category}": outputs for category, outputs in self.outputs(rows, stock.routers).items()}
        tensors = {name: tensor.contiguous() for name, tensor in {"inputs": rows, **named, **more}.items()}
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "cases.safetensors"
            family = transformer_of(self.whole.network)
            asked = {"auto": family.auto if family else "", "form": stock.form or "", "cases": json.dumps(cases)}
            save_file(tensors, path, {**asked, **header})
            found = _answer([sys.executable, "-P", str(program), str(weights.absolute()), str(path)], place)
        differences: dict[str, float] = {}
        for (category, _), difference in zip(cases, found, strict=True):
            differences[category] = max(difference, differences.get(category, 0.0))
        return differences

    def _along(self, model: SplitModel, category: str, rows: Tensor | None = None, **more: Tensor) -> Tensor:
        inputs = self.inputs if rows is None else rows
        return model(inputs, torch.full((len(inputs),), model.categories.index(category)), **more)


def _answer(command: Sequence[str], place: str) -> list[float]:
    """Return the differences that a program of its own tells; RuntimeError with its last words where it fails."""
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=place, capture_output=True, encoding="utf-8", errors="replace", env=quiet)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"the export does not load in a process of its own ({done.returncode}), which said: {said}")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert not answer["moeify"]
    return answer["differences"]


def _tolerable(differences: dict[str, float]) -> dict[str, float]:
    for category, difference in differences.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"the export for {category!r} differs from the split model by {difference:.2e} (> {TOLERANCE})"
            )
    return differences


def _difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@torch.no_grad()
def _round(network: nn.Module, dtype: torch.dtype) -> None:
    """Round every weight to what the dtype can hold, in place."""
    for name, parameter in network.named_parameters():
        rounded = parameter.to(dtype)
        if not torch.isfinite(rounded).all():
            raise ValueError(f"{name} has values that {dtype} cannot hold; take bfloat16 or float32")
        parameter.copy_(rounded)
