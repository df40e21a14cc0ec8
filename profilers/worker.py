"""The measuring child: packs, checks and times kernels, and says by a line what it is about to do and what it did.

    {"event": "start", "ids": [...], "stage": "pack" | "check" | "time"}   if the child ends now, these are to blame
    {"event": "failed", "ids": [...], "reason": ...}                       wrong numbers, or an exception
    {"event": "row", "id": ..., "times_us": [...], ...}                    a measurement

Runs under `isolate`, one shape after another. All kernels of a shape are timed against each other; each has its own
copies of the weights and takes them in turn, so that it meets caches as the model will leave them. Where the model's
weights fit in the cache, one untimed pass over the copies comes before every sample: the other candidates have used
that cache in the meantime.

On a CUDA device weights, inputs and the gate's reference are made there, a candidate's calls are one CUDA graph (see
`cuda_timer`), and what was timed passes the gate once more afterwards. After an error that leaves the device unusable
the child ends with `STICKY_EXIT`, having said whose failure it was; the parent starts another for the rest.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from autotune.errors import AutotuneError
from autotune.kernels.checks import gate
from autotune.kernels.reference import random_weight
from autotune.kernels.spec import GroupWeight, KernelModule, Packed, load
from autotune.profilers import cuda_timer, environment
from autotune.profilers.jobs import kernel_from_json
from autotune.profilers.timer import Call, Protocol, Timing, measure
from autotune.search_space.coverage import KernelSpec

MAX_COPIES = 4096
STICKY_EXIT = 87
_HEARTBEAT_S = 1.0
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Emit = Callable[[dict[str, Any]], None]


def time_jobs(
    emit: Emit, units: list[dict[str, Any]], threads: int, protocol: dict[str, Any], memory_bytes: int
) -> None:
    """Time every job of every unit.

    Args:
        units: {"members", "in_features", "bias", "dtype", "jobs": [{"id", "kernel", "scheme", "rows", "rotate_bytes",
            "resident"}]}.
        memory_bytes: what all copies of one shape may take together.
    """
    environment.pin(threads)
    with torch.inference_mode():
        for unit in units:
            _time_unit(_Unit.of(unit), emit, Protocol(**protocol), memory_bytes)


@dataclass(frozen=True)
class _Candidate:
    """One kernel on one scheme of the unit; `ids` maps rows to the job they answer."""

    spec: KernelSpec
    scheme: str
    ids: dict[int, int]
    rotate_bytes: int
    resident: bool

    @property
    def name(self) -> str:
        return f"{self.spec.name} {self.scheme}"


@dataclass(frozen=True)
class _Unit:
    out_features: int
    in_features: int
    bias: bool
    dtype: torch.dtype
    candidates: tuple[_Candidate, ...]

    @property
    def device(self) -> str:
        """Where it all happens: a unit's kernels are those of one target."""
        return self.candidates[0].spec.device

    @classmethod
    def of(cls, value: dict[str, Any]) -> _Unit:
        by_kernel: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for job in value["jobs"]:
            by_kernel.setdefault((job["kernel"]["name"], job["scheme"]), []).append(job)
        candidates = tuple(
            _Candidate(
                spec=kernel_from_json(jobs[0]["kernel"]),
                scheme=jobs[0]["scheme"],
                ids={job["rows"]: job["id"] for job in jobs},
                rotate_bytes=jobs[0]["rotate_bytes"],
                resident=jobs[0]["resident"],
            )
            for jobs in by_kernel.values()
        )
        dtype = _DTYPES[value["dtype"]]
        return cls(sum(value["members"]), value["in_features"], value["bias"], dtype, candidates)


@dataclass(frozen=True)
class _Loaded:
    """A candidate that has passed its checks on `rows`, with the copies it takes in turn."""

    candidate: _Candidate
    weight: GroupWeight
    module: KernelModule
    copies: tuple[Packed, ...]
    turns: Iterator[Packed]
    rows: tuple[int, ...]
    note: str

    def call(self, x: torch.Tensor) -> Call:
        run, turns = self.module.run, self.turns

        def once() -> None:
            run(next(turns), x)

        return once

    def refresh(self, x: torch.Tensor) -> Call:
        """One pass over all copies with a single row: reads the weights, ends where it began."""
        once, count = self.call(x[:1].contiguous()), len(self.copies)

        def one_pass() -> None:
            for _ in range(count):
                once()

        return one_pass


def _time_unit(unit: _Unit, emit: Emit, protocol: Protocol, memory_bytes: int) -> None:
    generator = torch.Generator(unit.device).manual_seed(protocol.seed)
    weights: dict[str, GroupWeight] = {}
    ready = []
    for candidate in unit.candidates:
        with _Guard(emit, candidate.ids.values()) as guard:
            guard.stage("pack")
            if candidate.scheme not in weights:
                weights[candidate.scheme] = _weight(candidate.scheme, unit, generator)
            share = memory_bytes // len(unit.candidates)
            ready.append(_load(candidate, weights[candidate.scheme], unit, guard, share))
    for rows in sorted({rows for loaded in ready for rows in loaded.rows}):
        x = torch.randn(rows, unit.in_features, generator=generator, device=unit.device).to(unit.dtype)
        timer = _time_rows_on_cuda if unit.device == "cuda" else _time_rows
        timer([loaded for loaded in ready if rows in loaded.rows], rows, x, emit, protocol)


def _weight(scheme: str, unit: _Unit, generator: torch.Generator) -> GroupWeight:
    return random_weight(scheme, unit.out_features, unit.in_features, unit.dtype, unit.bias, generator)


def _load(candidate: _Candidate, weight: GroupWeight, unit: _Unit, guard: _Guard, memory_bytes: int) -> _Loaded:
    """Pack once, check on every number of rows, then pack the copies."""
    module = load(candidate.spec)
    first = module.pack(_clone(weight), unit.dtype)
    passed = tuple(rows for rows in candidate.ids if _passes(candidate, weight, first, rows, guard))
    read_bytes = max(1.0, first.bytes / candidate.spec.copies)  # of a second copy, each call reads one
    wanted = min(MAX_COPIES, max(1, round(candidate.rotate_bytes / read_bytes))) if passed else 1
    count = max(1, min(wanted, memory_bytes // max(1, first.bytes)))
    note = f"rotated over {count} of {wanted} copies: no more memory" if count < wanted else ""
    if unit.device == "cuda":
        guard.stage("pack")
        copies = cuda_timer.copies_of(first, count)
    else:
        copies = (first,)
        while len(copies) < count:
            guard.stage("pack", seldom=True)
            copies = (*copies, module.pack(_clone(weight), unit.dtype))
    return _Loaded(candidate, weight, module, copies, itertools.cycle(copies), passed, note)


def _passes(candidate: _Candidate, weight: GroupWeight, packed: Packed, rows: int, guard: _Guard) -> bool:
    with _Guard(guard.emit, [candidate.ids[rows]]) as check:
        check.stage("check")
        gate(candidate.spec, weight, packed, rows)
    return not check.failed


def _clone(weight: GroupWeight) -> GroupWeight:
    """Memory of its own: a kernel may keep what it is given, and copies must not be one and the same."""
    tensors = {name: getattr(weight, name) for name in ("dense", "codes", "scales", "bias", "zeros")}
    copies: dict[str, Any] = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    return replace(weight, **copies)


class _Starting:
    """Says which candidate is at work, when it changes or a while has passed."""

    def __init__(self, ids: Mapping[str, int], emit: Emit, watch: cuda_timer.Watch | None = None) -> None:
        self.ids, self.emit, self.watch = ids, emit, watch
        self.running, self._said = "", 0.0

    def __call__(self, name: str) -> None:
        if self.watch:
            self.watch.look()
        if name != self.running or time.monotonic() - self._said > _HEARTBEAT_S:
            self.running, self._said = name, time.monotonic()
            self.emit({"event": "start", "ids": [self.ids[name]], "stage": "time"})


def _time_rows(ready: list[_Loaded], rows: int, x: torch.Tensor, emit: Emit, protocol: Protocol) -> None:
    """Time all candidates on one input; one that raises leaves and the others start over."""
    by_name = {loaded.candidate.name: loaded for loaded in ready}
    while by_name:
        calls = {name: loaded.call(x) for name, loaded in by_name.items()}
        before = {name: loaded.refresh(x) for name, loaded in by_name.items() if loaded.candidate.resident}
        starting = _Starting({name: loaded.candidate.ids[rows] for name, loaded in by_name.items()}, emit)
        try:
            timings = measure(calls, protocol, before, starting)
        except Exception as error:  # whatever an untrusted kernel raises is its own failure
            _failed_while_timed(by_name.pop(starting.running).candidate.ids[rows], emit, error)
            continue
        for name, loaded in by_name.items():
            emit(_row(loaded, rows, timings[name]))
        return


def _time_rows_on_cuda(ready: list[_Loaded], rows: int, x: torch.Tensor, emit: Emit, protocol: Protocol) -> None:
    """The same with a graph for each candidate; what was timed passes the gate again before its time counts."""
    by_name = {loaded.candidate.name: loaded for loaded in ready}
    graphs: dict[str, cuda_timer.Graphed] = {}
    clock, record = cuda_timer.DeviceClock(cuda_timer.event_s), cuda_timer.recorder()
    while by_name:
        watch = cuda_timer.Watch()
        starting = _Starting({name: loaded.candidate.ids[rows] for name, loaded in by_name.items()}, emit, watch)
        try:
            for name, loaded in by_name.items():
                starting(name)
                if name not in graphs:
                    each = [loaded.call(x)] * len(loaded.copies)
                    graphs[name] = cuda_timer.capture(each, cuda_timer.event_s, record)
            calls = {name: clock.timed(graphs[name]) for name in by_name}
            before = {name: loaded.refresh(x) for name, loaded in by_name.items() if loaded.candidate.resident}
            timings = measure(calls, protocol, before, starting, clock)
        except Exception as error:  # whatever an untrusted kernel raises is its own failure
            _failed_while_timed(by_name.pop(starting.running).candidate.ids[rows], emit, error)
            continue
        for name, loaded in by_name.items():
            timing = cuda_timer.per_call(timings[name], graphs[name].calls)
            with _Guard(emit, [loaded.candidate.ids[rows]]) as guard:
                guard.stage("check")
                gate(loaded.candidate.spec, loaded.weight, loaded.copies[-1], rows)
                emit(_row(loaded, rows, timing, str(watch)))
        return


def _failed_while_timed(number: int, emit: Emit, error: Exception) -> None:
    emit({"event": "failed", "ids": [number], "reason": f"while timed: {_say(error)}"})
    _leave_if_sticky(error)


def _leave_if_sticky(error: BaseException) -> None:
    """End this process where no later CUDA call can succeed: not even its own clean end would."""
    if cuda_timer.is_sticky(error):
        os._exit(STICKY_EXIT)


def _row(loaded: _Loaded, rows: int, timing: Timing, state: str = "") -> dict[str, Any]:
    return {
        "event": "row",
        "id": loaded.candidate.ids[rows],
        "times_us": [timing.median_us, timing.low_us, timing.high_us],
        "rounds": timing.rounds,
        "noisy": timing.noisy,
        "drift": timing.drift,
        "packed_bytes": loaded.copies[0].bytes,
        "note": "; ".join(text for text in (loaded.note, state) if text),
    }


class _Guard:
    """Announces stages for some jobs and turns an exception into their failure."""

    def __init__(self, emit: Emit, ids: Iterable[int]) -> None:
        self.emit, self.ids = emit, list(ids)
        self.failed, self.now, self.said = False, "", 0.0

    def stage(self, name: str, seldom: bool = False) -> None:
        """Say what comes next; `seldom`: only to show life, when the last word is a while ago."""
        self.now = name
        if not seldom or time.monotonic() - self.said > _HEARTBEAT_S:
            self.emit({"event": "start", "ids": self.ids, "stage": name})
            self.said = time.monotonic()

    def __enter__(self) -> _Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.failed = True
        stage = {"pack": "while packing", "check": "check failed"}[self.now or "pack"]
        self.emit({"event": "failed", "ids": self.ids, "reason": f"{stage}: {_say(error)}"})
        _leave_if_sticky(error)
        return True


def _say(error: Exception) -> str:
    text = error.message if isinstance(error, AutotuneError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
