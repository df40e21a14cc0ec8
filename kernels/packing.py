"""Exact bit packing of integer codes and of 2:4 patterns, for storage; kernels have layouts of their own.

Eight codes of b bits make b bytes, least significant first, rows padded to whole bytes: ceil(in * b / 8) bytes a row.
4-bit codes are therefore two to a byte, the earlier one in the low nibble. Codes are two's complement. A 2:4 tensor
keeps two values of every four inputs, in order, and where they were: 2 bits each, four to a byte.
"""

from __future__ import annotations

import torch

from autotune.errors import InputError

# For each mask of non-zeros in a group of four (bit i: input i), two bits each: the two positions kept, ascending.
_FIRST = [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 2, 0, 0, 0]
_SECOND = [1, 1, 1, 1, 2, 2, 2, 0, 3, 3, 3, 0, 3, 0, 0, 0]
_TOO_MANY = sum(1 << mask for mask in range(16) if mask.bit_count() > 2)
_LOWEST_BITS = 1 << 24 | 1 << 17 | 1 << 10 | 1 << 3  # times four bytes of 0 or 1: these, side by side, from bit 24 on
_WORDS = {1: torch.int32, 2: torch.int64}  # four values of so many bytes, as one number
_WHOLE = {8: torch.int8, 16: torch.int16}  # one value of so many bits


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes (out, in) within -2^(bits-1) .. 2^(bits-1)-1 to uint8 (out, ceil(in * bits / 8)); bits: 2, 3, 4 or 8.

    Raises:
        InputError: `packing.bits`, `packing.range`.
    """
    _check_bits(bits)
    if bits == 8:
        return codes.contiguous().view(torch.uint8).clone()
    half = 2 ** (bits - 1)
    if codes.numel() and not (-half <= int(codes.min()) and int(codes.max()) < half):
        found = f"{int(codes.min())}..{int(codes.max())}"
        raise InputError(
            "packing.range", f"codes {found} do not fit {bits} bits.", f"Clamp them to {-half}..{half - 1}."
        )
    return _pack_unsigned(codes.bitwise_and(2**bits - 1), bits)


def unpack_codes(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """The int8 codes (out, in_features) that `pack_codes` was given.

    Raises:
        InputError: `packing.bits`, `packing.shape`.
    """
    _check_bits(bits)
    if packed.shape[1] != -(-in_features * bits // 8):
        raise InputError("packing.shape", f"{packed.shape[1]} bytes a row are not {in_features} codes of {bits} bits.")
    if bits == 8:
        return packed.contiguous().view(torch.int8).clone()
    half = 2 ** (bits - 1)
    return _unpack_unsigned(packed, bits, in_features).bitwise_xor_(half).sub_(half)


def compress_24(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) with at most two non-zeros in every four inputs to values (out, in/2) and positions uint8 (out, in/8).

    Where fewer than two are non-zero, the lowest free positions fill up with zeros.

    Raises:
        InputError: `packing.pattern` when a group of four has more than two non-zeros, or `in` is not a multiple of 4.
    """
    rows, inputs = codes.shape
    if inputs % 4:
        raise InputError("packing.pattern", f"{inputs} inputs are not a multiple of 4, as 2:4 needs.")
    quads = movable(codes).contiguous().view(rows, inputs // 4, 4)
    own = quads if quads.dtype == codes.dtype else quads.bitwise_and(0x7F)  # of fp8 without the sign: -0.0 is a zero
    mask = ((own != 0).view(torch.int32).squeeze(-1) * _LOWEST_BITS >> 24).bitwise_and_(15)
    bad = int((_table(_TOO_MANY, mask.device) >> mask).bitwise_and_(1).sum())
    if bad:
        raise InputError(
            "packing.pattern", f"{bad} groups of four inputs have more than two non-zeros.", "Prune first."
        )
    mask *= 2
    tables = [_table(_pairs(places), mask.device) for places in (_FIRST, _SECOND)]
    kept = [(table >> mask).bitwise_and_(3) for table in tables]  # (out, in/4)
    positions = torch.stack(kept, -1)
    word = _WORDS.get(quads.element_size())
    if word is None:
        values = quads.gather(-1, positions.long())
    else:  # a shift costs a tenth of a gather
        words, width = quads.view(word).squeeze(-1), 8 * quads.element_size()
        parts = [(words >> place * width).to(_WHOLE[width]) for place in kept]
        values = torch.stack(parts, -1).view(quads.dtype)
    return values.view(rows, inputs // 2).view(codes.dtype), _pack_unsigned(positions.view(rows, inputs // 2), 2)


def positions_24(positions: torch.Tensor, survivors: int) -> torch.Tensor:
    """Positions as `compress_24` packs them to uint8 (out, survivors): where each was in its group of four, 0 to 3."""
    return _unpack_unsigned(positions, 2, survivors).view(torch.uint8)


def expand_24(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The tensor (out, in) that `compress_24` was given."""
    rows, survivors = values.shape
    if survivors % 2 or positions.shape[1] != -(-survivors // 4):
        raise InputError("packing.shape", f"{survivors} values do not go with {positions.shape[1]} bytes of positions.")
    index = positions_24(positions, survivors).view(rows, survivors // 2, 2).long()
    source = movable(values)
    quads = torch.zeros(rows, survivors // 2, 4, dtype=source.dtype, device=source.device)
    quads.scatter_(-1, index, source.view(rows, survivors // 2, 2))
    return quads.view(rows, survivors * 2).view(values.dtype)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool (out, in) to uint8 (out, ceil(in / 8)), the earliest input in the lowest bit."""
    return _pack_unsigned(mask, 1)


def unpack_bits(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """The bools (out, in_features) that `pack_bits` was given.

    Raises:
        InputError: `packing.shape`.
    """
    if packed.shape[1] != -(-in_features // 8):
        raise InputError("packing.shape", f"{packed.shape[1]} bytes a row are not {in_features} bits.")
    return _unpack_unsigned(packed, 1, in_features).view(torch.bool)


def movable(values: torch.Tensor) -> torch.Tensor:
    """The same bytes in a type that torch can gather and scatter: it does neither for fp8."""
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


def _pairs(values: list[int]) -> int:
    """Sixteen numbers below four as one of 32 bits, the first in the lowest."""
    return sum(value << (2 * place) for place, value in enumerate(values))


def _table(bits: int, device: torch.device) -> torch.Tensor:
    """32 bits as an int32 that can be shifted by a tensor; the sign is one of them."""
    return torch.tensor(bits - (1 << 32 if bits >> 31 else 0), dtype=torch.int32, device=device)


def _pack_unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows, inputs = codes.shape
    words = torch.zeros(rows, -(-inputs // 8), dtype=torch.int32, device=codes.device)  # eight codes of at most 4 bits
    for place in range(8):
        part = codes[:, place::8]
        words[:, : part.shape[1]] |= part.to(torch.int32) << (bits * place)
    bytes_ = [(words >> (8 * i)).bitwise_and_(255).to(torch.uint8) for i in range(bits)]
    return torch.stack(bytes_, -1).view(rows, -1)[:, : -(-inputs * bits // 8)].contiguous()


def _unpack_unsigned(packed: torch.Tensor, bits: int, inputs: int) -> torch.Tensor:
    rows, groups = packed.shape[0], -(-inputs // 8)
    padded = torch.zeros(rows, groups * bits, dtype=torch.uint8, device=packed.device)
    padded[:, : packed.shape[1]] = packed
    padded = padded.view(rows, groups, bits)
    words = torch.zeros(rows, groups, dtype=torch.int32, device=packed.device)
    for i in range(bits):
        words |= padded[:, :, i].to(torch.int32) << (8 * i)
    places = [(words >> (bits * place)).bitwise_and_(2**bits - 1).to(torch.int8) for place in range(8)]
    return torch.stack(places, -1).view(rows, -1)[:, :inputs].contiguous()


def _check_bits(bits: int) -> None:
    if bits not in (2, 3, 4, 8):
        raise InputError("packing.bits", f"codes of {bits} bits cannot be packed.", "Use 2, 3, 4 or 8.")
