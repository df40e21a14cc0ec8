"""Buffers with room to grow behind a growing cache's keys and values, for native code that writes the next position.

The cache's own tensors are views of what is filled. Keys and values are numbers, or their codes (`kv_cache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autotune.kernels.cpu.decoder import Layer, Place
from autotune.kernels.cpu.memory import advise
from autotune.kernels.kv_formats import NATIVE, decode, row_bytes
from autotune.kv_cache import coded_format

_ROOM = 256  # positions to grow into, at least


@dataclass
class Room:
    """Keys and values (sequences, key heads, capacity, width or row of codes) of a cache layer, `filled` so far, and
    what it shows."""

    keys: torch.Tensor
    values: torch.Tensor
    filled: int
    coded: str | None
    shown_keys: torch.Tensor | None = None
    shown_values: torch.Tensor | None = None

    @classmethod
    def of(cls, kept: Any, capacity: int) -> Room:
        """A copy of what a cache layer holds, in room for so many positions."""
        filled = kept.keys.shape[2]
        return cls(_grown(kept.keys, capacity), _grown(kept.values, capacity), filled, coded_format(kept))

    def put(self, places: Sequence[Place]) -> None:
        """Tell native code where it is."""
        place = places[0]
        place.keys, place.values = self.keys.data_ptr(), self.values.data_ptr()
        place.capacity, place.position, place.kept = self.keys.shape[2], self.filled, NATIVE[self.coded]

    @property
    def full(self) -> bool:
        return self.filled == self.keys.shape[2]

    def beside(self, kept: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Its numbers beside those of a cache layer."""
        pairs = ((self.keys, kept.keys), (self.values, kept.values))
        if self.coded is None:
            return list(pairs)
        return [(decode(a, self.coded, torch.float32), decode(b, self.coded, torch.float32)) for a, b in pairs]

    def show(self, kept: Any) -> None:
        """One position more was filled."""
        self.filled += 1
        kept.keys = self.shown_keys = self.keys.narrow(2, 0, self.filled)
        kept.values = self.shown_values = self.values.narrow(2, 0, self.filled)


class Rooms:
    """All layers of a cache in one buffer, so that one operator makes what they show.

    `checked`: the number of what the cache was last found fit for.
    """

    def __init__(self, kept: Sequence[Any]) -> None:
        """kept: cache layers that hold as much and in the same way."""
        self.kept = tuple(kept)
        keys = kept[0].keys
        self.sequences, heads, self.filled, row = keys.shape
        self.coded = coded_format(kept[0])
        self.capacity = _capacity(self.filled)
        self._buffer = keys.new_empty(2 * len(kept), self.sequences, heads, self.capacity, row)
        advise(self._buffer)
        self.checked = -1
        with torch.no_grad():
            for number, layer in enumerate(kept):
                self._buffer[2 * number, :, :, : self.filled] = layer.keys
                self._buffer[2 * number + 1, :, :, : self.filled] = layer.values
                layer._autotune_room = None
        self._show()

    def serves(self, layers: Sequence[Any]) -> bool:
        """There is room for a position, and the cache's layers still show what was put there."""
        if self.filled == self.capacity or len(layers) != len(self.kept):
            return False
        for layer, kept, keys, values in zip(layers, self.kept, self._keys, self._values, strict=True):
            if layer is not kept or layer.keys is not keys or layer.values is not values:
                return False
        return True

    def put(self, places: Sequence[Place]) -> None:
        """Tell native code where the layers are."""
        start, size = self._buffer.data_ptr(), self._buffer[0].nbytes
        for place in places:
            place.keys, place.values = start, start + size
            place.capacity, place.position, place.kept = self.capacity, self.filled, NATIVE[self.coded]
            start += 2 * size

    def show(self) -> None:
        """One position more was filled."""
        self.filled += 1
        self._show()

    def _show(self) -> None:
        views = self._buffer.narrow(3, 0, self.filled).unbind(0)
        self._keys, self._values = views[0::2], views[1::2]
        for kept, keys, values in zip(self.kept, self._keys, self._values, strict=True):
            kept.keys, kept.values = keys, values


def alike_layers(kept: Sequence[Any]) -> bool:
    """Cache layers that `Rooms` can hold."""
    first = kept[0]
    shape, dtype, coded = first.keys.shape, first.keys.dtype, coded_format(first)
    return all(x.keys.shape == shape and x.keys.dtype == dtype and coded_format(x) == coded for x in kept)


def with_room(kept: Any) -> Room:
    """The buffers behind a cache layer's keys and values, with room for one position more.

    They serve only as long as the cache holds the very views that were put there: after anything else (it was cropped,
    reordered, copied, grown by transformers) they are made anew from what it holds.
    """
    room: Room | None = getattr(kept, "_autotune_room", None)
    if room is None or kept.keys is not room.shown_keys or kept.values is not room.shown_values or room.full:
        room = kept._autotune_room = Room.of(kept, _capacity(kept.keys.shape[2]))
    return room


def holds(layer: Layer, kept: Any, x: torch.Tensor, rotary: int) -> bool:
    """The cache is of these sequences and of this layer's heads: the native call asks no more."""
    sequences, heads, _, elements = kept.keys.shape
    coded = coded_format(kept)
    dtype = x.dtype if coded is None else torch.int8
    same = kept.keys.dtype == kept.values.dtype == dtype and kept.keys.device == kept.values.device == x.device
    row = row_bytes(coded, layer.width, 1)
    return same and (sequences, heads, elements) == (x.shape[0], layer.key_heads, row) and rotary <= layer.width


def _capacity(filled: int) -> int:
    return filled + max(_ROOM, filled // 2)


def _grown(tensor: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, heads, filled, width = tensor.shape
    grown = tensor.new_empty(batch, heads, capacity, width)
    grown[:, :, :filled] = tensor
    return grown
