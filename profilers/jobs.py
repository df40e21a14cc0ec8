"""What has to be timed: one job for every (kernel, scheme, shape, rows, residency) a model, space and workload need.

Layers of equal shape share a job. Residency: a model's weights that fit in the last cache are read from there, pass
after pass, so a job rotates over copies that add up to the model's weight bytes *under its scheme*; beyond four caches
they stream from memory (`resident_bytes` None). Sizes are rounded to 1, 1.5, 2, 3, 4, ... so that models share rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from autotune.errors import InputError
from autotune.profilers.memory import uniform_bytes
from autotune.profilers.table import LatencyRow, Shape, Status, shape_of
from autotune.search_space.coverage import KernelSpec, Limits
from autotune.search_space.groups import ModelSpec
from autotune.search_space.schemes import Scheme, scheme
from autotune.search_space.space import SearchSpace
from autotune.search_space.workload import Workload
from autotune.targets.target import Target

CACHES_TO_STREAM = 4  # copies of this many last caches leave nothing of one pass for the next


@dataclass(frozen=True)
class Job:
    kernel: KernelSpec
    scheme: str
    members: tuple[int, ...]
    in_features: int
    bias: bool
    dtype: str
    rows: int
    resident_bytes: int | None

    @property
    def shape(self) -> Shape:
        return self.members, self.in_features, self.bias

    @property
    def out_features(self) -> int:
        return sum(self.members)

    @property
    def operations(self) -> int:
        """Of the dense product, a multiply-add counted as two."""
        return 2 * self.rows * self.in_features * self.out_features

    def identity(self) -> dict[str, Any]:
        """What names the job, the kernel by name only."""
        fields = {name: value for name, value in asdict(self).items() if name != "kernel"}
        return {"kernel": self.kernel.name, **fields}

    def row(
        self,
        times_us: tuple[float, float, float] | None,
        status: Status,
        packed_bytes: int = 0,
        rounds: int = 0,
        noisy: bool = False,
        reason: str = "",
    ) -> LatencyRow:
        """The job's row; `times_us` is (median, low, high)."""
        median, low, high = times_us or (None, None, None)
        return LatencyRow(
            **self.identity(),
            median_us=median,
            low_us=low,
            high_us=high,
            rounds_timed=rounds,
            status=status,
            noisy=noisy,
            reason=reason,
            packed_bytes=packed_bytes,
        )

    def __str__(self) -> str:
        shape = f"{'+'.join(map(str, self.members))} x {self.in_features}"
        return f"{self.kernel.name} {self.scheme} {shape}, {self.rows} rows"


def needed(
    spec: ModelSpec,
    space: SearchSpace,
    target: Target,
    workload: Workload,
    kernels: Sequence[KernelSpec],
    status: Literal["runs", "estimated"],
) -> tuple[Job, ...]:
    """The jobs of every (group, scheme) with this legality, each once, those of one shape together. What is usable for
    memory only runs too."""
    found = dict.fromkeys(_all(spec, space, target, workload, {kernel.name: kernel for kernel in kernels}, status))
    shapes = list(dict.fromkeys(job.shape for job in found))
    return tuple(sorted(found, key=lambda job: (shapes.index(job.shape), job.rows)))  # stable within


def _all(
    spec: ModelSpec,
    space: SearchSpace,
    target: Target,
    workload: Workload,
    kernels: dict[str, KernelSpec],
    status: str,
) -> Iterator[Job]:
    groups = {group.name: group for group in spec.groups}
    for entry in space.entries:
        if entry.legality.status != status and (status, entry.legality.status) != ("runs", "memory_only"):
            continue
        group, item = groups[entry.group], scheme(entry.scheme)
        resident = residency(spec, item, target.last_cache_bytes)
        for rows in dict.fromkeys(phase.rows(group) for phase in workload.phases):
            for name in entry.legality.kernels:
                if name not in kernels:
                    raise InputError("profile.kernel", f"the search space names kernel {name!r}, which is not given.")
                yield Job(kernels[name], item.name, *shape_of(group), spec.dtype, rows, resident)


def residency(spec: ModelSpec, item: Scheme, last_cache_bytes: int) -> int | None:
    """Bytes one pass over the model reads if all groups are under this scheme, rounded; None: they stream."""
    total = uniform_bytes(spec, item)
    return None if total > CACHES_TO_STREAM * last_cache_bytes else bucket(total)


def bucket(size: int) -> int:
    """The nearest of 1, 1.5, 2, 3, 4, 6, ...: at most a quarter off."""
    power: int = 1 << (max(size, 2).bit_length() - 1)
    return min((power, power * 3 // 2, power * 2), key=lambda near: abs(math.log(near / max(size, 1))))


def kernel_from_json(value: dict[str, Any]) -> KernelSpec:
    """The inverse of `dataclasses.asdict` after a trip through JSON."""
    limits = Limits(**{**value["limits"], "features": tuple(value["limits"]["features"])})
    tuples = {name: tuple(value[name]) for name in ("schemes", "dtypes")}
    return KernelSpec(**{**value, **tuples, "limits": limits})
