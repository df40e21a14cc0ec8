"""What a kernel covers, as data: the search space is built from these without importing any kernel.

A kernel implements one or more schemes in one runtime on one kind of device, within limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Limits:
    """Shapes and devices a kernel accepts. Features are names a `Target` lists; all are needed ("a|b": either)."""

    in_multiple: int = 1
    out_multiple: int = 1
    features: tuple[str, ...] = ()
    min_compute_capability: float | None = None
    max_compute_capability: float | None = None


@dataclass(frozen=True)
class KernelSpec:
    """`module` is imported on use and holds `pack` and `run` (see `kernels.spec.KernelModule`)."""

    name: str
    schemes: tuple[str, ...]
    device: Literal["cpu", "cuda"]
    dtypes: tuple[str, ...]  # activation dtypes it takes and returns: "bf16", "fp32"
    module: str
    limits: Limits = Limits()
    copies: float = 1.0  # packed bytes over the scheme's own; 2.0 where prefill needs a second copy
    compute_format: str = "bf16"  # number format its multiply runs in, for the roofline: a key of Ceilings.tera_ops
    sparse_compute: bool = False  # True: 2:4 tensor cores double that rate
    memory_only: bool = False  # True: unpacks before a dense multiply; saves bytes, never time
    notes: str = ""
