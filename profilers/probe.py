"""Measured ceilings of this machine: how fast it can read, multiply and be called. A few seconds, in a child.

On CUDA devices see `cuda_probe`; on CPUs:

- Read bandwidth over the working set, 256 KiB to four last caches: reductions that only read (minimum of bytes, of
  32-bit floats and of 64-bit integers), the fastest of them, the cost of the call itself taken off. The curve is made
  to fall: a smaller set can be read at least as fast as a larger one.
- Operations per number format: a large linear layer, plain or on weights oneDNN has reordered; u8 x s8 for int8.
- Launch: a linear layer of 16 x 16.

Each is the best of several passes spread over the probe: a ceiling is what the machine can do, so a neighbour can only
hide it, and a probe of a busy machine is low. A format torch cannot multiply here is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F

from autotune.profilers import environment
from autotune.profilers.isolate import call
from autotune.store import Memo, digest
from autotune.targets.target import Ceilings, Target

PROBE_VERSION = 1  # raise it when the meaning of a ceiling changes
SMALLEST_SET = 256 * 2**10
LARGEST_SET = 2**30
PASSES = 3
_SAMPLE_S = 0.02
_TIMEOUT_S = 180.0


def probe(target: Target, memo: Memo, threads: int | None = None) -> Target:
    """The target with measured ceilings; measured once for every fingerprint of the machine.

    Of a busy machine they are marked `busy` and not kept: the next call measures again.
    """
    threads = threads or (target.cores if target.device == "cpu" else 1)
    env = environment.child_env(threads)
    key = f"probe/{digest([PROBE_VERSION, environment.fingerprint(threads, env, target.device)])}"
    value = memo.get(key)
    if value is None:
        sizes = working_sets(target.last_cache_bytes, target.memory_bytes)
        busy = environment.load().busy
        measuring = "cuda_probe:measure" if target.device == "cuda" else "probe:measure"
        value = call(f"autotune.profilers.{measuring}", {"sizes": sizes, "threads": threads}, _TIMEOUT_S, env)
        value["busy"] = busy or environment.load().busy
        if not value["busy"]:
            memo.put(key, value)
    curve = tuple((int(size), float(rate)) for size, rate in value["read_gb_per_s"])
    return replace(target, ceilings=Ceilings(**{**value, "read_gb_per_s": curve}))


def working_sets(last_cache_bytes: int, memory_bytes: int) -> list[int]:
    """256 KiB, 1 MiB, 4 MiB, ... and a half, one, two and four last caches, within a sixteenth of the memory."""
    most = min(LARGEST_SET, memory_bytes // 16, max(4 * last_cache_bytes, 64 * SMALLEST_SET))
    steps = [SMALLEST_SET * 4**n for n in range(8)]
    caches = [int(last_cache_bytes * part) for part in (0.5, 1, 2, 4)]
    inside = [size // 64 * 64 for size in (*steps, *caches) if SMALLEST_SET <= size <= most]
    return sorted({*inside, most // 64 * 64})


def measure(sizes: list[int], threads: int) -> dict[str, Any]:
    """The child's side: {"read_gb_per_s", "tera_ops", "launch_us"}."""
    environment.pin(threads)
    with torch.inference_mode():
        launch_us = _best_s(_linear(torch.float32, 16, 1), 0.1) * 1e6
        rates = [_rates() for _ in range(PASSES)]
        curve = [(size, max(_read(size) for _ in range(2))) for size in sizes]
        rates.append(_rates())
    falling = [(size, max(rate for _, rate in curve[place:])) for place, (size, _) in enumerate(curve)]
    best = {name: max(found[name] for found in rates) for name in rates[0]}
    return asdict(Ceilings(tuple(falling), best, launch_us, "measured"))


def _read(size: int) -> float:
    """GB/s of the fastest reduction over `size` bytes, net of the call."""
    data = torch.ones(size // 8, dtype=torch.int64)
    views = (data, data.view(torch.float32).fill_(1.0), data.view(torch.int8))
    best = 0.0
    for view in views:
        reduce, small = view.amin, view[:8].amin
        whole_s = _best_s(reduce)
        net_s = max(whole_s - _best_s(small, _SAMPLE_S / 4), whole_s / 2)
        best = max(best, size / net_s / 1e9)
    return best


def _rates() -> dict[str, float]:
    """Tera-operations/s by number format, of the products torch can do here."""
    rates: dict[str, float] = {}
    for name, make in _products():
        size = 1024
        try:
            seconds = _best_s(make(size))
            if seconds < 0.004:  # too short to fill fast matrix units
                size, seconds = 2048, _best_s(make(2048))
        except RuntimeError:
            continue  # not implemented on this machine
        rates[name] = max(rates.get(name, 0.0), 2 * size**3 / seconds / 1e12)
    return rates


def _products() -> Iterator[tuple[str, Callable[[int], Callable[[], object]]]]:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        yield name, lambda size, dtype=dtype: _linear(dtype, size, size)  # type: ignore[misc]
        yield name, lambda size, dtype=dtype: _reordered(dtype, size)  # type: ignore[misc]
    yield "int8", _int8


def _linear(dtype: torch.dtype, size: int, rows: int) -> Callable[[], object]:
    x, w = torch.randn(rows, size).to(dtype), torch.randn(size, size).to(dtype)
    return lambda: F.linear(x, w)


def _reordered(dtype: torch.dtype, size: int) -> Callable[[], object]:
    x, w = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(w, size)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _int8(size: int) -> Callable[[], object]:
    x = torch.randint(0, 255, (size, size), dtype=torch.uint8)
    w = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(w, None)
    scales, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int64)
    run = torch.ops.onednn.qlinear_pointwise
    return lambda: run(x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")


def _best_s(work: Callable[[], object], sample_s: float = _SAMPLE_S) -> float:
    """Seconds of the fastest single call within `sample_s`, five calls or more."""
    work()
    best, calls, start = float("inf"), 0, time.perf_counter()
    while calls < 5 or time.perf_counter() - start < sample_s:
        before = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - before)
        calls += 1
    return best
