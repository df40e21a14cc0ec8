"""What a run would do, before anything is measured: groups, legal schemes, and expected minutes, memory and disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autotune import tables
from autotune.config import RunConfig
from autotune.profilers.memory import weight_bytes
from autotune.run import RunFolder, silent
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.schemes import scheme
from autotune.search_space.space import Entry, SearchSpace
from autotune.session import Session, open_session

_FORWARD_SHARE = 0.4  # of the peak rate that a whole forward pass reaches; measured 0.3 to 0.6 on small models
_SECONDS_PER_ROW = 0.15  # one kernel latency: gate, warm-up, 20 rounds


def print_dry_run(config: RunConfig, console: Console) -> None:
    """Print the plan of work; nothing is written but the probe of this machine."""
    session = open_session(RunFolder(Path(config.out)), config, silent)
    space = tables.build_space(session)
    spec = session.spec
    console.print(f"{spec.name}: {spec.architecture}, {spec.dtype}, {len(spec.groups)} layer groups")
    console.print(f"target {session.target.name} ({session.target.model}), workload {session.workload}")
    table = Table("groups", "shape", "schemes", "not legal, because", box=None, pad_edge=False)
    for groups in _alike(spec):
        entries = [entry for entry in space.entries if entry.group == groups[0].name]
        table.add_row(*_row(groups, entries))
    console.print(table)
    minutes, memory, disk = _expected(session, space)
    console.print(f"about {minutes:.0f} min, {memory / 2**30:.1f} GiB of memory, {disk / 2**20:.0f} MiB of disk")


def _alike(spec: ModelSpec) -> list[list[LayerGroup]]:
    """Groups of equal role and shape, together."""
    alike: dict[tuple[object, ...], list[LayerGroup]] = {}
    for group in spec.groups:
        alike.setdefault((group.role, group.out_features, group.in_features), []).append(group)
    return list(alike.values())


def _row(groups: Sequence[LayerGroup], entries: Sequence[Entry]) -> tuple[str, str, str, str]:
    first = groups[0]
    legal = ", ".join(f"{e.scheme} ({e.legality.status})" for e in entries if e.legality.usable)
    illegal = "; ".join(f"{e.scheme}: {e.legality.reason}" for e in entries if not e.legality.usable)
    return f"{len(groups)} x {first.role}", f"{first.out_features} x {first.in_features}", legal, illegal


def _expected(session: Session, space: SearchSpace) -> tuple[float, float, float]:
    """(minutes, bytes of memory, bytes of disk), rough: arithmetic over the machine's measured ceilings."""
    spec, config = session.spec, session.config
    parameters = sum(group.weights for group in spec.groups)
    wanted = [e for e in space.usable() if not scheme(e.scheme).is_dense]
    disk = sum(weight_bytes(scheme(e.scheme), spec.group(e.group), spec.dtype) for e in wanted)
    rows = len({(e.scheme, g.out_features, g.in_features) for e in space.usable() for g in [spec.group(e.group)]})
    seconds = 60.0 + rows * 2 * _SECONDS_PER_ROW
    memory = 2 * spec.dense_bytes + disk
    if not config.latency_only:
        tokens = config.calibration_tokens + config.score_tokens * (2 + 2 * config.score_draws)
        tokens += config.search_tokens * (config.trials + 15) + config.certify_tokens * (config.finalists + 1)
        rate = session.target.ceilings.tera_ops.get("fp32", 0.1) * 1e12 * _FORWARD_SHARE
        seconds += 2 * parameters * tokens / rate
        memory += 8 * parameters
    return seconds / 60, memory, disk
