"""What `autotune recover` did to a finished run, as the run's report says it: read from files, nothing is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autotune.errors import InputError
from autotune.plan import Plan
from autotune.recover.prices import TABLE, Prices
from autotune.recover.run import FOLDER, SCHEMA_VERSION
from autotune.report.write import write_report
from autotune.store import read_json

_COLUMN = ("recovered_nats", "recovered_low_nats", "recovered_high_nats")


def with_recovery(run: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report with the recovery of its run, null where there is none of the same loss table, and with the loss
    table's recovered column."""
    return report | {"recovered": _recovered(run), "groups": _priced(run, report["groups"])}


def redraw(run: Path) -> None:
    """The run's report again, where it has one; a run that met no budget has none."""
    if (run / "report.json").is_file():
        write_report(run, with_recovery(run, read_json(run / "report.json", "report")))


def _recovered(run: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = read_json(run / FOLDER / "recovery.json", "recover")
        tables = [Plan.load(folder / "plan.json").provenance.loss_table for folder in (run, run / FOLDER)]
    except InputError:  # none, or none that can be used
        return None
    if tables[0] != tables[1] or value.get("schema_version") != SCHEMA_VERSION:  # of before, or of another version
        return None
    keys = ("configuration", "seconds", "search_documents", "certificate", "speedup", "noisy", "searched", "promise")
    return {key: value.get(key) for key in keys} | {"tokens": value["recovery"]["tokens"]}


def _priced(run: Path, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Options with the recovered column; null where a row is not of the loss that the option has."""
    file = run / TABLE
    rows = Prices.from_csv(file.read_text(encoding="utf-8")).rows if file.is_file() else ()
    known = {(row.group, row.scheme, row.loss_nats): row for row in rows}

    def priced(group: dict[str, Any], option: dict[str, Any]) -> dict[str, Any]:
        row = known.get((group["name"], option["scheme"], option["loss_nats"]))
        return option | {name: None if row is None else getattr(row, name) for name in _COLUMN}

    return [group | {"options": [priced(group, option) for option in group["options"]]} for group in groups]
