"""Writes a report's folder: `report.json`, `pareto.png`, `layers.png`, `report.html`, each atomically.

`report.json` is removed first and written last, so that its presence means the other three belong to it.
"""

from __future__ import annotations

from pathlib import Path

from autotune import store
from autotune.report import page, pictures
from autotune.report.words import Report


def write_report(folder: Path, report: Report) -> None:
    """Raises DeviceError `store.no_space` or `store.write`; then the folder has no `report.json`."""
    drawn = {
        "pareto.png": pictures.pareto_png(report),
        "layers.png": pictures.layers_png(report),
        "report.html": page.render(report).encode(),
    }
    (folder / "report.json").unlink(missing_ok=True)
    for name, data in drawn.items():
        store.write_bytes(folder / name, data)
    store.write_json(folder / "report.json", report)
