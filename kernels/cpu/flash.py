"""Attention of a prompt's tokens in bf16 as one native call, in `flash.cpp` (FlashAttention, arXiv 2205.14135).

torch's own attention on a CPU runs bf16 products at speed only where there are AMX tiles; this is for CPUs with bf16
dot products and without tiles.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from autotune.errors import DeviceError
from autotune.kernels.cpu import build
from autotune.targets.detect import detect_cpu

_PANEL = 32  # a head's width is a multiple of it
_pointer, _size = ctypes.c_void_p, ctypes.c_int64


class _Task(ctypes.Structure):
    """`Task` of flash.cpp."""

    _fields_ = (
        *((name, _pointer) for name in ("queries", "keys", "values", "out")),
        *((name, _size * 3) for name in ("query_strides", "key_strides", "value_strides")),
        *((name, _size) for name in ("batch", "heads", "key_heads", "count", "kept", "width")),
        ("causal", ctypes.c_int32),
        ("scaling", ctypes.c_float),
    )


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend` takes these tensors, on this CPU."""
    tensors = (query, key, value)
    return (
        all(item.dtype == torch.bfloat16 and item.device.type == "cpu" and item.stride(-1) == 1 for item in tensors)
        and query.shape[-1] % _PANEL == 0
        and query.shape[-1] == key.shape[-1]
        and key.shape == value.shape
        and min(query.shape) > 0
        and key.shape[2] > 0
        and query.shape[1] % key.shape[1] == 0
        and available()
    )


@cache
def available() -> bool:
    """Whether this CPU has the instructions, no tiles, and a compiler."""
    return build.is_used("flash", detect_cpu().features) and build.available("flash")


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool = True
) -> torch.Tensor:
    """softmax(scaling * q k^T) v in bf16, sums and softmax in fp32.

    Args:
        query: (batch, heads, tokens, width), any strides but the last. Heads that follow each other share a key head.
        key, value: (batch, key heads, positions, width).
        causal: the last token sees all positions, each one before it one less; else all tokens see all.

    Returns:
        (batch, tokens, heads, width), contiguous.

    Raises:
        DeviceError: `kernel.memory`, `kernel.compiler`.
    """
    batch, heads, tokens, width = query.shape
    out = torch.empty(batch, tokens, heads, width, dtype=query.dtype)
    task = _Task(
        *(item.data_ptr() for item in (query, key, value, out)),
        *((_size * 3)(*item.stride()[:3]) for item in (query, key, value)),
        *(batch, heads, key.shape[1], tokens, key.shape[2], width),
        causal,
        scaling,
    )
    if _function()(ctypes.byref(task), torch.get_num_threads()):
        raise DeviceError("kernel.memory", f"no memory for attention over {key.shape[2]} positions.", "Fewer at once.")
    return out


@cache
def _function() -> Any:
    function = build.library("flash").autotune_flash
    function.argtypes = (_pointer, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
