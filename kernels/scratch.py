"""One reusable buffer per thread and kind, for routes that unpack weights before a dense multiply.

Large fresh temporaries cost more in page faults than the unpacking itself, so the buffer grows to the largest request
and stays. It is shared by all layers: a model's memory counts it once (`scratch_bytes`), not per layer.
"""

from __future__ import annotations

import threading

import torch

_local = threading.local()


def scratch(elements: int, dtype: torch.dtype, device: torch.device, slot: str) -> torch.Tensor:
    """An uninitialized 1-d buffer; its content lasts until the next request of the same slot, dtype and device."""
    buffers = _buffers()
    key: tuple[object, ...] = (slot, dtype, device)
    held = buffers.get(key)
    if held is None or held.numel() < elements:
        if held is not None and device.type == "cuda":
            buffers[("outgrown", len(buffers), *key)] = held  # graphs recorded before go on writing to it
        with torch.inference_mode(False):  # a buffer made under inference mode could not be written outside of it
            held = buffers[key] = torch.empty(elements, dtype=dtype, device=device)
    return held[:elements]


def scratch_bytes() -> int:
    """Bytes this thread's buffers hold."""
    return sum(buffer.nbytes for buffer in _buffers().values())


def release_scratch() -> None:
    _buffers().clear()


def poison_scratch() -> None:
    """Fill this thread's buffers with NaN (255 for integers), so that reading what was not written shows."""
    for buffer in _buffers().values():
        buffer.fill_(float("nan") if buffer.is_floating_point() else 255)


def _buffers() -> dict[tuple[object, ...], torch.Tensor]:
    if not hasattr(_local, "buffers"):
        _local.buffers = {}
    held: dict[tuple[object, ...], torch.Tensor] = _local.buffers
    return held
