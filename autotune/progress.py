"""Progress in the terminal: one bar a stage, with time left and the best found so far."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LABELS = {
    "open": "open model",
    "profile": "time kernels",
    "load": "load model",
    "smooth": "scale inputs",
    "compress": "compress",
    "score": "score losses",
    "pack": "pack kernels",
    "calibrate": "run uniform schemes",
    "search": "search",
    "recompress": "compress finalists",
    "verify": "run finalists",
    "certify": "certify",
    "gains": "train samples",
    "short": "train candidates",
    "recover": "recover",
    "save": "save model",
    "report": "report",
}


class Bars:
    """A `Reporter`. Without a terminal it prints one line when a stage begins."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Bars:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, value, trace)

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage not in self._bars:
            label = LABELS.get(stage, stage)
            self._bars[stage] = self._progress.add_task(label, total=total, note=note)
            if not self._console.is_terminal:
                self._console.print(f"{label} ...")
        task = self._bars[stage]
        self._progress.update(task, completed=done, total=max(total, 1), note=note)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        self._console.print(text)


@contextlib.contextmanager
def stoppable(console: Console, what: str) -> Iterator[tuple[Bars, threading.Event]]:
    """Bars, and an event that the first Ctrl-C sets, saying `what` is done about it; the second leaves at once."""
    stop = threading.Event()
    with Bars(console) as bars:

        def on_interrupt(*_: object) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            stop.set()
            bars.note(f"stopping: {what}; Ctrl-C again to leave at once")

        previous = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield bars, stop
        finally:
            signal.signal(signal.SIGINT, previous)
