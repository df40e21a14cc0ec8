"""What this machine can run, kernel by kernel, and what keeps it from more."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from autotune import __version__
from autotune.kernels.machine_code import machine_code
from autotune.kernels.spec import KERNELS, load
from autotune.planning import PACKAGES
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.groups import LayerGroup, Linear
from autotune.search_space.rules import legality
from autotune.search_space.schemes import scheme
from autotune.targets import detect
from autotune.targets.target import Target

_PROBE = LayerGroup("probe", "probe", None, (Linear("probe", "probe", 256, 256, False),))


def print_doctor(console: Console) -> None:
    """Versions, the machine, and every kernel with the reason where it cannot run."""
    target = detect.detect()
    console.print(f"autotune {__version__}, Python {platform.python_version()}, {platform.platform()}")
    console.print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    console.print(f"{target.model}: {target.cores} cores, {target.memory_bytes / 2**30:.1f} GiB, ", end="")
    console.print(", ".join(target.features))
    table = Table("kernel", "schemes", "here", box=None, pad_edge=False)
    for spec in KERNELS:
        table.add_row(spec.name, ", ".join(spec.schemes), _state(spec, target))
    console.print(table)


def _state(spec: KernelSpec, target: Target) -> str:
    if spec.device != target.device:
        return f"needs a {spec.device} device"
    answer = legality(
        scheme(spec.schemes[0]), _PROBE, spec.dtypes[0], target, [spec], local=True, for_memory=spec.memory_only
    )
    if not answer.usable:
        return answer.reason
    try:
        load(spec)
    except ImportError as error:
        return f"cannot be loaded: {error}"
    made = machine_code(spec, target.compute_capability)
    return f"runs: {made}" if made else "runs"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
