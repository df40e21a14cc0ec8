"""2:4 weights and activations of 8 bits on sparse tensor cores, by a CUDA C++ kernel of our own (`mma.sp`).

Every output is summed in int32 and rescaled in the epilogue: one rounding to bf16, where cuSPARSELt, which has no
epilogue for two scales, takes two and a second pass. Rows of activations need no padding. Made for prompts: a block
takes 128 tokens, so few rows leave most of it idle. Compiled by nvcc on first use. Not yet run on a card: its numbers
were checked with the instructions emulated.
"""

from __future__ import annotations

import torch

from autotune.kernels.cuda import build
from autotune.kernels.reference import canonical
from autotune.kernels.spec import GroupWeight, Packed
from autotune.kernels.torch.cuda_activations import INT8, quantize
from autotune.kernels.triton.survivors import survivors

TILE, STEP = 128, 64  # outputs of a block, inputs of a product


def home() -> torch.device:
    return torch.device("cuda")


def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
    codes, scales = canonical(weight)
    outputs, inputs = codes.shape
    device = home()
    padded = torch.nn.functional.pad(codes.to(device), (0, 0, 0, -outputs % TILE))
    values, places = arranged(padded)
    channels = scales.flatten().contiguous().to(device)
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    held = sum(part.nbytes for part in (values, places, channels, bias) if part is not None)
    return Packed(outputs, inputs, dtype, held, (values, places, channels, bias))


def arranged(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """2:4 codes (out, in) to values and places as lanes want them: (tiles, steps, 8, 32, 16 and 4) bytes.

    Output 2 g + h of 16 is row g + 8 h of a product, so that a lane's two outputs are neighbours.
    """
    outputs, inputs = codes.shape
    tiles, steps = outputs // TILE, inputs // STEP
    kept, where = survivors(codes)  # (out, in / 4, 2)
    values = kept.reshape(tiles, 8, 8, 2, steps, 2, 4, 4)  # tile, 16 rows, g, h, step, half, t, four of a word
    values = values.permute(0, 4, 1, 2, 6, 5, 3, 7).reshape(tiles, steps, 8, 32, 16)
    fours = where.reshape(tiles, 8, 8, 2, steps, 2, 4, 4)  # the same, 16 places of a half: four bytes of four
    bytes_of = fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6
    places = bytes_of.permute(0, 4, 1, 2, 5, 3, 6).reshape(tiles, steps, 8, 32, 4)
    return values.contiguous(), places.contiguous()


def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    values, places, channels, bias = packed.data
    codes, scales = quantize(x, INT8)
    y = torch.empty(x.shape[0], packed.out_features, dtype=packed.dtype, device=x.device)
    addresses = [
        None if part is None else part.data_ptr() for part in (values, places, codes, scales, channels, bias, y)
    ]
    _call(addresses, (x.shape[0], packed.out_features, packed.in_features // STEP), stream(x.device))
    return y


def stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _call(addresses: list[int | None], sizes: tuple[int, int, int], on: int) -> None:
    import ctypes

    library = build.library("sparse24_w8a8")
    given = [*map(ctypes.c_void_p, addresses), *map(ctypes.c_int, sizes), ctypes.c_void_p(on)]
    if error := library.sparse24_w8a8(*given):
        library.error_of.restype = ctypes.c_char_p
        raise RuntimeError(f"CUDA error: {library.error_of(error).decode()}")
