"""What every exporter writes beside the weights, and the folder it writes to: complete or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.errors import DeviceError, InputError
from autotune.export.exporters import ExportReport
from autotune.export.saved import SavedModel
from autotune.store import new_folder

if TYPE_CHECKING:
    import torch

# Tokenizer and generation files by name and by kind: never weights, never code.
_NAMES = ("generation_config", "token", "vocab", "merges", "special_tokens", "chat_template", "spiece", "preprocessor")
_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
_SKIPPED = {"model.safetensors.index.json"}


@contextlib.contextmanager
def output_folder(out: Path, force: bool, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well.

    Args:
        force: replace an existing `out`, unless one of `inputs` is in it.

    Raises:
        InputError: `export.exists`.
    """
    if out.exists() and any(path.resolve().is_relative_to(out.resolve()) for path in inputs):
        raise InputError("export.exists", f"{out} holds the model that is exported.", "Choose another folder.")
    if out.exists() and not force:
        raise InputError("export.exists", f"{out} exists.", "Choose another folder, or give --force to replace it.")
    for stale in out.parent.glob(f".{out.name}.*.tmp"):  # of an export that was killed
        if not stale.name.endswith(".old.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
    with new_folder(out) as temporary:
        yield temporary


def save_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raises DeviceError `store.no_space`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes it private
    except SafetensorError as error:  # how the library reports that a write failed
        hint = f"It needs {sum(tensor.nbytes for tensor in tensors.values()):,} bytes; free them and start again."
        raise DeviceError("store.no_space", f"the weights could not be written: {error}.", hint) from error


def write_side_files(saved: SavedModel, config: dict[str, Any], folder: Path) -> None:
    """config.json, the tokenizer's files and plan.json."""
    for file in sorted(saved.source.iterdir()):
        wanted = file.suffix in _SUFFIXES and any(name in file.name for name in _NAMES)
        if wanted and file.is_file() and file.name not in _SKIPPED:
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    saved.plan.save(folder / "plan.json")


def finish(report: ExportReport, folder: Path) -> ExportReport:
    """Count the bytes of the weight files and store the report."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    complete = replace(report, bytes=weights)
    stored = {key: value for key, value in asdict(complete).items() if key != "folder"}
    (folder / "export_report.json").write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return complete
