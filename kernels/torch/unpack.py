"""Any scheme by unpacking: weights are kept at their true size, and every call writes them out dense to multiply.

For schemes without a kernel of their own: it saves memory, never time. The dense matrix lies in a scratch buffer that
all layers share. Codes under 8 bits lie in planes: byte k of a row holds, of a plane of b bits, the codes k, k + n,
k + 2n, ... (n = inputs * b / 8), so that a plane is unpacked by a shift and a mask over whole lines; 3 bits are a plane
of two and a plane of one. Codes of tables lie two to a byte and are looked up in pairs. Pieces of rows stay in cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from autotune.kernels import formats, patterns, storage
from autotune.kernels.packing import movable, pack_codes
from autotune.kernels.reference import canonical, quantize_activations
from autotune.kernels.scratch import scratch
from autotune.kernels.spec import Form, GroupWeight, Packed
from autotune.search_space.schemes import Scheme, scheme, survivors

_CHUNK_WEIGHTS = 2**18
_GRID = ("scales", "zeros", "unit")
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}


@dataclass(frozen=True)
class _Stored:
    item: Scheme
    values: torch.Tensor  # (out, bytes or codes of a row)
    mask: torch.Tensor | None  # (out, ceil(in / 8)) uint8 plane of one bit; None: not sparse
    grid: Mapping[str, torch.Tensor]  # scales, zeros and unit as `storage` has them
    bias: torch.Tensor | None


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    item = scheme(weight.scheme)
    values = weight.dense if weight.dense is not None else canonical(weight)[0]
    out_features, in_features = values.shape
    mask: torch.Tensor | None = None
    grid: dict[str, torch.Tensor] = {}
    if item.sparsity != "dense":
        kept = patterns.kept_mask(values, item)
        mask = _to_planes(kept.to(torch.uint8), 1)
        values = movable(values)[kept].view(values.dtype).view(out_features, -1)
    if weight.codes is not None:
        stored = storage.pack(weight)
        grid = {name: stored[name] for name in _GRID if name in stored}
        values = _pack_values(values, item)
    bias = None if weight.bias is None else weight.bias.to(dtype)
    parts = [values, mask, bias, *grid.values()]
    held = sum(part.nbytes for part in parts if part is not None)
    return Packed(out_features, in_features, dtype, held, _Stored(item, values, mask, grid, bias))


def tensors(packed: Packed) -> tuple[torch.Tensor | None, ...]:
    held: _Stored = packed.data
    return (held.values, held.mask, held.bias, *(held.grid.get(name) for name in _GRID))


def bind(held: Sequence[torch.Tensor | None], form: Form) -> Packed:
    values, mask, bias, *parts = held
    assert values is not None
    grid = {name: part for name, part in zip(_GRID, parts, strict=True) if part is not None}
    return form.packed(_Stored(scheme(form.scheme), values, mask, grid, bias))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    held: _Stored = packed.data
    if held.item.activation is not None:
        x = quantize_activations(x, held.item.activation)
    return torch.nn.functional.linear(x, _dense(packed, x.device), held.bias)


def _dense(packed: Packed, device: torch.device) -> torch.Tensor:
    """W (out, in) in the scratch buffer."""
    held: _Stored = packed.data
    inputs, dtype = packed.in_features, packed.dtype
    dense = scratch(packed.out_features * inputs, dtype, device, "weight").view(-1, inputs)
    scales, zeros = _grid(packed)
    step = max(1, _CHUNK_WEIGHTS // inputs)
    for first in range(0, packed.out_features, step):
        part = slice(first, first + step)
        rows = dense[part]
        _write_levels(rows, held, part)
        if scales is not None:
            grouped = rows.view(len(rows), scales.shape[1], -1)
            if zeros is not None:
                grouped.sub_(zeros[part].unsqueeze(-1))
            grouped.mul_(scales[part].unsqueeze(-1))
    return dense


def _grid(packed: Packed) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    held: _Stored = packed.data
    if not held.grid:
        return None, None
    scales, zeros = storage.unpack_grid(held.item.weight, held.grid, packed.out_features, packed.in_features)
    return scales.to(packed.dtype), None if zeros is None else zeros.to(packed.dtype)


def _write_levels(rows: torch.Tensor, held: _Stored, part: slice) -> None:
    """What the codes of some rows stand for, in the dtype of `rows` (rows, in)."""
    inputs = rows.shape[1]
    values = _unpack_values(held.values[part], held.item, survivors(held.item.sparsity, inputs), rows.dtype)
    if held.mask is None:
        rows.copy_(values)
        return
    mask = _from_planes(held.mask[part], 1, inputs).view(torch.bool)
    rows.zero_().masked_scatter_(mask, values.to(rows.dtype))


def _pack_values(codes: torch.Tensor, item: Scheme) -> torch.Tensor:
    bits = item.weight.bits
    if bits == 8:
        return codes.contiguous()
    if formats.has_table(item.weight):
        return pack_codes(codes, bits)
    return _to_planes((codes + 2 ** (bits - 1)).view(torch.uint8), bits)


def _unpack_values(values: torch.Tensor, item: Scheme, kept: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, kept): levels plus zero points, in any type that holds them."""
    bits = item.weight.bits
    if bits >= 8:
        return values
    if formats.has_table(item.weight):
        pairs = formats.pairs(item.weight, dtype, values.device).index_select(0, values.flatten().int())
        return pairs.view(len(values), -1)[:, :kept]
    return _from_planes(values, bits, kept).view(torch.int8).sub_(2 ** (bits - 1))


def _to_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes (out, n) to bytes (out, ceil(n / 8) * bits)."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    planes, done = [], 0
    for width in _PLANES[bits]:
        parts = (padded >> done).bitwise_and_(2**width - 1).view(len(codes), 8 // width, -1)
        planes.append(sum(parts[:, place] << (width * place) for place in range(8 // width)))
        done += width
    return torch.cat(planes, 1).contiguous()  # type: ignore[arg-type]


def _from_planes(packed: torch.Tensor, bits: int, inputs: int) -> torch.Tensor:
    """The uint8 codes (rows, inputs) behind planes."""
    rows, eighth = packed.shape[0], packed.shape[1] // bits
    codes = torch.empty(rows, eighth * 8, dtype=torch.uint8, device=packed.device)
    done = 0
    for width in _PLANES[bits]:
        plane = packed[:, eighth * done : eighth * (done + width)]
        target = codes if done == 0 else torch.empty_like(codes)
        for place, part in enumerate(target.view(rows, 8 // width, -1).unbind(1)):
            torch.bitwise_right_shift(plane, width * place, out=part)
            if width * (place + 1) < 8:
                part.bitwise_and_(2**width - 1)
        if done:
            codes |= target.bitwise_left_shift_(done)
        done += width
    return codes[:, :inputs]
