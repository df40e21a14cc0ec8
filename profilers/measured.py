"""Latency tables measured elsewhere: shipped in `targets/measured/`, or imported by the user into `tables/`.

They stand in for the roofline where a search's target is not this machine: a row takes an estimate's place when kernel,
scheme, shape, dtype, rows and residency are the same and the device is. Of several the later file's counts, imported
after shipped. A measured row stays marked `measured`, with the file named as its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from autotune.errors import InputError
from autotune.profilers.table import LatencyRow, LatencyTable
from autotune.store import user_folder, write_bytes
from autotune.targets import detect
from autotune.targets.target import Target


def files() -> tuple[Path, ...]:
    """Shipped tables, then those the user imported, each by name."""
    shipped = Path(str(resources.files("autotune.targets"))) / "measured"
    folders = (shipped, user_folder() / "tables")
    return tuple(path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.csv")))


def import_table(source: Path, folder: Path | None = None) -> Path:
    """Keep a table for later searches; where it is now.

    Raises:
        InputError: `latency.missing`, `latency.syntax`, or `latency.estimated` when nothing in it was measured.
    """
    table = LatencyTable.from_csv(source)
    if not any(row.status == "measured" for row in table.rows):
        raise InputError("latency.estimated", f"no row of {source} was measured.", "Measure on the device itself.")
    goal = (folder or user_folder() / "tables") / f"{table.target}-{table.fingerprint}.csv"
    goal.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(goal, source.read_bytes())
    return goal


def fill(table: LatencyTable, target: Target, paths: Sequence[Path] | None = None) -> LatencyTable:
    """The table with estimates replaced by what was measured on such a device."""
    names = {target.name, detect.cuda_name(target.model)}
    found: dict[tuple[Any, ...], LatencyRow] = {}
    for path in files() if paths is None else paths:
        other = LatencyTable.from_csv(path)
        if other.target in names:
            timed = (row for row in other.rows if row.status == "measured")
            found |= {_identity(row): replace(row, reason=f"measured elsewhere: {path.name}") for row in timed}
    rows = tuple(found.get(_identity(row), row) if row.status == "estimated" else row for row in table.rows)
    return replace(table, rows=rows)


@dataclass(frozen=True)
class Difference:
    """One (kernel, scheme, shape, rows) in two tables. `ratio`: second over first; `apart`: intervals do not touch."""

    row: LatencyRow
    first_us: float
    second_us: float
    ratio: float
    apart: bool


def diff(first: LatencyTable, second: LatencyTable) -> tuple[Difference, ...]:
    """What both tables timed, the largest change first."""
    others = {_identity(row): row for row in second.rows}
    pairs = ((row, others.get(_identity(row))) for row in first.rows)
    found = [item for row, other in pairs if other is not None and (item := _difference(row, other)) is not None]
    return tuple(sorted(found, key=lambda item: -max(item.ratio, 1 / item.ratio)))


def typical_ratio(differences: Iterable[Difference]) -> float:
    """The geometric mean of second over first; 1 for none."""
    ratios = [item.ratio for item in differences]
    return geometric_mean(ratios) if ratios else 1.0


def _difference(row: LatencyRow, other: LatencyRow) -> Difference | None:
    if not (row.median_us and row.low_us and row.high_us and other.median_us and other.low_us and other.high_us):
        return None
    apart = row.high_us < other.low_us or other.high_us < row.low_us
    return Difference(row, row.median_us, other.median_us, other.median_us / row.median_us, apart)


def _identity(row: LatencyRow) -> tuple[Any, ...]:
    return (row.kernel, row.scheme, *row.shape, row.dtype, row.rows, row.resident_bytes)
