"""What compilers made of a CUDA kernel: the tensor-core instruction of its product, registers, spills.

Read from the assembly of the widest product that is compiled here (Triton's, nvcc's). What libraries run (cuBLAS,
cuSPARSELt) they choose among themselves at run time, and it is not known.
"""

from __future__ import annotations

import subprocess

from autotune.errors import AutotuneError
from autotune.search_space.coverage import KernelSpec


def machine_code(spec: KernelSpec, capability: float | None) -> str:
    """For example "wgmma.mma_async, 72 registers, no spills"; empty where nothing is compiled here.

    Never an error: it is told beside results, which a missing tool must not cost.
    """
    if capability is None:
        return ""
    try:
        return _inspected(spec, capability)
    except (AutotuneError, ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__}: {error})"


def _inspected(spec: KernelSpec, capability: float) -> str:
    if "nvcc" in spec.limits.features:
        from autotune.kernels.cuda import compiled as by_nvcc

        return str(by_nvcc.inspect(spec.module.rpartition(".")[2], capability))
    if "triton" not in spec.limits.features:
        return ""
    from autotune.kernels.triton import compiled

    products = [variant for variant in compiled.variants(spec) if variant.tensor_cores]
    return str(compiled.inspect(products[-1], capability))
