"""Removes what can be made again: a run's database and memo, or the measurements shared by all runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from autotune.errors import InputError, UsageError
from autotune.store import locked, user_folder

_RUN_PARTS = (
    "database",
    "evaluations.sqlite",
    "evaluations.sqlite-wal",
    "evaluations.sqlite-shm",
    "recovered/checkpoint",
    "recovered/checkpoint-short",
    "recovered/weights",
)


def clean(run: Path | None, measurements: bool) -> list[tuple[Path, int]]:
    """(path, bytes) of everything removed. Plans, reports and compressed models stay.

    Raises:
        UsageError: `clean.nothing` when neither is named.
        InputError: `config.missing` when the folder is not a run's.
        BusyError: `store.locked` when the run is going on.
    """
    if run is None and not measurements:
        raise UsageError("clean.nothing", "nothing was named.", "Give a run folder, or --measurements.")
    removed = []
    if run is not None:
        if not (run / "config.yaml").is_file():
            raise InputError(
                "config.missing", f"{run} is not the folder of a run.", "Give one made by `autotune tune`."
            )
        with locked(run):
            removed += [_remove(run / name) for name in _RUN_PARTS if (run / name).exists()]
    if measurements:
        removed += [_remove(path) for path in sorted(user_folder().glob("measurements.sqlite*"))]
    return removed


def _remove(path: Path) -> tuple[Path, int]:
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        shutil.rmtree(path)
    else:
        size = path.stat().st_size
        path.unlink()
    return path, size
