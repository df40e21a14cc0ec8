"""Every kernel against the float64 reference, through the gate that guards profiling, in a child that may be lost.

After an error that leaves the device unusable the child is gone; the next one goes on after the cell to blame.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from cells import Cell, Row

from autotune.errors import AutotuneError, DeviceError
from autotune.profilers import environment
from autotune.profilers.isolate import stream
from autotune.profilers.jobs import kernel_from_json

STEP_S = 60.0
START_S = 180.0


def checked(
    fits: list[Cell], misfits: dict[Cell, str], deadline_s: float, threads: int, dtype: str = "bf16"
) -> Iterator[Row]:
    """A row a cell: "correct" with its errors, "failed" with the reason, or "not reached"."""
    waiting, ended = dict(enumerate(fits)), "no time left"
    while waiting and time.monotonic() < deadline_s:
        at: int | None = None
        children = stream(
            "correctness:check",
            {"cells": [{"id": number, **_to_json(cell)} for number, cell in waiting.items()], "dtype": dtype},
            STEP_S,
            environment.child_env(threads),
            START_S,
        )
        try:
            for event in children:
                if event["event"] == "start":
                    at = event["id"]
                    continue
                yield _row(waiting.pop(event["id"]), event)
                if time.monotonic() > deadline_s:
                    break
        except DeviceError as error:
            said = f"{error.message} {error.hint}"[:300]
            if at is None or at not in waiting:  # no cell is to blame, and none would fare better
                ended = said
                break
            yield waiting.pop(at).row("correctness", reason=said)
    for cell in waiting.values():
        yield cell.row("correctness", status="not reached", reason=ended)
    for cell, reason in misfits.items():
        yield cell.row("correctness", status="not legal", reason=reason)


def _row(cell: Cell, event: dict[str, Any]) -> Row:
    if event["event"] == "failed":
        return cell.row("correctness", reason=event["reason"])
    found = f"largest relative error {event['largest']:.2e}, RMS {event['rms']:.2e}"
    return cell.row("correctness", status="correct", reason=found, packed_bytes=event["packed_bytes"])


def _to_json(cell: Cell) -> dict[str, Any]:
    return asdict(cell)


def check(emit: Callable[[dict[str, Any]], None], cells: list[dict[str, Any]], dtype: str) -> None:
    """The child's side: one weight and one packed copy serve all numbers of rows of a shape."""
    import torch

    from autotune.kernels.checks import gate
    from autotune.kernels.reference import random_weight
    from autotune.kernels.spec import load
    from autotune.profilers.cuda_timer import is_sticky
    from autotune.profilers.worker import STICKY_EXIT

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    held: tuple[Any, Any, Any] = (None, None, None)
    with torch.inference_mode():
        for cell in cells:
            spec = kernel_from_json(cell["kernel"])
            emit({"event": "start", "id": cell["id"]})
            try:
                key = (spec.name, cell["scheme"], cell["outputs"], cell["inputs"])
                if held[0] != key:
                    generator = torch.Generator(spec.device).manual_seed(cell["id"])
                    weight = random_weight(cell["scheme"], cell["outputs"], cell["inputs"], kind, True, generator)
                    held = (key, weight, load(spec).pack(weight, kind))
                result = gate(spec, held[1], held[2], cell["rows"])
                errors = {"largest": result.max_relative_error, "rms": result.rms_error}
                emit({"event": "correct", "id": cell["id"], "packed_bytes": held[2].bytes, **errors})
            except Exception as error:  # whatever an untrusted kernel raises is its own failure
                text = error.message if isinstance(error, AutotuneError) else f"{type(error).__name__}: {error}"
                emit({"event": "failed", "id": cell["id"], "reason": " ".join(text.split())[:300]})
                if is_sticky(error):
                    os._exit(STICKY_EXIT)
