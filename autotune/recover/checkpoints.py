"""Where a recovery stands, on disk: safetensors and one line of JSON, replaced as a whole, never a pickle.

A checkpoint belongs to the inputs whose hash it carries; one of other inputs is not looked at. Training is a function
of its inputs and its state, so a killed recovery that resumes writes the bytes of one that was not (on one machine,
with as many threads).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from autotune.errors import DeviceError
from autotune.store import new_folder

_STATE, _BEST = "state.safetensors", "best.safetensors"


@dataclass(frozen=True)
class Mark:
    """A point of the curve. `check_nats`: on the sequences set aside; `train_nats`: mean over steps since the last,
    half of it at temperature 2."""

    steps: int
    tokens: int
    seconds: float  # of training alone, over all sessions
    check_nats: float
    train_nats: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """`best`: masters and scales at the mark of least loss; `marks`: the curve so far."""

    steps: int
    seconds: float
    marks: tuple[Mark, ...]
    state: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]


def save(folder: Path, key: str, checkpoint: Checkpoint) -> None:
    """Raises DeviceError `store.no_space`, `store.write`; what was saved before is then still there."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {"key": key, "steps": checkpoint.steps, "seconds": checkpoint.seconds}
    text = json.dumps(about | {"marks": [asdict(mark) for mark in checkpoint.marks]})
    try:
        with new_folder(folder) as temporary:
            save_file(checkpoint.state, temporary / _STATE, metadata={"about": text})
            save_file(checkpoint.best, temporary / _BEST)
    except SafetensorError as error:  # how the library reports that a write failed
        needed = sum(tensor.nbytes for part in (checkpoint.state, checkpoint.best) for tensor in part.values())
        hint = f"It needs {needed:,} bytes; free them and start again."
        raise DeviceError("store.no_space", f"{folder} could not be written: {error}.", hint) from error


def load(folder: Path, key: str) -> Checkpoint | None:
    """The checkpoint of these inputs, or None: there is none, it is of others, or it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / _STATE, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            if about.get("key") != key:
                return None
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        with safe_open(folder / _BEST, framework="pt") as file:
            best = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError):
        return None
    marks = tuple(Mark(**mark) for mark in about["marks"])
    return Checkpoint(about["steps"], about["seconds"], marks, state, best)
