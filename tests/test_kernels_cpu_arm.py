"""The native integer kernels on Arm, cross-compiled and emulated: numbers only, no time.

Needs `aarch64-linux-gnu-g++` and `qemu-aarch64` (Debian: g++-aarch64-linux-gnu, qemu-user).
"""

from __future__ import annotations

import shutil
import struct
import subprocess

import pytest
import torch

from autotune.kernels.checks import gate
from autotune.kernels.cpu import build, integer
from autotune.kernels.reference import random_weight
from autotune.kernels.spec import kernel

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
pytestmark = pytest.mark.skipif(not (COMPILER and EMULATOR), reason="no Arm cross-compiler or emulator")

# Fields and arrays in the order of `integer._Linear`, then x; y comes back.
DRIVER = r"""
#include <cstdio>
#include <vector>
#include "integer.cpp"
#include "integer.sparse.cpp"
#include "narrow.cpp"

static std::vector<char> part(FILE* file) {
    int64_t size;
    if (fread(&size, 8, 1, file) != 1) return {};
    std::vector<char> data(size);
    if (size && fread(data.data(), 1, size, file) != size_t(size)) return {};
    return data;
}

int main(int, char** names) {
    FILE* file = fopen(names[1], "rb");
    std::vector<char> parts[6];
    for (auto& data : parts) data = part(file);
    fclose(file);
    Linear linear;
    memcpy(reinterpret_cast<char*>(&linear) + 32, parts[0].data(), parts[0].size());
    linear.weights = reinterpret_cast<uint8_t*>(parts[1].data());
    linear.scales = reinterpret_cast<uint16_t*>(parts[2].data());
    linear.corrections = parts[3].data();
    linear.bias = parts[4].empty() ? nullptr : reinterpret_cast<float*>(parts[4].data());
    const int64_t width = linear.bf16 ? 2 : 4, rows = parts[5].size() / width / linear.inputs;
    std::vector<char> y(rows * linear.outputs * width);
    const auto call = linear.format < 4 ? autotune_linear : autotune_narrow;
    if (call(&linear, parts[5].data(), rows, y.data(), 2)) return 1;
    file = fopen(names[2], "wb");
    fwrite(y.data(), 1, y.size(), file);
    return fclose(file);
}
"""

KERNELS = {
    "w8a8-int8": "cpu.w8a8",
    "w8a16-int8": "cpu.w8a16",
    "w4a8-int4-g64": "cpu.w4a8",
    "w4a16-int4-g128": "cpu.w4a16",
    "w3a16-int3-g128": "cpu.w3a16",
    "w2a16-int2-g128": "cpu.w2a16",
    "2:4+w8a8-int8": "cpu.24.w8a8",
    "2:4+w4a16-int4-g128": "cpu.24.w4a16",
}


@pytest.fixture(scope="module", params=["armv8.2-a+dotprod", "armv8.6-a"])
def program(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arm")
    (folder / "driver.cpp").write_text(DRIVER)
    command = [COMPILER, "-O1", "-w", "-std=c++17", f"-march={request.param}", "-fopenmp", "-static", "-I"]
    subprocess.run([*command, str(build.FOLDER), "driver.cpp", "-o", "driver"], cwd=folder, check=True, timeout=120)
    return folder


class _Emulated:
    """A kernel's module whose `run` is emulated."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def run(self, packed, x):
        _, linear, held = packed.data
        parts = [
            bytes(linear)[32:],
            *(b"" if part is None else part.view(torch.uint8).numpy().tobytes() for part in held),
        ]
        parts.append(x.contiguous().view(torch.uint8).numpy().tobytes())
        (self.folder / "in").write_bytes(b"".join(struct.pack("q", len(part)) + part for part in parts))
        subprocess.run([EMULATOR, "-cpu", "max", "./driver", "in", "out"], cwd=self.folder, check=True, timeout=60)
        data = bytearray((self.folder / "out").read_bytes())
        return torch.frombuffer(data, dtype=packed.dtype).view(x.shape[0], packed.out_features)


@pytest.mark.parametrize("name", KERNELS)
def test_matches_the_reference(program, name):
    for dtype in (torch.bfloat16, torch.float32):
        for outputs, inputs, rows in ((35, 256, 7), (16, 384, 1)):
            weight = random_weight(name, outputs, inputs, dtype, rows == 7, torch.Generator().manual_seed(0))
            gate(kernel(KERNELS[name]), weight, integer.pack(weight, dtype), rows, _Emulated(program))
