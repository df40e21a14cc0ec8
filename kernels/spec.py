"""The table of kernels, and what a kernel's module must hold.

A kernel is one file with two functions, `pack` and `run`; its limits are data in the table below. Add a kernel: write
the file, add one line here; the conformance suite in `tests/conformance/` then tests it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from autotune.errors import InputError, did_you_mean
from autotune.search_space.coverage import KernelSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GroupWeight:
    """A layer group's weights under a scheme, rows of all members stacked; unpacked, in canonical form.

    Dense schemes: `dense` holds W (out, in) in the model's dtype and `codes` is None. Quantized schemes: W = codes *
    scales, with `codes` int8 (out, in) (integers, or fp8 e4m3 as torch.float8_e4m3fn) and `scales` fp32 (out, groups),
    exact in bf16 and in fp16. A 2:4 scheme has at least two exact zeros in every four inputs.
    """

    scheme: str
    dense: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None  # (out,) in the model's dtype


@dataclass(frozen=True)
class Packed:
    """A kernel's own layout of one group. `bytes`: memory it really holds, all copies included."""

    out_features: int
    in_features: int
    dtype: torch.dtype  # of activations in and out
    bytes: int
    data: Any  # tensors and constants that only the kernel understands


class KernelModule(Protocol):
    def pack(self, weight: GroupWeight, dtype: torch.dtype) -> Packed:
        """Repack canonical weights once, at load time."""
        ...

    def run(self, packed: Packed, x: torch.Tensor) -> torch.Tensor:
        """y = x W^T + b for x (rows, in_features) of the packed dtype, any number of rows; returns (rows, out_features)."""
        ...


KERNELS: tuple[KernelSpec, ...] = ()


def kernel(name: str) -> KernelSpec:
    """Look a kernel up by name.

    Raises:
        InputError: `kernel.unknown`, with the closest known names.
    """
    for spec in KERNELS:
        if spec.name == name:
            return spec
    raise InputError("kernel.unknown", f"there is no kernel {name!r}.", did_you_mean(name, [k.name for k in KERNELS]))


def load(spec: KernelSpec) -> KernelModule:
    return cast(KernelModule, import_module(spec.module))
