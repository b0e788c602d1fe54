"""The files of a checkpoint's parts: one each, or one of each worker where workers share a model out.

A worker's file holds its share of every tensor, along the first axis, and the first worker's also what is not shared
out. Readers join the shares, a tensor at a time, so that they need not know; neither need a run that goes on with
another number of workers. ``torch.distributed.checkpoint`` says what is where in a pickle, or in the headers of its
safetensors files, as these do: alone in a folder, those of a part are what its ``HuggingFaceStorageReader`` reads.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from attribution.tensor_files import save_file
from moeify.shares import offset, own
from moeify.storing import StorageError
from moeify.world import World

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Part (one file each) -> name -> tensor."""


class CorruptCheckpointError(ValueError):
    """A checkpoint is not what was written."""


def write_parts(draft: Path | None, tensors: Tensors, world: World) -> dict[str, dict[str, Any]]:
    """Write this worker's files of all parts, and return name -> hash and size of every worker's.

    A part that is shared out takes a file of each worker, the first of which also holds what is not shared out of it.
    """
    if draft is None or not draft.is_dir():
        raise StorageError(
            f"worker {world.rank} does not see {draft}, where worker 0 keeps the run; workers that share models out "
            f"(cluster.parallel) need a folder or a URL that all of them reach: set MOEIFY_HOME to one"
        )
    files = {}
    for part, held in tensors.items():
        shared = any(isinstance(tensor, DTensor) for tensor in held.values())
        assert world.size > 1 or not shared, "every worker has to write its share"
        name = f"{part}.{world.rank}-of-{world.size}.safetensors" if shared else f"{part}.safetensors"
        mine = {key: own(t) for key, t in held.items() if world.rank == 0 or isinstance(t, DTensor)}
        if shared or world.rank == 0:
            known_to_torch = {"DCP_SHARDING_INFO": json.dumps(_offsets(held, mine))} if shared else None
            save_file({key: tensor.detach().contiguous() for key, tensor in mine.items()}, draft / name, known_to_torch)
            files[name] = known(draft / name)
    return {name: each_known for each in world.gather(files) for name, each_known in each.items()}


def _offsets(held: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return where the shares begin in the whole, as ``torch.distributed.checkpoint`` writes it."""
    return {name: {"saved_offsets": list(offset(held[name]))} for name in sorted(mine)}


class Part(Mapping[str, Tensor]):
    """The tensors of the files of one part, each read, and joined where it is shared out, when it is asked for.

    Raises CorruptCheckpointError where a file is not one of tensors, or shares do not fit together.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._where = f"{files[0].parent.name}: {files[0].name}"
        with self._readable():
            self._open: list[Any] = [safe_open(path, framework="pt") for path in files]
            self._names = [frozenset(file.keys()) for file in self._open]

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, all of it."""
        with self._readable():
            held = [file for file, names in zip(self._open, self._names, strict=True) if name in names]
            shares = [file.get_tensor(name) for file in held]
        if not shares:
            raise KeyError(name)
        try:
            return shares[0] if len(shares) == 1 else torch.cat(shares)
        except RuntimeError as error:
            raise CorruptCheckpointError(f"{self._where}: the shares of {name} do not fit together") from error

    def __iter__(self) -> Iterator[str]:
        """Go through the names of all tensors."""
        return iter(sorted(frozenset().union(*self._names)))

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(frozenset().union(*self._names))

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise CorruptCheckpointError(f"{self._where} cannot be read ({error})") from error


def part_names(names: Collection[str], part: str) -> list[str]:
    """Return which of a folder's files holds a part, or those of all workers, in their order, that it is shared over.

    CorruptCheckpointError where a worker's is missing. Whether the only file is there is not looked at.
    """
    shares = [name for name in names if re.fullmatch(re.escape(part) + r"\.[0-9]+-of-[0-9]+\.safetensors", name)]
    wanted = [f"{part}.{rank}-of-{len(shares)}.safetensors" for rank in range(len(shares))]
    if sorted(shares) != sorted(wanted):
        raise CorruptCheckpointError(f"the files of {part!r} are not those of so many workers: {sorted(shares)}")
    return wanted or [f"{part}.safetensors"]


def known(path: Path) -> dict[str, Any]:
    """Have a file on the disk, and return its hash and size."""
    flush(path)
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def sha256(path: Path) -> str:
    """Return the hash of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have a file, or what a folder lists, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
