"""What is done to rows between matrix products as single calls, in `between.cpp`, where eager torch takes many."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from autotune.kernels.cpu import build

_pointer, _size, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Heads(ctypes.Structure):
    """`Heads` of between.cpp."""

    _fields_ = (
        *((name, _pointer) for name in ("rows", "q_norm", "k_norm", "cosines", "sines")),
        *((name, _size) for name in ("count", "outputs", "heads", "key_heads", "width", "tokens", "rotary")),
        ("sequence_stride", _size),
        *((name, _real) for name in ("q_eps", "k_eps")),
    )


def available() -> bool:
    """False where nothing can be compiled."""
    return build.available("between")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension: x (..., width) contiguous, weight (width,), both bf16
    or both fp32.

    Raises:
        DeviceError: `kernel.compiler`, as all here.
    """
    y, width = torch.empty_like(x), weight.shape[0]
    call = _function("autotune_norm", _pointer, _pointer, _pointer, _size, _size, _real)
    call(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // width, width, eps, *_how(x))
    return y


def add_norm(x: torch.Tensor, sums: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Adds x to `sums`, both (..., width) contiguous, and returns the norm of that, as `rms_norm` has it."""
    y, width = torch.empty_like(x), weight.shape[0]
    call = _function("autotune_add_norm", _pointer, _pointer, _pointer, _pointer, _size, _size, _real)
    addresses = (x.data_ptr(), weight.data_ptr(), sums.data_ptr(), y.data_ptr())
    call(*addresses, x.numel() // width, width, eps, *_how(x))
    return y


def turn(
    rows: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    heads: tuple[int, int],
    width: int,
    norms: tuple[tuple[torch.Tensor | None, float], tuple[torch.Tensor | None, float]],
) -> None:
    """Normalises and turns queries and keys where they are.

    Args:
        rows: (tokens of all sequences, outputs), contiguous: heads of queries first, then of keys, then others.
        angles: cosines and sines, each (sequences or 1, tokens, turned numbers), contiguous, in transformers' order.
        heads: of queries, and of keys, each `width` numbers.
        norms: of queries and of keys: weight (width,), if there is one, and eps.
    """
    cosines, sines = angles
    (q_norm, q_eps), (k_norm, k_eps) = norms
    item = _Heads(
        rows.data_ptr(),
        *(None if norm is None else norm.data_ptr() for norm in (q_norm, k_norm)),
        *(cosines.data_ptr(), sines.data_ptr()),
        *(*rows.shape, *heads, width, cosines.shape[1], cosines.shape[2]),
        cosines.stride(0) if cosines.shape[0] > 1 else 0,
        *(q_eps, k_eps),
    )
    _function("autotune_turn", _pointer)(ctypes.byref(item), *_how(rows))


def gate(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: (rows, 2 * inner) contiguous, gate's outputs first, to (rows, inner)."""
    inner = both.shape[1] // 2
    y = both.new_empty(both.shape[0], inner)
    call = _function("autotune_gate", _pointer, _pointer, _size, _size)
    call(both.data_ptr(), y.data_ptr(), both.shape[0], inner, *_how(both))
    return y


def _how(x: torch.Tensor) -> tuple[int, int]:
    return x.dtype == torch.bfloat16, torch.get_num_threads()


@cache
def _function(name: str, *types: Any) -> Any:
    function = getattr(build.library("between"), name)
    function.argtypes = (*types, ctypes.c_int, ctypes.c_int)
    function.restype = None
    return function
