"""Schemes are named as the field names them, and their numbers follow from the name."""

from __future__ import annotations

import re

import pytest

from autotune.errors import InputError
from autotune.search_space.schemes import MORE, SCHEMES, dense_scheme, scheme


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp32", 32),
        ("bf16", 16),
        ("w8a8-int8", 8),
        ("w8a16-int8", 8),
        ("w4a16-int4-g32", 4.5),
        ("w4a16-int4-g64", 4.25),
        ("w4a16-int4-g128", 4.125),
        ("w8a8-fp8", 8),
        ("2:4", 9),
        ("2:4+w8a8-int8", 5),
        ("2:4+w4a16-int4-g128", 3.125),
        ("w3a16-int3-g64", 3.25),
        ("w4a16-int4-g128-asym", 4.15625),
        ("w8a8-fp8-128x128", 8 + 16 / 128**2),
        ("w4a16-nf4-g64", 4.25),
        ("w4a16-mxfp4", 4.25),
        ("w4a16-nvfp4", 4.5),
        ("50%+w8a16-int8", 5),
    ],
)
def test_bits_count_scales_and_positions(name, bits):
    assert scheme(name).bits_per_weight == bits


@pytest.mark.parametrize("item", (*SCHEMES, *MORE), ids=lambda item: item.name)
def test_the_name_says_what_it_is(item):
    assert scheme(item.name) is item
    assert item.sparsity == next((name for name in ("2:4", "4:8", "50%") if item.name.startswith(name)), "dense")
    assert item.name.endswith("-asym") == (not item.weight.symmetric)
    if match := re.search(r"w(\d+)a(\d+)", item.name):
        assert item.weight.bits == int(match.group(1))
        assert (item.activation.bits if item.activation else 16) == int(match.group(2))
    if match := re.search(r"-g(\d+)", item.name):
        assert item.weight.group_size == int(match.group(1))
    assert ("fp8" in item.name) == (item.weight.kind == "float" and item.weight.bits == 8)


def test_only_the_models_own_numbers_are_dense():
    assert {item.name for item in SCHEMES if item.is_dense} == {"fp32", "bf16"}
    assert dense_scheme("bf16") is scheme("bf16")


@pytest.mark.parametrize(("name", "qmax"), [("w8a8-int8", 127), ("w4a16-int4-g32", 7), ("w8a8-fp8", 448)])
def test_the_largest_code(name, qmax):
    assert scheme(name).weight.qmax == qmax


def test_sparse_schemes_have_codes_in_which_zero_is_zero():
    for item in (*SCHEMES, *MORE):
        if item.sparsity != "dense":
            assert item.weight.symmetric and item.weight.rows == 1 and item.weight.scale == "bf16"
            assert item.weight.kind == "int" or item.weight.bits >= 8


def test_an_unknown_scheme_is_met_with_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'w8a8-int8'") as error:
        scheme("w8a8-int")
    assert error.value.code == "scheme.unknown"
