"""The compiled kernels with one mistake each, compiled too: the gate must catch every one on small shapes.

A mistake is a textual change of a kernel's sources. When a source changes so that a mistake no longer fits, its test
says so: write the same mistake for the new source.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import native
import pytest
from native import AVX2, DTYPES, EMULATED, NATIVE, one_thread, only, variant, weight  # noqa: F401 - a fixture

from autotune.errors import DeviceError
from autotune.kernels.checks import gate
from autotune.kernels.spec import KernelModule
from autotune.search_space.schemes import scheme

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, WRONG = "the output holds NaN or infinity", "largest relative error"
TILES, EXPAND, AMX = "tiles.h", "expand.h", "amx_integer.cpp"
W8A8, W8A16, SPARSE8 = ("w8a8-int8", "bf16"), ("w8a16-int8", "bf16"), ("2:4+w8a8-int8", "bf16")
W4A8, W4A16, SPARSE4 = ("w4a8-int4-g32", "bf16"), ("w4a16-int4-g128", "bf16"), ("2:4+w4a16-int4-g128", "bf16")
THREE, TWO = ("w3a16-int3-g128", "bf16"), ("w2a16-int2-g128", "bf16")
W8A16_FP32, DENSE, SPARSE = ("w8a16-int8", "fp32"), ("bf16", "bf16"), ("2:4", "bf16")


@dataclass(frozen=True)
class Mistake:
    name: str
    on: tuple[str, str]  # scheme and dtype it is shown on
    caught: str  # what the gate says
    changes: tuple[native.Change, ...]
    in_brief: bool = False  # compiled in `make test` too
    flags: tuple[str, ...] | None = NATIVE  # None: a packer's mistake, nothing to compile
    rows: tuple[int, ...] = (1, 3, 19)
    shape: tuple[int, int] | None = None  # outputs and inputs, where the two small shapes do not show it


def _one(name: str, on: tuple[str, str], caught: str, file: str, old: str, new: str, **rest: object) -> Mistake:
    return Mistake(name, on, caught, ((file, old, new),), **rest)


CODE, SUMS, FORMATS, QUANT, SIMD = "stream.h", "integer.h", "formats.h", "activations.h", "simd.h"
MISTAKES = (
    # Scales and groups
    _one(
        "the next group's scale",
        W4A8,
        WRONG,
        CODE,
        "* groups + g) * kLanes",
        "* groups + (g + 1) % groups) * kLanes",
        in_brief=True,
    ),
    _one("the first block's scales", W8A8, WRONG, SUMS, "load_bf16(a.scales + first_)", "load_bf16(a.scales)"),
    Mistake(
        "sums not reset between groups",
        W4A16,
        WRONG,
        (
            (
                CODE,
                "    for (int64_t g = 0; g < groups; g++) {\n        Sums<rows> sums[blocks];",
                "    Sums<rows> sums[blocks];\n    for (int64_t g = 0; g < groups; g++) {",
            ),
            (CODE, "sums[b][r][c] = zero_ints();", "if (g == 0) sums[b][r][c] = zero_ints();"),
        ),
        in_brief=True,
    ),
    _one("one activation scale for all rows", W8A8, WRONG, CODE, "x.scales[row]", "x.scales[token]"),
    _one(
        "the fourth row of a group with the third's scale",
        W8A8,
        WRONG,
        CODE,
        "x.scales[row]",
        "x.scales[token + (t == 3 ? 2 : t)]",
        rows=(8,),
    ),
    _one(
        "the second plane of two left out",
        W8A16,
        WRONG,
        SUMS,
        "plane == planes - 1 ? 1.0f",
        "plane == planes - 1 ? 0.0f",
        rows=(19,),
        shape=(512, 1024),
    ),
    _one("planes weighed the other way around", W8A16, WRONG, SUMS, "plane == planes - 1 ? 1.0f", "plane == 0 ? 1.0f"),
    _one(
        "the last plane of three left out",
        W8A16_FP32,
        WRONG,
        SUMS,
        "plane == planes - 1 ? 1.0f",
        "plane == planes - 1 ? 0.0f",
    ),
    # Sums and offsets
    _one(
        "sums that wrap at 16 bits",
        W8A8,
        WRONG,
        SUMS,
        "to_floats(sums(plane) - whole_off_)",
        "to_floats(shift_right_signed<16>(shift_left_int<16>(sums(plane) - whole_off_)))",
    ),
    _one(
        "the offset of the activations left in",
        W8A8,
        WRONG,
        SUMS,
        "to_floats(sums(plane) - whole_off_)",
        "to_floats(sums(plane))",
        in_brief=True,
    ),
    _one(
        "a chain of sums left out",
        W8A8,
        WRONG,
        CODE,
        "(chains[0] + chains[1]) + (chains[2] + chains[3])",
        "(chains[0] + chains[1]) + chains[2]",
    ),
    _one(
        "16-bit products that saturate",
        W8A8,
        WRONG,
        SIMD,
        "return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));",
        "return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));",
        flags=AVX2,
        in_brief=True,
    ),
    # Inputs
    _one(
        "the last step of inputs skipped",
        W8A8,
        WRONG,
        CODE,
        "s < a.steps_per_group; s++",
        "s + 1 < a.steps_per_group || s == 0; s++",
    ),
    _one(
        "inputs behind the last full vector skipped",
        W8A8,
        WRONG,
        QUANT,
        "for (int64_t i = 0; i < count; i += 16) {\n        uint8_t*",
        "for (int64_t i = 0; i + 16 <= count; i += 16) {\n        uint8_t*",
    ),
    _one(
        "codes rounded down",
        W8A8,
        WRONG,
        QUANT,
        "to_nearest(max(min(a / by, high), low))",
        "to_nearest(max(min(a / by - splat(0.5f), high), low))",
    ),
    _one("the largest input, not the largest magnitude", W8A8, WRONG, QUANT, "max(most, magnitude(a))", "max(most, a)"),
    _one(
        "codes out of their places",
        W8A8,
        WRONG,
        SIMD,
        "_mm256_packs_epi32(a.v[0], a.v[1]), 0xD8",
        "_mm256_packs_epi32(a.v[0], a.v[1]), 0xE4",
        flags=AVX2,
    ),
    # Weights
    _one(
        "swapped nibbles",
        W4A8,
        WRONG,
        FORMATS,
        "if constexpr (j % 2) return both & splat_byte(0xF0);",
        "if constexpr (j % 2 == 0) return both & splat_byte(0xF0);",
    ),
    _one(
        "the next chunk's positions",
        SPARSE8,
        WRONG,
        FORMATS,
        "shift_right<2 * t>(positions)",
        "shift_right<2 * (t ^ 1)>(positions)",
        in_brief=True,
    ),
    _one(
        "quads out of order",
        SPARSE4,
        WRONG,
        FORMATS,
        "upper ? 0x0C0C0808u : 0x04040000u",
        "upper ? 0x08080C0Cu : 0x00000404u",
    ),
    _one(
        "the lowest of three bits from another input",
        THREE,
        WRONG,
        FORMATS,
        "shift_left<5 - j>(lowest)",
        "shift_left<5 - (j & 4)>(lowest)",
        in_brief=True,
    ),
    _one(
        "three bits with their neighbours",
        THREE,
        WRONG,
        FORMATS,
        "and_or(upper, splat_byte(0xC0)",
        "and_or(upper, splat_byte(0xD0)",
    ),
    _one(
        "two bits with their neighbours",
        TWO,
        WRONG,
        FORMATS,
        "(load_bytes(w + 64 * (j / 4))) & splat_byte(0xC0);",
        "(load_bytes(w + 64 * (j / 4))) & splat_byte(0xE0);",
    ),
    _one(
        "the second block of a tile with the first's weights",
        W4A16,
        WRONG,
        FORMATS,
        "quad<j>(w + b * apart)",
        "quad<j>(w + (rows < 8) * b * apart)",
        in_brief=True,
    ),
    # Rows and outputs
    _one(
        "the last of an odd number of blocks not computed in pairs",
        W8A8,
        NAN,
        CODE,
        "block < last; block += tile",
        "block + tile <= last; block += tile",
    ),
    _one(
        "the last output of a part block not written",
        W8A8,
        NAN,
        QUANT,
        "padded, (count - i) * Type::kBytes",
        "padded, (count - i - 1) * Type::kBytes",
        in_brief=True,
    ),
    _one("the last block not computed", W4A16, NAN, CODE, "share(a.blocks, thread", "share(a.blocks - 1, thread"),
    _one(
        "a single row behind full groups not computed",
        W8A8,
        NAN,
        CODE,
        "if constexpr (tokens > 1)\n        if (token < end)",
        "if constexpr (tokens > 1)\n        if (token + 1 < end)",
    ),
    _one(
        "rows a plane too close together",
        W8A16,
        WRONG,
        CODE,
        "x.codes + token * planes * a.padded",
        "x.codes + token * a.padded",
    ),
    _one("the first block's bias", W8A8, WRONG, SUMS, "load_floats(a.bias + first_)", "load_floats(a.bias)"),
    _one(
        "a row between two passes not computed",
        W8A16,
        NAN,
        CODE,
        "start < x.count; start += pass",
        "start < x.count; start += pass + 1",
        rows=(43,),
        shape=(33, 16384),
    ),
    _one(
        "activations of the call before",
        W8A8,
        WRONG,
        CODE,
        "if (codes) quantize<Type, planes>(a, x, 0, 1, 1, codes, scales);",
        "static thread_local bool done = false; if (codes && !done) "
        "quantize<Type, planes>(a, x, 0, 1, 1, codes, scales); done = true;",
    ),
    _one(
        "rows of a group interleaved too closely",
        W8A16,
        WRONG,
        CODE,
        "group.size * planes * kStep, place",
        "(group.size > 1 ? group.size - 1 : 1) * planes * kStep, place",
    ),
    # bf16
    _one(
        "positions of another quad",
        SPARSE,
        WRONG,
        "bf16.cpp",
        "_mm512_set1_epi16(4 * t)",
        "_mm512_set1_epi16(4 * (t ^ 1))",
        in_brief=True,
    ),
    _one(
        "pairs of inputs out of order", DENSE, WRONG, "bf16.cpp", "x + r * kStep + 2 * j", "x + r * kStep + 2 * (j ^ 1)"
    ),
    _one("one chain of sums for all", DENSE, WRONG, "bf16.cpp", "c < kChains<rows>; c++) total", "c < 1; c++) total"),
    _one("the last output masked off", SPARSE, NAN, "bf16.cpp", "(1u << count) - 1;", "((1u << count) - 1) >> 1;"),
    _one("no bias", SPARSE, WRONG, "bf16.cpp", "__m512 total = bias;", "__m512 total = _mm512_setzero_ps();"),
    # Tiles
    _one(
        "the second sixteen rows' sums from the first's activations",
        W8A8,
        WRONG,
        TILES,
        "x + i * x_step + 16 * width",
        "x + i * x_step",
        flags=EMULATED,
        rows=(33,),
    ),
    Mistake(
        "sums of rows and of outputs stored in each other's place",
        W8A16,
        WRONG,
        (
            (
                TILES,
                "if constexpr (high == 2) tile_store<2>(to + kSum",
                "if constexpr (high == 2) tile_store<2>(to + 2 * kSum",
            ),
            (
                TILES,
                "if constexpr (wide == 2) tile_store<1>(to + 2 * kSum",
                "if constexpr (wide == 2) tile_store<1>(to + kSum",
            ),
        ),
        flags=EMULATED,
        rows=(33,),
    ),
    _one(
        "the next group's weights with this group's activations",
        W4A8,
        WRONG,
        AMX,
        "codes += cut.tiles_per_group * kPanelRows * cut.width;",
        "",
        flags=EMULATED,
        in_brief=True,
    ),
    _one(
        "the first of two blocks' scales",
        W4A16,
        WRONG,
        AMX,
        "((block + b) * groups + g)",
        "(block * groups + g)",
        flags=EMULATED,
    ),
    _one(
        "nibbles expanded the other way around",
        W4A16,
        WRONG,
        EXPAND,
        "put(to + 128 * j, shift_left<4>(both) & high);\n        put(to + 128 * j + 64, both & high);",
        "put(to + 128 * j + 64, shift_left<4>(both) & high);\n        put(to + 128 * j, both & high);",
        flags=EMULATED,
    ),
    _one(
        "a survivor at its neighbour's position",
        SPARSE8,
        WRONG,
        EXPAND,
        "8 * (at >> 24 & 3)",
        "8 * (at >> 16 & 3)",
        flags=EMULATED,
    ),
    _one(
        "weights that are not zero behind the last step",
        W8A8,
        WRONG,
        EXPAND,
        "steps * Int8::kBytes, 0,",
        "steps * Int8::kBytes, 127,",
        flags=EMULATED,
        shape=(33, 288),
    ),
    _one(
        "the last of an odd number of blocks not computed",
        W8A8,
        NAN,
        AMX,
        "block < last; block += kStripBlocks",
        "block + 1 < last; block += kStripBlocks",
        flags=EMULATED,
    ),
    _one(
        "rows behind the first pass not computed",
        W8A16,
        NAN,
        AMX,
        "start < panels; start += pass",
        "start < 1; start += pass",
        flags=EMULATED,
        rows=(43,),
        shape=(33, 16384),
    ),
    _one(
        "survivors of bf16 in the other pair",
        SPARSE,
        WRONG,
        EXPAND,
        "static_cast<uint32_t>(quad >> 32)",
        "static_cast<uint32_t>(quad)",
        flags=EMULATED,
        in_brief=True,
    ),
    _one(
        "inputs behind the last not zero",
        DENSE,
        NAN,
        "amx_bf16.cpp",
        "std::memset(place + bytes, 0,",
        "std::memset(place + bytes, 255,",
        flags=EMULATED,
    ),
    # Packers
    _one(
        "nibbles packed the other way around",
        W4A8,
        WRONG,
        "integer.py",
        "(low & 15) | (high << 4)",
        "(high & 15) | (low << 4)",
        flags=None,
    ),
    _one(
        "scales by output, then by group",
        W4A16,
        WRONG,
        "integer.py",
        ".transpose(1, 2).to(torch.bfloat16)",
        ".to(torch.bfloat16)",
        flags=None,
    ),
    _one("an offset of 127", W4A16, WRONG, "integer.py", ".mul_(128.0)", ".mul_(127.0)", flags=None),
    _one("an offset of 127 in whole numbers", W8A8, WRONG, "integer.py", ".mul_(128).", ".mul_(127).", flags=None),
    _one(
        "positions of two chunks swapped",
        SPARSE8,
        WRONG,
        "integer.py",
        "spots[:, :, 1] << 2 | spots[:, :, 2] << 4",
        "spots[:, :, 1] << 4 | spots[:, :, 2] << 2",
        flags=None,
    ),
    _one(
        "the corrections of unscaled codes",
        W4A8,
        WRONG,
        "integer.py",
        "(sums.double() * scales.double()).sum(1)",
        "(sums.double().sum(1) * scales.double().mean(1))",
        flags=None,
    ),
    _one(
        "positions of the halves swapped",
        SPARSE,
        WRONG,
        "bf16.py",
        "for half in (0, 4))",
        "for half in (4, 0))",
        flags=None,
    ),
)
CONTROLS = sorted({(mistake.on, mistake.rows, mistake.shape) for mistake in MISTAKES}, key=str)


def _gate(on: tuple[str, str], rows: tuple[int, ...], shape: tuple[int, int] | None, module: KernelModule) -> None:
    """Two shapes, neither of whole blocks, one not of whole steps where the scheme allows; or the one given."""
    name, dtype = on
    spec = next(spec for spec in native.SPECS if name in spec.schemes and dtype in spec.dtypes)
    grouped = scheme(name).weight.group_size
    for outputs, inputs in [shape] if shape else [(40, 384), (33, 384 if grouped else 100)]:
        made = weight(name, outputs, inputs, DTYPES[dtype])
        packed = module.pack(made, DTYPES[dtype])
        for count in rows:
            gate(spec, made, packed, count, module)


def _module(on: tuple[str, str]) -> str:
    return "bf16" if on in (DENSE, SPARSE) else "narrow" if on in (THREE, TWO) else "integer"


def _cases() -> list[object]:
    cases = []
    for mistake in MISTAKES:
        module = _module(mistake.on)
        module = f"amx_{module}" if mistake.flags is EMULATED else module
        marks = [
            pytest.mark.skipif(
                not native.runs_here(module.removeprefix("amx_"), mistake.flags),
                reason="this CPU cannot run the kernel",
            )
        ]
        marks += [] if mistake.in_brief or mistake.flags is None else [pytest.mark.slow]
        cases.append(pytest.param(mistake, module, id=mistake.name, marks=marks))
    return cases


@pytest.mark.parametrize(("mistake", "module"), _cases())
def test_the_gate_catches(mistake, module, tmp_path):
    fewer = only(mistake.on) if module == "integer" and mistake.flags else []
    broken = variant(module, tmp_path, mistake.flags, [*mistake.changes, *fewer])
    with pytest.raises(DeviceError, match=r"kernel\.wrong") as error:
        _gate(mistake.on, mistake.rows, mistake.shape, broken)
    assert mistake.caught in str(error.value)


@pytest.mark.parametrize(("on", "rows", "shape"), CONTROLS, ids=str)
def test_the_gate_lets_the_honest_ones_pass(on, rows, shape):
    module = _module(on)
    if not native.runs_here(module):
        pytest.skip("this CPU cannot run the kernel")
    _gate(on, rows, shape, import_module(f"autotune.kernels.cpu.{module}"))
