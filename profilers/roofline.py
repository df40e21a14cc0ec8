"""The roofline: the least time a call can take, from a target's ceilings.

    time = max(bytes / read bandwidth at the working set, operations / rate of the format) + launch

Bytes are one packed copy of the weights plus the activations in and out, and their quantized form written and read
where the scheme has one. 2:4 tensor cores double the rate. Used for targets that are not this machine (rows marked
`estimated`) and to catch times that are too good to be true. Real kernels are slower: caches, tails and tile shapes are
not modelled.
"""

from __future__ import annotations

import math

from autotune.errors import InputError
from autotune.profilers.jobs import Job
from autotune.profilers.memory import packed_weight_bytes
from autotune.profilers.table import LatencyRow
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.schemes import scheme
from autotune.targets.target import Ceilings

SLACK = 1.05  # a ceiling is a measurement too
_WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}


def estimate(job: Job, ceilings: Ceilings) -> LatencyRow:
    """A row marked `estimated`. It has no spread: the interval is the estimate itself."""
    time_us = least_us(job, ceilings)
    reason = f"roofline of {ceilings.source} ceilings"
    stored = packed_weight_bytes(job.scheme, job.shape, job.dtype, job.kernel.copies)
    return job.row((time_us, time_us, time_us), "estimated", stored, reason=reason)


def least_us(job: Job, ceilings: Ceilings) -> float:
    return max(read_us(job, ceilings), compute_us(job, ceilings)) + ceilings.launch_us


def read_us(job: Job, ceilings: Ceilings) -> float:
    working_set = math.inf if job.resident_bytes is None else job.resident_bytes
    weights = packed_weight_bytes(job.scheme, job.shape, job.dtype)
    return (weights + activation_bytes(job)) / (ceilings.bandwidth(working_set) * 1e3)


def compute_us(job: Job, ceilings: Ceilings) -> float:
    return job.operations / (rate(job.kernel, ceilings) * 1e6)


def activation_bytes(job: Job) -> int:
    """Read, written quantized and read again where the scheme quantizes them, and the output."""
    width, activation = _WIDTH[job.dtype], scheme(job.scheme).activation
    quantized = 2 * activation.bits // 8 if activation else 0
    return job.rows * (job.in_features * (width + quantized) + job.out_features * width)


def rate(kernel: KernelSpec, ceilings: Ceilings) -> float:
    """TFLOP/s or TOP/s of the kernel's multiply.

    Raises:
        InputError: `target.ceiling` when the target does not say.
    """
    if kernel.compute_format not in ceilings.tera_ops:
        known = ", ".join(sorted(ceilings.tera_ops))
        hint = f"Add it to ceilings.tera_ops; known there: {known}."
        raise InputError(
            "target.ceiling", f"{kernel.name} computes in {kernel.compute_format}, no rate is given.", hint
        )
    return ceilings.tera_ops[kernel.compute_format] * (2.0 if kernel.sparse_compute else 1.0)


def too_good(job: Job, median_us: float, packed_bytes: int, ceilings: Ceilings) -> str:
    """Why a measured time cannot be: faster than the measured ceilings allow. Empty when it can be."""
    if ceilings.source != "measured" or ceilings.busy:
        return ""
    best = _bandwidth_within(job.resident_bytes, ceilings)
    got = packed_bytes / job.kernel.copies / median_us / 1e3
    if got > SLACK * best:
        return f"reads {got:.1f} GB/s of weights where the best measured read is {best:.1f} GB/s"
    if job.kernel.compute_format in ceilings.tera_ops:
        peak, done = rate(job.kernel, ceilings), job.operations / median_us / 1e6
        if done > SLACK * peak:
            return f"does {done:.2f} tera-operations/s where the best measured is {peak:.2f}"
    return ""


def _bandwidth_within(resident_bytes: int | None, ceilings: Ceilings) -> float:
    """The best rate at this working set: between two measured sizes, that of the smaller, as it is the faster."""
    size = math.inf if resident_bytes is None else resident_bytes
    below = [rate for measured, rate in ceilings.read_gb_per_s if measured <= size]
    return max(below[-1] if below else 0.0, ceilings.bandwidth(size))
