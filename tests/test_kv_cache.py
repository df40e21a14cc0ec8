"""Coded keys and values: what rows hold, that native layers read them as torch does, and that nothing is kept wider."""

from __future__ import annotations

import copy

import pytest
import torch
from test_attention import model as small
from test_decoder import FEATURES, PROMPT, build, close, trusted, walk

from autotune.kernels.cpu import decoder as native
from autotune.kernels.kv_formats import FORMATS, GROUP, decode, encode, format_of, row_bytes
from autotune.kv_cache import Keeping, coded_format, keep_as, unsupported

WORST = {"int8": 0.5 / 127, "fp8": 1 / 16}  # of the row's largest number; fp8: of the number itself
needs_compiler = pytest.mark.skipif("cxx" not in FEATURES, reason="there is no C++ compiler")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_within_half_a_step(name, dtype):
    x = (torch.randn(2, 3, 5, 18, generator=torch.Generator().manual_seed(0)) * 7).to(dtype)
    rows = encode(x, name)
    assert rows.shape == (2, 3, 5, 22) and rows.dtype == torch.int8
    assert rows.shape[-1] == row_bytes(name, 18, 2) and row_bytes(None, 18, 2) == 36
    back, wide = decode(rows, name, torch.float32), x.float()
    most = wide.abs().amax(-1, keepdim=True)
    room = most if name == "int8" else wide.abs().clamp_min(float(most.max()) * 2**-14)
    assert bool(((back - wide).abs() <= room * WORST[name] * 1.001).all())
    assert torch.equal(encode(back, name)[..., :-4], rows[..., :-4])  # what is rounded stays as it is


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_zeros_and_rows_that_are_not_finite(name):
    x = torch.tensor([[0.0, 0.0], [1.0, float("inf")], [float("nan"), 1.0], [3e38, -3e38]])
    back = decode(encode(x, name), name, torch.float32)
    assert torch.equal(back[0], x[0])
    assert bool(back[1:3].isnan().all())
    assert torch.allclose(back[3], x[3], rtol=1e-3)


def test_a_configuration_names_the_format():
    assert format_of({GROUP: "kv-int8", "L0.qkv": "w8a8-int8"}) == "int8"
    assert format_of({GROUP: "bf16"}) is None
    assert format_of({}) is None


@needs_compiler
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_native_layers_read_codes_as_torch_does(name, dtype, tolerance, kind, monkeypatch):
    prompt = PROMPT.repeat(2, 1) + torch.arange(2)[:, None]
    slow, fast = build(kind, dtype, quick=False), build(kind, dtype)
    keep_as(slow, name)
    keep_as(fast, name)
    expected, kept = walk(slow, prompt)
    made, step = [], native.step
    monkeypatch.setattr(native, "step", lambda *given: (made.append(given[0].places[0].kept), step(*given))[1])
    found, ours = walk(fast, prompt)
    assert trusted(fast) == [True, True]
    assert made and set(made) == {FORMATS.index(name) + 1}
    assert close(found, expected, tolerance)
    for a, b in zip(ours.layers, kept.layers, strict=True):
        assert coded_format(a) == coded_format(b) == name
        assert a.keys.dtype == torch.int8 and a.keys.shape == b.keys.shape == (2, 2, 19, 20)
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert close(decode(x, name, torch.float32), decode(y, name, torch.float32), tolerance)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_tokens_one_by_one_are_the_document_at_once(name, kind):
    """What attention sees does not depend on the passes: losses on documents are those of decoding."""
    made = _model(kind)
    keep_as(made, name)
    ids = torch.randint(1, 256, (1, 12), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        whole, without = made(ids).logits, made(ids, use_cache=False).logits
        output, parts = made(ids[:, :5], use_cache=True), []
        parts.append(output.logits)
        for place in range(5, 12):
            output = made(ids[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
        keep_as(made, None)
        dense = made(ids).logits
    assert close(torch.cat(parts, 1), whole, 1e-3)
    assert close(without, whole, 1e-6)
    assert not close(whole, dense, 1e-7)  # it is rounded
    assert close(whole, dense, 0.2)


def _model(kind):
    if kind != "gpt2":
        return small(kind)
    import transformers

    torch.manual_seed(0)
    values = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 64}
    config = transformers.GPT2Config(**values, eos_token_id=None, bos_token_id=None)
    return transformers.GPT2LMHeadModel(config).eval()


@needs_compiler
def test_the_format_can_change_under_a_cache_and_back():
    made = build()
    with torch.inference_mode():
        output = made(PROMPT, use_cache=True)
        keep_as(made, "int8")
        for number in range(3):
            token = torch.full((1, 1), 7 + number)
            output = made(token, past_key_values=output.past_key_values, use_cache=True)
    assert [coded_format(layer) for layer in output.past_key_values.layers] == ["int8", "int8"]
    keep_as(made, None)
    found, kept = walk(made)
    expected, _ = walk(build(quick=False))
    assert [coded_format(layer) for layer in kept.layers] == [None, None]
    assert close(found, expected, 2e-5)


@needs_compiler
def test_beams_and_copies_move_codes_with_their_scales():
    made, other = build(), build(quick=False)
    for each in (made, other):
        keep_as(each, "int8")
    more = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    found, expected = (each.generate(PROMPT, **more) for each in (made, other))
    assert torch.equal(found, expected)
    with torch.inference_mode():
        kept = made(PROMPT, use_cache=True).past_key_values
        twin, token = copy.deepcopy(kept), torch.full((1, 1), 7)
        found, expected = (made(token, past_key_values=each, use_cache=True).logits for each in (twin, kept))
    assert torch.equal(found, expected)


def test_other_caches_keep_rounded_numbers():
    from transformers import StaticCache

    made, ids = small(), torch.arange(1, 9).view(1, 8)
    keep_as(made, "int8")
    with torch.inference_mode():
        expected = made(ids).logits
        cache = StaticCache(config=made.config, max_cache_len=32)
        assert close(made(ids, past_key_values=cache).logits, expected, 1e-5)
    kept = cache.layers[0].keys[:, :, :8]
    assert torch.allclose(decode(encode(kept, "int8"), "int8", kept.dtype), kept, rtol=1e-5)


def test_only_innermost_modules_are_exchanged_and_once():
    made = small("gemma3")  # its layers know their number too
    keep_as(made, None)
    assert not [m for m in made.modules() if isinstance(m.forward, Keeping)]
    for name in ("int8", "fp8"):
        keep_as(made, name)
    exchanged = [path for path, m in made.named_modules() if isinstance(m.forward, Keeping)]
    assert exchanged == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_what_keeps_no_cache_that_could_be_coded_says_so():
    config = small().config
    assert unsupported(config, True, "cpu") == ""
    assert "encoder" in unsupported(config, False, "cpu")
    assert "cuda" in unsupported(config, True, "cuda")
    assert "window" in unsupported(small("gemma3").config, True, "cpu")
