"""Decoding with query heads side by side: transformers' attention, only faster."""

from __future__ import annotations

import pytest
import torch
import transformers

from autotune import attention as module
from autotune.attention import NAME, fuse_attention
from autotune.kernels.cpu import flash

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen3": transformers.Qwen3Config,
    "gemma3": transformers.Gemma3TextConfig,
}


def model(kind="llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    values = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    values |= {"num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 256, "head_dim": 16}
    values |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = {
        "llama": transformers.LlamaConfig,
        "qwen3": transformers.Qwen3Config,
        "gemma3": transformers.Gemma3TextConfig,
    }
    return transformers.AutoModelForCausalLM.from_config(config[kind](**(values | changes)), dtype=dtype).eval()


def decoded(made, ids, **more):
    with torch.inference_mode():
        return made.generate(
            ids, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True, **more
        )


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_generation_is_the_same(kind, batch, monkeypatch):
    made, ids = model(kind), torch.randint(1, 256, (batch, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0 if batch > 1 else 1  # padding on the left: a mask in every step
    expected = decoded(made, ids, attention_mask=mask)
    assert fuse_attention(made)
    shapes = []
    call = torch.nn.functional.scaled_dot_product_attention

    def watched(query, *rest, **more):
        shapes.append(tuple(query.shape))
        return call(query, *rest, **more)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", watched)
    found = decoded(made, ids, attention_mask=mask)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert (batch, 2, 4, 16) in shapes  # key heads, query heads of each


def test_heads_that_share_no_keys_decode_as_before():
    made, ids = model(num_key_value_heads=8), torch.arange(1, 6).view(1, 5)
    expected = decoded(made, ids)
    assert fuse_attention(made)
    found = decoded(made, ids)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_a_model_with_another_attention_keeps_it():
    made = model(attn_implementation="eager")
    assert not fuse_attention(made)
    assert made.config._attn_implementation == "eager"
    assert not fuse_attention(torch.nn.Linear(2, 2))


def test_a_mask_of_its_own_for_every_head_is_left_to_transformers():
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)
    mask = torch.randn(1, 4, 1, 5)
    host = torch.nn.Module()
    host.num_key_value_groups = 2
    found, _ = module.attention(host, query, key, key, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), key.repeat_interleave(2, 1), attn_mask=mask
    )
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


def test_the_name_is_the_models_afterwards():
    made = model()
    assert fuse_attention(made)
    assert made.config._attn_implementation == NAME
    assert not fuse_attention(made)


@pytest.mark.skipif(not flash.available(), reason="no native attention of prompts on this CPU")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_prompts_attend_natively(kind, monkeypatch):
    made, ids = model(kind, torch.bfloat16, head_dim=32), torch.randint(1, 256, (2, 70))
    with torch.inference_mode():
        expected = made(ids).logits.float()
        assert fuse_attention(made)
        calls = []
        monkeypatch.setattr(flash, "attend", lambda *given, call=flash.attend: (calls.append(given), call(*given))[1])
        found = made(ids).logits.float()
    assert len(calls) == 2 and all(given[-1] is True for given in calls)
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.skipif(not flash.available(), reason="no native attention of prompts on this CPU")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_text_that_goes_on_attends_natively(kind, monkeypatch):
    made, ids = model(kind, torch.bfloat16, head_dim=32), torch.randint(1, 256, (2, 70))
    with torch.inference_mode():
        expected = made(ids).logits[:, 41:].float()
        assert fuse_attention(made)
        cache = made(ids[:, :41], use_cache=True).past_key_values
        calls = []
        monkeypatch.setattr(flash, "attend", lambda *given, call=flash.attend: (calls.append(given), call(*given))[1])
        found = made(ids[:, 41:], past_key_values=cache).logits.float()
    assert [given[1].shape[2] for given in calls] == [70, 70]
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.skipif(not flash.available(), reason="no native attention of prompts on this CPU")
def test_what_the_native_prompt_is_not_for(monkeypatch):
    """Padding, windows, gradients, dropout, and a causal text without its beginning."""
    host = torch.nn.Module()
    query, key = torch.randn(2, 4, 9, 32).bfloat16(), torch.randn(2, 4, 9, 32).bfloat16()
    monkeypatch.setattr(flash, "attend", lambda *_: pytest.fail("ran natively"))
    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    plain, padded = seen.tril(), seen.tril()
    padded[1, :, :, 0] = False
    with torch.no_grad():
        for mask in (seen, padded, plain.triu(-3), seen.tril(1), plain.bfloat16()):
            module.attention(host, query, key, key, mask)
        module.attention(host, query, key, key, None, dropout=0.5)
        module.attention(host, query[:, :, :3], key, key, None)
    module.attention(host, query.requires_grad_(), key, key, None)


@pytest.mark.skipif(not flash.available(), reason="no native attention of prompts on this CPU")
@pytest.mark.parametrize("way", ["module", "argument"])
def test_an_encoders_prompt_sees_all_positions(way):
    host = torch.nn.Module()
    if way == "module":
        host.is_causal = False
    query, key = torch.randn(1, 2, 40, 32).bfloat16(), torch.randn(1, 2, 50, 32).bfloat16()
    found, _ = module.attention(host, query, key, key, None, **({} if way == "module" else {"is_causal": False}))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key).transpose(1, 2)
    assert torch.allclose(found.float(), expected.float(), atol=0.02)
