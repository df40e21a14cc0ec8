"""Compression schemes: sparsity pattern x weight format x activation format, written as the field writes them.

A scheme says what the numbers are, not which code runs them: `w4a16-int4-g128` keeps 4-bit signed integers with one
scale per 128 inputs and leaves activations alone; `2:4+w8a8-int8` has two non-zeros in every four weights along the
inputs, 8 bits each, and quantizes activations per token. `bf16` and `fp32` are the dense schemes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autotune.errors import InputError, did_you_mean

Sparsity = Literal["dense", "2:4"]


@dataclass(frozen=True)
class NumberFormat:
    """How one tensor's numbers are kept. `group_size` None: one scale an output channel (weights), a token (inputs)."""

    kind: Literal["int", "float"]
    bits: int
    group_size: int | None = None

    @property
    def qmax(self) -> float:
        """Largest magnitude a code can take; integers are symmetric (-qmax..qmax), fp8 is e4m3."""
        if self.kind == "int":
            return float(2 ** (self.bits - 1) - 1)
        return 448.0


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
    def bits_per_weight(self) -> float:
        """Bits of storage a weight, scales (16 bit) per group and 2:4 positions (2 bits a survivor) included."""
        bits = float(self.weight.bits)
        if self.sparsity == "2:4":
            bits = bits / 2 + 1.0
        if self.weight.group_size:
            bits += 16.0 / self.weight.group_size
        return bits


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
_BY_NAME = {scheme.name: scheme for scheme in SCHEMES}


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
