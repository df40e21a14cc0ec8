"""Engines that are timed against each other, each in a process of its own, driven by lines of JSON.

Our own kernels are one engine, every other package is one. A process each, because thread pools of different runtimes
get in each other's way: their idle threads spin, and OpenMP may bind the thread that starts another runtime's pool to
one core. One engine works at a time; the next waits until the last one's threads have gone to sleep (`SETTLE_S`).

`Case` is a cell of a table of kernels as an engine sees it, `Remote` the parent's side of an engine's process;
`peers_child.py` is the other side. An engine that hangs or dies is an `EngineGone`, which costs its candidates only.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import json
import math
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autotune.kernels.reference import dequantize, random_weight
from autotune.kernels.spec import GroupWeight
from autotune.profilers import environment

SETTLE_S = 0.01  # longer than idle OpenMP, TBB and ONNX Runtime threads spin
MANY_ROWS = 64  # from here on arithmetic hides where weights come from
MAX_COPIES = 4096
CACHES_TO_STREAM = 4
RESIDENT_SHARE = 0.25  # of the last cache: what copies of a resident weight add up to
MAX_GRAPHS = 8
GRAPH_BYTES = 45e6  # weights one call of a graph should read, where rows are few: about 1.5 ms
_LAST_WORDS = 300

# engine -> (module with its `Engine`, packages it needs, whether its threads are torch's)
ENGINES: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "autotune": ("cpu_own", ("torch",), True),
    "onnxruntime": ("peers_onnxruntime", ("onnxruntime", "onnx"), False),
    "openvino": ("peers_openvino", ("openvino",), False),
    "torchao": ("peers_torchao", ("torchao",), True),
    "llama.cpp": ("peers_llama", ("llama_cpp", "gguf"), False),
}
KERNEL_PEERS = ("onnxruntime", "openvino", "torchao")


class EngineGone(Exception):
    """An engine's process ended or hung; `at`: the candidate it last said it was at."""

    def __init__(self, engine: str, at: str, why: str) -> None:
        super().__init__(f"{engine}: {why}" + (f", at {at}" if at else ""))
        self.engine, self.at = engine, at


@dataclass(frozen=True)
class Case:
    """One (shape, rows, residency); `schemes` and `kernels` are patterns, `barred` has crashed before."""

    n: int
    k: int
    m: int
    all_m: tuple[int, ...]  # every number of rows this shape will be timed at: what kernels are checked on
    cold: bool
    last_cache_bytes: int
    sample_s: float = 0.0015
    schemes: tuple[str, ...] = ("*",)
    kernels: tuple[str, ...] = ("*",)
    barred: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Case:
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
        return cls(**fields)

    def wants(self, kernel: str, scheme: str) -> bool:
        """Dense bf16 is always wanted: everything is compared with it."""
        if f"{kernel} {scheme}" in self.barred:
            return False
        return scheme == "bf16" or (_any(kernel, self.kernels) and _any(scheme, self.schemes))

    def copies(self, packed_bytes: float) -> int:
        """Copies of a weight to take in turn, so that it comes from memory (cold) or from the last cache."""
        if self.cold:
            return min(MAX_COPIES, max(1, math.ceil(CACHES_TO_STREAM * self.last_cache_bytes / packed_bytes)))
        if self.m >= MANY_ROWS:
            return 1
        return max(1, int(RESIDENT_SHARE * self.last_cache_bytes / packed_bytes))

    def graphs(self, packed_bytes: float) -> list[range]:
        """The copies, split evenly over graphs that are run one by one, for runtimes that run whole graphs."""
        copies = self.copies(packed_bytes)
        each = math.ceil(copies / MAX_GRAPHS)
        if self.m < MANY_ROWS:
            each = min(copies, max(each, math.ceil(GRAPH_BYTES / packed_bytes)))
        return [range(start, start + each) for start in range(0, copies, each)]


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Loaded:
    """A kernel ready to be called. `calls` are taken in turn; each uses `nodes` copies of the weight."""

    kernel: str
    scheme: str
    packed_bytes: float  # that one multiplication reads
    calls: Sequence[Callable[[], object]]
    nodes: int = 1
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.scheme}"


class Failures(list[dict[str, str]]):
    """Candidates that could not be loaded or were wrong."""

    def add(self, kernel: str, scheme: str, reason: object) -> None:
        words = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
        self.append({"kernel": kernel, "scheme": scheme, "reason": " ".join(words.split())[:300]})


def made_weight(scheme: str, case: Case) -> GroupWeight:
    """The same random weight in every engine."""
    generator = torch.Generator().manual_seed(0)
    return random_weight(scheme, case.n, case.k, torch.bfloat16, False, generator)


def made_input(case: Case) -> torch.Tensor:
    """(m, k) in fp32, holding bf16 numbers."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.m, case.k, generator=generator).bfloat16().float()


def relative_error(weight: GroupWeight, x: torch.Tensor, y: torch.Tensor, outputs: int = 64) -> float:
    """RMS of y - x W^T over the RMS of x W^T, on up to 8 rows and the first and last outputs; a rough check."""
    assert weight.codes is not None and weight.scales is not None
    worst = 0.0
    for part in (slice(0, outputs), slice(-outputs, None)):
        piece = GroupWeight(weight.scheme, codes=weight.codes[part], scales=weight.scales[part])
        expected = x[:8].double() @ dequantize(piece).double().T
        error = (y[:8, part].double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        worst = max(worst, float(error)) if math.isfinite(float(error)) else math.inf
    return worst


class Remote:
    """An engine in its own process."""

    def __init__(self, engine: str, threads: int, python: str = sys.executable) -> None:
        self.engine, self.at = engine, ""
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._buffer = b""
        command = [python, str(Path(__file__).with_name("peers_child.py")), engine, str(threads)]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=_environment(threads, ENGINES[engine][2]),
        )
        self.about: dict[str, Any] = self.ask(180.0, do="about")

    def ask(self, timeout_s: float, **request: Any) -> dict[str, Any]:
        """One question, one answer.

        Raises:
            EngineGone: no answer came; the process has been killed.
        """
        assert self._child.stdin is not None
        self.at = ""
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        deadline = time.monotonic() + timeout_s
        while True:
            answer: dict[str, Any] = json.loads(self._line(deadline, timeout_s))
            if "at" not in answer:
                return answer
            self.at = answer["at"]
            deadline = time.monotonic() + timeout_s

    def load(self, case: Case, timeout_s: float = 600.0) -> dict[str, Any]:
        """{"candidates": [...], "failed": [...]}"""
        return self.ask(timeout_s, do="load", case=asdict(case))

    def sample(self, name: str, settle_s: float, timeout_s: float = 300.0) -> float:
        """Seconds of one sample of a loaded candidate."""
        self.at = name
        return float(self.ask(timeout_s, do="sample", name=name, settle_s=settle_s)["seconds"])

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._words):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _line(self, deadline: float, timeout_s: float) -> bytes:
        assert self._child.stdout is not None
        handle = self._child.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._gone(f"no answer in {timeout_s:g} s")
            data = os.read(handle, 2**16)
            if not data:
                self._child.wait()
                raise self._gone(f"ended with code {self._child.returncode}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _gone(self, why: str) -> EngineGone:
        self._words.seek(0)
        words = " ".join(self._words.read().decode(errors="replace").split())[-_LAST_WORDS:]
        self.close()
        return EngineGone(self.engine, self.at, f"{why}; last words: {words}" if words else why)


def available(names: tuple[str, ...], python: str) -> Iterator[str]:
    """Those whose packages `python` can import."""
    for name in names:
        packages = ENGINES[name][1]
        if python == sys.executable:
            found = all(importlib.util.find_spec(package) is not None for package in packages)
        else:
            code = f"import importlib.util as u; raise SystemExit(not all(map(u.find_spec, {packages!r})))"
            found = subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0
        if found:
            yield name


def _environment(threads: int, torch_threads: bool) -> dict[str, str]:
    """Torch's engines get what the profiler's children get; the others place their threads themselves."""
    ours = environment.child_env(threads)
    if torch_threads:
        return {**os.environ, **ours}
    foreign = re.compile(r"^(OMP_|GOMP_|KMP_)")
    kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    allocator = {name: value for name, value in ours.items() if not foreign.match(name)}
    return {**kept, **allocator, "OMP_NUM_THREADS": str(threads)}
