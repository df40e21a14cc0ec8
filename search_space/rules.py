"""Legality: may a scheme be used for a layer group on a target, by which kernels, and if not, why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from autotune.search_space.coverage import KernelSpec
from autotune.search_space.groups import LayerGroup
from autotune.search_space.schemes import Scheme
from autotune.targets.target import Target

# runs: a kernel exists here. estimated: a kernel exists for that target, which is not this machine (searched from the
# roofline, never applied). memory_only: runs here by unpacking weights in every call, saves bytes but no time; measured
# like any other. illegal: not possible.
Status = Literal["runs", "estimated", "memory_only", "illegal"]


@dataclass(frozen=True)
class Legality:
    status: Status
    reason: str
    kernels: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        return self.status != "illegal"


def legality(
    scheme: Scheme,
    group: LayerGroup,
    dtype: str,
    target: Target,
    kernels: Sequence[KernelSpec],
    local: bool,
    for_memory: bool = False,
) -> Legality:
    """`local`: the target is this machine, so its kernels can be run and not only estimated. `for_memory`: kernels that
    save bytes and no time count where there is no other."""
    if reason := _format_misfit(scheme, group):
        return Legality("illegal", reason)
    own = [kernel for kernel in kernels if kernel.device == target.device and scheme.name in kernel.schemes]
    found = _judge(scheme, group, dtype, target, [kernel for kernel in own if not kernel.memory_only], local)
    if found.usable or not (for_memory and local):
        return found
    unpacking = _judge(scheme, group, dtype, target, [kernel for kernel in own if kernel.memory_only], local)
    if not unpacking.usable:
        return found
    return Legality("memory_only", f"saves memory only: {found.reason}", unpacking.kernels)


def _judge(
    scheme: Scheme, group: LayerGroup, dtype: str, target: Target, named: Sequence[KernelSpec], local: bool
) -> Legality:
    if not named:
        return Legality("illegal", f"no {target.device} kernel implements {scheme.name}")
    misfits = {kernel.name: _misfit(kernel, group, dtype, target) for kernel in named}
    fitting = tuple(name for name, reason in misfits.items() if not reason)
    if not fitting:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in misfits.items())
        return Legality("illegal", reasons)
    if local:
        return Legality("runs", f"kernels here: {', '.join(fitting)}", fitting)
    return Legality("estimated", f"kernels on {target.name}: {', '.join(fitting)}; not this machine", fitting)


def _format_misfit(scheme: Scheme, group: LayerGroup) -> str:
    size, part = scheme.weight.group_size, group.parts[0]
    if group.experts > 1 and (scheme.weight.rows is None or scheme.weight.scale == "e4m3"):
        return "one scale for the whole tensor would be shared by all experts"
    if group.experts > 1 and part.out_features % (scheme.weight.rows or 1):
        rows = scheme.weight.rows
        return f"an expert's {part.out_features} outputs are not a multiple of the {rows} that share a scale"
    if size and group.in_features % size:
        return f"{group.in_features} inputs are not a multiple of the scale group {size}"
    if scheme.block and group.in_features % scheme.block:
        return f"{group.in_features} inputs are not a multiple of {scheme.block}, as {scheme.sparsity} needs"
    return ""


def _misfit(kernel: KernelSpec, group: LayerGroup, dtype: str, target: Target) -> str:
    limits = kernel.limits
    if dtype not in kernel.dtypes:
        return f"takes {' or '.join(kernel.dtypes)} activations, the model runs in {dtype}"
    if missing := lacking(limits.features, target.features):
        return f"{target.name} lacks {', '.join(missing)}"
    capability = target.compute_capability or 0.0
    if limits.min_compute_capability and capability < limits.min_compute_capability:
        return f"needs compute capability {limits.min_compute_capability}, {target.name} has {capability}"
    if limits.max_compute_capability and capability > limits.max_compute_capability:
        return f"works up to compute capability {limits.max_compute_capability}, {target.name} has {capability}"
    if group.in_features % limits.in_multiple:
        return f"{group.in_features} inputs are not a multiple of {limits.in_multiple}"
    outputs = group.parts[0].out_features
    if outputs % limits.out_multiple:
        return f"{outputs} outputs are not a multiple of {limits.out_multiple}"
    return ""


def lacking(needed: Sequence[str], features: Sequence[str]) -> list[str]:
    """What of `needed` is not there; "a|b" is satisfied by either."""
    return [name.replace("|", " or ") for name in needed if not set(name.split("|")) & set(features)]
