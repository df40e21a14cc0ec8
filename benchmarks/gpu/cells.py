"""Cells of a table: one (shape, rows, kernel, scheme) each, timed by the profiler's own worker, and rows for a CSV.

A kernel that a shape or the device does not admit is a row with that reason, and so is one that fails or is not reached
in time. Speed-ups are over the fastest dense kernel on the same shape and rows, timed in the same interleaved run; the
interval is that of the quotient of two independent medians, so it is too wide rather than too narrow.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from autotune.errors import DeviceError
from autotune.kernels.spec import KERNELS
from autotune.profilers.jobs import Job
from autotune.profilers.latency import time_jobs
from autotune.profilers.roofline import rate
from autotune.profilers.table import LatencyRow
from autotune.profilers.timer import Protocol
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.groups import LayerGroup, Linear
from autotune.search_space.rules import legality
from autotune.search_space.schemes import scheme
from autotune.targets.target import Target

PROTOCOL = Protocol(rounds=20, max_rounds=40, warm_s=0.1, max_candidate_s=1.0, max_run_s=4.0)
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    shape: str
    outputs: int
    inputs: int
    rows: int
    kernel: KernelSpec
    scheme: str

    def job(self, dtype: str) -> Job:
        return Job(self.kernel, self.scheme, (self.outputs,), self.inputs, False, dtype, self.rows, None)

    def row(self, table: str, **more: Any) -> Row:
        empty = dict.fromkeys(("us", "low_us", "high_us", "speedup", "speedup_low", "speedup_high"))
        empty |= dict.fromkeys(("gb_per_s", "tera_ops", "peak_share", "packed_bytes"))
        return {
            "table": table,
            "shape": self.shape,
            "n": self.outputs,
            "k": self.inputs,
            "m": self.rows,
            "kernel": self.kernel.name,
            "scheme": self.scheme,
            "status": "failed",
            "reason": "",
            "noisy": False,
            **empty,
            **more,
        }


def cells(
    shapes: dict[str, tuple[int, int]],
    rows: Iterable[int],
    target: Target,
    patterns: Iterable[str] = ("*",),
    dtype: str = "bf16",
) -> tuple[list[Cell], dict[Cell, str]]:
    """What can be run, and why the rest cannot; dense kernels are always among them, as the baseline."""
    fits: list[Cell] = []
    misfits: dict[Cell, str] = {}
    wanted = tuple(patterns)
    for name, (outputs, inputs) in shapes.items():
        group = LayerGroup(name, "linear", None, (Linear(name, name, outputs, inputs, False),))
        for spec in (spec for spec in KERNELS if spec.device == target.device and dtype in spec.dtypes):
            for item in spec.schemes:
                if item != dtype and not any(fnmatch(f"{spec.name} {item}", f"{pattern}*") for pattern in wanted):
                    continue
                answer = legality(scheme(item), group, dtype, target, [spec], local=True)
                for count in rows:
                    cell = Cell(name, outputs, inputs, count, spec, item)
                    if answer.usable:
                        fits.append(cell)
                    else:
                        misfits[cell] = answer.reason
    return fits, misfits


def timed(
    table: str, fits: list[Cell], misfits: dict[Cell, str], target: Target, deadline_s: float, dtype: str = "bf16"
) -> Iterator[tuple[Row, LatencyRow | None]]:
    """Every cell's row, as it comes; those not reached by `deadline_s` (of `time.monotonic`) at the end."""
    waiting, ended = {cell.job(dtype): cell for cell in fits}, "no time left"
    running = time_jobs(list(waiting), target, PROTOCOL)
    try:
        for job, result in running:
            yield row_of(table, waiting.pop(job), result, target), result
            if time.monotonic() > deadline_s:
                break
    except DeviceError as error:  # of the measuring process itself: what it measured stays
        ended = f"{error.message} {error.hint}"[:300]
    finally:
        running.close()  # type: ignore[attr-defined]
    for cell in waiting.values():
        yield cell.row(table, status="not reached", reason=ended), None
    for cell, reason in misfits.items():
        yield cell.row(table, status="not legal", reason=reason), None


def row_of(table: str, cell: Cell, result: LatencyRow, target: Target) -> Row:
    if result.median_us is None or result.low_us is None or result.high_us is None:
        return cell.row(table, status=result.status, reason=result.reason)
    job = cell.job(result.dtype)
    done = job.operations / result.median_us / 1e6
    known = cell.kernel.compute_format in target.ceilings.tera_ops
    return cell.row(
        table,
        status=result.status,
        reason=result.reason,
        noisy=result.noisy,
        us=result.median_us,
        low_us=result.low_us,
        high_us=result.high_us,
        gb_per_s=result.packed_bytes / cell.kernel.copies / result.median_us / 1e3,
        tera_ops=done,
        peak_share=done / rate(cell.kernel, target.ceilings) if known else None,
        packed_bytes=result.packed_bytes,
    )


def with_speedups(rows: list[Row], dense: str = "bf16") -> list[Row]:
    """Rows with their speed-up over the fastest dense kernel of the same shape and rows."""
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row["shape"], row["m"])
        if row["scheme"] == dense and row["us"] and (key not in best or row["us"] < best[key]["us"]):
            best[key] = row
    return [_with_speedup(row, best.get((row["shape"], row["m"]))) for row in rows]


def _with_speedup(row: Row, base: Row | None) -> Row:
    if base is None or not row["us"]:
        return row
    return row | {
        "speedup": base["us"] / row["us"],
        "speedup_low": base["low_us"] / row["high_us"],
        "speedup_high": base["high_us"] / row["low_us"],
    }
