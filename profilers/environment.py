"""What a measurement depends on besides the kernel, and how this process is set up for measuring.

`fingerprint` describes the machine and the software as a plain dict; its short hash is part of every measurement's key,
so a new torch, another thread count or a moved virtual machine measures again. `child_env` and `pin` fix what would
otherwise vary between runs: threads, their cores, and an allocator that keeps its pages, since a fresh output buffer
for every call would time page faults. `load` says whether someone else is using the machine. Governors, boost and huge
pages are left as they are.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.profilers import cuda_environment
from autotune.store import digest
from autotune.targets import detect

_KNOBS = re.compile(
    r"^(OMP_|GOMP_|KMP_|MKL_|MALLOC_|ONEDNN_|DNNL_|ATEN_|TORCH_|LD_PRELOAD$|GLIBC_TUNABLES$|CUDA_VISIBLE_DEVICES$)"
)
_BUSY_FRACTION = 0.10
_STEAL_FRACTION = 0.02


def fingerprint(threads: int, env: Mapping[str, str] | None = None, device: str = "cpu") -> dict[str, Any]:
    """What decides how fast a kernel runs here, with `env` set on top of our environment."""
    target = detect.detect_cpu()
    torch_version, onednn_version = _torch_versions()
    return {
        **({"cuda": cuda_environment.fingerprint()} if device == "cuda" else {}),
        "cpu": target.model,
        "features": list(target.features),
        "caches": target.caches,
        "cores": target.cores,
        "threads": threads,
        "torch": torch_version,
        "onednn": onednn_version,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "allocator": _allocator(),
        "env": {name: value for name, value in sorted({**os.environ, **(env or {})}.items()) if _KNOBS.match(name)},
    }


def short_hash(value: Mapping[str, Any]) -> str:
    """12 hex digits of a fingerprint."""
    return digest(dict(value))[:12]


def child_env(threads: int) -> dict[str, str]:
    """Environment of a measuring child; OpenMP and the C library read theirs once, at start."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_PROC_BIND": "close",
        "OMP_PLACES": "cores",
        "KMP_BLOCKTIME": "200",  # ms: longer than any gap between two layers, so threads stay awake
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the most glibc takes; below it, buffers are reused, not unmapped
        "MALLOC_TRIM_THRESHOLD_": str(2**30),
        "MALLOC_TOP_PAD_": str(64 * 2**20),
    }


def pin(threads: int) -> dict[str, Any]:
    """Bind this process to its first `threads` cores and torch to as many threads; returns what was done."""
    import torch

    done: dict[str, Any] = {"threads": threads, "cpus": None}
    if hasattr(os, "sched_setaffinity"):
        cpus = one_cpu_per_core(sorted(os.sched_getaffinity(0)))[:threads]
        if len(cpus) == threads:  # fewer cores than threads: leave the placing to the system
            os.sched_setaffinity(0, cpus)
            done["cpus"] = cpus
    torch.set_num_threads(threads)
    return done


def one_cpu_per_core(cpus: list[int], root: Path = detect.ROOT) -> list[int]:
    """The first of each core's hyperthreads."""
    firsts: dict[str, int] = {}
    for cpu in cpus:
        file = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        firsts.setdefault(file.read_text().strip() if file.is_file() else str(cpu), cpu)
    return sorted(firsts.values())


@dataclass(frozen=True)
class Load:
    """What others did on our CPUs while we slept: fractions of their time, 0..1."""

    others: float
    stolen: float  # by other virtual machines
    average: float  # the 1-minute load average per CPU

    @property
    def busy(self) -> bool:
        return self.others > _BUSY_FRACTION or self.stolen > _STEAL_FRACTION

    def __str__(self) -> str:
        return (
            f"{self.others:.0%} of the CPUs in use by others, {self.stolen:.0%} stolen, load {self.average:.1f} per CPU"
        )


def load(window_s: float = 0.2, sleep: Callable[[float], None] = time.sleep, root: Path = detect.ROOT) -> Load:
    """Look at our CPUs for `window_s` without using them. All zero where the system does not say (macOS)."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    average = os.getloadavg()[0] / len(cpus)
    if not (root / "proc/stat").is_file():
        return Load(0.0, 0.0, average)
    first = _cpu_times(root, cpus)
    sleep(window_s)
    passed = [after - before for before, after in zip(first, _cpu_times(root, cpus), strict=True)]
    total = sum(passed) or 1
    idle, stolen = passed[3] + passed[4], passed[7]  # idle + iowait; steal
    return Load((total - idle - stolen) / total, stolen / total, average)


def _cpu_times(root: Path, cpus: list[int]) -> list[int]:
    """user, nice, system, idle, iowait, irq, softirq, steal: ticks summed over these CPUs."""
    wanted = {f"cpu{cpu}" for cpu in cpus}
    lines = [line.split() for line in (root / "proc/stat").read_text().splitlines()]
    return [
        sum(column)
        for column in zip(*([int(t) for t in line[1:9]] for line in lines if line[0] in wanted), strict=True)
    ]


def _torch_versions() -> tuple[str, str]:
    import torch

    found = re.search(r"MKL-DNN v(\S+)|oneDNN v(\S+)", torch.__config__.show())
    return torch.__version__, next((part for part in found.groups() if part), "none") if found else "none"


def _allocator() -> str:
    """The C library, and any allocator loaded over it."""
    preloaded = [Path(item).name for item in re.split(r"[ :]", os.environ.get("LD_PRELOAD", "")) if item]
    return " + ".join(["-".join(platform.libc_ver()) or platform.system(), *preloaded])
