"""Schemes that measuring has ruled out, each with the reason people will read.

A scheme leaves when none of its kernels could be timed, or when another of the group is faster and cannot be less
accurate: it keeps at least as many weight bits and activation bits and no more zeros. The dense scheme is such another
for all ("kept dense is faster here"). Faster means that the 95% intervals do not touch; for rows that are noisy or
only estimated it takes a wider gap. Where memory is budgeted, the other must not be larger either.
"""

from __future__ import annotations

from collections.abc import Iterable

from autotune.profilers.table import Choice, LatencyTable
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.schemes import Scheme, Sparsity, scheme
from autotune.search_space.space import SearchSpace
from autotune.search_space.workload import Workload

ESTIMATE_ERROR = 0.15  # median error of published kernel-level latency models
_ORDER: tuple[Sparsity, ...] = ("dense", "50%", "4:8", "2:4")  # masks of a pattern are masks of those before it
NOISY_ERROR = 0.5  # an interval from a disturbed run may miss the truth by far


def prune(
    spec: ModelSpec, space: SearchSpace, table: LatencyTable, workload: Workload, keep_bytes: bool
) -> dict[tuple[str, str], str]:
    """(group, scheme) -> why it leaves; for `SearchSpace.without`. The dense scheme never does.

    Args:
        keep_bytes: memory is budgeted, so a slower scheme stays if it is smaller.
    """
    dropped: dict[tuple[str, str], str] = {}
    for group in spec.groups:
        names = [entry.scheme for entry in space.schemes(group.name)]
        timed = {name: choice for name in names if (choice := table.best(group, name, workload)) is not None}
        for name in names:
            if name == space.dense:
                continue
            if name not in timed:
                dropped[group.name, name] = _unmeasured(group, name, table, workload)
            elif reason := _dominated(timed[name], timed.values(), space.dense, keep_bytes):
                dropped[group.name, name] = reason
    return dropped


def at_least_as_accurate(a: Scheme, b: Scheme) -> bool:
    """By construction: as many bits for weights and activations, scales no coarser, no more zeros."""
    if _ORDER.index(a.sparsity) > _ORDER.index(b.sparsity):
        return False
    return _weight_bits(a, b) and _activation_bits(a) >= _activation_bits(b) and _same_activations(a, b)


def _weight_bits(a: Scheme, b: Scheme) -> bool:
    if a.weight.bits != b.weight.bits:
        return a.weight.bits > b.weight.bits
    whole = float("inf")  # one scale for all inputs of a channel, or for all channels
    finer = (a.weight.group_size or whole) <= (b.weight.group_size or whole)
    finer = finer and (a.weight.rows or whole) <= (b.weight.rows or whole)
    alike = (a.weight.kind, a.weight.symmetric, a.weight.scale) == (b.weight.kind, b.weight.symmetric, b.weight.scale)
    return finer and alike


def _same_activations(a: Scheme, b: Scheme) -> bool:
    """Formats of equal width are not ordered: int8 and fp8 lose different things."""
    if a.activation is None or b.activation is None or a.activation.bits != b.activation.bits:
        return True
    finer = (a.activation.group_size or float("inf")) <= (b.activation.group_size or float("inf"))
    return finer and a.activation.kind == b.activation.kind


def _activation_bits(item: Scheme) -> float:
    return item.activation.bits if item.activation else 16


def _unmeasured(group: LayerGroup, name: str, table: LatencyTable, workload: Workload) -> str:
    reasons = table.failures(group, name, workload)
    return f"could not be timed: {'; '.join(reasons)}" if reasons else "no kernel of it was timed"


def _dominated(choice: Choice, others: Iterable[Choice], dense: str, keep_bytes: bool) -> str:
    """The reason why the fastest of the others makes this one pointless; empty when none does."""
    better = [
        other
        for other in others
        if other.scheme != choice.scheme
        and at_least_as_accurate(scheme(other.scheme), scheme(choice.scheme))
        and _apart(other, choice)
        and (not keep_bytes or other.packed_bytes <= choice.packed_bytes)
    ]
    if not better:
        return ""
    first = min(better, key=lambda other: (other.scheme != dense, other.latency_us))
    numbers = f"{_time(first)} against {_time(choice)} a request"
    how = "" if choice.status == "measured" == first.status else " (estimated)"
    if first.scheme == dense:
        return f"kept dense is faster here: {numbers}{how}"
    return f"{first.scheme} is faster here and at least as accurate: {numbers}{how}"


def _apart(faster: Choice, slower: Choice) -> bool:
    if "estimated" in (faster.status, slower.status):
        return faster.latency_us * (1 + ESTIMATE_ERROR) < slower.latency_us
    margin = NOISY_ERROR if faster.noisy or slower.noisy else 0.0
    return faster.high_us * (1 + margin) < slower.low_us


def _time(choice: Choice) -> str:
    return f"{choice.latency_us / 1e3:.2f} ms" if choice.latency_us >= 1e4 else f"{choice.latency_us:.1f} us"
