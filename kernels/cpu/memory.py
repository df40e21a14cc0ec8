"""Memory that native kernels read from."""

from __future__ import annotations

import ctypes
import mmap

import torch

_LARGE_PAGE = 2**21
_ALIGNMENT = 64  # a cache line, and the width of a vector


def on_large_pages(data: torch.Tensor) -> torch.Tensor:
    """The same bytes (1-d uint8), aligned, on large pages where the system gives them: fewer address translations."""
    room = torch.empty(data.numel() + _ALIGNMENT, dtype=torch.uint8)
    advise(room)
    shift = -room.data_ptr() % _ALIGNMENT
    return room[shift : shift + data.numel()].copy_(data)


def padded_bias(bias: torch.Tensor, outputs: int) -> torch.Tensor:
    """fp32, zeros behind the real ones."""
    wide = torch.zeros(outputs)
    wide[: bias.numel()] = bias.float()
    return wide


def advise(room: torch.Tensor) -> None:
    """Ask for large pages before the memory is first written; refusal is no error."""
    start, size = room.data_ptr(), room.nbytes
    first = -(-start // _LARGE_PAGE) * _LARGE_PAGE
    last = (start + size) // _LARGE_PAGE * _LARGE_PAGE
    if last > first and hasattr(mmap, "MADV_HUGEPAGE"):
        call = ctypes.CDLL(None).madvise
        call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        call(first, last - first, mmap.MADV_HUGEPAGE)
