"""int4 weights with a scale per group of inputs on CPUs: torch's int4 operator, and a dense multiply for many rows.

`_weight_int4pack_mm_for_cpu` computes (q - 8) * scale + zero for unsigned q, so canonical codes go in as q = code + 8
with zero 0: exact. Its packed layout is a detail of torch's CPU code (blocks of 64 outputs with AVX-512, 32 with AVX2;
within a block, one line per input whose low nibbles are the first half of the outputs and whose high nibbles are the
second). `_block` finds it by packing a probe. From `_DENSE_ROWS` rows on, blocks are unpacked by that rule into
a scratch buffer and multiplied densely, so one stored copy serves both routes. Outputs are padded to whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from autotune.errors import DeviceError
from autotune.kernels.reference import canonical
from autotune.kernels.scratch import scratch
from autotune.kernels.spec import Form, GroupWeight, Packed

_DENSE_ROWS = 64  # measured: the operator costs as much as unpacking and multiplying at 50 to 90 rows
_PADDING = 64  # a multiple of every block size


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    out_features, in_features = codes.shape
    groups = scales.shape[1]
    _block()  # refuse an unknown layout now, not in the first prompt
    padded = -(-out_features // _PADDING) * _PADDING
    unsigned = torch.full((padded, in_features), 8, dtype=torch.int32)
    unsigned[:out_features] = codes
    unsigned[:out_features] += 8
    nibbles = torch._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    scales_zeros = torch.zeros(groups, padded, 2, dtype=dtype)
    scales_zeros[:, :out_features, 0] = scales.T
    bias = None if weight.bias is None else weight.bias.to(dtype)
    held = nibbles.nbytes + scales_zeros.nbytes + (0 if bias is None else bias.nbytes)
    return Packed(out_features, in_features, dtype, held, (nibbles, scales_zeros, bias))


def tensors(packed: Packed) -> tuple[torch.Tensor | None, ...]:
    return (*packed.data, torch.tensor([_block()]))


def bind(held: Sequence[torch.Tensor | None], form: Form) -> Packed:
    """Raises: DeviceError `kernel.layout` where the weights were packed for another kind of CPU."""
    *data, block = held
    assert block is not None
    if int(block) != _block():
        message = f"these int4 weights lie in blocks of {int(block)}, and torch reads blocks of {_block()} on this CPU."
        raise DeviceError("kernel.layout", message, "Export the model again on this kind of CPU.")
    return form.packed(tuple(data))


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    nibbles, scales_zeros, bias = packed.data
    if x.shape[0] < _DENSE_ROWS:
        size = packed.in_features // scales_zeros.shape[0]
        y = torch._weight_int4pack_mm_for_cpu(x, nibbles, size, scales_zeros)
    else:
        y = x @ _unpack(packed, x.device)
    if y.shape[1] != packed.out_features:
        y = y[:, : packed.out_features].contiguous()
    return y if bias is None else y.add_(bias)


def _unpack(packed: Packed, device: torch.device) -> torch.Tensor:
    """W^T (in, padded out) in the scratch buffer. Bytes are transposed first, while they are few."""
    nibbles, scales_zeros, _ = packed.data
    groups, outputs, _ = scales_zeros.shape
    inputs, half = packed.in_features, _block() // 2
    shape = (inputs, outputs // (2 * half), half)
    lines = scratch(inputs * outputs // 2, torch.uint8, device, "nibbles").view(shape)
    lines.copy_(nibbles.view(shape[1], inputs, half).transpose(0, 1))
    codes = scratch(inputs * outputs, torch.uint8, device, "codes").view(inputs, shape[1], 2, half)
    torch.bitwise_and(lines, 15, out=codes[:, :, 0])
    torch.bitwise_right_shift(lines, 4, out=codes[:, :, 1])
    dense = scratch(inputs * outputs, packed.dtype, device, "weight").view(inputs, outputs)
    dense.copy_(codes.view(torch.int8).sub_(8).view(inputs, outputs))
    dense.view(groups, -1, outputs).mul_(scales_zeros[..., 0].contiguous().unsqueeze(1))
    return dense


@cache
def _block() -> int:
    """Outputs in a block of the packed layout on this CPU."""
    codes = torch.randint(0, 16, (_PADDING, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    nibbles = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    for block in (64, 32, 16):
        lines = nibbles.view(_PADDING // block, 32, block // 2)
        halves = torch.cat([lines & 15, lines >> 4], -1)  # (blocks, inputs, block)
        if torch.equal(halves.transpose(1, 2).reshape(_PADDING, 32).int(), codes):
            return block
    hint = "Use another kernel for int4 on this CPU, and report the CPU and the torch version."
    raise DeviceError("kernel.layout", "torch packs int4 weights in a layout that is not known here.", hint)
