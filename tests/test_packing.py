"""Bit packing and 2:4 compression are exact for every width and shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import InputError
from autotune.kernels.packing import compress_24, expand_24, pack_codes, unpack_codes

shapes = st.tuples(st.integers(1, 9), st.integers(1, 70))


def _codes(rows: int, inputs: int, bits: int, seed: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, inputs), dtype=torch.int8, generator=generator)


@settings(max_examples=120, deadline=None)
@given(shapes, st.sampled_from((2, 3, 4, 8)), st.integers(0, 2**20))
def test_codes_come_back(shape, bits, seed):
    codes = _codes(*shape, bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], -(-shape[1] * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, shape[1]), codes)


def test_every_code_of_every_width_comes_back():
    for bits in (2, 3, 4, 8):
        half = 2 ** (bits - 1)
        codes = torch.arange(-half, half, dtype=torch.int16).to(torch.int8).view(1, -1)
        assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, codes.shape[1]), codes)


def test_four_bits_put_the_earlier_code_low():
    assert pack_codes(torch.tensor([[1, -1, 7]], dtype=torch.int8), 4).tolist() == [[0xF1, 0x07]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.sampled_from(("int8", "bf16")), st.integers(0, 2**20))
def test_24_comes_back(rows, groups, kind, seed):
    codes = _codes(rows, groups * 4, 8, seed)
    order = torch.rand(rows, groups, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    codes.view(rows, groups, 4)[order < 2] = 0
    values_in = codes if kind == "int8" else codes.to(torch.bfloat16)
    values, positions = compress_24(values_in)
    assert values.shape == (rows, groups * 2)
    assert positions.shape == (rows, -(-groups // 2))
    assert torch.equal(expand_24(values, positions), values_in)


def test_24_takes_a_negative_zero_for_a_zero():
    """Pruning by a product leaves -0.0 where a negative weight was."""
    codes = torch.tensor([[1.0, -0.0, -2.0, -0.0, -0.0, -0.0, -0.0, 3.0]])
    for kind in (torch.float8_e4m3fn, torch.bfloat16):
        values, positions = compress_24(codes.to(kind))
        assert torch.equal(expand_24(values, positions).float(), codes)


def test_24_positions_rise_and_zeros_fill_up():
    values, positions = compress_24(torch.tensor([[0, 0, 0, 9, 0, 0, 0, 0]], dtype=torch.int8))
    assert values.tolist() == [[0, 9, 0, 0]]
    assert positions.tolist() == [[0 | 3 << 2 | 0 << 4 | 1 << 6]]


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda: pack_codes(torch.tensor([[8]], dtype=torch.int8), 4), "packing.range"),
        (lambda: pack_codes(torch.tensor([[-9]], dtype=torch.int8), 4), "packing.range"),
        (lambda: pack_codes(torch.tensor([[0]], dtype=torch.int8), 5), "packing.bits"),
        (lambda: unpack_codes(torch.zeros(1, 2, dtype=torch.uint8), 4, 5), "packing.shape"),
        (lambda: compress_24(torch.ones(1, 4, dtype=torch.int8)), "packing.pattern"),
        (lambda: compress_24(torch.zeros(1, 6, dtype=torch.int8)), "packing.pattern"),
        (lambda: expand_24(torch.zeros(1, 4), torch.zeros(1, 3, dtype=torch.uint8)), "packing.shape"),
    ],
)
def test_what_cannot_be_packed_is_refused(call, code):
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.code == code
