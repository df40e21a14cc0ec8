"""A run folder: its settings, its artifacts, and stages that do nothing when their inputs have not changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from autotune.config import RunConfig
from autotune.store import Memo, digest, read_json, write_json

T = TypeVar("T")


class Reporter(Protocol):
    """Where progress goes; the command line draws it, tests ignore it."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """A reporter that says nothing."""


class RunFolder:
    """`stages.json` records, for every finished stage, the hash of what it depended on and how long it took."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def config(self) -> RunConfig:
        return RunConfig.load(self.path / "config.yaml")

    def memo(self) -> Memo:
        """Evaluations of the search, durable one by one."""
        return Memo(self.path / "evaluations.sqlite")

    def stage(
        self,
        name: str,
        inputs: Any,
        compute: Callable[[], T],
        save: Callable[[T], None],
        load: Callable[[], T],
        complete: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """Load the stage's artifact if it was made from equal inputs, else compute and save it.

        Args:
            complete: False for a result that was cut short; it is saved, but the next run computes it again.
        """
        key = digest(inputs)
        records = self.records()
        if records.get(name, {}).get("key") == key:
            return load()
        start = time.monotonic()
        value = compute()
        if name in records:  # killed while saving, the old key must not vouch for the new artifact
            self.record(name, "incomplete", 0.0)
        save(value)
        self.record(name, key if complete(value) else "incomplete", time.monotonic() - start)
        return value

    def json_stage(
        self,
        name: str,
        inputs: Any,
        compute: Callable[[], T],
        encode: Callable[[T], Any],
        decode: Callable[[Any], T],
        complete: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """A stage whose artifact is `<name>.json`."""
        file = self.path / f"{name}.json"

        def save(value: T) -> None:
            write_json(file, encode(value))

        return self.stage(name, inputs, compute, save, lambda: decode(read_json(file, "run")), complete)

    def records(self) -> dict[str, dict[str, Any]]:
        file = self.path / "stages.json"
        return read_json(file, "run") if file.is_file() else {}

    def record(self, name: str, key: str, seconds: float) -> None:
        write_json(self.path / "stages.json", self.records() | {name: {"key": key, "seconds": round(seconds, 3)}})

    def seconds(self) -> dict[str, float]:
        return {name: record["seconds"] for name, record in self.records().items()}
