"""What leaves a run: a dense model of one route, a stock mixture of experts, or the split model and parts of it.

What is exported is named by a run's folder, or is at hand (``Origin``). Every export is checked before it is published:
it must give the split model's own outputs for every category (``moeify.export.verification``). A model card stands
beside the weights.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moeify.export import gguf_file, onnx_file, speed
from moeify.export.card_measures import FileForm
from moeify.export.model_card import NOTHING, About, Checked, card
from moeify.export.recovery import Recover
from moeify.export.speeds import Speeds
from moeify.export.stock import Form, Stock, ffn_sites, to_dense, without_bars
from moeify.export.stock_moe import to_moe
from moeify.export.verification import Source
from moeify.models.families import transformer_of
from moeify.place import LOADED
from moeify.routed.split_model import SplitModel
from moeify.routers.by_layer import Distil, LayerRouterReport
from moeify.routers.joint import Joined
from moeify.split_folder import load_from_run, load_split, save_split

SHARD = "5GB"
"""Weights of a stock export above this size go to several files."""

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class How:
    """What all kinds of exports have in common."""

    dtype: Dtype = "float32"
    """Of the weights in the file. Below float32, the check is against the split model with weights rounded the same."""
    gguf: bool = False
    """Write stock forms as one GGUF file, ``model.gguf``, in place of a folder of ``transformers``."""
    onnx: bool = False
    """Write a dense model as one ONNX graph, ``model.onnx``, instead; of any network that can be rebuilt."""
    cache: bool = False
    """Of an ONNX graph: keys and values of earlier tokens go in and out. For models that write text."""
    verify: bool = True
    speed: bool = False
    """Time it against the dense network, see ``moeify.export.speed``: on the card, and in a file beside it."""
    about: About = NOTHING
    """What the model card can say of the run."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return getattr(torch, self.dtype)

    @property
    def file(self) -> FileForm | None:
        """What the one file is, where it is one."""
        return "gguf" if self.gguf else "onnx" if self.onnx else None


PLAIN = How()


@dataclass(frozen=True)
class Origin:
    """A split model that is at hand, and what belongs to it. Its weights become those of the export's dtype."""

    model: SplitModel
    name: str = "the model"
    assets: Mapping[str, bytes] = field(default_factory=dict)
    """The tokenizer's files, by name; none where nothing is known of a tokenizer."""


def export_dense(run: Path | Origin, categories: Sequence[str], out: Path, how: How = PLAIN) -> Checked:
    """Write the one route that these categories share as a smaller dense model of the same family.

    For a model of ``transformers`` this is a directory that ``from_pretrained`` of its auto class loads; for other
    networks, which have no stock format, an undivided split folder for ``moeify.load_split``. GGUF and ONNX files keep
    each layer's own width.
    """
    _refuse_occupied(out)
    _refuse_lacking(run, how)
    source = Source.of(_split_of(run), how.torch_dtype, keep=categories)
    heads_too = len(ffn_sites(source.whole)) < len(source.whole.space.sites)
    stock = to_dense(source.whole, categories, padded=not how.onnx and (not how.gguf or heads_too))
    if transformer_of(stock.network) is None and not how.onnx:
        return export_split(run, out, how, keep=categories)
    return _export_stock(run, source, stock, out, how)


def export_moe(
    run: Path | Origin,
    form: Form,
    out: Path,
    how: How = PLAIN,
    *,
    forced: str | None = None,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    recover: Recover | None = None,
    distil: Distil | None = None,
    join: Callable[[SplitModel], Joined] | None = None,
) -> Checked:
    """Write the split model as a stock ``transformers`` mixture of experts.

    ``distil``: trains its routers, so that it routes text without labels by itself. ``forced``: the category along
    whose route every token goes instead; without both it is the first that is whole. The model card says how to force
    a category after loading. ``join``: has the whole split model and its routers learn together first
    (``moeify.routers.joint``). ``keep``, ``drop``, ``recover``: as in ``export_split``.
    """
    if forced and distil:
        raise ValueError(f"got category {forced!r} to force and routers to train; leave one of the two out")
    if join and (distil is None or keep or drop):
        raise ValueError("joint training is for the whole mixture and its routers; export all categories, force none")
    if how.onnx:
        raise ValueError("an ONNX graph is of one category's route; export a dense model, or the mixture without onnx")
    _refuse_occupied(out)
    _refuse_lacking(run, how)
    split = _split_of(run)
    joined = None
    if join:
        to_moe(split, form, split.categories[0])  # says what does not fit before anything is trained
        joined = join(split)
    source = Source.of(split, how.torch_dtype, keep=keep, drop=drop, recover=recover)
    intact = [category for category in source.part.categories if category not in drop]
    if distil is None:
        stock = to_moe(source.part, form, forced or (intact or source.part.categories)[0])
        return _export_stock(run, source, stock, out, how)
    to_moe(source.part, form, source.part.categories[0])
    routers, report = distil(source.part, joined.routers if joined else None)
    if joined:
        report = report.model_copy(update={"joint": joined.report})
    stock = to_moe(source.part, form, routers.rounded(how.torch_dtype))
    return _export_stock(run, source, stock, out, how, report)


def export_split(
    run: Path | Origin,
    out: Path,
    how: How = PLAIN,
    *,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    recover: Recover | None = None,
) -> Checked:
    """Write the split model as a folder that ``moeify.load_split`` gives back.

    ``keep``: only these categories, and the experts that serve them. ``drop``: all categories, without the experts that
    serve none but these; rows of a dropped category run on what is left of their route. ``recover``: how what is left
    is then trained on.
    """
    _refuse_occupied(out)
    source = Source.of(_split_of(run), how.torch_dtype, keep=keep, drop=drop, recover=recover)
    with _published(out) as draft:
        shutil.rmtree(draft)
        save_split(source.part, draft, _assets(run), dtype=how.torch_dtype)
        differences = source.against_split(load_split(draft)) if how.verify else None
        speeds = speed.of_split(load_split(draft), source.whole) if how.speed else None
        checked = Checked(source.rounding, differences, source.recovery, speeds)
        _describe(draft, card(how.about, source, checked, dtype=how.dtype), speeds)
    return checked


def _export_stock(
    run: Path | Origin, source: Source, stock: Stock, out: Path, how: How, routers: LayerRouterReport | None = None
) -> Checked:
    if how.speed and how.gguf:
        speed.refuse_gguf(source.whole)
    route = stock.forced or next(iter(stock.price.routes))
    with _published(out) as draft:
        differences, speeds = None, None
        if how.gguf:
            assets = _assets(run)
            path, name = draft / "model.gguf", how.about.run or out.name
            gguf_file.write(stock.network, assets, path, dtype=how.torch_dtype, name=name)
            if how.verify:
                differences = source.against_gguf(path, stock, assets, how.torch_dtype)
            if how.speed:
                speeds = speed.of_gguf(source.part, source.whole, path, assets, route, how.torch_dtype)
        elif how.onnx:
            path = draft / "model.onnx"
            name = how.about.run or out.name
            onnx_file.write(stock.network, path, dtype=how.torch_dtype, name=name, cache=how.cache)
            _write_assets(run, draft)
            if how.verify:
                differences = source.against_onnx(path, stock)
            if how.speed:
                speeds = speed.of_onnx(source.part, source.whole, path, route, how.torch_dtype)
        else:
            _save_pretrained(stock.network.to(how.torch_dtype), draft)
            _write_assets(run, draft)
            if how.verify:
                differences = source.against_stock(draft, stock)
            if how.speed:
                chosen = None if stock.routers else route
                speeds = speed.of_stock(source.part, source.whole, draft, chosen, how.torch_dtype)
        checked = Checked(source.rounding, differences, source.recovery, speeds, routers)
        text = card(how.about, source, checked, dtype=how.dtype, stock=stock, file=how.file, cache=how.cache)
        _describe(draft, text, speeds)
    return checked


def _save_pretrained(stock: nn.Module, folder: Path) -> None:
    network: Any = stock
    if hasattr(network, "generation_config"):  # of models that write text
        network.config.use_cache = True
        network.generation_config.use_cache = True
    with without_bars():
        network.save_pretrained(folder, max_shard_size=SHARD)


def _write_assets(run: Path | Origin, folder: Path) -> None:
    for name, content in _assets(run).items():
        (folder / name).write_bytes(content)


def _describe(folder: Path, text: str, speeds: Speeds | None) -> None:
    (folder / "README.md").write_text(text, encoding="utf-8")
    if speeds:
        (folder / speed.FILE).write_text(json.dumps(speeds.as_json(), indent=2) + "\n", encoding="utf-8")


def _split_of(run: Path | Origin) -> SplitModel:
    return run.model if isinstance(run, Origin) else load_from_run(run)


def _assets(run: Path | Origin) -> Mapping[str, bytes]:
    if isinstance(run, Origin):
        return run.assets
    folder = run / "assets"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.is_dir() else {}


def _refuse_occupied(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; name an empty or new folder")


def _refuse_lacking(run: Path | Origin, how: How) -> None:
    if how.gguf:
        gguf_file.require(verify=how.verify)
        if "tokenizer.json" not in _assets(run):
            raise ValueError(f"{run.name} has no tokenizer, which a GGUF file must hold; GGUF is for language models")
    if how.cache and (how.speed or not how.onnx):
        raise ValueError("a cache is for ONNX graphs, which are timed without one; leave one of the two out")
    if how.onnx:
        onnx_file.require(runs=how.verify or how.speed)


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes ``out`` when all went well and is gone otherwise.

    Where ``out`` is there (it may be the working directory, or a mounted volume), what was written moves into it, that
    without which nothing loads it last.
    """
    out = out.resolve()
    there = out.exists()
    home = out if there else out.parent
    home.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=home))
    try:
        yield draft
        draft.chmod(0o755)
        for path in draft.iterdir():
            path.chmod(0o644)
        if there:
            for path in sorted(draft.iterdir(), key=lambda path: path.name in LOADED):
                path.rename(out / path.name)
            draft.rmdir()
        else:
            draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
