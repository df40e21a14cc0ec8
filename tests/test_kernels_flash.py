"""A prompt's attention as one native call, against softmax and sums in double precision."""

from __future__ import annotations

import pytest
import sanitized
import torch
from native import NATIVE

from autotune.errors import DeviceError
from autotune.kernels.cpu import build, flash
from autotune.targets.detect import detect_cpu

FEATURES = detect_cpu().features
needed = pytest.mark.skipif(
    "avx512_bf16" not in FEATURES or "cxx" not in FEATURES, reason="no bf16 dot products here, or no C++ compiler"
)


@pytest.fixture(autouse=True)
def _also_where_tiles_are_better(monkeypatch):
    monkeypatch.setattr(flash, "available", lambda: build.available("flash"))


def tensors(batch, heads, key_heads, tokens, positions, width, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, tokens, width), (batch, key_heads, positions, width), (batch, key_heads, positions, width)
    return [(torch.randn(shape, generator=generator) * scale).bfloat16() for shape in shapes]


def expected(query, key, value, scaling, causal):
    """In double precision, as (batch, tokens, heads, width)."""
    shared = query.shape[1] // key.shape[1]
    key, value = (item.double().repeat_interleave(shared, 1) for item in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scaling
    tokens, positions = scores.shape[-2:]
    if causal:
        unseen = torch.ones(tokens, positions, dtype=torch.bool).triu(positions - tokens + 1)
        scores = scores.masked_fill(unseen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


SHAPES = [  # batch, heads, key heads, tokens, positions, width
    (1, 1, 1, 1, 1, 32),
    (1, 16, 8, 512, 512, 128),
    (2, 4, 2, 37, 37, 64),
    (3, 4, 1, 5, 5, 32),
    (1, 8, 8, 100, 300, 96),
    (1, 2, 1, 257, 257, 256),
    (1, 3, 3, 13, 31, 160),
]


@needed
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(shape, causal):
    query, key, value = tensors(*shape)
    found, scaling = flash.attend(query, key, value, shape[-1] ** -0.5, causal), shape[-1] ** -0.5
    assert found.shape == (shape[0], shape[3], shape[1], shape[5]) and found.is_contiguous()
    wanted = expected(query, key, value, scaling, causal)
    assert error(found, wanted) < 0.004  # bf16 weights and outputs: 2 ** -9 each
    assert error(found[:, :1], wanted[:, :1]) < 0.006 and error(found[:, -1:], wanted[:, -1:]) < 0.006


@needed
def test_strides_are_free_but_for_the_last():
    query, key, value = tensors(2, 4, 2, 50, 50, 64)
    plain = flash.attend(query, key, value, 0.125)
    fused = torch.cat([item.transpose(1, 2).reshape(2, 50, -1) for item in (query, key, value)], -1)
    parts = [part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in fused.split([256, 128, 128], -1)]
    assert not any(part.is_contiguous() for part in parts)
    assert torch.equal(flash.attend(*parts, 0.125), plain)


@needed
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    before = torch.get_num_threads()
    query, key, value = tensors(1, 4, 2, 130, 130, 64)
    wanted = flash.attend(query, key, value, 0.125)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(flash.attend(query, key, value, 0.125), wanted)
    finally:
        torch.set_num_threads(before)


@needed
@pytest.mark.parametrize("scale", [30.0, 1e-3])
def test_scores_of_any_size(scale):
    """Large ones: one position takes all; the running maximum changes in every block."""
    query, key, value = tensors(1, 2, 2, 600, 600, 64, scale=scale)
    query, key = query.sort(2).values, key.sort(2).values
    assert error(flash.attend(query, key, value, 0.125), expected(query, key, value, 0.125, True)) < 0.004


@needed
def test_nothing_of_later_tokens_is_seen():
    query, key, value = tensors(1, 2, 2, 300, 300, 32)
    before = flash.attend(query, key, value, 0.2)
    key[:, :, 200:], value[:, :, 200:] = 7.0, -9.0
    after = flash.attend(query, key, value, 0.2)
    assert torch.equal(after[:, :200], before[:, :200])
    assert not torch.equal(after[:, 200:], before[:, 200:])


@needed
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_comes_through(which):
    items = tensors(1, 1, 1, 70, 70, 32)
    items[which][0, 0, 40, 5] = torch.nan
    found = flash.attend(*items, 0.2)[0].isnan().any(-1).flatten()
    reached = torch.arange(70) == 40 if which == 0 else torch.arange(70) >= 40
    assert found[reached].all()
    assert which == 2 or not found[~reached].any()  # zero times NaN is NaN, as in torch


@needed
def test_what_it_takes():
    query, key, value = tensors(1, 4, 2, 9, 9, 64)
    assert flash.serves(query, key, value)
    assert not flash.serves(query.float(), key.float(), value.float())
    assert not flash.serves(query[..., :48], key[..., :48], value[..., :48])
    assert not flash.serves(query, key, value[..., :32])
    assert not flash.serves(query[:, :3], key, value)
    assert not flash.serves(query, key[..., ::2], value[..., ::2])
    assert not flash.serves(query[:, :, :0], key, value)
    assert not flash.serves(query.to("meta"), key.to("meta"), value.to("meta"))


@needed
def test_sanitizers_find_nothing(tmp_path):
    """`flash_harness.cpp`: buffers of exactly the size needed."""
    sanitized.run("flash", NATIVE, tmp_path)


@pytest.mark.parametrize(
    ("features", "used"),
    [((), False), (("avx512_bf16",), True), (("avx512_bf16", "amx_bf16"), False), (("amx_bf16", "amx_tile"), False)],
)
def test_it_is_compiled_where_it_is_used(features, used, monkeypatch):
    monkeypatch.setattr(build, "detect_cpu", lambda: type("Cpu", (), {"features": features}))
    assert build.is_used("flash", features) is used
    assert ("flash" in build.libraries()) is used


def test_without_a_compiler_it_serves_nothing(monkeypatch):
    def missing(_name):
        raise DeviceError("kernel.compiler", "there is none.")

    monkeypatch.setattr(build, "library", missing)
    build.available.cache_clear()
    assert not flash.serves(*tensors(1, 4, 2, 9, 9, 64))
    build.available.cache_clear()
