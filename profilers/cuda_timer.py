"""Timing on CUDA devices: calls captured into a graph, timed by events, on a clock on which only the device passes.

A candidate is one CUDA graph of its calls, each on a weight copy of its own so that weights come from memory, repeated
until a replay lasts about a millisecond: no launch of Python's is in it, and an event's resolution does not matter. The
graph is then one call to `timer.measure`, whose clock is the time that events saw; figures are divided by the calls.

`Watch` notes clocks and what slows the card down while others are timed. `copies_of` clones packed weights on the
device. Nothing is zeroed or flushed inside a timed region: that would leave dirty lines to write back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch

from autotune.kernels.spec import Packed
from autotune.profilers.timer import Call, Timing
from autotune.targets import cuda_driver
from autotune.targets.cuda_driver import CudaState

REPLAY_S = 1e-3  # what one replay lasts at least
MOST_NODES = 2000  # calls in a graph
_LOOK_S = 0.02  # how often the watch asks the driver
# What CUDA answers to every later call once a kernel has gone wrong: the process has to be left.
_STICKY = (
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "unspecified launch failure",
    "device-side assert",
    "invalid program counter",
    "hardware stack error",
    "launch timed out",
    "uncorrectable ecc",
)


def is_sticky(error: BaseException) -> bool:
    """Whether no later CUDA call of this process can succeed."""
    text = f"{error} {getattr(error, 'message', '')}".lower()
    return any(words in text for words in _STICKY)


class Replayable(Protocol):
    def replay(self) -> None: ...


class Launched:
    """What no graph holds: a replay launches it again."""

    def __init__(self, call: Call) -> None:
        self.replay = call


@dataclass(frozen=True)
class Graphed:
    """`graph` makes `calls` calls when it is replayed."""

    graph: Replayable
    calls: int


def capture(calls: Sequence[Call], elapsed: Callable[[Call], float], record: Callable[[Call], Replayable]) -> Graphed:
    """All calls, in order and as often as it takes to last `REPLAY_S`, as one graph.

    Args:
        elapsed: seconds the device takes for a call of the host's.
        record: makes a graph of what a call launches; see `recorder`.
    """

    def once() -> None:
        for call in calls:
            call()

    once()  # compile, allocate and search before capturing: none of it is allowed inside
    graph = record(once)
    graph.replay()
    pass_s = max(min(elapsed(graph.replay) for _ in range(2)), 1e-7)
    passes = max(1, min(round(REPLAY_S / pass_s), MOST_NODES // len(calls)))
    if passes == 1:
        return Graphed(graph, len(calls))

    def several() -> None:
        for _ in range(passes):
            once()

    return Graphed(record(several), passes * len(calls))


def recorder() -> Callable[[Call], Replayable]:
    """Graphs that share one memory pool: their outputs are never read, and no two run at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(call: Call) -> Replayable:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            call()
        return graph

    return record


def event_s(call: Call) -> float:
    """Seconds the device took for what `call` launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


@dataclass(frozen=True)
class Recording:
    """How a call becomes a graph, and how many seconds the device takes for a call of the host's."""

    record: Callable[[Call], Replayable]
    elapsed: Callable[[Call], float]


def on_device() -> Recording:
    """CUDA graphs, timed by events."""
    return Recording(recorder(), event_s)


def rehearsed() -> Recording:
    """Where there is no card: a graph is the call itself, timed by the host's clock."""

    def elapsed_s(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return Recording(Launched, elapsed_s)


class DeviceClock:
    """Seconds that timed replays took on the device; what happens between them does not count."""

    def __init__(self, elapsed: Callable[[Call], float]) -> None:
        self.timed_s = 0.0
        self.elapsed = elapsed

    def __call__(self) -> float:
        return self.timed_s

    def timed(self, graphed: Graphed) -> Call:
        def once() -> None:
            self.timed_s += self.elapsed(graphed.graph.replay)

        return once


def per_call(timing: Timing, calls: int) -> Timing:
    """From a replay of so many calls to one of them."""
    return replace(
        timing,
        median_us=timing.median_us / calls,
        low_us=timing.low_us / calls,
        high_us=timing.high_us / calls,
        samples_us=tuple(sample / calls for sample in timing.samples_us),
    )


class Watch:
    """What the card did while it was timed: call `look` between samples, as often as one likes."""

    def __init__(self, ask: Callable[[], CudaState | None] = cuda_driver.state) -> None:
        self.ask, self.seen, self._last_s = ask, list[CudaState](), 0.0

    def look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= _LOOK_S and (state := self.ask()) is not None:
            self.seen.append(state)
            self._last_s = now_s

    def __str__(self) -> str:
        """ "SM 1755 MHz (1710 to 1980), 512 W, slowed by power cap"."""
        if not self.seen:
            return ""
        clocks = sorted(state.sm_mhz for state in self.seen)
        text = f"SM {clocks[len(clocks) // 2]} MHz"
        if clocks[-1] > 1.03 * clocks[0]:
            text += f" ({clocks[0]} to {clocks[-1]})"
        if (most := max(state.power_w for state in self.seen)) > 0:
            text += f", {most:.0f} W"
        slowed = sorted({reason for state in self.seen for reason in state.slowed_by})
        return text + (f", slowed by {' and '.join(slowed)}" if slowed else "")


def copies_of(packed: Packed, count: int) -> tuple[Packed, ...]:
    """The packed weight and copies of it in memory of their own, `count` in all."""
    return (packed, *(replace(packed, data=_cloned(packed.data)) for _ in range(count - 1)))


def _cloned(data: Any) -> Any:
    """Tensors cloned with their strides, through tuples, lists, dicts and dataclasses; anything else is shared."""
    if isinstance(data, torch.Tensor):
        return data.clone()
    if isinstance(data, tuple | list):
        return type(data)(_cloned(part) for part in data)
    if isinstance(data, dict):
        return {name: _cloned(part) for name, part in data.items()}
    if is_dataclass(data) and not isinstance(data, type):
        return replace(data, **{item.name: _cloned(getattr(data, item.name)) for item in fields(data)})
    return data
