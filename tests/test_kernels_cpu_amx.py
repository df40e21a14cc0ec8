"""AMX without AMX: what other tests on emulated tiles leave open. The real instructions are compiled, not run."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import native
import numpy as np
import pytest
import tiny
import torch
from native import EMULATED, normal, one_thread, weight  # noqa: F401 - a fixture

from autotune.errors import DeviceError
from autotune.kernels.cpu import amx, amx_bf16, amx_integer, bf16, build, integer
from autotune.kernels.spec import KERNELS
from autotune.search_space.groups import LayerGroup, Linear
from autotune.search_space.rules import legality
from autotune.search_space.schemes import scheme
from autotune.targets.detect import compiler

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not {"cxx", "avx2", "fma"} <= set(native.FEATURES), reason="needs a compiler and an x86 CPU"),
]
# As for use, but for a CPU that this one is not.
FOR_AMX = (*(flag for flag in build._FLAGS if not flag.startswith("-march")), "-march=sapphirerapids")
needs_objdump = pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")


def _library(name: str) -> Path:
    try:
        return build.build(name, FOR_AMX)
    except DeviceError as error:
        if "sapphirerapids" not in str(error):
            raise
        pytest.skip("a compiler from before AMX")


def _instructions(path: Path, function: str | None = None) -> list[tuple[str, ...]]:
    """(name, tiles...) of those that concern tiles."""
    chosen = [f"--disassemble={function}"] if function else ["-d"]
    text = subprocess.run(["objdump", *chosen, str(path)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\t(ldtilecfg|tile\w+|tdp\w+)\b(.*)", text)
    return [(name, *re.findall(r"tmm\d", operands)) for name, operands in found]


@needs_objdump
@pytest.mark.parametrize(("name", "product"), [("amx_integer", "tdpbusd"), ("amx_bf16", "tdpbf16ps")])
def test_the_real_instructions_are_in_the_library(name, product):
    found = _instructions(_library(name))
    tiles = {("tmm0", "tmm4", "tmm6"), ("tmm1", "tmm4", "tmm7"), ("tmm2", "tmm5", "tmm6"), ("tmm3", "tmm5", "tmm7")}
    assert {tuple(reversed(operands)) for what, *operands in found if what == product} == tiles
    assert {what for what, *_ in found} == {
        "ldtilecfg",
        "tilerelease",
        "tilezero",
        "tileloadd",
        "tilestored",
        product,
    }


BOTH_WAYS = """
#include "tiles.h"
extern "C" {
void ours(const TileShapes& shapes, const void* from, void* to, long stride) {
    tile_shapes(shapes), tile_zero<3>(), tile_load<5>(from, stride), tile_dot_bytes<0, 4, 6>();
    tile_dot_bf16<1, 4, 7>(), tile_store<2>(to, stride), tile_release();
}
void theirs(const TileShapes& shapes, const void* from, void* to, long stride) {
    _tile_loadconfig(&shapes);
    _tile_zero(3);
    _tile_loadd(5, from, stride);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stored(2, to, stride);
    _tile_release();
}
}
"""


@needs_objdump
def test_assembly_says_what_the_compilers_intrinsics_say(tmp_path):
    _library("amx_bf16")  # or skip
    (tmp_path / "both.cpp").write_text(BOTH_WAYS)
    command = [compiler(), *FOR_AMX, "-I", str(build.FOLDER), "-c", "both.cpp", "-o", "both.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    ours, theirs = (_instructions(tmp_path / "both.o", name) for name in ("ours", "theirs"))
    assert ours == theirs
    assert len(ours) == 7


def test_a_system_without_tiles_says_so():
    """The question is a real one: asked of this machine's Linux."""
    allowed = ctypes.CDLL(str(_library("amx_integer"))).autotune_amx_allowed()
    assert (allowed == 0) == ("amx_tile" in native.FEATURES)


def test_a_refusal_is_an_error_of_the_whole_kernel(monkeypatch):
    for module, name in ((amx_integer, "w8a8-int8"), (amx_bf16, "bf16")):
        refusing = SimpleNamespace(library=lambda _name: SimpleNamespace(autotune_amx_allowed=lambda: 95))
        monkeypatch.setattr(module.linear, "build", refusing)
        with pytest.raises(DeviceError, match=r"kernel\.amx.*not supported.*Linux 5\.16"):
            module.pack(weight(name, 16, 32, torch.bfloat16), torch.bfloat16)


def test_the_search_offers_tiles_where_there_are_some():
    here = tiny.here()
    group = LayerGroup("layers.0.qkv", "qkv", 0, (Linear("q.weight", "q", 256, 512, False),))
    tiles = replace(
        here, features=tuple({*here.features, *(name for s in native.AMX_SPECS for name in s.limits.features)})
    )
    without = replace(here, features=tuple(name for name in tiles.features if not name.startswith("amx")))
    for spec in native.AMX_SPECS:
        item = scheme(spec.schemes[0])
        assert spec.name in legality(item, group, "bf16", tiles, KERNELS, True).kernels
        assert spec.name not in legality(item, group, "bf16", without, KERNELS, True).kernels


@pytest.mark.parametrize(("name", "other"), [("amx_integer", integer), ("amx_bf16", bf16)])
def test_few_rows_go_to_vector_instructions(name, other, monkeypatch):
    """One packed copy for both; in whole numbers the outputs are the same, bit for bit."""
    if not native.runs_here(name.removeprefix("amx_")):
        pytest.skip("this CPU cannot run the kernel")
    module, calls = native.emulated(name, EMULATED), []
    run = other.run
    monkeypatch.setattr(other, "run", lambda packed, x: calls.append(len(x)) or run(packed, x))
    module.LEAST_ROWS = amx.LEAST_ROWS
    made = weight("bf16" if other is bf16 else "w4a16-int4-g32", 40, 96, torch.bfloat16)
    packed, x = module.pack(made, torch.bfloat16), normal(33, 96, torch.bfloat16)
    for rows in (1, amx.LEAST_ROWS - 1, amx.LEAST_ROWS, 33):
        y = module.run(packed, x[:rows])
        native.assert_close(y, made, x[:rows])
        if other is integer:
            assert torch.equal(y, run(packed, x[:rows]))
    assert calls == [1, amx.LEAST_ROWS - 1]
    assert module.native(packed) == other.native(packed)


EMULATOR = """
#define AUTOTUNE_EMULATED_TILES
#include "tiles.h"
extern "C" void products(int width, const void* x, const void* w, void* bytes, void* bf16) {
    Tiles tiles(width);
    tile_load<4>(x, 64), tile_load<6>(w, 64), tile_load<0>(bytes, 64), tile_load<1>(bf16, 64);
    tile_dot_bytes<0, 4, 6>(), tile_dot_bf16<1, 4, 6>();
    tile_store<0>(bytes, 64), tile_store<1>(bf16, 64);
}
extern "C" void fault(int which) {
    static uint8_t place[1024];
    TileShapes shapes(64);
    if (which == 0) return tile_load<4>(place, 64);
    if (which == 1) shapes.palette = 2;
    if (which == 2) shapes.reserved[3] = 1;
    if (which == 3) shapes.rows[2] = 0;
    if (which == 4) shapes.row_bytes[5] = 65;
    if (which == 5) shapes.rows[6] = 8;
    tile_shapes(shapes);
    if (which == 6) tile_release();
    if (which == 7) return tile_dot_bytes<0, 4, 4>();
    tile_dot_bytes<0, 4, 6>();
}
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "emulator.cpp").write_text(EMULATOR)
    command = [compiler(), *EMULATED, "-I", str(build.FOLDER), "-shared", "emulator.cpp", "-o", "emulator.so"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "emulator.so"


def _bf16(values: np.ndarray) -> np.ndarray:
    """The bits of numbers that bf16 holds."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("width", [64, 32])
def test_emulated_products_are_those_of_the_manual(emulator, width):
    generator, k = np.random.default_rng(width), width // 4
    raw = [generator.integers(0, 256, (16, 64), dtype=np.uint8) for _ in range(2)]
    start = generator.integers(-(2**31), 2**31, (16, 16)).astype(np.int32)  # sums that wrap
    x, w = raw[0].astype(np.int64)[:, :width], raw[1].view(np.int8).astype(np.int64)[:k]
    bytes_expected = (start + x @ w.reshape(k, 16, 4).transpose(0, 2, 1).reshape(width, 16)).astype(np.int32)
    bytes_ = start.copy()
    ctypes.CDLL(str(emulator)).products(
        width, *(a.ctypes.data_as(ctypes.c_void_p) for a in (*raw, bytes_, start.copy()))
    )
    assert np.array_equal(bytes_, bytes_expected)

    scale = 2.0 ** generator.integers(-3, 4, (2, 16, 32))
    numbers = generator.integers(-255, 256, (2, 16, 32)) * scale  # eight significant bits: bf16 holds them
    numbers[0, 3, :2], numbers[1, 0, :2] = 2.0**-100, 2.0**-100  # products that no fp32 holds
    numbers[0, 4, 4], numbers[1, 2, 6] = 2.0**-130, -(2.0**-130)  # subnormal
    sums = generator.integers(-999, 1000, (16, 16)).astype(np.float32)
    sums[5, 5] = 2.0**-140
    expected = _manual(np.where(np.abs(numbers) < 2.0**-126, 0.0, numbers), sums, k)
    images = [_bf16(part) for part in numbers]
    ctypes.CDLL(str(emulator)).products(
        width, *(a.ctypes.data_as(ctypes.c_void_p) for a in (*images, start.copy(), sums))
    )
    assert np.array_equal(sums, expected)


def _manual(numbers: np.ndarray, sums: np.ndarray, k: int) -> np.ndarray:
    """TDPBF16PS in float64, which holds each of these products and sums before it is rounded to fp32."""
    x, w = numbers
    chains = np.zeros((16, 16, 2), np.float32)
    for i in range(k):
        for odd in range(2):
            product = x[:, None, 2 * i + odd] * w[i].reshape(16, 2)[None, :, odd]
            chains[:, :, odd] = _flushed((chains[:, :, odd] + product).astype(np.float32))
    pairs = _flushed(chains[:, :, 0] + chains[:, :, 1])
    return _flushed(_flushed(sums) + pairs)


def _flushed(a: np.ndarray) -> np.ndarray:
    return np.where(np.abs(a) < np.float32(2.0**-126), np.float32(0.0), a)


@pytest.mark.parametrize("which", range(9))
def test_emulated_faults_end_the_process(emulator, which):
    code = f"import ctypes; ctypes.CDLL({str(emulator)!r}).fault({which})"
    done = subprocess.run([shutil.which("python3") or "python3", "-S", "-c", code], capture_output=True, text=True)
    if which == 8:  # the only one without a mistake
        assert done.returncode == 0, done.stderr
    else:
        assert "AMX fault" in done.stderr
