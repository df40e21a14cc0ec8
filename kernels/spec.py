"""The table of kernels, and what a kernel's module must hold.

A kernel is one file with two functions, `pack` and `run`; its limits are data in the table below. Add a kernel: write
the file, add one line here; the conformance suite in `tests/conformance/` then tests it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from autotune.errors import InputError, did_you_mean
from autotune.kernels.cpu import build
from autotune.kernels.cuda import build as cuda_build
from autotune.search_space.coverage import KernelSpec, Limits
from autotune.search_space.schemes import MORE, SCHEMES
from autotune.store import digest, file_digest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GroupWeight:
    """A layer group's weights under a scheme, rows of all members stacked; unpacked, in canonical form.

    Dense schemes: `dense` holds W (out, in) in the model's dtype and `codes` is None. Quantized schemes: W = levels *
    scales, with `codes` (out, in) int8, or torch.float8_e4m3fn, that stand for levels (`kernels.formats`; of symmetric
    integers and fp8 the codes themselves) and `scales` fp32 (out, groups), exact in bf16 and in fp16, repeated where
    rows share them. A sparse scheme has exact zeros where its pattern wants them, 2:4 two in every four inputs.
    """

    scheme: str
    dense: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None  # (out,) in the model's dtype
    zeros: torch.Tensor | None = None  # int8 (out, groups): the code that stands for 0, of asymmetric integers

    def part(self, rows: slice) -> GroupWeight:
        """Some of the output rows; nothing is copied."""
        names = ("dense", "codes", "scales", "bias", "zeros")
        tensors = {name: tensor[rows] for name in names if (tensor := getattr(self, name)) is not None}
        return GroupWeight(self.scheme, **tensors)


@dataclass(frozen=True)
class Packed:
    """A kernel's own layout of one group. `bytes`: memory it really holds, all copies included."""

    out_features: int
    in_features: int
    dtype: torch.dtype  # of activations in and out
    bytes: int
    data: Any  # tensors and constants that only the kernel understands


@dataclass(frozen=True)
class Form:
    """What a kernel must know of a group besides the tensors it packed."""

    scheme: str
    out_features: int
    in_features: int
    dtype: torch.dtype  # of activations in and out

    def packed(self, data: Any, held: int = 0) -> Packed:
        """`held`: bytes, all copies included; 0 where nobody counts them."""
        return Packed(self.out_features, self.in_features, self.dtype, held, data)


class KernelModule(Protocol):
    """A kernel's file. In a graph its weights are tensors (`kernels.operator`): where `Packed.data` is not a plain
    tuple of them (or None: no bias), the file has `tensors(packed)` to get one and `bind(tensors, form)` to go back, of
    the same memory; where the first is opaque, `tensors` gives None for it and `plain(packed)` a copy that is not.
    """

    def pack(self, weight: GroupWeight, dtype: torch.dtype) -> Packed:
        """Repack canonical weights once, at load time."""
        ...

    def run(self, packed: Packed, x: torch.Tensor) -> torch.Tensor:
        """y = x W^T + b: x (rows, in_features) of the packed dtype, any number of rows, to (rows, out_features)."""
        ...


_INT4 = ("w4a16-int4-g32", "w4a16-int4-g64", "w4a16-int4-g128")
_INT4_A8 = ("w4a8-int4-g32", "w4a8-int4-g64", "w4a8-int4-g128")
_SPARSE_INT4_A8 = ("2:4+w4a8-int4-g64", "2:4+w4a8-int4-g128")
_TORCH = "autotune.kernels.torch."
_CPU = "autotune.kernels.cpu."
_TRITON = "autotune.kernels.triton."
_FLOATS = ("bf16", "fp32")
_NATIVE = Limits(features=("cxx", "avx2|dotprod"))  # compiled here, for the best instructions that the CPU has
_TRITON_LIMITS = Limits(16, 8, ("triton",), min_compute_capability=8.0)
_TRITON_SPARSE = Limits(32, 8, ("triton",), min_compute_capability=8.0)  # words of eight quads; no sparse tensor cores
_NATIVE_BF16 = Limits(features=("cxx", "avx512bw", "avx512_bf16"))
_AMX = Limits(features=("cxx", "avx512bw", "avx512_vnni", "amx_tile", "amx_int8"))  # few rows are for VNNI there too
_AMX_BF16 = Limits(features=("cxx", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16"))

_UNTRIED = "never run on a CPU with AMX: what the gate refuses there is left out"

# Everything but the models' own numbers.
_ANY = tuple(item.name for item in (*SCHEMES, *MORE) if not item.is_dense)

KERNELS: tuple[KernelSpec, ...] = (
    KernelSpec("torch.cpu.bf16", ("bf16",), "cpu", ("bf16",), _TORCH + "dense"),
    KernelSpec("torch.cpu.fp32", ("fp32",), "cpu", ("fp32",), _TORCH + "dense", compute_format="fp32"),
    KernelSpec("onednn.bf16", ("bf16",), "cpu", ("bf16",), _TORCH + "onednn_dense", Limits(features=("avx512f",))),
    KernelSpec(
        "onednn.fp32",
        ("fp32",),
        "cpu",
        ("fp32",),
        _TORCH + "onednn_dense",
        Limits(features=("avx2",)),
        compute_format="fp32",
    ),
    KernelSpec(
        "onednn.w8a8",
        ("w8a8-int8",),
        "cpu",
        ("bf16", "fp32"),
        _TORCH + "onednn_w8a8",
        Limits(features=("avx512_vnni",)),
        compute_format="int8",
    ),
    KernelSpec("torch.cpu.w8a16", ("w8a16-int8",), "cpu", ("bf16", "fp32"), _TORCH + "w8a16", Limits(in_multiple=16)),
    KernelSpec("torch.cpu.w4a16", _INT4, "cpu", ("bf16", "fp32"), _TORCH + "w4a16", Limits(features=("avx2",))),
    KernelSpec("cpu.bf16", ("bf16",), "cpu", ("bf16",), _CPU + "bf16", _NATIVE_BF16),
    KernelSpec("cpu.w8a8", ("w8a8-int8",), "cpu", _FLOATS, _CPU + "integer", _NATIVE, compute_format="int8"),
    KernelSpec("cpu.w8a16", ("w8a16-int8",), "cpu", _FLOATS, _CPU + "integer", _NATIVE),
    KernelSpec("cpu.w4a8", _INT4_A8, "cpu", _FLOATS, _CPU + "integer", _NATIVE, compute_format="int8"),
    KernelSpec("cpu.w4a16", _INT4, "cpu", _FLOATS, _CPU + "integer", _NATIVE),
    KernelSpec("cpu.w3a16", ("w3a16-int3-g128",), "cpu", _FLOATS, _CPU + "narrow", _NATIVE),
    KernelSpec("cpu.w2a16", ("w2a16-int2-g128",), "cpu", _FLOATS, _CPU + "narrow", _NATIVE),
    KernelSpec("cpu.24.bf16", ("2:4",), "cpu", ("bf16",), _CPU + "bf16", _NATIVE_BF16),
    KernelSpec("cpu.24.w8a8", ("2:4+w8a8-int8",), "cpu", _FLOATS, _CPU + "integer", _NATIVE, compute_format="int8"),
    KernelSpec("cpu.24.w4a8", _SPARSE_INT4_A8, "cpu", _FLOATS, _CPU + "integer", _NATIVE, compute_format="int8"),
    KernelSpec("cpu.24.w4a16", ("2:4+w4a16-int4-g128",), "cpu", _FLOATS, _CPU + "integer", _NATIVE),
    KernelSpec("cpu.amx.bf16", ("bf16",), "cpu", ("bf16",), _CPU + "amx_bf16", _AMX_BF16, notes=_UNTRIED),
    KernelSpec(
        "cpu.amx.w8a8",
        ("w8a8-int8",),
        "cpu",
        _FLOATS,
        _CPU + "amx_integer",
        _AMX,
        compute_format="int8",
        notes=_UNTRIED,
    ),
    KernelSpec("cpu.amx.w8a16", ("w8a16-int8",), "cpu", _FLOATS, _CPU + "amx_integer", _AMX, notes=_UNTRIED),
    KernelSpec(
        "cpu.amx.w4a8", _INT4_A8, "cpu", _FLOATS, _CPU + "amx_integer", _AMX, compute_format="int8", notes=_UNTRIED
    ),
    KernelSpec("cpu.amx.w4a16", _INT4, "cpu", _FLOATS, _CPU + "amx_integer", _AMX, notes=_UNTRIED),
    KernelSpec("cpu.amx.24.bf16", ("2:4",), "cpu", ("bf16",), _CPU + "amx_bf16", _AMX_BF16, notes=_UNTRIED),
    KernelSpec(
        "cpu.amx.24.w8a8",
        ("2:4+w8a8-int8",),
        "cpu",
        _FLOATS,
        _CPU + "amx_integer",
        _AMX,
        compute_format="int8",
        notes=_UNTRIED,
    ),
    KernelSpec(
        "cpu.amx.24.w4a8",
        _SPARSE_INT4_A8,
        "cpu",
        _FLOATS,
        _CPU + "amx_integer",
        _AMX,
        compute_format="int8",
        notes=_UNTRIED,
    ),
    KernelSpec(
        "cpu.amx.24.w4a16",
        ("2:4+w4a16-int4-g128",),
        "cpu",
        _FLOATS,
        _CPU + "amx_integer",
        _AMX,
        notes=_UNTRIED,
    ),
    KernelSpec("cuda.bf16", ("bf16",), "cuda", ("bf16",), _TORCH + "cuda_dense"),
    KernelSpec("cuda.fp32", ("fp32",), "cuda", ("fp32",), _TORCH + "cuda_dense", compute_format="fp32"),
    KernelSpec(
        "cuda.fp8",
        ("w8a8-fp8",),
        "cuda",
        ("bf16",),
        _TORCH + "cuda_fp8",
        Limits(16, 16, ("fp8",), min_compute_capability=8.9),
        compute_format="fp8",
    ),
    KernelSpec(
        "cuda.fp8.fast",
        ("w8a8-fp8",),
        "cuda",
        ("bf16",),
        _TORCH + "cuda_fp8_fast",
        Limits(16, 16, ("fp8",), min_compute_capability=8.9),
        compute_format="fp8",
        notes="short sums: left out wherever the gate refuses them",
    ),
    KernelSpec(
        "cuda.fp8.blocks",
        ("w8a8-fp8-128x128",),
        "cuda",
        ("bf16",),
        _TORCH + "cuda_fp8_blocks",
        Limits(128, 16, ("fp8",), min_compute_capability=9.0, max_compute_capability=9.0),
        compute_format="fp8",
        notes="Hopper only",
    ),
    KernelSpec(
        "cuda.int8",
        ("w8a8-int8",),
        "cuda",
        ("bf16",),
        _TORCH + "cuda_int8",
        Limits(8, 8, min_compute_capability=8.0),
        compute_format="int8",
    ),
    KernelSpec(
        "cuslt.bf16",
        ("2:4",),
        "cuda",
        ("bf16",),
        _TORCH + "cuslt",
        Limits(16, 16, ("sparse24",), min_compute_capability=8.0),
        sparse_compute=True,
    ),
    KernelSpec(
        "cuslt.int8",
        ("2:4+w8a8-int8",),
        "cuda",
        ("bf16",),
        _TORCH + "cuslt",
        Limits(32, 32, ("sparse24",), min_compute_capability=8.0),
        compute_format="int8",
        sparse_compute=True,
    ),
    KernelSpec(
        "cuslt.fp8",
        ("2:4+w8a8-fp8",),
        "cuda",
        ("bf16",),
        _TORCH + "cuslt",
        Limits(32, 32, ("sparse24", "fp8"), min_compute_capability=8.9),
        compute_format="fp8",
        sparse_compute=True,
    ),
    KernelSpec(
        "cuda.24.w8a8",
        ("2:4+w8a8-int8",),
        "cuda",
        ("bf16",),
        "autotune.kernels.cuda.sparse24_w8a8",
        Limits(64, 8, ("sparse24", "nvcc"), min_compute_capability=8.0),
        compute_format="int8",
        sparse_compute=True,
        notes="never run on a card: what the gate refuses there is left out",
    ),
    KernelSpec(
        "cuda.int4",
        _INT4,
        "cuda",
        ("bf16",),
        _TORCH + "cuda_int4",
        Limits(32, 8, min_compute_capability=8.0),
        notes="tinygemm: slow for more than a few rows",
    ),
    KernelSpec("torch.cpu.unpack", _ANY, "cpu", _FLOATS, _TORCH + "unpack", memory_only=True),
    KernelSpec(
        "triton.w8a8",
        ("w8a8-int8",),
        "cuda",
        ("bf16",),
        _TRITON + "w8a8",
        Limits(16, 8, ("triton",), min_compute_capability=8.0),
        compute_format="int8",
    ),
    KernelSpec("triton.w8a16", ("w8a16-int8",), "cuda", ("bf16",), _TRITON + "w8a16", _TRITON_LIMITS),
    KernelSpec("triton.w8a16.fp8", ("w8a16-fp8",), "cuda", ("bf16",), _TRITON + "w8a16", _TRITON_LIMITS),
    KernelSpec(
        "triton.fp8.blocks",
        ("w8a8-fp8-128x128",),
        "cuda",
        ("bf16",),
        _TRITON + "fp8_blocks",
        Limits(128, 8, ("triton", "fp8"), min_compute_capability=8.9),
        compute_format="fp8",
    ),
    KernelSpec("triton.w4a16", _INT4, "cuda", ("bf16",), _TRITON + "w4a16", _TRITON_LIMITS),
    KernelSpec("triton.24.bf16", ("2:4",), "cuda", ("bf16",), _TRITON + "sparse24", _TRITON_SPARSE),
    KernelSpec("triton.24.w8a16", ("2:4+w8a16-int8",), "cuda", ("bf16",), _TRITON + "sparse24", _TRITON_SPARSE),
    KernelSpec(
        "triton.24.w4a16", ("2:4+w4a16-int4-g128",), "cuda", ("bf16",), _TRITON + "sparse24_int4", _TRITON_SPARSE
    ),
)


def kernel(name: str) -> KernelSpec:
    """Look a kernel up by name.

    Raises:
        InputError: `kernel.unknown`, with the closest known names.
    """
    for spec in KERNELS:
        if spec.name == name:
            return spec
    raise InputError("kernel.unknown", f"there is no kernel {name!r}.", did_you_mean(name, [k.name for k in KERNELS]))


def kernel_hash(spec: KernelSpec) -> str:
    """sha256 of what a measurement depends on: the source of kernel, reference and formats, and torch's version.

    Of kernels compiled here: everything beside them, which they share, and what compiles it.
    """
    module = _source(spec.module)
    compiled, by_nvcc = ("cxx" in spec.limits.features), ("nvcc" in spec.limits.features)
    used = ("reference", "formats", "packing") if compiled else ("reference", "formats")
    shared = {".py", ".h", ".cpp", ".cu"} if compiled or by_nvcc else {".py"} if spec.device == "cuda" else set()
    files = [module, *(_source(f"autotune.kernels.{name}") for name in used)]
    made_by = build.made_by() if compiled else cuda_build.made_by() if by_nvcc else ()
    files += sorted(path for path in module.parent.iterdir() if path.suffix in shared)
    return digest([spec.name, *map(file_digest, files), *made_by, version("torch")])


def dense_of(weight: GroupWeight) -> torch.Tensor:
    """The dense matrix of a weight that is not quantized.

    Raises:
        InputError: `kernel.weight`.
    """
    if weight.dense is None:
        raise InputError("kernel.weight", f"a {weight.scheme} weight needs a dense matrix, and this one has none.")
    return weight.dense


def load(spec: KernelSpec) -> KernelModule:
    return cast(KernelModule, import_module(spec.module))


def _source(module: str) -> Path:
    found = find_spec(module)
    if found is None or found.origin is None:
        raise InputError("kernel.unknown", f"the kernel table names {module}, which is not installed.", "Reinstall.")
    return Path(found.origin)
