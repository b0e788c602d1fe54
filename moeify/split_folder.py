"""The split model as a folder: hashed safetensors and JSON, the tokenizer's files beside them.

``manifest.json`` holds the network's description, the categories and the partition; ``model.safetensors`` the
parameters under the stock architecture's names, units in tree order, each site as wide as its widths add up to. Folders
of the same ``moeify.store.FORMAT`` stay readable; the model card in the folder describes it for other readers.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moeify.models.families import describe, example_inputs
from moeify.models.resizing import shaped
from moeify.place import Place, checked_url, fetch, is_url
from moeify.recipe.arms import Arm
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.store import (
    CorruptCheckpointError,
    FolderStore,
    part_files,
    read_manifest,
    read_part,
    understood,
    write_folder,
)

_OWN = ("parameter/", "buffer/")
"""What the names of a model's tensors start with in a checkpoint."""
_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""Of a number; 8 for all others."""


def save_split(
    model: SplitModel, target: Path, assets: Mapping[str, bytes], dtype: torch.dtype = torch.float32
) -> None:
    """Write a split model and the files that belong to it; the folder appears whole or not at all.

    ``dtype``: of the weights in the file, running statistics stay as they are; what ``load_split`` gives is float32
    again, with the values in the file.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "split"
    >>> save_split(model, folder, {})
    >>> load_split(folder).partition == model.partition
    True
    """
    facts = {
        "network": describe(model.network),
        "categories": list(model.categories),
        "partition": model.partition.as_json(),
    }
    weights = {name for name, _ in model.network.named_parameters()}
    tensors = {name: tensor.to(dtype) if name in weights else tensor for name, tensor in _tensors(model).items()}
    write_folder(target, facts, {"model": tensors}, assets)


def load_split(folder: str | Path) -> SplitModel:
    """Return the split model that ``moeify export RUN --split`` wrote to a folder or a URL, in eval mode.

    Raises CorruptCheckpointError (a ValueError) when a file is missing or is not what was written.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "split"
    >>> save_split(model, folder, {"note.txt": b"mine"})
    >>> back = load_split(folder)
    >>> back.categories, back.training
    (('dark', 'light'), False)
    """
    if isinstance(folder, str) and is_url(folder):
        with TemporaryDirectory(prefix="moeify-split-") as copy:
            fetch(Place(checked_url(folder)), Path(copy))
            return load_split(copy)
    folder = Path(folder)
    if not (folder / "manifest.json").exists():
        got = "no such folder" if not folder.is_dir() else "its manifest.json is not there"
        stock = "; transformers loads what has a config.json" if (folder / "config.json").exists() else ""
        raise CorruptCheckpointError(f"{folder}: {got}, wanted what `moeify export RUN --split` wrote{stock}")
    facts = read_manifest(folder)["facts"]
    tensors = read_part(folder, "model")
    with understood(str(folder)):
        return _load(facts, facts["partition"], tensors)


def arms_of_run(folder: Path) -> tuple[Arm, ...]:
    """Return the arms that a run's newest checkpoint holds; ValueError where there is no checkpoint yet."""
    return tuple(_newest(folder)[2]["arms"])


def load_from_run(folder: Path, arm: Arm = "split") -> SplitModel:
    """Return an arm's model from a run's newest checkpoint, in eval mode; ValueError where it is not there yet."""
    store, name, facts = _newest(folder)
    _known_arm(folder, facts, arm)
    own = _own(store.tensors(name, arm))
    with understood(f"checkpoint {name} of {folder.name}"):
        return _load(facts, facts["arms"][arm]["partition"], own)


def began_of_run(folder: Path) -> str:
    """Return the hash of the network that a run began with, as its newest checkpoint has it; empty: unknown."""
    return str(_newest(folder)[2].get("began", ""))


def bytes_in_run(folder: Path, arm: Arm) -> int:
    """Return how large an arm's model in a run's newest checkpoint is, without reading it; ValueError as above."""
    store, name, facts = _newest(folder)
    _known_arm(folder, facts, arm)
    total = 0
    for path in part_files(store.folder / "checkpoints" / name, arm):
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(key) for key in file.keys() if key.startswith(_OWN)]  # noqa: SIM118
            total += sum(math.prod(each.get_shape()) * _BYTES.get(each.get_dtype(), 8) for each in shapes)
    return total


def copy_from_run(folder: Path, arm: Arm, target: Path) -> None:
    """Write an arm's model from a run's newest checkpoint, and the run's assets, as ``save_split`` would write them.

    No network is built for it. ValueError where the arm is not there.
    """
    store, name, facts = _newest(folder)
    _known_arm(folder, facts, arm)
    own = _own(store.tensors(name, arm))
    assets = folder / "assets"
    files = {path.name: path.read_bytes() for path in sorted(assets.iterdir())} if assets.is_dir() else {}
    known = {key: facts[key] for key in ("network", "categories")} | {"partition": facts["arms"][arm]["partition"]}
    write_folder(target, known, {"model": own}, files)


def split_hash(folder: Path) -> str:
    """Return the SHA-256 of the split model in a run's newest checkpoint, to tell what belongs to it."""
    if "split" not in arms_of_run(folder):
        raise ValueError(f"{folder.name} has not been split yet; its first cut comes after the first training phase")
    store, name, _ = _newest(folder)
    with understood(f"checkpoint {name} of {folder.name}"):
        checkpoint = store.folder / "checkpoints" / name
        known = read_manifest(checkpoint)["files"]
        hashes = [str(known[path.name]["sha256"]) for path in part_files(checkpoint, "split")]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _newest(folder: Path) -> tuple[FolderStore, str, dict[str, Any]]:
    store = FolderStore(folder, keep=1)
    found = store.newest()
    if found is None:
        raise ValueError(f"{folder.name} has no checkpoint yet; let it train on, or see `moeify show {folder.name}`")
    facts = store.facts(found.name)
    if not isinstance(facts.get("arms"), dict):
        raise CorruptCheckpointError(f"checkpoint {found.name} of {folder.name} does not say which models it holds")
    return store, found.name, facts


def _known_arm(folder: Path, facts: Mapping[str, Any], arm: Arm) -> None:
    if arm in facts["arms"]:
        return
    if "split" in facts["arms"]:
        there = ", ".join(facts["arms"])
        raise ValueError(f"{folder.name} has no arm {arm!r}, only {there}; its recipe's controls do not ask for it")
    raise ValueError(f"{folder.name} has not been split yet; its first cut comes after the first training phase")


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's tensors among those of a checkpoint, which has the optimizer's too."""
    return {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith(_OWN)}


def _tensors(model: SplitModel) -> dict[str, Tensor]:
    persistent = model.network.state_dict()
    named = [*model.network.named_parameters(), *model.network.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in persistent}


@torch.no_grad()
def _load(facts: Mapping[str, Any], partition: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SplitModel:
    widths = Partition.from_json(partition)
    network = shaped(facts["network"], {site: widths.units(site) for site in widths.widths})
    told = any(name.endswith(".told.weight") for name in tensors)
    model = SplitModel(network, facts["categories"], widths, told=told)
    own = _tensors(model)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise CorruptCheckpointError(f"the tensors do not fit the described network, first difference: {odd[0]!r}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise CorruptCheckpointError(
                f"{name} is {list(tensors[name].shape)}, the described network wants {list(tensor.shape)}"
            )
        tensor.copy_(tensors[name])
    model.eval()
    # A description can be odd in ways that show only as it runs; better here than at the first real row.
    model(example_inputs(network, rows=1, seed=0), torch.zeros(1, dtype=torch.long))
    return model
