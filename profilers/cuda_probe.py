"""Measured ceilings of a CUDA device: read bandwidth over the working set, dense products by format, one launch.

- Bandwidth over the working set: the faster of a maximum over it and a copy of one half to the other, passes repeated
  inside a CUDA graph, so that sets within L2 stay there.
- Operations: a product of 8192 x 8192 x 8192 on random numbers (zeros run at a higher clock), as a graph. A format
  that torch cannot multiply here is left out.
- Launch: an eager linear layer of 16 x 16, by the host's clock over many.

Each is the best of several; a card that was busy or throttled shows low. About two seconds. Not yet run on a card.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from autotune.profilers import cuda_timer
from autotune.targets.target import Ceilings

_SIZE = 8192
_PASSES = 5


def measure(sizes: list[int], threads: int) -> dict[str, Any]:
    """The child's side: {"read_gb_per_s", "tera_ops", "launch_us"}."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        curve = [(size, _read(size)) for size in sizes]
        rates = _rates()
        launch_us = _launch_us()
    falling = [(size, max(rate for _, rate in curve[place:])) for place, (size, _) in enumerate(curve)]
    return asdict(Ceilings(tuple(falling), rates, launch_us, "measured"))


def _read(size: int) -> float:
    """GB/s of the fastest way to go over `size` bytes."""
    data = torch.randn(size // 4, device="cuda")
    source, goal = data[: len(data) // 2], data[len(data) // 2 :]
    ways = (data.amax, data.view(torch.bfloat16).amax, lambda: goal.copy_(source[: len(goal)]))
    return max(size / _best_s(way) / 1e9 for way in ways)


def _rates() -> dict[str, float]:
    """Tera-operations/s by number format."""
    rates = {}
    for name, make in _products():
        try:
            rates[name] = 2 * _SIZE**3 / _best_s(make()) / 1e12
        except RuntimeError as error:
            if cuda_timer.is_sticky(error):
                raise
    return rates


def _products() -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        yield name, lambda dtype=dtype: _linear(_random().to(dtype), _random().to(dtype))  # type: ignore[misc]
    yield "int8", _int8
    yield "fp8", _fp8


def _linear(x: torch.Tensor, w: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(x, w)


def _int8() -> Callable[[], object]:
    x, w = (torch.randint(-127, 128, (_SIZE, _SIZE), dtype=torch.int8, device="cuda") for _ in range(2))
    return lambda: torch._int_mm(x, w.t())


def _fp8() -> Callable[[], object]:
    x, w = _random().to(torch.float8_e4m3fn), _random().to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _random() -> torch.Tensor:
    return torch.randn(_SIZE, _SIZE, device="cuda")


def _best_s(call: Callable[[], object]) -> float:
    """Seconds of one call in the fastest of several replays."""

    def once() -> None:
        call()

    graphed = cuda_timer.capture([once], cuda_timer.event_s, cuda_timer.recorder())
    return min(cuda_timer.event_s(graphed.graph.replay) for _ in range(_PASSES)) / graphed.calls


def _launch_us(calls: int = 200) -> float:
    x = torch.randn(16, 16, device="cuda")
    best = float("inf")
    for _ in range(_PASSES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            torch.nn.functional.linear(x, x)
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best
