"""The report's rows on layer groups: what each got, what it could have had, how close its kernel is to the roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autotune.decide import of_layers
from autotune.kernels.spec import KERNELS
from autotune.planning import expert_notes, why
from autotune.profilers import roofline
from autotune.profilers.jobs import Job, needed
from autotune.profilers.memory import packed_weight_bytes
from autotune.profilers.table import shape_of
from autotune.search.problem import GroupOptions, Option
from autotune.search_space.groups import LayerGroup
from autotune.search_space.schemes import scheme

if TYPE_CHECKING:
    from autotune.result import Result


def group_rows(result: Result) -> list[dict[str, Any]]:
    assert result.problem and result.chosen
    pairs = of_layers(result.problem, result.chosen.candidate.genotype)
    session = result.session
    status: Any = "runs" if session.local else "estimated"
    jobs = needed(session.spec, result.space, session.target, session.workload, KERNELS, status)
    return [
        _group(result, group, item, option, jobs)
        for group, (item, option) in zip(result.session.spec.groups, pairs, strict=True)
    ]


def _group(
    result: Result, group: LayerGroup, item: GroupOptions, chosen: Option, jobs: Sequence[Job]
) -> dict[str, Any]:
    dense = item.options[0]
    return {
        "name": group.name,
        "role": group.role,
        "layer": group.layer,
        "scheme": chosen.scheme,
        "kernel": chosen.kernel,
        "why": why(item, chosen, result.space),
        "compression": _compression(result, group.name, chosen.scheme),
        "latency_us": chosen.latency_us,
        "dense_latency_us": dense.latency_us,
        "loss_nats": chosen.loss_nats if result.losses else None,
        "weight_bytes": chosen.weight_bytes,
        "dense_bytes": dense.weight_bytes,
        "weights": group.weights,
        "in_features": group.in_features,
        "out_features": group.parts[0].out_features,
        "experts": _experts(result, group, chosen.scheme),
        "options": _options(result, group, item, chosen),
        "roofline": _roofline(result, group, {dense.scheme, chosen.scheme}, jobs),
    }


def _experts(result: Result, group: LayerGroup, name: str) -> dict[str, Any] | None:
    """Of a mixture: how many there are, how many a token takes, how many calibration hardly reached."""
    if group.experts == 1:
        return None
    notes = expert_notes(result, group.name, name)
    return {"count": group.experts, "per_token": group.experts_per_token, "hardly_reached": len(notes)}


def _compression(result: Result, group: str, name: str) -> dict[str, Any] | None:
    """Which method made the weights that were chosen, and the squared relative error it left in the group's output."""
    if result.database is None or scheme(name).is_dense:
        return None
    assert result.chosen is not None
    method, error = result.chosen.weights(result.database, {group: name}).origin(group, name)
    return {"method": method, "layer_error": error}


def _options(result: Result, group: LayerGroup, item: GroupOptions, chosen: Option) -> list[dict[str, Any]]:
    survivors = {option.scheme: option for option in item.options}
    intervals = {(row.group, row.scheme): row for row in result.losses.rows} if result.losses else {}
    rows = []
    for entry in (entry for entry in result.space.entries if entry.group == group.name):
        option, loss = survivors.get(entry.scheme), intervals.get((group.name, entry.scheme))
        rows.append(
            {
                "scheme": entry.scheme,
                "status": entry.legality.status,
                "reason": entry.legality.reason,
                "latency_us": option.latency_us if option else None,
                "loss_nats": loss.loss_nats if loss else 0.0 if option and result.losses else None,
                "low_nats": loss.low_nats if loss else None,
                "high_nats": loss.high_nats if loss else None,
                "weight_bytes": option.weight_bytes if option else None,
                "chosen": entry.scheme == chosen.scheme,
            }
        )
    return rows


def _roofline(result: Result, group: LayerGroup, schemes: set[str], jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Isolated kernel times against the least time the ceilings allow."""
    session = result.session
    rows = []
    for phase in session.workload.phases:
        for job in jobs:
            if job.shape != shape_of(group) or job.rows != phase.rows(group) or job.scheme not in schemes:
                continue
            choice = result.table.best(group, job.scheme, session.workload)
            row = next((r for r in result.table.of(group, job.scheme, phase) if r.kernel == job.kernel.name), None)
            if choice is None or choice.kernel != job.kernel.name or row is None or row.median_us is None:
                continue
            rows.append(_roof_row(result, phase.name, job, row.median_us))
    return rows


def _roof_row(result: Result, phase: str, job: Job, measured_us: float) -> dict[str, Any]:
    ceilings = result.session.target.ceilings
    moved = packed_weight_bytes(job.scheme, job.shape, job.dtype) + roofline.activation_bytes(job)
    working_set = math.inf if job.resident_bytes is None else job.resident_bytes
    memory_us = moved / (ceilings.bandwidth(working_set) * 1e3)
    compute_us = job.operations / (roofline.rate(job.kernel, ceilings) * 1e6)
    bounds = {"memory": memory_us, "compute": compute_us, "launch": ceilings.launch_us}
    return {
        "phase": phase,
        "rows": job.rows,
        "scheme": job.scheme,
        "kernel": job.kernel.name,
        "measured_us": measured_us,
        "floor_us": roofline.least_us(job, ceilings),
        "bound": max(bounds, key=lambda name: bounds[name]),
        "peak_share": compute_us / measured_us,
        "ops": float(job.operations),
        "bytes": float(moved),
    }
