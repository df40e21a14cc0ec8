"""What this machine can run, kernel by kernel, and what keeps it from more."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from autotune import __version__
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
    return "runs" + _machine_code(spec, target)


def _machine_code(spec: KernelSpec, target: Target) -> str:
    """Whether tensor cores are active, from the assembly of a compiled kernel's widest product for this device."""
    if target.compute_capability is None:
        return ""
    if "nvcc" in spec.limits.features:
        from autotune.kernels.cuda import compiled as by_nvcc

        return f": {by_nvcc.inspect(spec.module.rpartition('.')[2], target.compute_capability)}"
    if "triton" not in spec.limits.features:
        return ""
    from autotune.kernels.triton import compiled

    products = [variant for variant in compiled.variants(spec) if variant.tensor_cores]
    return f": {compiled.inspect(products[-1], target.compute_capability)}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
