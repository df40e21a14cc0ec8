"""The compiled kernels built otherwise: for CPUs without AVX-512, and under sanitizers, which see what tests cannot."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from signal import SIGSEGV

import native
import pytest
import torch
from native import AVX2, EMULATED, NATIVE, assert_close, cases, inputs_of, normal, only, variant, weight
from native import one_thread as one_thread

from autotune.errors import DeviceError
from autotune.kernels.checks import gate
from autotune.kernels.cpu import build
from autotune.kernels.spec import GroupWeight, KernelModule, load
from autotune.targets.detect import compiler

pytestmark = pytest.mark.usefixtures("one_thread")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", *native.FAST)
# The kernels' own buffers without their slack.
EXACT = [
    ("rows.h", "size_ = (bytes + 4095) / 4096 * 4096;", "size_ = bytes;"),
    ("rows.h", "std::aligned_alloc(4096, size_)", "std::malloc(size_)"),
]
FUNCTIONS = {
    "integer": "autotune_linear",
    "narrow": "autotune_narrow",
    "bf16": "autotune_bf16",
    "amx_integer": "autotune_amx_linear",
    "amx_bf16": "autotune_amx_bf16",
}
BRIEF = (("w4a16-int4-g32", "fp32"), ("2:4+w8a8-int8", "bf16"))
BF16 = (("bf16", "bf16"), ("2:4", "bf16"))
NARROW = tuple((name, dtype) for name in ("w3a16-int3-g128", "w2a16-int2-g128") for dtype in ("bf16", "fp32"))
TILED = (("w8a8-int8", "bf16"), ("w4a8-int4-g32", "bf16"), ("2:4+w4a16-int4-g128", "fp32"))
EVERYTHING = tuple(
    (name, dtype)
    for spec in native.SPECS
    if native.short(spec) == "integer"
    for name in spec.schemes
    for dtype in spec.dtypes
)


@pytest.mark.parametrize(("spec", "name", "dtype"), [case for case in cases("integer") if ".avx2" in case.id])
def test_avx2_passes_the_gate(spec, name, dtype):
    for outputs, inputs in ((1, inputs_of(name, 4)[0]), (48, inputs_of(name, 1, 2, 100)[-1]), (33, 1024)):
        made = weight(name, outputs, inputs, dtype)
        packed = load(spec).pack(made, dtype)
        for rows in (1, 2, 3, 4, 7, 8, 33):
            gate(spec, made, packed, rows)


def test_avx_vnni_compiles(tmp_path):
    """Run where the CPU has it; elsewhere it must at least be C++."""
    if not native.runs_here("integer", AVX2):
        pytest.skip("needs an x86 CPU")
    names = [("w8a8-int8", "bf16"), ("2:4+w4a16-int4-g128", "fp32")]
    try:
        module = variant("integer", tmp_path, (*AVX2, "-mavxvnni"), only(*names))
    except DeviceError as error:
        if "mavxvnni" not in str(error):
            raise
        pytest.skip("a compiler from before AVX-VNNI")
    if "avx_vnni" not in native.FEATURES:
        return
    for name, dtype in names:
        spec = next(spec for spec in native.SPECS if name in spec.schemes)
        made = weight(name, 40, 384, native.DTYPES[dtype])
        for rows in (1, 3, 19):
            gate(spec, made, module.pack(made, native.DTYPES[dtype]), rows, module)


class _Watched:
    """Calls of one library, made by a child process in one go on buffers without slack."""

    def __init__(self, name: str, folder: Path, module: KernelModule, library: Path) -> None:
        self.name, self.folder, self.module, self.library = name, folder, module, library
        self.jobs: list[dict] = []
        self.expected: list[tuple[GroupWeight, torch.Tensor]] = []
        self.kept = 0
        folder.mkdir()

    def add(self, made: GroupWeight, inputs: Iterable[torch.Tensor]) -> None:
        """One layer and several x for it, by turns on one thread and on two."""
        inputs = list(inputs)
        packed = self.module.pack(made, inputs[0].dtype)
        structure, known = packed.data[1], {part.data_ptr(): part for part in native.held(packed)}
        fields: list[tuple[str, int | str | None]] = []
        for name, kind in structure._fields_:
            value = getattr(structure, name)
            if kind is ctypes.c_void_p:
                fields.append(("P", None if value is None else self._keep(known[value])))
            else:
                fields.append(("q" if kind is ctypes.c_int64 else "i", value))
        for number, x in enumerate(inputs):
            job = {"library": str(self.library), "function": FUNCTIONS[self.name], "fields": fields}
            job |= {"x": self._keep(x), "rows": x.shape[0], "threads": 1 + number % 2, "y": f"y{len(self.jobs)}"}
            self.jobs.append(job | {"y_bytes": x.shape[0] * packed.out_features * x.element_size()})
            self.expected.append((made, x))

    def run(self, how: str = "malloc") -> subprocess.CompletedProcess[str]:
        (self.folder / "calls.json").write_text(json.dumps(self.jobs))
        env = dict(os.environ)
        if how == "malloc":
            env |= {"LD_PRELOAD": _runtime("libasan.so"), "ASAN_OPTIONS": "detect_leaks=0"}
        command = [sys.executable, "-S", str(Path(__file__).parent / "native_child.py"), str(self.folder), how]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)

    def check(self, how: str = "malloc") -> None:
        done = self.run(how)
        assert done.returncode == 0, done.stderr
        for number, (made, x) in enumerate(self.expected):
            data = bytearray((self.folder / f"y{number}").read_bytes())
            assert_close(torch.frombuffer(data, dtype=x.dtype).view(x.shape[0], -1), made, x)

    def _keep(self, tensor: torch.Tensor) -> str:
        self.kept += 1
        (self.folder / f"buffer{self.kept}").write_bytes(bytes(tensor.contiguous().view(torch.uint8).numpy()))
        return f"buffer{self.kept}"


def _runtime(name: str) -> str:
    """Where the compiler keeps a sanitizer's library."""
    command = [*shlex.split(compiler() or "c++"), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _packer(name: str) -> KernelModule:
    return import_module(f"autotune.kernels.cpu.{name.removeprefix('amx_')}")


@pytest.fixture
def watched(tmp_path, tmp_path_factory):
    """(module, what of it, flags) -> calls of that kernel, sanitized and built once."""

    def get(name: str, wanted: Sequence[tuple[str, str]] = (), flags: Sequence[str] = NATIVE[-1:]) -> _Watched:
        if not native.runs_here(name.removeprefix("amx_"), flags):
            pytest.skip("this CPU cannot run the kernel")
        if not Path(_runtime("libasan.so")).is_absolute():
            pytest.skip("the compiler has no sanitizers")
        if name.startswith("amx_"):  # packed by the others: a sanitized library does not load in this process
            sources = native.copied(tmp_path_factory.mktemp("sources"), EXACT)
            library = native.built(sources, name, (*SANITIZED, *flags, EMULATED[-1]))
            return _Watched(name, tmp_path / name, _packer(name), library)
        fewer = only(*wanted) if name == "integer" else []
        module = variant(name, tmp_path_factory.mktemp("sources"), (*SANITIZED, *flags), [*EXACT, *fewer])
        return _Watched(name, tmp_path / name, module, module.linear.build.path)

    return get


def _fill(calls: _Watched, names: Sequence[tuple[str, str]], outputs: tuple, inputs: tuple, rows: tuple) -> _Watched:
    for name, dtype in names:
        for count in outputs:
            for width in inputs_of(name, *inputs):
                made = weight(name, count, width, native.DTYPES[dtype], bias=(count + width) % 2 == 0)
                calls.add(made, [normal(number, width, native.DTYPES[dtype], number) for number in rows])
    return calls


def test_sanitizers_find_nothing_in_brief(watched):
    _fill(watched("integer", BRIEF), BRIEF, (1, 17, 48), (4, 33, 100), (1, 2, 3, 13)).check()


def test_sanitizers_find_nothing_in_bf16(watched):
    _fill(watched("bf16"), BF16, (1, 15, 17, 48), (1, 4, 31, 32, 33, 100), (1, 2, 3, 8, 13)).check()


def test_sanitizers_find_nothing_around_tiles(watched):
    """Tiles are emulated: what they load and store is seen, and a fault ends the process."""
    _fill(watched("amx_integer"), TILED, (1, 17, 48), (4, 33, 100), (1, 17, 33)).check()


def test_sanitizers_find_nothing_around_bf16_tiles(watched):
    _fill(watched("amx_bf16"), BF16, (1, 17, 48), (4, 33, 100), (1, 17, 33)).check()


def _in_use(name: str, folder: Path, *flags: tuple[str, ...]) -> _Watched:
    """Calls of the library as it is compiled for use, or under these flags."""
    if not native.runs_here(name.removeprefix("amx_"), *flags):
        pytest.skip("this CPU cannot run the kernel")
    return _Watched(name, folder / "calls", _packer(name), build.build(name, *flags))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("bf16", ()),
        ("narrow", ()),
        ("integer", ()),
        ("integer", (AVX2,)),
        ("amx_bf16", (EMULATED,)),
        ("amx_integer", (EMULATED,)),
    ],
)
def test_no_byte_behind_a_buffer_is_touched(tmp_path, name, flags):
    """Masked loads and stores are not seen by sanitizers, and optimizers may widen others."""
    of = {"integer": EVERYTHING, "amx_integer": TILED, "narrow": NARROW}
    names = of.get(name, BF16)
    _fill(_in_use(name, tmp_path, *flags), names, (1, 33), (1, 31, 100), (1, 3, 13)).check("guard")


@pytest.mark.parametrize("how", ["malloc", "guard"])
def test_a_byte_too_few_would_be_found(watched, tmp_path, how):
    """The reason that the tests above mean something: each buffer in turn lacks its last byte."""
    name, dtype = ("2:4+w8a8-int8", "bf16")
    calls = watched("integer", BRIEF) if how == "malloc" else _in_use("integer", tmp_path)
    calls.add(weight(name, 33, 96, native.DTYPES[dtype]), [normal(3, 96, native.DTYPES[dtype])])
    for file in calls.folder.glob("buffer*"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        done = calls.run(how)
        file.write_bytes(whole)
        assert done.returncode == -SIGSEGV if how == "guard" else "ERROR: AddressSanitizer" in done.stderr, file
    calls.check(how)
    calls.jobs[0]["y_bytes"] -= 1
    done = calls.run(how)
    assert done.returncode == -SIGSEGV if how == "guard" else "ERROR: AddressSanitizer" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags", [NATIVE[-1:], AVX2[len(native.FAST) :]], ids=["native", "avx2"])
def test_sanitizers_find_nothing_at_all(watched, flags):
    calls = watched("integer", EVERYTHING, flags)
    _fill(calls, EVERYTHING, (1, 15, 16, 17, 33), (1, 4, 31, 32, 33, 100), (1, 2, 3, 5, 8, 19, 64))
    for name, dtype in EVERYTHING:  # several passes over the weights
        calls.add(weight(name, 17, 16384, native.DTYPES[dtype]), [normal(43, 16384, native.DTYPES[dtype])])
    calls.check()


@pytest.mark.slow
def test_sanitizers_find_nothing_in_two_and_three_bits(watched):
    _fill(watched("narrow"), NARROW, (1, 15, 17, 48), (4, 33, 100), (1, 2, 3, 8, 13)).check()


@pytest.mark.slow
def test_sanitizers_find_nothing_around_any_tile(watched):
    calls = watched("amx_integer")
    _fill(calls, EVERYTHING, (1, 16, 33), (1, 31, 32, 33, 96, 100), (1, 16, 19, 64))
    for name, dtype in EVERYTHING:  # several passes over the weights
        calls.add(weight(name, 17, 16384, native.DTYPES[dtype]), [normal(97, 16384, native.DTYPES[dtype])])
    calls.check()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["integer", "amx_integer"])
def test_sanitizers_find_nothing_in_rows_with_nan(watched, module):
    """Codes of what is no number must not overflow."""
    calls = watched(module, EVERYTHING)
    for name, dtype in EVERYTHING:
        width = inputs_of(name, 100)[0]
        x = normal(9, width, native.DTYPES[dtype])
        x[0, 1], x[4], x[8, -1], x[5] = float("nan"), float("inf"), -float("inf"), 0.0
        x[6], x[7, ::3] = torch.finfo(x.dtype).max, torch.finfo(x.dtype).tiny / 4
        calls.add(weight(name, 17, width, native.DTYPES[dtype]), [x])
    done = calls.run()
    assert done.returncode == 0, done.stderr
