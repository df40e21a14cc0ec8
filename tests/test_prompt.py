"""Prompts through common layers with native passes between the products: transformers' answers, and only then."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from test_decoder import FEATURES, GROUPS, build, close, steps

from autotune import runtime
from autotune.kernels.cpu import between
from autotune.kernels.linear import ZEROS
from autotune.kv_cache import keep_as

pytestmark = pytest.mark.skipif("cxx" not in FEATURES, reason="there is no C++ compiler")
PROMPT = torch.randint(1, 256, (2, 70), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def calls(monkeypatch):
    """Rows of each time that a layer's prompt ran natively."""
    made = []
    gate = between.gate
    monkeypatch.setattr(between, "gate", lambda both: (made.append(len(both)), gate(both))[1])
    return made


def trusted(made):
    return [step._prompt.trusted for step in steps(made)]


@torch.inference_mode()
def read(made, prompt=PROMPT, **more):
    """Logits of all positions, and the cache."""
    output = made(prompt, use_cache=True, **more)
    return output.logits, output.past_key_values


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
def test_logits_and_caches_are_those_of_transformers(kind, dtype, tolerance, calls):
    expected, kept = read(build(kind, dtype, quick=False))
    made = build(kind, dtype)
    found, ours = read(made)
    assert trusted(made) == [True, True]
    assert calls == [64, 140] * 2  # each layer's first tokens are tried
    assert close(found, expected, tolerance)
    for a, b in zip(ours.layers, kept.layers, strict=True):
        assert a.keys.shape == b.keys.shape
        assert close(a.keys, b.keys, tolerance) and close(a.values, b.values, tolerance)
    calls.clear()
    assert torch.equal(read(made)[0], found) and calls == [140] * 2


def test_without_a_cache():
    expected = build(quick=False)(PROMPT, use_cache=False).logits
    with torch.no_grad():
        assert close(build()(PROMPT, use_cache=False).logits, expected, 2e-5)


@pytest.mark.parametrize("tokens", [1, 2, 31, 33])
@pytest.mark.parametrize("changes", [{"num_key_value_heads": 8}, {"num_key_value_heads": 1}, {"head_dim": 20}])
def test_other_numbers_of_heads_widths_and_tokens(changes, tokens):
    expected, _ = read(build(quick=False, **changes), PROMPT[:, :tokens])
    found, _ = read(build(**changes), PROMPT[:, :tokens])
    assert close(found, expected, 2e-5)


def test_part_of_a_head_is_turned():
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    expected, _ = read(build(quick=False, **changes))
    assert close(read(build(**changes))[0], expected, 2e-5)


@pytest.mark.parametrize(
    ("kind", "changes"), [("granite", {"residual_multiplier": 0.3}), ("gemma3", {}), ("olmo2", {})]
)
def test_layers_of_another_kind_stay_as_they_are(kind, changes):
    expected, _ = read(build(kind, quick=False, **changes))
    made = build(kind, **changes)
    assert close(read(made)[0], expected, 2e-5)
    found = [step._prompt.trusted for step in steps(made) if hasattr(step, "_prompt")]
    assert True not in found


def test_a_layer_that_answers_differently_is_not_trusted(monkeypatch, calls):
    made, plain = build(), build(quick=False)
    turn = between.turn
    monkeypatch.setattr(between, "turn", lambda rows, angles, *rest: turn(rows, angles[::-1], *rest))
    found, _ = read(made)
    assert trusted(made) == [False, False] and calls == [64] * 2
    assert close(found, read(plain)[0], 2e-5)


def test_padding_goes_to_transformers(calls):
    mask = torch.ones_like(PROMPT)
    mask[0, :4] = 0
    expected, _ = read(build(quick=False), attention_mask=mask)
    made = build()
    assert close(read(made, attention_mask=mask)[0], expected, 2e-5)
    assert calls == [] and trusted(made) == [None, None]
    read(made, attention_mask=torch.ones_like(PROMPT))
    assert calls == [64, 140] * 2


def test_more_of_a_text_goes_to_transformers(calls):
    made, plain = build(), build(quick=False)
    (_, ours), (_, kept) = read(made), read(plain)
    calls.clear()
    expected, _ = read(plain, PROMPT[:, :20], past_key_values=kept)
    assert close(read(made, PROMPT[:, :20], past_key_values=ours)[0], expected, 2e-5)
    assert calls == []


def test_a_static_cache_goes_to_transformers(calls):
    made, plain = build(), build(quick=False)
    caches = [transformers.StaticCache(config=item.config, max_cache_len=80) for item in (made, plain)]
    expected, _ = read(plain, past_key_values=caches[1])
    assert close(read(made, past_key_values=caches[0])[0], expected, 2e-5)
    assert calls == []


def test_a_coded_cache_goes_to_transformers(calls):
    made = build()
    keep_as(made, "int8")
    read(made)
    assert calls == []
    keep_as(made, None)
    read(made)
    assert calls == [64, 140] * 2


def test_hooks_gradients_and_wanted_states(calls):
    made = build()
    read(made)
    calls.clear()
    seen = []
    handle = made.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    read(made)
    assert seen == [1] and calls == [140]  # the other layer
    handle.remove()
    assert len(made(PROMPT, output_hidden_states=True).hidden_states) == 3
    calls.clear()
    embedded = made.model.embed_tokens(PROMPT).requires_grad_()
    made(inputs_embeds=embedded).logits.sum().backward()
    assert calls == [] and embedded.grad is not None


def test_zeros_do_not_judge_a_layer(calls):
    made = build()
    group = made.model.layers[0].mlp.down_proj.group
    group.select(ZEROS)
    read(made)
    assert trusted(made) == [None, True]
    group.select("w8a16-int8")
    found, _ = read(made)
    assert trusted(made) == [True, True]
    assert close(found, read(build(quick=False))[0], 2e-5)
    for layer in made.model.layers:
        for members in GROUPS:
            layer.get_submodule(members[0]).group.select(ZEROS)
    nothing = made.model.norm(made.model.embed_tokens(PROMPT)) @ made.lm_head.weight.t()
    assert close(read(made)[0], nothing, 1e-5)


def test_a_plain_model_and_its_copy():
    """Without groups there is nothing native to run."""
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    expected, _ = read(made)
    runtime.quicken(made)
    twin = copy.deepcopy(made)
    assert close(read(twin)[0], expected, 2e-5) and trusted(twin) == [None, None]
    assert all(step._prompt.layer is layer for step, layer in zip(steps(twin), twin.model.layers, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_passes_one_by_one(dtype):
    """Against torch's operators, rounded where they round."""
    generator = torch.Generator().manual_seed(0)
    both = (torch.randn(70, 2 * 1000, generator=generator) * 4).to(dtype)
    expected = torch.nn.functional.silu(both[:, :1000]) * both[:, 1000:]
    steps_apart = 2 * torch.finfo(dtype).eps
    assert torch.allclose(between.gate(both), expected, rtol=16 * steps_apart, atol=1e-6)
    x, sums = (torch.randn(3, 65, 1000, generator=generator).to(dtype) for _ in range(2))
    weight, before = torch.rand(1000, generator=generator).to(dtype), sums.clone()
    normed = between.add_norm(x, sums, weight, 1e-6)
    assert torch.equal(sums, before + x)
    assert torch.equal(normed, between.rms_norm(sums, weight, 1e-6))
