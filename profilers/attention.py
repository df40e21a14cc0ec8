"""Microseconds of one new token's attention in one layer, by what keys and values are kept as and how many there are.

It is the native attention of `kernels/cpu/decoder.cpp`: rotation of the new token's queries and key, keeping its key
and value, scores, softmax, weighted sum. Every call has its own copy of the cache, as many as exceed the last cache
twice: in a model the weights of all layers have been read since a layer's keys were. Formats take turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autotune.kernels.cpu import decoder as native
from autotune.kernels.kv_formats import NATIVE, encode, row_bytes

ROUNDS = 25
_MOST_BYTES = 2**30  # of all copies


@dataclass(frozen=True)
class Heads:
    """Of one layer; `width` of a head."""

    heads: int
    key_heads: int
    width: int
    bf16: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def layer_bytes(self, name: str | None, positions: int, batch: int) -> int:
        """Of keys and values kept."""
        return 2 * batch * self.key_heads * positions * row_bytes(name, self.width, self.dtype.itemsize)


def attention_us(
    heads: Heads,
    formats: Sequence[str | None],
    positions: int,
    batch: int = 1,
    last_cache_bytes: int = 2**25,
    rounds: int = ROUNDS,
) -> dict[str | None, tuple[float, float, float]]:
    """Format -> (median, lower quartile, upper quartile) over the rounds of a layer's time.

    Raises:
        DeviceError: `kernel.compiler`, `kernel.memory`.
    """
    cells = {name: _Cell(heads, name, positions, batch, last_cache_bytes) for name in formats}
    samples: dict[str | None, list[float]] = {name: [] for name in formats}
    for cell in cells.values():
        cell.time_us()
    for _ in range(rounds):
        for name, cell in cells.items():
            samples[name].append(cell.time_us())
    quartiles = {name: np.quantile(values, (0.5, 0.25, 0.75)) for name, values in samples.items()}
    return {name: (float(values[0]), float(values[1]), float(values[2])) for name, values in quartiles.items()}


class _Cell:
    """Copies of one cache, and what the native call needs besides."""

    def __init__(self, heads: Heads, name: str | None, positions: int, batch: int, last_cache_bytes: int) -> None:
        size = heads.layer_bytes(name, positions, batch)
        copies = max(1, min(2 * last_cache_bytes // size + 1, _MOST_BYTES // size))
        generator = torch.Generator().manual_seed(0)
        outputs = (heads.heads + 2 * heads.key_heads) * heads.width
        shape = (batch, heads.key_heads, positions, heads.width)
        rows = torch.randn(shape, generator=generator).to(heads.dtype)
        kept = rows if name is None else encode(rows, name)
        self._caches = [(kept.clone(), kept.clone()) for _ in range(copies)]
        self._projected = torch.randn(batch, outputs, generator=generator).to(heads.dtype)
        self._attended = torch.empty(batch, heads.heads * heads.width, dtype=heads.dtype)
        self._angles = torch.full((batch, heads.width), 0.7, dtype=heads.dtype)
        self._layer = native.Layer(
            qkv=native.Product(None, None, outputs),
            scaling=heads.width**-0.5,
            bf16=heads.bf16,
            heads=heads.heads,
            key_heads=heads.key_heads,
            width=heads.width,
            projected=self._projected.data_ptr(),
            attended=self._attended.data_ptr(),
            rows=batch,
        )
        self._tokens = native.Tokens(
            cosines=self._angles.data_ptr(),
            sines=self._angles.data_ptr(),
            count=batch,
            rotary=heads.width,
            rotary_stride=heads.width,
        )
        self._place = native.Place(capacity=positions, position=positions - 1, kept=NATIVE[name])

    def time_us(self) -> float:
        """Of a layer, the mean over all copies."""
        threads, start = torch.get_num_threads(), time.perf_counter()
        for keys, values in self._caches:
            self._place.keys, self._place.values = keys.data_ptr(), values.data_ptr()
            native.attend(self._layer, self._place, self._tokens, threads)
        return (time.perf_counter() - start) / len(self._caches) * 1e6
