"""What leaves a run: a smaller dense model for one category, or the whole split model.

Every export is checked before it is published: it must give the split model's own outputs.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.families import describe, example_inputs, rebuild, with_units
from moeify.models import logits
from moeify.split_folder import load_from_run, load_split, save_split
from moeify.split_model import SplitModel

TOLERANCE = 1e-4
"""Largest difference of an output (logit, fp32) between an export and the split model."""


def export_category(run: Path, category: str, out: Path) -> None:
    """Write the part of a run's split model that serves one category as a smaller dense model of the same family.

    For a language model this is a directory that ``transformers.AutoModelForCausalLM.from_pretrained`` loads; for the
    autoencoder, which has no stock format, an undivided split folder for ``moeify.load_split``.
    """
    _refuse_occupied(out)
    split = load_from_run(run)
    dense = extract(split, category)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=_parent(out)))
    try:
        match describe(dense)["family"]:
            case "llama":
                _save_pretrained(dense, draft, _assets(run))
                reloaded = _load_pretrained(draft)
            case _:
                shutil.rmtree(draft)
                save_split(SplitModel(dense, [category]), draft, _assets(run))
                reloaded = load_split(draft)
        _verify(split, reloaded, category)
        _publish(draft, out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def export_split(run: Path, out: Path) -> None:
    """Write the whole split model as a folder that ``moeify.load_split`` gives back."""
    _refuse_occupied(out)
    split = load_from_run(run)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=_parent(out)))
    try:
        shutil.rmtree(draft)
        save_split(split, draft, _assets(run))
        reloaded = load_split(draft)
        for category in split.categories:
            _verify(split, reloaded, category)
        _publish(draft, out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


@torch.no_grad()
def extract(split: SplitModel, category: str) -> nn.Module:
    """Return a dense network of the units on one category's route; narrower sites are zero-padded to the widest.

    A zero unit reads and writes nothing, so the padding changes no output.
    """
    if category not in split.categories:
        raise ValueError(f"no category {category!r}; the model has {', '.join(split.categories)}")
    active = {site.name: split.partition.active(site.name, category).nonzero()[:, 0] for site in split.space.sites}
    kinds = {site.kind for site in split.space.sites}
    widest = {kind: max(len(active[site.name]) for site in split.space.sites if site.kind == kind) for kind in kinds}
    dense = rebuild(with_units(describe(split.network), widest["ffn"], widest.get("heads")))
    held = dict(split.network.named_parameters()) | dict(split.network.named_buffers())
    parts = {part.parameter: (part, active[site.name]) for site in split.space.sites for part in site.slices}
    for name, tensor in [*dense.named_parameters(), *dense.named_buffers()]:
        source = held[name]
        if name in parts:
            part, index = parts[name]
            source = _pad(source.index_select(part.axis, part.entries(index)), part.axis, tensor.shape[part.axis])
        tensor.copy_(source)
    return dense.eval()


def _pad(tensor: Tensor, axis: int, width: int) -> Tensor:
    behind = [0, 0] * (tensor.dim() - 1 - axis)
    return F.pad(tensor, [*behind, 0, width - tensor.shape[axis]])


@torch.no_grad()
def _verify(split: SplitModel, other: nn.Module, category: str) -> None:
    """Raise RuntimeError unless the export gives the split model's outputs on the category's route."""
    inputs = example_inputs(split.network, rows=2, seed=0)
    index = split.categories.index(category)
    wanted = split(inputs, torch.full((len(inputs),), index))
    if isinstance(other, SplitModel):
        got = other(inputs, torch.full((len(inputs),), other.categories.index(category)))
    else:
        got = logits(other, inputs)
    difference = (wanted - got).abs().max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"the export for {category!r} differs from the split model by {difference:.2e} (> {TOLERANCE})"
        )


def _save_pretrained(dense: nn.Module, folder: Path, assets: Mapping[str, bytes]) -> None:
    network: Any = dense
    network.save_pretrained(folder)
    for name, content in assets.items():
        (folder / name).write_bytes(content)


def _load_pretrained(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    network: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return network.eval()


def _assets(run: Path) -> dict[str, bytes]:
    folder = run / "assets"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.is_dir() else {}


def _parent(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def _refuse_occupied(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; name an empty or new folder")


def _publish(draft: Path, out: Path) -> None:
    draft.chmod(0o755)
    if out.exists():
        out.rmdir()
    draft.rename(out)
