"""The compiled CPU kernels for tests: their cases, a float64 reference with error bounds, and variants built apart.

A variant is a kernel's Python module and sources copied, changed and compiled under other flags: instruction sets this
CPU would not choose, sanitizers, and mistakes made on purpose.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from autotune.kernels import reference
from autotune.kernels.cpu import build
from autotune.kernels.spec import KERNELS, GroupWeight, KernelModule, Packed, load
from autotune.search_space.coverage import KernelSpec, Limits
from autotune.search_space.rules import lacking
from autotune.search_space.schemes import scheme
from autotune.targets.detect import detect_cpu

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FEATURES = detect_cpu().features
COMPILED = tuple(spec for spec in KERNELS if "cxx" in spec.limits.features)
AMX_SPECS = tuple(spec for spec in COMPILED if "amx_tile" in spec.limits.features)
SPECS = tuple(spec for spec in COMPILED if spec not in AMX_SPECS)
FAST = ("-O1", "-std=c++17", "-fPIC", "-fopenmp", "-w")  # a variant is run for moments: compiling it is what costs
NATIVE, AVX2 = (*FAST, "-march=native"), (*FAST, "-mavx2", "-mfma", "-mno-avx512f")
# Tiles in plain C++; optimized, or the tests would take minutes.
EMULATED = ("-O3", *FAST[1:], "-march=native", "-DAUTOTUNE_EMULATED_TILES")

Change = tuple[str, str, str]  # file, what it holds exactly once, what to put there
_numbers = itertools.count()


def short(spec: KernelSpec) -> str:
    """The module's own name, whatever it is built for: `integer`, `narrow` or `bf16`."""
    return spec.module.rpartition(".")[2].removeprefix("amx_").removesuffix("_avx2").removesuffix("_emulated")


def family(spec: KernelSpec) -> str:
    """The module that packs: `integer` or `bf16`."""
    return "bf16" if short(spec) == "bf16" else "integer"


def cases(module: str | None = None, activations: bool | None = None) -> list[object]:
    """(spec, scheme, dtype) of the compiled kernels, all or of one module, with or without quantized activations.

    Integer kernels come twice: as this CPU runs them, and as one without AVX-512 would. AMX kernels too: on tiles where
    there are any, and on emulated ones.
    """
    found = []
    for spec in (*COMPILED, *_avx2_specs(), *_emulated_specs()):
        missing = lacking(spec.limits.features, FEATURES)
        marks = [pytest.mark.skipif(bool(missing), reason=f"this CPU lacks {', '.join(missing)}")]
        for name, dtype in itertools.product(spec.schemes, spec.dtypes):
            slow = [pytest.mark.slow] if ".emulated" in spec.name and _seldom(name, dtype) else []
            if module not in (None, family(spec)) or activations not in (None, scheme(name).activation is not None):
                continue
            found.append(pytest.param(spec, name, DTYPES[dtype], id=f"{spec.name}-{name}-{dtype}", marks=marks + slow))
    return found


def _seldom(name: str, dtype: str) -> bool:
    """Emulated tiles take their time: forms that differ in little but sizes from others are left to `make test-all`."""
    others = "-g64" in name or "w4a8-int4-g128" in name
    return others or (dtype == "fp32" and scheme(name).activation is not None and name != "w8a8-int8")


def runs_here(module: str, flags: Sequence[str] | None = None) -> bool:
    """Whether this CPU runs the kernels of a module, compiled under flags such as `AVX2`."""
    if "-mavx2" in (flags or ()) and not {"avx2", "fma"} <= set(FEATURES):
        return False
    return not any(lacking(spec.limits.features, FEATURES) for spec in SPECS if short(spec) == module)


def weight(name: str, outputs: int, inputs: int, dtype: torch.dtype, bias: bool = True, seed: int = 0) -> GroupWeight:
    return reference.random_weight(name, outputs, inputs, dtype, bias, torch.Generator().manual_seed(seed))


def inputs_of(name: str, *wanted: int) -> list[int]:
    """Numbers of inputs that the scheme allows: those wanted, or as many scale groups."""
    item = scheme(name)
    if item.weight.group_size:
        return [item.weight.group_size * count for count in range(1, 1 + min(3, len(wanted)))]
    multiple = 4 if item.sparsity == "2:4" else 1
    return sorted({math.ceil(count / multiple) * multiple for count in wanted})


def normal(rows: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost far more than they save on small shapes."""
    with threads(1):
        yield


def assert_close(y: torch.Tensor, made: GroupWeight, x: torch.Tensor) -> None:
    """Every output within what the kernels promise of the float64 reference; rows with NaN or infinity left out.

    Promised: integer planes lose half a step of the token's largest value, times the sum of the weights' magnitudes,
    where a step is 1/32639 (bf16) or 1/8355711 (fp32, which divides to a quarter of a step more); int8 codes are the
    reference's own. Sums in fp32 fit within the same. On top comes the rounding of the output: one to bf16, or a few in
    fp32 (the planes' sum, the scales' product, the bias added).
    """
    rows = torch.isfinite(x.float()).all(1)
    y, x = y[rows].double(), x[rows]
    expected = reference.reference_linear(made, x, torch.float64)
    half = x.dtype == torch.bfloat16
    largest = x.double().abs().amax(1, keepdim=True).clamp_min(reference.SMALLEST_AMAX)
    lost = largest * reference.dequantize(made).double().abs().sum(1) * (0.5 / 32639 if half else 0.75 / 8355711)
    terms = expected.abs() + (0.0 if made.bias is None else made.bias.double().abs())
    rounding = expected.abs() * 2.0**-8 if half else terms * 2.0**-22
    worst = float(((y - expected).abs() - lost - rounding).max())
    assert bool(torch.isfinite(y).all()), "the output holds NaN or infinity"
    assert worst <= 0.0, f"an output is {worst:.3g} further off than promised"


def variant(name: str, folder: Path, flags: tuple[str, ...] | None, changes: Iterable[Change] = ()) -> KernelModule:
    """The kernel module `name` from changed copies of its files; flags None: with the library that is there already."""
    copies = copied(folder, changes)
    if name.startswith("amx_"):
        return emulated(name, flags or EMULATED, copies)
    module = _imported(copies / f"{name}.py")
    if flags is not None:
        path = built(copies, name, flags)
        module.linear.build = SimpleNamespace(library=lambda _name: ctypes.CDLL(str(path)), path=path)
    return module


def copied(folder: Path, changes: Iterable[Change] = ()) -> Path:
    """A folder below this one with the kernels' files, changed."""
    copies = Path(shutil.copytree(build.FOLDER, folder / f"sources{next(_numbers)}", ignore=_not_sources))
    for file, old, new in changes:
        text = (copies / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{file} does not hold once: {old}"
        (copies / file).write_text(text.replace(old, new), encoding="utf-8")
    return copies


def built(folder: Path, name: str, flags: tuple[str, ...]) -> Path:
    """The library of NAME.cpp in a folder of sources."""
    with patch.object(build, "FOLDER", folder):
        return build.build(name, flags)


@cache
def _avx2_specs() -> tuple[KernelSpec, ...]:
    """Under module names of their own, and compiled when the first of them runs."""
    made = []
    limits = Limits(features=("cxx", "avx2", "fma"))
    for name in ("integer", "narrow"):
        module = _imported(build.FOLDER / f"{name}.py")
        module.linear.build = SimpleNamespace(library=lambda name: ctypes.CDLL(str(build.build(name, AVX2))))
        sys.modules[f"{name}_avx2"] = module
        specs = [spec for spec in SPECS if short(spec) == name]
        made += [replace(spec, name=f"{spec.name}.avx2", module=f"{name}_avx2", limits=limits) for spec in specs]
    return tuple(made)


@cache
def _emulated_specs() -> tuple[KernelSpec, ...]:
    """AMX kernels for CPUs without AMX; every number of rows goes through tiles."""
    for name in ("amx_integer", "amx_bf16"):
        sys.modules[f"{name}_emulated"] = emulated(name, EMULATED)
    made = []
    for spec in AMX_SPECS:
        module, limits = f"{spec.module.rpartition('.')[2]}_emulated", Limits(features=("cxx", "avx2", "fma"))
        made.append(replace(spec, name=f"{spec.name}.emulated", module=module, limits=limits))
    return tuple(made)


def emulated(name: str, flags: tuple[str, ...], folder: Path = build.FOLDER) -> ModuleType:
    """An AMX module from `folder`, compiled under these flags when it first runs, its own memory of libraries."""
    module = _imported(folder / f"{name}.py")
    module.linear.build = SimpleNamespace(library=lambda library: ctypes.CDLL(str(built(folder, library, flags))))
    module.LEAST_ROWS = 0
    return module


def only(*wanted: tuple[str, str]) -> list[Change]:
    """Changes that leave of integer.cpp and its part what these (scheme, dtype) need: a fraction to compile."""
    formats = ("Int8", "Int4", "Sparse8", "Sparse4")
    kept: dict[str, set[str]] = {}
    for name, dtype in wanted:
        item = scheme(name)
        number = (item.sparsity == "2:4") * 2 + (item.weight.bits == 4)
        kept.setdefault(formats[number], set()).add(dtype)
    changes = []
    for number, made in enumerate(formats):
        grouped = "true" if made.endswith("4") else "false"
        label, file = (
            "default" if number == 3 else f"case {number}",
            "integer.cpp" if number < 2 else "integer.sparse.cpp",
        )
        old = f"{label}: return !by_type<{made}, {grouped}>(a, x, rows, y, threads);"
        calls = "".join(
            f"if (a.bf16 == {is_bf16}) return !by_planes<{made}, {number_type}, {grouped}>(a, x, rows, y, threads);"
            for dtype, is_bf16, number_type in (("bf16", 1, "Bf16"), ("fp32", 0, "Fp32"))
            if dtype in kept.get(made, ())
        )
        changes.append((file, old, f"{label}: {calls} return 1;"))
    return changes


def held(packed: Packed) -> list[torch.Tensor]:
    """The tensors a packed weight points into."""
    found: list[torch.Tensor] = []
    parts = list(packed.data)
    while parts:
        part = parts.pop()
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, list | tuple):
            parts += part
    return found


def run(spec: KernelSpec, made: GroupWeight, x: torch.Tensor, module: KernelModule | None = None) -> torch.Tensor:
    kernel = module or load(spec)
    return kernel.run(kernel.pack(made, x.dtype), x)


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"variant_{path.stem}_{next(_numbers)}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _not_sources(_folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith((".cpp", ".h", ".py"))]
