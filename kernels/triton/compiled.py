"""Kernels compiled ahead of time for any NVIDIA generation, no card needed, and what the compiler made of them.

    for variant in variants(kernel("triton.w4a16")):
        print(inspect(variant, 9.0))     registers, spills, and the tensor-core instruction in the assembly

Answers "are tensor cores active?" from the assembly itself: `mma` (Ampere, Ada, GeForce Blackwell), `wgmma` (Hopper)
or `tcgen05` (data-centre Blackwell), or none where a kernel multiplies without them on purpose. Triton 3.6 has no
tcgen05 for int8 and uses `mma` there.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autotune.kernels.triton import activations
from autotune.kernels.triton.launch import Config, finish_kernel
from autotune.search_space.coverage import KernelSpec

CAPABILITIES = (8.0, 8.9, 9.0, 10.0, 12.0)
_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
_POINTERS = {
    "x": "*bf16", "y": "*bf16", "dense": "*bf16", "bias": "*bf16", "channels": "*fp32", "parts": "*fp32",
    "words": "*i32", "positions": "*i32", "places": "*i32",
}  # fmt: skip
_WHOLE = ("rows", "padded", "outputs", "inputs", "count")  # arguments that are numbers


@dataclass(frozen=True)
class Variant:
    """One kernel function with one configuration. `tensor_cores`: whether it is meant to use them."""

    name: str
    function: Any
    types: tuple[tuple[str, str], ...]  # argument -> type, "constexpr" for those in `constants`
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    tensor_cores: bool
    least_capability: float = 7.5

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.name} {sizes} warps={self.warps} stages={self.stages}"


@dataclass(frozen=True)
class Resources:
    registers: int
    stack_bytes: int  # a stack frame means spilled registers, or arrays that are not in registers
    local_bytes: int
    shared_bytes: int
    instruction: str  # the tensor-core instruction, "" where there is none

    @property
    def spills(self) -> bool:
        """More than four registers: the assembler keeps one or two values outside of loops in memory now and then."""
        return self.stack_bytes > 16 or self.local_bytes > 0

    def __str__(self) -> str:
        spilled = "spills" if self.spills else "no spills"
        return f"{self.instruction or 'no tensor cores'}, {self.registers} registers, {spilled}"


def variants(spec: KernelSpec, everything: bool = False) -> Iterator[Variant]:
    """What `spec` may launch: each function with its first configuration, or with all of them."""
    module = import_module(spec.module)
    name = spec.module.rpartition(".")[2]
    for scheme in spec.schemes[-1:]:
        yield from _VARIANTS[name](module, scheme, everything)


def shared_variants() -> Iterator[Variant]:
    """Quantizing and rescaling, which the kernels of libraries use as well, and the sum over splits."""
    plain = Config(0, 0, warps=8)
    for integer, codes in ((True, "*i8"), (False, "*fp8e4nv")):
        sizes = {"STEPS": 127.5 if integer else 448.0, "LEAST": 1e-30, "INTEGER": integer, "BLOCK": 4096}
        item = _variant(
            f"quantize {codes}", activations.quantize_kernel, plain, False, sizes, codes=codes, scales="*fp32"
        )
        yield item if integer else replace(item, least_capability=8.9)  # before 8.9 there is no fp8 to convert to
    sizes = {"STEPS": 448.0, "LEAST": 1e-30, "SIZE": 128, "GROUPS": 8}
    grouped = Config(0, 0, warps=4)
    function = activations.quantize_groups_kernel
    item = _variant("quantize groups", function, grouped, False, sizes, codes="*fp8e4nv", scales="*fp32")
    yield replace(item, least_capability=8.9)
    for sums in ("*i32", "*bf16"):
        sizes = {"SCALED": True, "BIASED": True, "BLOCK": 1024}
        yield _variant(f"rescale {sums}", activations.rescale_kernel, plain, False, sizes, sums=sums, scales="*fp32")
    sizes = {"SPLITS": 4, "SCALED": True, "BIASED": True, "BLOCK": 256}
    yield _variant("finish", finish_kernel, plain, False, sizes)


def inspect(variant: Variant, capability: float) -> Resources:
    """Compile for sm_80, sm_90, ... and read the compiler's report."""
    compiled = triton.compile(
        ASTSource(
            variant.function,
            dict(variant.types),
            dict(variant.constants),
            {
                (place,): [["tt.divisibility", 16]]
                for place, (_, kind) in enumerate(variant.types)
                if kind != "constexpr"
            },
        ),
        target=GPUTarget("cuda", round(capability * 10), 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
    report = _report(compiled.asm["cubin"])
    instruction = next((name for name in _INSTRUCTIONS if name in compiled.asm["ptx"]), "")
    return Resources(report["REG"], report["STACK"], report["LOCAL"], compiled.metadata.shared, instruction)


def _report(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory, by the `cuobjdump` that Triton ships."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [_cuobjdump(), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


@cache
def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _variant(
    name: str, function: Any, config: Config, tensor_cores: bool, constants: dict[str, Any], **pointers: str
) -> Variant:
    kinds = _POINTERS | pointers
    types = []
    for argument in function.arg_names:
        if argument in constants:
            types.append((argument, "constexpr"))
        else:
            types.append((argument, "i32" if argument in _WHOLE else kinds[argument]))
    return Variant(name, function, tuple(types), tuple(constants.items()), config.warps, config.stages, tensor_cores)


def _w8a8(module: Any, scheme: str, everything: bool) -> Iterator[Variant]:
    for configs in (module.NARROW, module.MIDDLE, module.WIDE):
        for config in configs if everything else configs[:1]:
            sizes = {"BIASED": True, "BM": config.rows, "BN": config.outputs, "BK": config.steps}
            name = f"w8a8 {config.rows} rows"
            yield _variant(name, module.multiply_kernel, config, True, sizes, x="*i8", w="*i8", scales="*fp32")


def _fp8_blocks(module: Any, scheme: str, everything: bool) -> Iterator[Variant]:
    pointers = {"x": "*fp8e4nv", "w": "*fp8e4nv", "scales": "*fp32", "blocks": "*fp32"}
    for configs in (module.NARROW, module.MIDDLE, module.WIDE):
        for config in configs if everything else configs[:1]:
            sizes = {"BIASED": True, "BM": config.rows, "BN": config.outputs, "BK": config.steps, "WIDE": False}
            name = f"fp8 blocks {config.rows} rows"
            item = _variant(name, module.multiply_kernel, config, True, sizes, **pointers)
            yield replace(item, least_capability=8.9)


def _decode(module: Any, everything: bool, extra: dict[str, Any], **pointers: str) -> Iterator[Variant]:
    """One-row, few-rows and unpacking functions of a weight-only kernel."""
    name = module.__name__.rpartition(".")[2]
    for config in module.configs(1) if everything else module.configs(1)[:1]:
        sizes = {"BIASED": True, "SPLITS": config.splits, "BN": config.outputs, "BK": config.steps, **extra}
        sizes |= {"STAGES": config.stages}
        out = "*bf16" if config.splits == 1 else "*fp32"
        yield _variant(f"{name} 1 row", module.one_row_kernel, config, False, sizes, **pointers, y=out)
    for rows in (16, 32, 64) if everything else (16,):
        for config in module.configs(rows) if everything else module.configs(rows)[:1]:
            sizes = {"BIASED": True, "SPLITS": config.splits, "BN": config.outputs, "BK": config.steps, **extra}
            sizes |= {"BM": rows, "WIDE": False}
            out = "*bf16" if config.splits == 1 else "*fp32"
            yield _variant(f"{name} {rows} rows", module.few_rows_kernel, config, True, sizes, **pointers, y=out)
    kept = {key: value for key, value in extra.items() if key in module.unpack_kernel.arg_names}
    plain = Config(0, 0)
    yield _variant(f"{name} unpack", module.unpack_kernel, plain, False, {**kept, "BLOCK": 256}, **pointers)


def _w8a16(module: Any, scheme: str, everything: bool) -> Iterator[Variant]:
    yield from _decode(module, everything, {"FLOAT": "fp8" in scheme}, w="*i8")


def _w4a16(module: Any, scheme: str, everything: bool) -> Iterator[Variant]:
    for eighth in (16, 8, 4) if everything else (16,):
        yield from _decode(module, everything, {"EIGHTH": eighth}, scales="*bf16")


def _sparse24(module: Any, scheme: str, everything: bool) -> Iterator[Variant]:
    scaled = "int8" in scheme
    kind = "*i8" if scaled else "*bf16"
    yield from _decode(module, everything, {"SCALED": scaled}, first=kind, second=kind)


def _sparse24_int4(module: Any, scheme: str, everything: bool) -> Iterator[Variant]:
    yield from _decode(module, everything, {}, first="*i32", second="*i32", scales="*bf16")


_VARIANTS = {
    "w8a8": _w8a8,
    "fp8_blocks": _fp8_blocks,
    "w8a16": _w8a16,
    "w4a16": _w4a16,
    "sparse24": _sparse24,
    "sparse24_int4": _sparse24_int4,
}
