"""Random numbers that are a function of a place and a key, the same bits on every device and however rows are sharded.

The mixing is splitmix64's finish, in 64-bit integers that wrap around (Steele, Lea and Flood 2014).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MASK = 2**64 - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def row_seed(seed: int, row: int) -> int:
    """Mix a pass's seed and a row's id into 63 bits, so that neighbours do not correlate.

    >>> row_seed(0, 0) == row_seed(0, 0), row_seed(0, 1) == row_seed(1, 0)
    (True, False)
    """
    state = (seed * _STEP + row + _STEP) & _MASK
    state = ((state ^ (state >> 30)) * _FIRST) & _MASK
    state = ((state ^ (state >> 27)) * _SECOND) & _MASK
    return (state ^ (state >> 31)) >> 1


def mixed(places: Int[Tensor, "..."], keys: Int[Tensor, "..."] | int) -> Int[Tensor, "..."]:
    """Mix places and keys into 64 bits.

    >>> mixed(torch.arange(2), 1).tolist()
    [6238072747940578789, -7995527694508729151]
    """
    state = places * _signed(_STEP) + keys
    state = (state ^ shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ shifted(state, 27)) * _signed(_SECOND)
    return state ^ shifted(state, 31)


def shifted(state: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """Shift 64-bit integers to the right and fill with zeros.

    >>> shifted(torch.tensor([-1]), 63).tolist()
    [1]
    """
    return (state >> bits) & (2 ** (64 - bits) - 1)


def signs(seeds: Sequence[int], count: int, device: torch.device) -> Float[Tensor, "rows count"]:
    """Return ``count`` fair random signs, 1.0 or -1.0, for each row's seed.

    >>> signs([3, 3, 4], 8, torch.device("cpu")).tolist()[1:]
    [[1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0], [1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0, 1.0]]
    """
    keys_R = torch.tensor([_signed(seed & _MASK) for seed in seeds], device=device)
    words_RW = mixed(torch.arange(-(-count // 64), device=device), keys_R[:, None])
    bytes_N = words_RW.view(torch.uint8).flatten().int()
    bit_of_byte = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return (1.0 - 2.0 * bit_of_byte).index_select(0, bytes_N).view(len(seeds), -1)[:, :count]


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
