"""CUDA C++ kernels without a card: the source compiled as C++ over emulated instructions, and what nvcc makes of it."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

from autotune.errors import DeviceError
from autotune.kernels import reference
from autotune.kernels.checks import gate
from autotune.kernels.cuda import build, compiled, sparse24_w8a8
from autotune.kernels.machine_code import machine_code
from autotune.kernels.spec import KERNELS, kernel
from autotune.kernels.torch.cuda_activations import quantize_torch
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.groups import LayerGroup, Linear
from autotune.search_space.rules import legality
from autotune.search_space.schemes import scheme
from autotune.targets import detect, target
from autotune.targets.detect import compiler

LIBRARY = build.library
NAME, ITEM = "cuda.24.w8a8", "2:4+w8a8-int8"
SPEC = kernel(NAME)
HERE = KernelSpec(SPEC.name, SPEC.schemes, "cpu", SPEC.dtypes, SPEC.module, SPEC.limits)
pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The kernel's own source, its warps emulated."""
    made = tmp_path_factory.mktemp("cuda") / "emulated.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    source = build.FOLDER / "sparse24_w8a8.cu"
    command = [compiler(), *flags, "-DAUTOTUNE_EMULATED_WARPS", "-x", "c++", str(source), "-o", str(made)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(made))


@pytest.fixture(autouse=True)
def _here(emulated, monkeypatch):
    monkeypatch.setattr(build, "library", lambda name: emulated)
    monkeypatch.setattr(sparse24_w8a8, "home", lambda: torch.device("cpu"))
    monkeypatch.setattr(sparse24_w8a8, "stream", lambda device: 0)
    monkeypatch.setattr(sparse24_w8a8, "quantize", quantize_torch)


def weight_of(outputs, inputs, bias=True):
    generator = torch.Generator().manual_seed(outputs)
    return reference.random_weight(ITEM, outputs, inputs, torch.bfloat16, bias, generator)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("outputs", "inputs", "rows"),
    # Fewer steps than are in flight, as many, and more; tiles that are not full, and several both ways.
    [(8, 64, 1), (136, 128, 5), (128, 192, 128), (24, 256, 130), (264, 320, 33), (8, 576, 17)],
)
def test_numbers_match_the_reference(outputs, inputs, rows, bias):
    weight = weight_of(outputs, inputs, bias)
    packed = sparse24_w8a8.pack(weight, torch.bfloat16)
    found = gate(HERE, weight, packed, rows)
    assert found.rms_error < 4e-3  # one rounding to bf16
    tiles = -(-outputs // 128) * 128
    assert packed.bytes == tiles * inputs * 5 // 8 + outputs * (4 + 2 * bias)


def test_sums_are_exact():
    """Scales of one, so that what comes out is the integer sum, small enough for bf16."""
    weight = weight_of(128, 128, bias=False)
    codes = weight.codes.clamp(-1, 1)
    given = reference.GroupWeight(ITEM, codes=codes, scales=torch.ones(128, 1))
    x = torch.randint(-1, 2, (7, 128), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    packed = sparse24_w8a8.pack(given, torch.bfloat16)
    values, places, channels, _ = packed.data
    y = torch.empty(7, 128, dtype=torch.bfloat16)
    scales, kept = torch.ones(7), x.to(torch.int8)
    pointers = [t.data_ptr() for t in (values, places, kept, scales, channels)]
    sparse24_w8a8._call([*pointers, None, y.data_ptr()], (7, 128, 2), 0)
    assert torch.equal(y.float(), x.float() @ codes.float().t())


def test_places_of_other_lanes_are_noticed():
    """The check above is one of the order of places, too."""
    weight = weight_of(128, 64)
    packed = sparse24_w8a8.pack(weight, torch.bfloat16)
    packed.data[1].copy_(packed.data[1].view(1, 1, 8, 8, 4, 4)[..., [0, 2, 1, 3], :].reshape(packed.data[1].shape))
    with pytest.raises(DeviceError, match=r"kernel\.wrong"):
        gate(HERE, weight, packed, 9)


# ---- the compiler


def test_without_nvcc_it_is_refused(monkeypatch):
    group = LayerGroup("g", "o", 0, (Linear("g", "g", 64, 128, False),))
    answer = legality(scheme(ITEM), group, "bf16", target.load("h100"), [SPEC], local=True)
    assert not answer.usable and "lacks nvcc" in answer.reason
    monkeypatch.setattr(build, "nvcc", lambda: None)
    with pytest.raises(DeviceError, match=r"kernel\.compiler.*no nvcc"):
        build.compiled("sparse24_w8a8", build.FOLDER / "never")


def test_nvcc_is_a_feature_where_it_is(monkeypatch):
    monkeypatch.setattr(detect, "nvcc", lambda: "/bin/nvcc")
    assert "nvcc" in detect._compilers()
    monkeypatch.setattr(detect, "nvcc", lambda: None)
    assert "nvcc" not in detect._compilers()


@pytest.mark.skipif(detect.nvcc() is None, reason="no nvcc")
def test_what_nvcc_says_is_told(monkeypatch, tmp_path):
    (tmp_path / "broken.cu").write_text("int main() { return nothing; }")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    with pytest.raises(DeviceError, match=r'kernel\.compiler.*"nothing" is undefined'):
        build.compiled("broken", tmp_path / "out.o", "-c")


@pytest.mark.skipif(detect.nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize(
    "capability", [9.0, *(pytest.param(number, marks=pytest.mark.slow) for number in (8.0, 8.6, 8.9, 10.0, 12.0))]
)
def test_sparse_tensor_cores_and_no_spills(capability):
    found = compiled.inspect("sparse24_w8a8", capability)
    assert (found.stack_bytes, found.spilled_bytes, found.instruction) == (0, 0, "mma.sp")
    assert 100 <= found.registers <= 255 and str(found) == f"mma.sp, {found.registers} registers, no spills"


@pytest.mark.skipif(detect.nvcc() is None, reason="no nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_the_library_is_built_once_loads_and_says_that_there_is_no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    made = build.build("sparse24_w8a8")
    written = made.stat().st_mtime_ns
    assert build.build("sparse24_w8a8") == made and made.stat().st_mtime_ns == written
    monkeypatch.setattr(build, "library", LIBRARY)
    packed = sparse24_w8a8.pack(weight_of(8, 64), torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"CUDA error: .*(driver|device)"):
        sparse24_w8a8.run(packed, torch.ones(1, 64, dtype=torch.bfloat16))


@pytest.mark.skipif(detect.nvcc() is None, reason="no nvcc")
def test_the_instruction_is_named(monkeypatch):
    monkeypatch.setattr(compiled, "inspect", lambda name, capability: f"{name} for {capability}")
    assert machine_code(SPEC, 9.0) == "sparse24_w8a8 for 9.0"


@pytest.mark.parametrize("error", [DeviceError("kernel.compiler", "no nvcc."), FileNotFoundError("cuobjdump")])
def test_a_tool_that_is_missing_costs_no_report(monkeypatch, error):
    def inspect(_name, _capability):
        raise error

    monkeypatch.setattr(compiled, "inspect", inspect)
    assert machine_code(SPEC, 9.0).startswith(f"unknown ({type(error).__name__}: ")


def test_every_kernel_of_nvcc_is_tested_here():
    assert [spec.name for spec in KERNELS if "nvcc" in spec.limits.features] == [NAME]
