"""Compression schemes: sparsity pattern x weight format x activation format, written as the field writes them.

A scheme says what the numbers are, not which code runs them: `w4a16-int4-g128` keeps 4-bit signed integers with one
scale per 128 inputs and leaves activations alone; `2:4+w8a8-int8` has two non-zeros in every four weights along the
inputs, 8 bits each, and quantizes activations per token. `bf16` and `fp32` are the dense schemes.

`SCHEMES` are the search space; `MORE` are searched where `--schemes` names them. Sparse schemes have symmetric integers
or floats, in which the code 0 is the number 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from autotune.errors import InputError, did_you_mean

# N:M keeps N of every M weights along the inputs; "50%" keeps that share of every row, wherever (unstructured).
Sparsity = Literal["dense", "2:4", "4:8", "50%"]
_BLOCKS: dict[Sparsity, int | None] = {"dense": 1, "2:4": 4, "4:8": 8, "50%": None}
_KEPT: dict[Sparsity, float] = {"dense": 1.0, "2:4": 0.5, "4:8": 0.5, "50%": 0.5}


@dataclass(frozen=True)
class NumberFormat:
    """How one tensor's numbers are kept.

    Kinds: two's complement integers; floats (16 and 32 bits as they are, 8 bits e4m3, 4 bits e2m1); NF4, the 16
    quantiles of a normal distribution (QLoRA, arXiv 2305.14314). `group_size` None: one scale an output channel
    (weights), a token (inputs).
    """

    kind: Literal["int", "float", "nf"]
    bits: int
    group_size: int | None = None
    rows: int | None = 1  # output channels that share a scale; None: all of the tensor
    symmetric: bool = True  # False: integers with a zero point beside every scale, of as many bits
    # 8 significant bits, as bf16 and fp16 hold them; a power of two (MX); e4m3 times a power of two a tensor (NVFP4)
    scale: Literal["bf16", "e8m0", "e4m3"] = "bf16"

    @property
    def qmax(self) -> float:
        """Largest magnitude a code stands for; symmetric integers are -qmax..qmax."""
        if self.kind == "int":
            return float(2 ** (self.bits - 1) - 1)
        return 1.0 if self.kind == "nf" else {4: 6.0, 8: 448.0}.get(self.bits, math.inf)

    @property
    def scale_bits(self) -> int:
        """Bits of a scale, its zero point included."""
        return (16 if self.scale == "bf16" else 8) + (0 if self.symmetric else self.bits)


@dataclass(frozen=True)
class Scheme:
    name: str
    weight: NumberFormat
    activation: NumberFormat | None = None  # None: activations stay in the model's dtype
    sparsity: Sparsity = "dense"

    @property
    def is_dense(self) -> bool:
        """True for the model's own numbers: nothing is quantized or pruned."""
        return self.sparsity == "dense" and self.weight.kind == "float" and self.weight.bits >= 16

    @property
    def block(self) -> int | None:
        """Inputs that the pattern is about; None: a whole row."""
        return _BLOCKS[self.sparsity]

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage a weight: scales and zero points per group of inputs included, and where the weights of a
        sparse scheme are (2:4: 2 bits a survivor, else 1 bit a weight)."""
        bits = float(self.weight.bits)
        if self.sparsity != "dense":
            bits = bits * _KEPT[self.sparsity] + 1.0
        if self.weight.group_size and self.weight.rows:
            bits += self.weight.scale_bits / (self.weight.group_size * self.weight.rows)
        return bits

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a weight of this shape as it is stored, every row whole bytes."""
        number = self.weight
        kept = survivors(self.sparsity, in_features)
        row = math.ceil(kept * number.bits / 8)
        if self.sparsity != "dense":
            row += math.ceil(kept / 4) if self.sparsity == "2:4" else math.ceil(in_features / 8)
        if number.bits >= 16:
            return out_features * row
        across = in_features // (number.group_size or in_features)
        down = math.ceil(out_features / (number.rows or out_features))
        scales = down * across * (2 if number.scale == "bf16" else 1) + (4 if number.scale == "e4m3" else 0)
        return out_features * row + scales + (0 if number.symmetric else down * math.ceil(across * number.bits / 8))


def survivors(sparsity: Sparsity, in_features: int) -> int:
    """Weights that a pattern keeps of so many along the inputs: whole blocks, or a row."""
    return math.ceil(in_features * _KEPT[sparsity])


def _int(bits: int, group_size: int | None = None) -> NumberFormat:
    return NumberFormat("int", bits, group_size)


_BF16 = NumberFormat("float", 16)
_FP8 = NumberFormat("float", 8)

SCHEMES: tuple[Scheme, ...] = (
    Scheme("fp32", NumberFormat("float", 32)),
    Scheme("bf16", _BF16),
    Scheme("w8a8-int8", _int(8), _int(8)),
    Scheme("w8a16-int8", _int(8)),
    Scheme("w4a16-int4-g32", _int(4, 32)),
    Scheme("w4a16-int4-g64", _int(4, 64)),
    Scheme("w4a16-int4-g128", _int(4, 128)),
    Scheme("w4a8-int4-g32", _int(4, 32), _int(8)),
    Scheme("w4a8-int4-g64", _int(4, 64), _int(8)),
    Scheme("w4a8-int4-g128", _int(4, 128), _int(8)),
    Scheme("w8a8-fp8", _FP8, _FP8),
    Scheme("2:4", _BF16, None, "2:4"),
    Scheme("2:4+w8a8-int8", _int(8), _int(8), "2:4"),
    Scheme("2:4+w8a16-int8", _int(8), None, "2:4"),
    Scheme("2:4+w8a8-fp8", _FP8, _FP8, "2:4"),
    Scheme("2:4+w4a16-int4-g128", _int(4, 128), None, "2:4"),
    Scheme("2:4+w4a8-int4-g64", _int(4, 64), _int(8), "2:4"),
    Scheme("2:4+w4a8-int4-g128", _int(4, 128), _int(8), "2:4"),
)

_GROUPED = tuple(
    Scheme(f"w{bits}a16-int{bits}-g{size}{'' if symmetric else '-asym'}", number)
    for bits in (8, 4, 3, 2)
    for size in (32, 64, 128)
    for symmetric in (True, False)
    if (number := NumberFormat("int", bits, size, symmetric=symmetric)) not in {item.weight for item in SCHEMES}
)
_SPARSE: tuple[Sparsity, ...] = ("4:8", "50%")

MORE: tuple[Scheme, ...] = (
    *_GROUPED,
    Scheme("w8a16-fp8", _FP8),
    Scheme("w8a8-fp8-tensor", NumberFormat("float", 8, rows=None), _FP8),
    # Blocks of 128 x 128 weights, activations in pieces of 128 inputs of a token (DeepSeek-V3, arXiv 2412.19437).
    Scheme("w8a8-fp8-128x128", NumberFormat("float", 8, 128, rows=128), NumberFormat("float", 8, 128)),
    Scheme("w4a16-nf4-g64", NumberFormat("nf", 4, 64)),
    Scheme("w4a16-mxfp4", NumberFormat("float", 4, 32, scale="e8m0")),  # OCP Microscaling 1.0
    Scheme("w4a16-nvfp4", NumberFormat("float", 4, 16, scale="e4m3")),
    *(Scheme(name, _BF16, None, name) for name in _SPARSE),
    *(Scheme(f"{name}+w8a16-int8", _int(8), None, name) for name in _SPARSE),
    *(Scheme(f"{name}+w4a16-int4-g128", _int(4, 128), None, name) for name in _SPARSE),
)
_BY_NAME = {scheme.name: scheme for scheme in (*SCHEMES, *MORE)}


CACHE = "kv-"  # how names begin that are no schemes of weights, but formats of the KV cache


def scheme(name: str) -> Scheme:
    """Look a scheme up by name.

    Raises:
        InputError: `scheme.unknown`, with the closest known names.
    """
    if name not in _BY_NAME:
        raise InputError("scheme.unknown", f"there is no scheme {name!r}.", did_you_mean(name, _BY_NAME))
    return _BY_NAME[name]


def dense_scheme(dtype: str) -> Scheme:
    """The scheme that leaves a model of this dtype ("bf16" or "fp32") as it is."""
    return scheme(dtype)
