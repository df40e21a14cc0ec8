"""One layer's experts, routed by the device inside a CUDA graph: numbers first, then times, over bf16 in the same run.

The graph is recorded for one routing and replayed for another; its output has to be what the host's routing gives. What
that takes, launched (the best of five, waiting included), stands beside each time. Runs in a child.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cells import Row

from autotune.errors import AutotuneError, DeviceError
from autotune.profilers import environment
from autotune.profilers.isolate import stream

STEP_S, START_S = 120.0, 300.0
KERNELS = {  # the first is the baseline
    "cuda": (
        ("cuda.bf16", "bf16"),
        ("triton.w8a16", "w8a16-int8"),
        ("triton.w4a16", "w4a16-int4-g128"),
        ("triton.24.w4a16", "2:4+w4a16-int4-g128"),
        ("cuda.fp8", "w8a8-fp8"),
    ),
    "cpu": (("torch.cpu.bf16", "bf16"), ("torch.cpu.w8a16", "w8a16-int8")),
}
TOKENS = (1, 4, 16)
# hidden, inner, experts, experts a token
LAYERS = {
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "tiny": (128, 256, 8, 2),
}
LARGEST = 2e-2  # of the largest output: what two orders of bf16 sums may differ by


def measured(device: str, deadline_s: float, layers: tuple[str, ...]) -> Iterator[Row]:
    """A row a layer, kernel and number of tokens."""
    for layer in layers:
        base: dict[int, dict[str, Any]] = {}
        for kernel, scheme in KERNELS[device]:
            if time.monotonic() > deadline_s:
                yield _row(layer, 0, kernel, scheme, status="not reached", reason="no time left")
                continue
            arguments = {"device": device, "layer": layer, "kernel": kernel, "scheme": scheme}
            try:
                for event in stream("mixture:measure", arguments, STEP_S, environment.child_env(8), START_S):
                    if event["event"] == "failed":
                        yield _row(layer, event["tokens"], kernel, scheme, reason=event["reason"])
                    elif event["event"] == "timed":
                        first = base.setdefault(event["tokens"], event)
                        times = {name: event[name] for name in ("us", "low_us", "high_us", "noisy", "reason")}
                        speedup = first["us"] / event["us"]
                        yield _row(layer, event["tokens"], kernel, scheme, status="measured", speedup=speedup, **times)
            except DeviceError as error:
                yield _row(layer, 0, kernel, scheme, reason=f"{error.message} {error.hint}"[:300])


def _row(layer: str, tokens: int, kernel: str, scheme: str, **more: Any) -> Row:
    row: Row = {"table": "mixture", "shape": layer, "m": tokens, "kernel": kernel, "scheme": scheme}
    return {**row, "status": "failed", "reason": "", "noisy": False, "us": None, "speedup": None, **more}


# ---- the child's side


def measure(emit: Callable[[dict[str, Any]], None], device: str, layer: str, kernel: str, scheme: str) -> None:
    import torch

    from autotune.profilers.cuda_timer import is_sticky
    from autotune.profilers.worker import STICKY_EXIT

    tokens = 0
    with torch.inference_mode():
        try:
            emit({"event": "start"})
            experts = _build(layer, kernel, scheme)
            for tokens in TOKENS:
                emit({"event": "start"})
                emit({"event": "timed", "tokens": tokens, **_time(experts, LAYERS[layer], tokens, device)})
        except Exception as error:  # whatever an untrusted kernel raises is its own failure
            text = error.message if isinstance(error, AutotuneError) else f"{type(error).__name__}: {error}"
            emit({"event": "failed", "tokens": tokens, "reason": " ".join(text.split())[:300]})
            if is_sticky(error):
                os._exit(STICKY_EXIT)


def _build(layer: str, kernel: str, scheme: str) -> Any:
    """Experts of random weights, no two alike, all of them in banks."""
    import torch

    from autotune.experts import Expert, SplitExperts
    from autotune.kernels import bank, spec
    from autotune.kernels.linear import Alternative, FusedGroup, install
    from autotune.kernels.reference import random_weight

    hidden, inner, count, _ = LAYERS[layer]
    item = spec.kernel(kernel)
    module, generator = spec.load(item), torch.Generator(item.device).manual_seed(0)
    empty = torch.empty(2 * inner, hidden, device="meta"), torch.empty(hidden, inner, device="meta")
    experts = SplitExperts(Expert(*empty, torch.nn.SiLU()) for _ in range(count))
    for names, sizes, inputs in (
        (("gate_proj", "up_proj"), (inner, inner), hidden),
        (("down_proj",), (hidden,), inner),
    ):
        weights = (random_weight(scheme, sum(sizes), inputs, torch.bfloat16, False, generator) for _ in range(count))
        packs = (module.pack(weight, torch.bfloat16) for weight in weights)
        shared = bank.bank(item, scheme, packs, count)
        for number in range(count):
            group = FusedGroup(inputs, sizes)
            group.add(scheme, Alternative(module.run, shared.expert(number), bank=shared))
            install(experts, [f"{number}.{name}" for name in names], group)
    return experts


def _time(experts: Any, sizes: tuple[int, int, int, int], tokens: int, device: str) -> dict[str, Any]:
    import torch

    from autotune.profilers import cuda_timer
    from autotune.profilers.timer import Protocol
    from autotune.profilers.timer import measure as timed

    hidden, _, count, each = sizes
    recording = cuda_timer.on_device() if device == "cuda" else cuda_timer.rehearsed()
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator, device=device).to(torch.bfloat16)
    drawn = [torch.rand(tokens, count, generator=generator, device=device).topk(each) for _ in range(2)]
    chosen, weights = drawn[0].indices.clone(), drawn[0].values.to(torch.bfloat16)
    y = torch.empty_like(x)

    def step() -> None:
        y.copy_(experts(x, chosen, weights))

    graphed = cuda_timer.capture([step], recording.elapsed, recording.record)
    chosen.copy_(drawn[1].indices)  # of what was recorded only the addresses may count
    graphed.graph.replay()
    found = y.clone()
    with _host_routes():
        step()
        host_us = 1e6 * min(recording.elapsed(step) for _ in range(5))
    away = float((found - y).abs().max() / y.abs().max())
    if not away <= LARGEST:
        raise DeviceError("kernel.wrong", f"{away:.1e} of the largest output away from the host's routing.", "")
    clock = cuda_timer.DeviceClock(recording.elapsed)
    protocol = Protocol(rounds=20, max_rounds=30, warm_s=0.1, sample_s=0.002, max_candidate_s=2.0, max_run_s=5.0)
    timing = timed({"graph": clock.timed(graphed)}, protocol, None, lambda name: None, clock)["graph"]
    one = cuda_timer.per_call(timing, graphed.calls)
    reason = f"{away:.1e} away from the host's routing, which takes {host_us:.1f} us launched"
    return {"us": one.median_us, "low_us": one.low_us, "high_us": one.high_us, "noisy": one.noisy, "reason": reason}


@contextmanager
def _host_routes() -> Iterator[None]:
    """Meanwhile the host routes, whatever the number of tokens."""
    from autotune import routing

    most, routing.MOST_TOKENS = routing.MOST_TOKENS, 0
    try:
        yield
    finally:
        routing.MOST_TOKENS = most
