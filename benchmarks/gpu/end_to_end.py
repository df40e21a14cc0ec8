"""Whole models of random weights by transformers: a decode step as one CUDA graph over a static cache, and a prompt.

Each configuration puts one kernel into every layer group (q/k/v and gate/up fused; lm_head stays dense); all are kept
side by side, selected in place and timed interleaved. What the tables of single layers predict is set beside what was
saved: predicted = the sum over groups and layers of (dense kernel - this kernel) at the same rows. Runs in a child; a
configuration that takes the device down is a row with its reason, and the others are timed without it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import shapes
from cells import Row

from autotune.errors import AutotuneError, DeviceError
from autotune.profilers import environment
from autotune.profilers.isolate import stream

STEP_S, START_S = 240.0, 300.0
LATE_S = 60.0  # a child that says nothing for so long after the end of its time is given up
# kernel, scheme; the first is the baseline
CONFIGURATIONS = {
    "cuda": (
        ("cuda.bf16", "bf16"),
        ("triton.w8a16", "w8a16-int8"),
        ("triton.w4a16", "w4a16-int4-g128"),
        ("cuda.int4", "w4a16-int4-g128"),
        ("triton.24.w4a16", "2:4+w4a16-int4-g128"),
        ("cuda.fp8", "w8a8-fp8"),
        ("triton.w8a16.fp8", "w8a16-fp8"),
        ("triton.fp8.blocks", "w8a8-fp8-128x128"),
        ("cuslt.fp8", "2:4+w8a8-fp8"),
        ("cuda.24.w8a8", "2:4+w8a8-int8"),
    ),
    "cpu": (("torch.cpu.bf16", "bf16"), ("onednn.w8a8", "w8a8-int8")),
}
PHASES = {"decode batch 1": (1, 1), "decode batch 16": (16, 1), "prefill 2048": (1, 2048)}
LAYERS = {
    "llama-3.1-8b": {"layers": 32, "heads": 32, "shared": 8, "size": 128, "vocabulary": 128256},
    "llama-3.2-1b": {"layers": 16, "heads": 32, "shared": 8, "size": 64, "vocabulary": 128256},
    "tiny": {"layers": 2, "heads": 4, "shared": 2, "size": 32, "vocabulary": 512},
}
ROLES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
CONTEXT, CACHE = 512, 1024  # tokens before the decode step, and what the static cache holds at least


def measured(device: str, deadline_s: float, known: list[Row], models: tuple[str, ...]) -> Iterator[Row]:
    """Rows of every model, phase and configuration; `known` are rows of single layers, for the predictions."""
    for model in models:
        wanted = list(CONFIGURATIONS[device])
        while wanted and time.monotonic() < deadline_s:
            at, done = wanted[0], False
            left_s = deadline_s - time.monotonic()
            arguments = {"device": device, "model": model, "configurations": wanted, "seconds": left_s}
            step_s, start_s = min(STEP_S, left_s + LATE_S), min(START_S, left_s + LATE_S)
            try:
                for event in stream("end_to_end:measure", arguments, step_s, environment.child_env(8), start_s):
                    if event["event"] == "start":
                        at = (event["kernel"], event["scheme"])
                    elif event["event"] == "failed":
                        yield _row(model, event["phase"], event["kernel"], event["scheme"], reason=event["reason"])
                    else:
                        yield from _phase_rows(model, event, known)
                done = True
            except DeviceError as error:
                yield _row(model, "all", *at, reason=f"{error.message} {error.hint}"[:300])
            if done or at == wanted[0]:
                break
            wanted = [item for item in wanted if tuple(item) != at]


def _phase_rows(model: str, event: dict[str, Any], known: list[Row]) -> Iterator[Row]:
    base = event["times"][0]
    for item in event["times"]:
        predicted = _predicted_us(model, event["rows"], base["kernel"], item, known)
        saved = base["us"] - item["us"]
        yield _row(
            model, event["phase"], item["kernel"], item["scheme"], status="measured", reason=event["state"],
            us=item["us"], low_us=item["low_us"], high_us=item["high_us"], noisy=item["noisy"],
            speedup=base["us"] / item["us"], predicted_saving_us=predicted, saving_us=saved,
            prediction_error=predicted / saved - 1 if predicted is not None and saved > 0 else None,
        )  # fmt: skip


def _predicted_us(model: str, rows: int, dense: str, item: dict[str, Any], known: list[Row]) -> float | None:
    """What single layers promise to save in a pass; None where one was not timed."""
    times = {(row["shape"], row["m"], row["kernel"], row["scheme"]): row["us"] for row in known if row["us"]}
    total = 0.0
    for role in ROLES:
        shape = f"{model}.{role}"
        before, after = (
            times.get((shape, rows, dense, "bf16")),
            times.get((shape, rows, item["kernel"], item["scheme"])),
        )
        if before is None or after is None:
            return None
        total += before - after
    return total * LAYERS[model]["layers"]


def _row(model: str, phase: str, kernel: str, scheme: str, **more: Any) -> Row:
    empty = dict.fromkeys(
        ("us", "low_us", "high_us", "speedup", "predicted_saving_us", "saving_us", "prediction_error")
    )
    row = {"table": "end_to_end", "shape": f"{model} {phase}", "m": 0, "kernel": kernel, "scheme": scheme}
    return {**row, "status": "failed", "reason": "", "noisy": False, **empty, **more}


# ---- the child's side


def measure(
    emit: Callable[[dict[str, Any]], None], device: str, model: str, configurations: list[list[str]], seconds: float
) -> None:
    import torch

    from autotune.profilers.cuda_timer import is_sticky
    from autotune.profilers.worker import STICKY_EXIT

    end_s = time.monotonic() + seconds
    with torch.inference_mode():
        network, groups = _build(model, device)
        ready = []
        for kernel, scheme in configurations:
            emit({"event": "start", "kernel": kernel, "scheme": scheme})
            try:
                _add(groups, kernel, scheme)
                ready.append((kernel, scheme))
            except Exception as error:  # whatever an untrusted kernel raises is its own failure
                emit(_failed("all", kernel, scheme, error))
                if is_sticky(error):
                    os._exit(STICKY_EXIT)
        for phase, (batch, tokens) in PHASES.items():
            if time.monotonic() >= end_s:
                return
            try:
                _time_phase(emit, network, groups, ready, phase, batch, tokens, device)
            except Exception as error:  # the other phases may still be timed
                emit(_failed(phase, "all", "", error))
                if is_sticky(error):
                    os._exit(STICKY_EXIT)


def _failed(phase: str, kernel: str, scheme: str, error: Exception) -> dict[str, Any]:
    text = error.message if isinstance(error, AutotuneError) else f"{type(error).__name__}: {error}"
    return {
        "event": "failed",
        "phase": phase,
        "kernel": kernel,
        "scheme": scheme,
        "reason": " ".join(text.split())[:300],
    }


def _build(model: str, device: str) -> tuple[Any, dict[str, list[Any]]]:
    """The model on the device with fused groups in place, and its groups by role; weights are random."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from autotune.kernels.linear import FusedGroup, install

    size = LAYERS[model]
    hidden, inner = (128, 256) if model == "tiny" else (shapes.MODELS[model]["o"][0], shapes.MODELS[model]["down"][1])
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=size["layers"], head_dim=size["size"],
        num_attention_heads=size["heads"], num_key_value_heads=size["shared"], vocab_size=size["vocabulary"],
        max_position_embeddings=8192, tie_word_embeddings=model != "llama-3.1-8b",
    )  # fmt: skip
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    groups: dict[str, list[Any]] = {role: [] for role in ROLES}
    for number in range(size["layers"]):
        for role, names in ROLES.items():
            parent = "self_attn" if role in ("qkv", "o") else "mlp"
            paths = [f"model.layers.{number}.{parent}.{name}" for name in names]
            layers = [network.get_submodule(path) for path in paths]
            group = FusedGroup(layers[0].in_features, [layer.out_features for layer in layers])
            install(network, paths, group)
            groups[role].append(group)
    return network, groups


def _add(groups: dict[str, list[Any]], kernel: str, scheme: str) -> None:
    """One random weight a role, packed once; every layer gets a copy of its own."""
    import torch

    from autotune.kernels import spec
    from autotune.kernels.linear import Alternative
    from autotune.kernels.reference import random_weight
    from autotune.profilers.cuda_timer import copies_of

    item = spec.kernel(kernel)
    module = spec.load(item)
    for members in groups.values():
        generator = torch.Generator(item.device).manual_seed(0)
        weight = random_weight(
            scheme, members[0].out_features, members[0].in_features, torch.bfloat16, False, generator
        )
        first = module.pack(weight, torch.bfloat16)
        for group, packed in zip(members, copies_of(first, len(members)), strict=True):
            group.add(f"{kernel} {scheme}", Alternative(module.run, packed))


def _time_phase(
    emit: Callable[[dict[str, Any]], None],
    network: Any,
    groups: dict[str, list[Any]],
    ready: list[tuple[str, str]],
    phase: str,
    batch: int,
    tokens: int,
    device: str,
) -> None:
    import torch

    from autotune.passes import StaticRequest
    from autotune.profilers import cuda_timer
    from autotune.profilers.cuda_timer import DeviceClock, Graphed, Watch, capture, is_sticky, per_call
    from autotune.profilers.timer import Protocol, measure
    from autotune.profilers.worker import STICKY_EXIT

    recording = cuda_timer.on_device() if device == "cuda" else cuda_timer.rehearsed()
    prompt = tokens if tokens > 1 else CONTEXT
    request = StaticRequest(network, batch, prompt, max(CACHE, prompt), torch.device(device))
    step = request.prefill if tokens > 1 else request.decode
    if tokens == 1:
        _fill(request, groups, ready[:1])
    graphs: dict[str, Graphed] = {}
    for kernel, scheme in ready:
        emit({"event": "start", "kernel": kernel, "scheme": scheme})
        _select(groups, f"{kernel} {scheme}")
        try:
            graphs[f"{kernel} {scheme}"] = capture([step], recording.elapsed, recording.record)
        except Exception as error:  # whatever an untrusted kernel raises is its own failure
            emit(_failed(phase, kernel, scheme, error))
            if is_sticky(error):
                os._exit(STICKY_EXIT)
    clock, watch = DeviceClock(recording.elapsed), Watch()
    protocol = Protocol(rounds=20, max_rounds=30, warm_s=0.3, sample_s=0.002, max_candidate_s=2.0, max_run_s=15.0)
    if not graphs:
        return

    def starting(name: str) -> None:
        watch.look()
        kernel, _, scheme = name.partition(" ")
        emit({"event": "start", "kernel": kernel, "scheme": scheme})
        if device == "cpu":  # there a graph is the model itself, which has to be switched
            _select(groups, name)

    timings = measure({name: clock.timed(graph) for name, graph in graphs.items()}, protocol, None, starting, clock)
    found = []
    for name, graph in graphs.items():
        one, (kernel, _, scheme) = per_call(timings[name], graph.calls), name.partition(" ")
        times = {"us": one.median_us, "low_us": one.low_us, "high_us": one.high_us, "noisy": one.noisy}
        found.append({"kernel": kernel, "scheme": scheme, **times})
    emit({"event": "phase", "phase": phase, "rows": batch * tokens, "times": found, "state": str(watch)})


def _fill(request: Any, groups: dict[str, list[Any]], dense: list[tuple[str, str]]) -> None:
    """Put the prompt into the cache, by the first configuration that is there."""
    for kernel, scheme in dense:
        _select(groups, f"{kernel} {scheme}")
        request.prefill()


def _select(groups: dict[str, list[Any]], name: str) -> None:
    for group in (group for members in groups.values() for group in members):
        group.select(name)
