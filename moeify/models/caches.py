"""Caches of keys and values for networks of ``transformers``: its own, and one that is written in place."""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from moeify.models.transformer import config_of

_GROWTH = 1.5
"""Room for how many times as many tokens as there are is made where there is none left."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """Keys and values in memory that has room for more: a token's are written there, where ``DynamicLayer`` copies
    those of all tokens before it. Not for gradients."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch heads tokens size]; return those of all tokens, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms: dict[str, Tensor] = {}
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, held: Tensor, more: Tensor) -> Tensor:
        before = held.shape[-2] if held.numel() else 0
        after = before + more.shape[-2]
        room = self._rooms.get(name)
        ours = room is not None and held.data_ptr() == room.data_ptr() and held.shape[:2] == room.shape[:2]
        if room is None or not ours or room.shape[-2] < after:  # rows may have been chosen from what was held
            larger = max(after, int(_GROWTH * before))
            room = self._rooms[name] = more.new_empty(*more.shape[:2], larger, more.shape[-1])
            if before:
                room[:, :, :before] = held
        room[:, :, before:after] = more
        return room[:, :, :after]


def empty_cache(network: nn.Module) -> tuple[DynamicCache, str]:
    """Return an empty cache as ``transformers`` makes it, and the keyword by which the network takes it."""
    parameters = inspect.signature(network.forward).parameters
    return DynamicCache(config=config_of(network)), "cache" if "cache" in parameters else "past_key_values"


def growing_cache(network: nn.Module) -> tuple[DynamicCache, str]:
    """Return the same, with layers that are written in place; those of a sliding window stay as they are."""
    cache, keyword = empty_cache(network)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache, keyword
