"""Large tensors reduced to small sums in float64, a part at a time, in memory that stays where it is.

Axes: rows r of a part, positions P, units U, features W of a unit.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_CHUNK = 2**18
"""Elements reduced at a time: a scratch of 2 MB that stays in the cache."""


class Scratch:
    """Two buffers in float64 that all taps reduce in, one after the other.

    New memory of this size comes from the system page by page, which took several times as long as what is done in it.
    """

    def __init__(self) -> None:
        self._held: dict[torch.device, Tensor] = {}

    def pair(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return two tensors of a shape, which hold anything until the next call."""
        size, held = like.numel(), self._held.get(like.device)
        if held is None or held.shape[1] < size:
            held = self._held[like.device] = like.new_empty(2, max(size, _CHUNK), dtype=torch.float64)
        one, other = held[:, :size].view(2, *like.shape)
        return one, other


def chunks(arranged: Tensor) -> Iterator[slice]:
    """Cut rows into parts of about ``_CHUNK`` elements.

    >>> list(chunks(torch.zeros(3, 1, 2**17, 1)))
    [slice(0, 2, None), slice(2, 4, None)]
    """
    step = max(1, _CHUNK // max(1, arranged[0].numel()))
    return (slice(start, start + step) for start in range(0, len(arranged), step))


def over_features(values_rPUW: Tensor, how: Callable[..., Tensor]) -> Tensor:
    """Return ``how(values, 3)``, or where that axis is one long, as of FFN units, a view without it.

    >>> over_features(torch.ones(1, 1, 1, 3), torch.sum), over_features(torch.ones(1, 1, 1, 1), torch.sum)
    (tensor([[[3.]]]), tensor([[[1.]]]))
    """
    return values_rPUW.squeeze(3) if values_rPUW.shape[3] == 1 else how(values_rPUW, 3)
