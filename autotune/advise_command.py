"""`autotune advise`: what is the bottleneck, and which technique shifts it? Printed from `advise.Advice`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from autotune.advise import Advice, PhaseAdvice, SchemeAdvice

console = Console(highlight=False)
_BINDS = {
    "weights": ("reading weights", "fewer bits a weight, or larger batches, which share the reading"),
    "arithmetic": ("arithmetic", "activations of 8 bits, or 2:4 where the device multiplies it faster"),
    "cache": ("reading the KV cache", "shorter contexts or fewer sequences; no scheme of the weights does"),
    "launches": ("launches", "CUDA graphs or larger batches; no scheme of the weights does"),
}


def advise(
    model: Annotated[str, typer.Argument(help="A model folder, a config.json, or org/name@revision: no weights.")],
    target: Annotated[str, typer.Option(help="auto (this machine), a profile's name, or a YAML file.")] = "auto",
    workload: Annotated[str, typer.Option(help="chat, decode, prefill, or batch,prompt,generated.")] = "chat",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; by default what the config says.")] = None,
    schemes: Annotated[str | None, typer.Option(help="Comma-separated schemes; `default`: those searched.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write all of it to this file.")] = None,
) -> None:
    """What is the bottleneck, and which technique shifts it? Bounds in seconds, without weights."""
    from autotune.advise import advise as compute
    from autotune.store import write_json

    names = [name.strip() for name in schemes.split(",")] if schemes else None
    advice = compute(model, target, workload, dtype, names)
    print_advice(advice, console)
    if json is not None:
        write_json(json, advice.to_json())


def print_advice(advice: Advice, console: Console) -> None:
    console.print(f"{advice.model}, on {advice.target} ({advice.device}), ceilings {advice.ceilings}")
    fits = "fit" if advice.dense_fits else "do not fit"
    console.print(
        f"workload {advice.workload}; dense weights of {_size(advice.dense_bytes)} and the KV cache {fits} in"
    )
    console.print(f"{_size(advice.memory_bytes)} of memory\n")
    console.print(_phase_table(advice.phases))
    for line in _sentences(advice):
        console.print(line)
    console.print()
    console.print(_scheme_table(advice))
    for note in advice.notes:
        console.print(f"note: {note}")


def _phase_table(phases: tuple[PhaseAdvice, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("dense, least time of a pass")
    for name in ("weights", "arithmetic", "KV cache", "launches", "in all", "layers measured"):
        table.add_column(name, justify="right")
    for phase in phases:
        label = f"{phase.name}, {phase.tokens} tokens, {phase.context} positions"
        parts = [_time(part) for part in phase.parts_us.values()]
        table.add_row(
            label, *parts, _time(phase.least_us), "" if phase.measured_us is None else _time(phase.measured_us)
        )
    return table


def _sentences(advice: Advice) -> Iterator[str]:
    """For each phase what binds and what shifts it."""
    for phase in advice.phases:
        what, how = _BINDS[phase.binds]
        share = (phase.parts_us[phase.binds] or 0.0) / phase.least_us if phase.least_us else 0.0
        line = f"{phase.name} is bound by {what} ({share:.0%}): {how}"
        best = max(advice.schemes, key=lambda item: _gain(item, phase.name), default=None)
        if best is not None and _gain(best, phase.name) > 1.005:
            line += f". At most {_gain(best, phase.name):.2f}x by {best.name}"
        yield line
    if advice.cache_bytes:
        sizes = ", ".join(f"{_size(size)} at {context:,}" for context, size in advice.cache_bytes.items())
        yield f"KV cache: {sizes} positions"


def _gain(item: SchemeAdvice, phase: str) -> float:
    """Of a scheme that a kernel of ours runs and that fits; 0 for others."""
    return (item.gains or {}).get(phase, 0.0) if item.kernels and item.fits else 0.0


def _scheme_table(advice: Advice) -> Table:
    phases = list(dict.fromkeys(phase.name for phase in advice.phases))
    table = Table(box=None, pad_edge=False)
    table.add_column("scheme, gain at most")
    for name in (*phases, "workload", "weights", "fits"):
        table.add_column(name, justify="right")
    for name in ("from", "loaded by"):
        table.add_column(name)
    for item in advice.schemes:
        gains = [f"{item.gains[name]:.2f}x" if item.gains else "?" for name in (*phases, "workload")]
        everywhere = "" if item.groups == advice.groups else f" ({item.groups} of {advice.groups} groups)"
        origin = item.source if item.kernels else f"no kernel here: {item.reason}"
        table.add_row(
            item.name + everywhere, *gains, _size(item.weight_bytes), "yes" if item.fits else "no", origin,
            ", ".join(item.runtimes) or "-",
        )  # fmt: skip
    return table


def _time(us: float | None) -> str:
    if us is None:
        return "unknown"
    return f"{us / 1e3:.2f} ms" if us >= 100 else f"{us:.1f} us"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
