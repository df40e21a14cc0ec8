"""Reads what a safetensors checkpoint claims to hold, and refuses one that lies, before a single tensor is allocated.

Headers are parsed here rather than by the library because every finding must name the shard and the tensor. Files of
other formats (pickle) are never opened.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from autotune.errors import InputError
from autotune.store import digest, file_digest, read_json

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
_BYTES |= {"U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    shard: str
    dtype: str  # safetensors' name: "BF16", "F32", ...
    shape: tuple[int, ...]

    @property
    def floating(self) -> bool:
        return self.dtype in _FLOATS

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    tensors: dict[str, TensorInfo]
    shards: tuple[str, ...]

    def hash(self) -> str:
        """sha256 over config.json and the sorted (tensor, dtype, shape, sha256 of its shard) list."""
        shards = {name: file_digest(self.folder / name) for name in self.shards}
        rows = [[name, t.dtype, list(t.shape), shards[t.shard]] for name, t in sorted(self.tensors.items())]
        config = (self.folder / "config.json").read_bytes()
        return digest([digest(config), rows])


def read(folder: Path) -> Checkpoint:
    """The tensors of all shards of a folder.

    Raises:
        InputError: `model.missing`, `model.pickle`, `model.path`, `model.corrupt`.
    """
    shards = _shards(folder)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in _header(folder / shard).items():
            if name in tensors:
                raise _corrupt(folder / shard, f"tensor {name!r} is also in {tensors[name].shard}")
            tensors[name] = info
    if not tensors:
        raise _corrupt(folder / shards[0], "it holds no tensors")
    return Checkpoint(folder, tensors, shards)


def _shards(folder: Path) -> tuple[str, ...]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        value = read_json(index, "model.corrupt")
        files = value.get("weight_map") if isinstance(value, dict) else None
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise _corrupt(index, "it has no weight_map of names")
        names = tuple(sorted(set(files.values())))
    elif (folder / "model.safetensors").is_file():
        names = ("model.safetensors",)
    else:
        raise _no_weights(folder)
    for name in names:
        _check_path(folder, name)
    return names


def _no_weights(folder: Path) -> InputError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        hint = (
            "Loading it could run code, so autotune never does. Convert it where you trust it: "
            "`model = AutoModelForCausalLM.from_pretrained(folder); model.save_pretrained(new_folder)`."
        )
        return InputError("model.pickle", f"{folder} holds only pickled weights ({pickles[0]}).", hint)
    hint = "Give a folder with model.safetensors (or its index), or a config.json with --latency-only."
    return InputError("model.missing", f"{folder} holds no safetensors weights.", hint)


def _check_path(folder: Path, name: str) -> None:
    path = folder / name
    # A hub cache links blobs by absolute link inside one tree, so the link's own place is what must not leave.
    if Path(name).is_absolute() or ".." in Path(name).parts or Path(name).name != name:
        raise InputError("model.path", f"the index of {folder} names {name!r}, which leaves the folder.")
    if not path.is_file():
        raise _corrupt(path, "the index names it, but it does not exist")
    if path.suffix in _PICKLES:
        raise InputError("model.pickle", f"the index of {folder} names {name!r}, a pickle.", "Convert it first.")


def _header(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _corrupt(path, f"its header claims {length} bytes, the file has {size}")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, value) for name, value in header.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise _corrupt(path, f"its header is not valid: {error}") from error
    _check_layout(path, header, size - 8 - length)
    return entries


def _entry(path: Path, name: str, value: object) -> TensorInfo:
    try:
        assert isinstance(value, dict)
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        sizes_ok = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        expected = math.prod(shape) * _BYTES[dtype]
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, f"tensor {name!r} has a malformed entry") from error
    if not sizes_ok or end - start != expected:
        raise _corrupt(path, f"tensor {name!r} is {dtype} {shape} but takes bytes {start} to {end}")
    return TensorInfo(path.name, dtype, tuple(shape))


def _check_layout(path: Path, header: dict[str, dict[str, list[int]]], data_bytes: int) -> None:
    position = 0
    for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = value["data_offsets"]
        if start != position:
            raise _corrupt(path, f"tensor {name!r} starts at byte {start}, expected {position}: a hole or an overlap")
        position = end
    if position != data_bytes:
        raise _corrupt(path, f"tensors need {position} bytes of data, the file has {data_bytes}")


def _corrupt(path: Path, what: str) -> InputError:
    return InputError("model.corrupt", f"{path}: {what}.", "Fetch or save the file again.")
