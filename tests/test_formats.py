"""Number formats: levels are those of the formats' definitions, rounding finds the nearest, codes come back."""

from __future__ import annotations

import pytest
import torch

from autotune.compress import rounding
from autotune.kernels import formats, patterns
from autotune.kernels.reference import activation_codes, dequantize, random_weight, reference_linear
from autotune.kernels.spec import GroupWeight
from autotune.search_space.schemes import MORE, NumberFormat, scheme, survivors

NAMES = [item.name for item in MORE]
QUANTIZED = [item.name for item in MORE if item.weight.bits < 16]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def made(name, rows=6, columns=256, seed=0):
    return random_weight(name, rows, columns, torch.float32, True, torch.Generator().manual_seed(seed))


def all_levels(number, zero=0):
    """What a format holds, counted out by its definition."""
    if number.kind == "int":
        low = -number.qmax if number.symmetric else -number.qmax - 1
        return torch.arange(low, number.qmax + 1) - zero
    if number.bits == 4 and number.kind == "float":
        return torch.tensor([-level for level in E2M1] + E2M1)
    if number.kind == "nf":
        return formats.table(number)
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).float()
    return every[every.isfinite()]


@pytest.mark.parametrize("name", QUANTIZED)
def test_rounding_finds_the_nearest_level(name):
    number = scheme(name).weight
    values = torch.randn(500, generator=torch.Generator().manual_seed(1)) * number.qmax
    zero = None if number.symmetric else torch.tensor(1.0)
    levels = all_levels(number, 0 if zero is None else 1)
    found = formats.round_to(values.clone(), number, zero)
    best = (values.unsqueeze(1) - levels).abs().amin(1)
    assert torch.allclose((found - values).abs(), best, atol=1e-6)
    assert bool(torch.isin(found, levels).all())


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_stand_for_their_levels(name):
    number = scheme(name).weight
    zero = None if number.symmetric else torch.tensor(1, dtype=torch.int8)
    levels = all_levels(number, 0 if zero is None else 1).float()
    codes = formats.encode(levels, number, zero)
    assert codes.dtype == formats.code_type(number)
    assert torch.equal(formats.decode(codes, number, zero), levels)


def test_e2m1_is_written_by_sign_and_magnitude():
    """OCP Microscaling 1.0: 0b0111 is 6, 0b1111 is -6, 0b0001 is the subnormal 0.5."""
    number = scheme("w4a16-mxfp4").weight
    codes = formats.encode(torch.tensor([0.5, 6.0, -6.0, -0.5, 0.0]), number)
    assert codes.bitwise_and(15).tolist() == [0b0001, 0b0111, 0b1111, 0b1001, 0]


def test_nf4_is_the_table_of_normal_quantiles():
    """QLoRA's construction: quantiles of a normal distribution, eight below and nine above zero, over the largest."""
    normal, edge = torch.distributions.Normal(0.0, 1.0), 0.9677083
    above, below = normal.icdf(torch.linspace(edge, 0.5, 9)[:-1]), -normal.icdf(torch.linspace(edge, 0.5, 8)[:-1])
    expected = torch.cat([above, below, torch.zeros(1)]).sort().values
    assert torch.allclose(formats.table(scheme("w4a16-nf4-g64").weight), expected / expected.max(), atol=1e-5)


def test_powers_of_two_are_exact_both_ways():
    exponents = torch.arange(-126, 128)
    powers = formats.powers_of_two(exponents.float())
    assert powers.tolist() == [2.0**n for n in exponents.tolist()]
    assert torch.equal(formats.exponents(powers.view(2, -1).t()).t().flatten(), exponents.int())


def test_scales_are_what_their_encoding_holds():
    drawn = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + 1e-3
    powers = formats.round_scales(drawn, scheme("w4a16-mxfp4").weight)
    assert torch.equal(powers.log2(), powers.log2().round())
    assert bool(((powers / drawn).log2().abs() <= 0.5).all())
    unit = formats.scale_unit(float(drawn.max()))
    small = formats.round_scales(drawn, scheme("w4a16-nvfp4").weight, unit)
    assert torch.equal((small / unit).to(torch.float8_e4m3fn).float(), small / unit)
    assert float((small / drawn - 1).abs().max()) <= 1 / 16


@pytest.mark.parametrize("largest", [0.0, 1e-9, 3e-5, 0.01, 448.0, 5e4])
def test_the_unit_of_a_tensor_covers_its_largest_scale(largest):
    unit = formats.scale_unit(largest)
    scales = formats.round_scales(torch.tensor([largest, largest / 100]), scheme("w4a16-nvfp4").weight, unit)
    assert scales[0] >= largest * 15 / 16
    assert formats.scale_unit(float(scales.max())) <= unit
    assert torch.equal(scales.half().float(), scales) and torch.equal(scales.bfloat16().float(), scales)


@pytest.mark.parametrize("name", [name for name in QUANTIZED if "nf4" not in name])
def test_dequantizing_is_exact_in_fp32(name):
    weight = made(name)
    groups = weight.scales.shape[1]
    zeros = None if weight.zeros is None else weight.zeros.unsqueeze(-1)
    levels = formats.decode(weight.codes.view(6, groups, -1), scheme(name).weight, zeros).double()
    assert torch.equal(dequantize(weight).double(), (levels * weight.scales.double().unsqueeze(-1)).view(6, 256))


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_sums_what_it_says(name):
    """Against float64 arithmetic written out here, from codes and scales alone."""
    weight, x = made(name), torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    activation = scheme(name).activation
    seen = x.double()
    if activation is not None:
        size = activation.group_size or 256
        pieces = x.view(3, -1, size)
        steps = pieces.abs().amax(-1, keepdim=True) / 448
        seen = ((pieces / steps).to(torch.float8_e4m3fn).double() * steps.double()).view(3, 256)
    expected = seen @ dequantize(weight).double().T + weight.bias.double()
    assert torch.allclose(reference_linear(weight, x, torch.float64), expected, rtol=1e-12, atol=1e-12)


def test_pieces_of_inputs_have_scales_of_their_own():
    x = torch.ones(2, 256)
    x[:, 128:] = 1e-3
    number = NumberFormat("float", 8, 128)
    codes, scales = activation_codes(x, number)
    assert torch.equal(codes, torch.full((2, 256), 448.0))
    assert torch.allclose(codes * scales, x)


@pytest.mark.parametrize("name", ["w4a16-int4-g32-asym", "w3a16-int3-g64-asym", "w2a16-int2-g128-asym"])
def test_a_zero_point_pays_where_weights_lie_to_one_side(name):
    weight = torch.rand(8, 256, generator=torch.Generator().manual_seed(0)) * 0.1
    asymmetric = scheme(name).weight
    symmetric = scheme(name.removesuffix("-asym")).weight
    errors = []
    for number in (asymmetric, symmetric):
        found = rounding.quantize(weight, None, number)
        chosen = name if number is asymmetric else name.removesuffix("-asym")
        values = dequantize(GroupWeight(chosen, codes=found.codes, scales=found.scales, zeros=found.zeros))
        errors.append(float((values - weight).square().sum()))
    assert errors[0] < 0.4 * errors[1]


@pytest.mark.parametrize("name", ["4:8", "50%", "4:8+w8a16-int8"])
def test_patterns_come_back_and_take_the_best(name):
    item = scheme(name)
    score = torch.rand(5, 48, generator=torch.Generator().manual_seed(0))
    mask = patterns.choose(score, item)
    block = item.block or 48
    blocks, kept = score.view(5, -1, block), mask.view(5, -1, block)
    assert torch.equal(kept.sum(-1), torch.full(kept.shape[:2], survivors(item.sparsity, block)))
    worst_kept = blocks.masked_fill(~kept, 2).amin(-1)
    assert bool((worst_kept >= blocks.masked_fill(kept, -1).amax(-1)).all())
    values = (score * mask).to(torch.bfloat16)
    values[0, :8] = 0.0  # fewer than the pattern allows
    stored, bits = patterns.compress(values, item)
    assert stored.shape == (5, survivors(item.sparsity, 48)) and bits.shape == (5, 6)
    assert torch.equal(patterns.expand(stored, bits, 48), values)


def test_too_many_for_a_pattern_are_refused():
    from autotune.errors import InputError

    with pytest.raises(InputError, match=r"packing\.pattern.*more than 4"):
        patterns.compress(torch.ones(1, 8), scheme("4:8"))
