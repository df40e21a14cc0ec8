"""`autotune tables`: latency tables that go from one machine to another. A part of `cli`; same rules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Latency tables measured on other machines.")
console = Console(highlight=False)


@app.command("import")
def tables_import(table: Path) -> None:
    """Use a table measured elsewhere in searches for that device."""
    from autotune.profilers.measured import import_table

    console.print(f"kept as {import_table(table)}")


@app.command("export")
def tables_export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Argument(help="The CSV to write.")],
) -> None:
    """Copy a run's latency table, for another machine to import."""
    from autotune.profilers.table import LatencyTable

    LatencyTable.from_csv(run / "latency.csv").to_csv(out)
    console.print(f"{out}: copy it to the other machine and run `autotune tables import {out.name}`")


@app.command("diff")
def tables_diff(
    first: Path, second: Path, rows: Annotated[int, typer.Option(help="How many of the largest changes.")] = 20
) -> None:
    """What two tables timed differently, the largest change first."""
    from autotune.profilers import measured
    from autotune.profilers.table import LatencyTable

    found = measured.diff(LatencyTable.from_csv(first), LatencyTable.from_csv(second))
    for item in found[:rows]:
        row, mark = item.row, "" if item.apart else "  (intervals overlap)"
        shape = f"{'+'.join(map(str, row.members))} x {row.in_features}, {row.rows} rows"
        times = f"{item.first_us:.1f} -> {item.second_us:.1f} us"
        console.print(f"{row.kernel} {row.scheme} {shape}: {times}, {item.ratio:.2f}{mark}")
    console.print(f"{len(found)} in both, typically {measured.typical_ratio(found):.3f} of the first")
