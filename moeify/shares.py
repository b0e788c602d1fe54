"""Tensors of which every worker holds a share, torch's DTensor cut along the first axis, and all others.

What reads or moves whole tensors gathers one at a time. ``whole`` and ``Gathered`` are collectives: every rank calls
them in the same order, which partitioning is sure to do, since all ranks decide alike.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def own(tensor: Tensor) -> Tensor:
    """Return what this worker holds of a tensor; of one that is not shared out, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def offset(tensor: Tensor) -> tuple[int, ...]:
    """Return where in the whole tensor this worker's share begins, on each axis."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered where it is shared out."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor, in place: whole ones, or shares as the tensor's own."""
    own(tensor).copy_(_share(tensor, values))


@torch.no_grad()
def like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return a copy of values on the tensor's device, shared out as it is where they have its shape."""
    if not isinstance(tensor, DTensor) or values.shape != tensor.shape:
        return own(values).to(tensor.device, copy=True)
    share = _share(tensor, values).to(tensor.device, copy=True)
    return DTensor.from_local(
        share, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _share(tensor: Tensor, values: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor) or isinstance(values, DTensor):
        return own(values)
    begins, shape = offset(tensor), own(tensor).shape
    return values[tuple(slice(first, first + size) for first, size in zip(begins, shape, strict=True))]


class Gathered(Mapping[str, Tensor]):
    """Tensors by name that are gathered when they are asked for; the last one is kept."""

    def __init__(self, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
        self._tensors = tensors
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, all of it."""
        if self._last is None or self._last[0] != name:
            self._last = None  # so that there are never two
            self._last = name, self._tensors[name]()
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._tensors)
