"""A checkpoint that lies is refused before a tensor is allocated; a pickle is never opened."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from autotune import checkpoint
from autotune.errors import InputError


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as error:
        checkpoint.read(folder)
    return error.value


def index(folder: Path, shards: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def test_what_a_file_holds(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    found = checkpoint.read(tmp_path)
    assert found.shards == ("model.safetensors",)
    assert found.tensors["a"] == checkpoint.TensorInfo("model.safetensors", "F32", (2, 3))
    assert (found.tensors["a"].bytes, found.tensors["b"].bytes) == (24, 10)


def test_shards_are_joined(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "2.safetensors")
    index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert {name: info.shard for name, info in checkpoint.read(tmp_path).tensors.items()} == {
        "a": "1.safetensors",
        "b": "2.safetensors",
    }


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        pytest.param({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", "4", id="truncated data"),
        pytest.param({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"x" * 9, "9", id="trailing data"),
        pytest.param({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"x" * 8, "'a'", id="shape lies"),
        pytest.param({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, b"x" * 8, "'a'", id="dtype lies"),
        pytest.param({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, b"", "'a'", id="negative"),
        pytest.param({"a": {"dtype": "F32", "shape": [0.5], "data_offsets": [0, 2]}}, b"xx", "'a'", id="fraction"),
        pytest.param({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"x", "'a'", id="truth value"),
        pytest.param({"a": {"dtype": "U8", "shape": "12", "data_offsets": [0, 2]}}, b"xx", "'a'", id="text as shape"),
        pytest.param({"a": 5}, b"", "'a'", id="number as entry"),
        pytest.param({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"", "'a'", id="one offset"),
        pytest.param(
            {
                "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            },
            b"x" * 6,
            "overlap",
            id="overlap",
        ),
        pytest.param({"a": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}, b"x" * 6, "hole", id="hole"),
        pytest.param([], b"", "header", id="list"),
        pytest.param(7, b"", "header", id="number"),
        pytest.param(b"{", b"", "header", id="not JSON"),
        pytest.param(b"\xff\xfe", b"", "header", id="not text"),
        pytest.param(b"[" * 100_000, b"", "header", id="deep"),
        pytest.param({}, b"", "no tensors", id="empty"),
    ],
)
def test_a_lying_header_is_refused_by_name(tmp_path, header, data, says):
    write(tmp_path / "model.safetensors", header, data)
    error = refusal(tmp_path)
    assert error.code == "model.corrupt"
    assert str(tmp_path / "model.safetensors") in error.message
    assert says in error.message
    assert error.hint


@pytest.mark.parametrize("size", [0, 3, 8])
@pytest.mark.parametrize("length", [9, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, size, length):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length)[:size])
    assert refusal(tmp_path).code == "model.corrupt"


def test_every_truncation_of_a_real_file_is_refused(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        assert refusal(tmp_path).code == "model.corrupt"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_header_raises_nothing_but_our_error(tmp_path, data):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5)}, tmp_path / "model.safetensors")
    whole = bytearray((tmp_path / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(bytes(whole))
    try:
        tensors = checkpoint.read(tmp_path).tensors
    except InputError as error:
        assert error.code == "model.corrupt"
    else:
        assert sum(info.bytes for info in tensors.values()) == 44


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a/../b"])
def test_a_shard_path_that_leaves_the_folder_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "out.safetensors")
    index(folder, {"a": name})
    error = refusal(folder)
    assert error.code == "model.path"
    assert repr(name) in error.message


def test_a_missing_shard_is_named(tmp_path):
    index(tmp_path, {"a": "gone.safetensors"})
    error = refusal(tmp_path)
    assert error.code == "model.corrupt"
    assert "gone.safetensors" in error.message


@pytest.mark.parametrize("value", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}])
def test_a_malformed_index_is_refused(tmp_path, value):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(value))
    assert refusal(tmp_path).code == "model.corrupt"


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    error = refusal(tmp_path)
    assert error.code == "model.corrupt"
    assert "'a'" in error.message


class Marker:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl"])
@pytest.mark.parametrize("form", ["pickle", "torch", "zip"])
def test_a_pickle_is_refused_and_never_opened(tmp_path, name, form):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    folder.mkdir()
    if form == "pickle":
        (folder / name).write_bytes(pickle.dumps(Marker(marker)))
    elif form == "torch":
        torch.save({"x": Marker(marker)}, folder / name)
    else:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Marker(marker)))
    error = refusal(folder)
    assert error.code == "model.pickle"
    assert name in error.message
    assert "save_pretrained" in error.hint
    assert not marker.exists()


def test_a_pickle_named_like_safetensors_is_refused_and_never_opened(tmp_path):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(pickle.dumps(Marker(marker)))
    assert refusal(folder).code == "model.corrupt"
    index(folder, {"a": "pytorch_model.bin"})
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(marker)))
    assert refusal(folder).code == "model.pickle"
    assert not marker.exists()


def test_a_pickle_beside_safetensors_is_ignored(checkpoint_copy):
    (checkpoint_copy / "pytorch_model.bin").write_bytes(b"whatever")
    assert checkpoint.read(checkpoint_copy).shards == ("model.safetensors",)


def test_an_empty_folder_says_what_to_give(tmp_path):
    error = refusal(tmp_path)
    assert error.code == "model.missing"
    assert "model.safetensors" in error.hint


def test_the_hash_is_of_the_content(checkpoint_copy, tmp_path):
    first = checkpoint.read(checkpoint_copy).hash()
    other = tmp_path / "elsewhere"
    shutil.copytree(checkpoint_copy, other)
    assert checkpoint.read(other).hash() == first
    tensors = load_file(other / "model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert checkpoint.read(other).hash() != first
    (checkpoint_copy / "config.json").write_text("{}")
    assert checkpoint.read(checkpoint_copy).hash() != first
