"""Bytes: what weights take under a scheme, and what this process has taken at its peak.

`weight_bytes` is storage: codes, scales, zero points, a pattern's positions and bias, as a checkpoint holds them; times
a kernel's `copies` it is what the kernel holds. Kernels that pad hold more: the latency table's `packed_bytes` says.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from autotune.profilers.table import Shape, shape_of
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.schemes import Scheme, scheme

_STATUS = Path("/proc/self/status")
_WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}


def weight_bytes(item: Scheme, group: LayerGroup, dtype: str) -> int:
    """Bytes of a group's weights, biases included, under a scheme."""
    return group.experts * packed_weight_bytes(item.name, shape_of(group), dtype)


@cache
def packed_weight_bytes(name: str, shape: Shape, dtype: str, copies: float = 1.0) -> int:
    """The same for a shape, as a kernel that keeps `copies` of the codes holds it."""
    item, (members, in_features, has_bias) = scheme(name), shape
    out_features = sum(members)
    bias = out_features * _WIDTH[dtype] if has_bias else 0
    more = math.ceil(in_features * out_features * item.bits_per_weight / 8 * (copies - 1))
    return item.stored_bytes(out_features, in_features) + more + bias


def uniform_bytes(spec: ModelSpec, item: Scheme) -> int:
    """Bytes all layer groups read in one pass if every one were under this scheme; a tied lm_head is read too."""
    return sum(weight_bytes(item, group, spec.dtype) for group in spec.groups)


def model_bytes(spec: ModelSpec, plan: Mapping[str, str]) -> int:
    """Bytes of the model with each group under the scheme `plan` names; kept tensors included.

    A tied lm_head that stays dense shares the embedding and adds nothing; a compressed one is a copy of its own.
    """
    total = spec.kept_bytes
    for group in spec.groups:
        item = scheme(plan[group.name])
        if not (spec.tied_embeddings and group.role == "lm_head" and item.is_dense):
            total += weight_bytes(item, group, spec.dtype)
    return total


def peak_process_bytes() -> int:
    """The most memory this process has had resident so far (VmHWM; elsewhere than on Linux ru_maxrss)."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
