"""The KV cache of a changing batch: one prompt shared by many rows, rows that leave, rows that join.

All rows are aligned at their right end, so joining two caches pads the shorter one on the left; which columns
are padding is the attention mask's business. Works on transformers' cache layers of full and sliding
attention; a model with other layers (linear attention, say) is `joinable(cache) == False` and its batches
stay as they started.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_GROWTH = 64


class BufferedLayer(DynamicLayer):
    """A full-attention layer that writes new tokens into room kept free for them.

    transformers' own layer copies all keys and values at every step to append one column.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [batch, heads, tokens, width] keys and values; gives all of them so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        have = int(self.get_seq_length())
        end = have + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end:
            keys, values = (
                new.new_empty((*new.shape[:-2], end + _GROWTH, new.shape[-1]))
                for new in (key_states, value_states)
            )
            if self.keys is not None and self.values is not None and have:
                keys[..., :have, :] = self.keys
                values[..., :have, :] = self.values
            self._room = (keys, values)
        keys, values = self._room
        keys[..., have:end, :] = key_states
        values[..., have:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take these as the content; the room is made again when the next token comes."""
        self._room = None
        self.keys, self.values = keys, values
        self.device = keys.device
        self.is_initialized = True

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._room = None

    def reset(self) -> None:
        super().reset()
        self._room = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None and self.get_seq_length() > 0:
            index = beam_idx.to(self.keys.device)
            self.hold(self.keys.index_select(0, index), self.values.index_select(0, index))


def new_cache(config: Any) -> DynamicCache:
    """An empty cache for a decoder with this config."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = BufferedLayer()
    return cache


def joinable(cache: DynamicCache) -> bool:
    """Whether rows may join and columns may be trimmed: every layer is full or sliding attention."""
    return all(isinstance(layer, BufferedLayer | DynamicSlidingWindowLayer) for layer in cache.layers)


def select(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Keep these rows, in this order; a row may be named several times (a shared prompt)."""
    layers: Any = cache.layers
    for layer in layers:
        layer.reorder_cache(rows)


def join(cache: DynamicCache, other: DynamicCache) -> None:
    """Append the rows of `other` to `cache`; both are aligned at their right end."""
    pairs: Any = zip(cache.layers, other.layers, strict=True)
    for mine, theirs in pairs:
        if not theirs.is_initialized:
            continue  # a layer that borrows another one's keys and values
        width = max(mine.keys.shape[-2], theirs.keys.shape[-2])
        keys = torch.cat([_pad_left(mine.keys, width), _pad_left(theirs.keys, width)])
        values = torch.cat([_pad_left(mine.values, width), _pad_left(theirs.values, width)])
        _hold(mine, keys, values)
        if isinstance(mine, DynamicSlidingWindowLayer):
            mine.cumulative_length = max(mine.cumulative_length, theirs.cumulative_length)


def trim(cache: DynamicCache, columns: int) -> None:
    """Drop leading columns that are padding in every row."""
    layers: Any = cache.layers
    for layer in layers:
        if not layer.is_initialized:
            continue
        sliding = isinstance(layer, DynamicSlidingWindowLayer)
        if sliding:
            layer.cumulative_length -= columns
            kept = min(layer.cumulative_length, layer.sliding_window - 1)
            start = int(layer.keys.shape[-2]) - kept
        else:
            start = columns
        _hold(layer, layer.keys[..., start:, :], layer.values[..., start:, :])


def _hold(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    if isinstance(layer, BufferedLayer):
        layer.hold(keys, values)
    else:
        layer.keys, layer.values = keys, values


def _pad_left(states: Any, width: int) -> torch.Tensor:
    missing = width - states.shape[-2]
    if missing == 0:
        return states
    # zeros, never uninitialised memory: a masked NaN would still poison the sum
    pad = states.new_zeros((*states.shape[:-2], missing, states.shape[-1]))
    return torch.cat([pad, states], dim=-2)
