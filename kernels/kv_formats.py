"""What a KV cache keeps a key or a value as: numbers of the activations' type, or a byte each with a scale behind them.

A row is one head of one token: `width` codes, then its scale as four bytes (fp32), so that whatever moves rows (cropped
caches, beams) moves both. Scales are the row's largest magnitude over the largest code, so a token is coded once, when
it comes, and no other is touched. Keys are coded after their rotation. `kernels/cpu/kept.h` does the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autotune.search_space.schemes import CACHE

GROUP = "kv_cache"  # what a configuration calls the cache, beside its layer groups
PREFIX = CACHE  # before a format's name where schemes are named too
FORMATS = ("int8", "fp8")
NATIVE = {None: 0, "int8": 1, "fp8": 2}  # `Tokens.kept` of decoder.cpp
SCALE_BYTES = 4
_MOST = {"int8": 127.0, "fp8": 448.0}
_LEAST_SCALE = 1e-30


def encode(x: torch.Tensor, name: str) -> torch.Tensor:
    """(..., width) -> (..., width + 4) int8. A row that is not finite comes back as NaN."""
    wide = x.float()
    most = wide.abs().amax(-1, keepdim=True)
    scale = (most / _MOST[name]).clamp_min(_LEAST_SCALE)
    scale = torch.where(most.isfinite(), scale, torch.nan)
    numbers = wide / scale
    codes = numbers.round_().to(torch.int8) if name == "int8" else numbers.to(torch.float8_e4m3fn).view(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], -1)


def decode(rows: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    """(..., width + 4) int8 -> (..., width)."""
    codes, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    numbers = codes if name == "int8" else codes.contiguous().view(torch.float8_e4m3fn)
    return (numbers.float() * scale).to(dtype)


def row_bytes(name: str | None, width: int, element_bytes: int) -> int:
    """Of one head's key, or value, of one token; `element_bytes` of the activations' type."""
    return width * element_bytes if name is None else width + SCALE_BYTES


def format_of(configuration: Mapping[str, str]) -> str | None:
    """The cache's format in a configuration; None: as the activations."""
    name = configuration.get(GROUP, "")
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None
