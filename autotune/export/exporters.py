"""The table of exporters: which tools a plan can be handed to, and what an exporter's file must hold.

An exporter is one file with two functions, `write` and `read`. Add one: write the file, add one line to the table
below; the conformance suite in `tests/conformance/` then tests it. What the tool cannot represent exactly is refused
with `export.unsupported` before anything is written; nothing is converted silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from autotune.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Exporter:
    """`consumers`: the tools that load what it writes, for people."""

    name: str
    module: str
    consumers: str


@dataclass(frozen=True)
class ExportReport:
    """What was written; also stored beside it as `export_report.json`."""

    exporter: str
    folder: Path
    plan_sha256: str
    bytes: int  # of the weight files
    schemes: dict[str, str]  # group -> scheme, dense groups included
    notes: tuple[str, ...]  # where the result differs from what one might expect, one sentence each


class ExporterModule(Protocol):
    def write(self, folder: Path, out: Path, source: Path | None = None, force: bool = False) -> ExportReport:
        """Write a saved model in the tool's format to `out`, complete or not at all.

        Args:
            folder: a run folder, or the model folder in it.
            source: the original model, for its config and tokenizer; default: the one the run names, or its copies.
            force: replace an existing `out`.

        Raises:
            InputError: `export.unsupported`, `export.exists`, `export.weights`, `export.source`, `plan.*`.
        """
        ...

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """Module -> its weight (out, in), dequantized by the tool's own code; what `write` is tested with."""
        ...


EXPORTERS: tuple[Exporter, ...] = (
    Exporter("compressed-tensors", "autotune.export.compressed_tensors", "transformers, vLLM, SGLang"),
)


def exporter(name: str) -> Exporter:
    """Look an exporter up by name.

    Raises:
        InputError: `export.unknown`, with the closest known names.
    """
    for item in EXPORTERS:
        if item.name == name:
            return item
    raise InputError(
        "export.unknown", f"there is no exporter {name!r}.", did_you_mean(name, [e.name for e in EXPORTERS])
    )


def load(item: Exporter) -> ExporterModule:
    return cast(ExporterModule, import_module(item.module))
