"""Where a target's models, packed weights and documents live, and how its passes are timed: decided here, nowhere else.

On a CUDA device a pass is recorded as a graph and replayed: launched one by one from Python, operators take so long
that no kernel's gain would show. A CPU runs its passes as they are. For a target that is not this machine losses are
measured on the CPU. Products in fp32 are in fp32 on a CUDA device too: losses and compression are told so here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from autotune.errors import DeviceError
from autotune.kernels.spec import kernel
from autotune.profilers import cuda_timer
from autotune.profilers.cuda_timer import Recording
from autotune.targets.target import Target


@dataclass(frozen=True)
class Place:
    """`recording`: how a pass becomes a graph, and how long the device takes for it; None: passes run as they are."""

    device: torch.device
    recording: Recording | None = None

    def put(self, documents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [document.to(self.device) for document in documents]

    def make_room(self) -> None:
        """Return memory that nothing uses any more to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def memory_bytes(self) -> int:
        """All that the device has, or that a process may take of the machine's."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        try:
            return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        except (OSError, ValueError):  # no control group, or no limit ("max")
            return total

    @property
    def available_bytes(self) -> int:
        """What this process could still take, or has in reserve."""
        if self.device.type == "cuda":
            reserve = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return int(torch.cuda.mem_get_info(self.device)[0]) + reserve
        return available_memory()


CPU = Place(torch.device("cpu"))


def available_memory() -> int:
    """Bytes that this process could still take: of the machine and of its control group; 0 where neither is told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0
    try:
        group = Path("/sys/fs/cgroup")
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return free


def at_a_time(device: torch.device, in_cache: int, elsewhere: int = 2**24) -> int:
    """How many numbers to handle at a time: on a CPU as many as stay in cache, elsewhere so many that launches do not
    count."""
    return in_cache if device.type == "cpu" else elsewhere


def logits_at_a_time(device: torch.device) -> int:
    """How many logits to compare at a time: in cache it is 4x faster than a document at once."""
    return at_a_time(device, 2**17, 2**26)


def cuda_device() -> torch.device:
    """The CUDA device, its fp32 products in fp32: an environment may ask torch for TF32, whose 11 bits would be
    measured as a loss."""
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda:0")


def place_of(target: Target) -> Place:
    """Of a target that is this machine.

    Raises:
        DeviceError: `device.missing`.
    """
    if target.device == "cpu":
        return CPU
    if target.device != "cuda" or not torch.cuda.is_available():
        hint = "Run on that machine, or search for it from here by naming its profile with --target."
        raise DeviceError("device.missing", f"{target.name} is a {target.device} device, and there is none here.", hint)
    return Place(cuda_device(), cuda_timer.on_device())


def device_of(kernels: Iterable[str]) -> torch.device:
    """Where a model that runs these kernels lives.

    Raises:
        DeviceError: `device.missing`.
    """
    if "cuda" not in {kernel(name).device for name in kernels}:
        return CPU.device
    if not torch.cuda.is_available():
        hint = "Load it on a machine with such a device, or hand it to another tool with `autotune export`."
        raise DeviceError("device.missing", "the plan runs CUDA kernels, and there is no CUDA device here.", hint)
    return torch.device("cuda:0")
