"""Single tokens through all layers at once: transformers' answers, and only where nothing else is done between."""

from __future__ import annotations

import pytest
import torch
from test_decoder import FEATURES, PROMPT, build, close, walk

from autotune import cache_room, decoder_step
from autotune.decoder_step import OneStep
from autotune.kernels.cpu import decoder as native

pytestmark = pytest.mark.skipif("cxx" not in FEATURES, reason="there is no C++ compiler")


@pytest.fixture
def stacks(monkeypatch):
    """Layers of each native call."""
    made = []
    step = native.step

    def counted(stack, tokens, threads):
        made.append(stack.number)
        return step(stack, tokens, threads)

    monkeypatch.setattr(native, "step", counted)
    return made


@torch.inference_mode()
def token(model, cache, number=5, rows=1, **more):
    return model(torch.full((rows, 1), number), past_key_values=cache, use_cache=True, **more)


def warmed(kind="llama", **changes):
    """A model whose decoder was tried, and a cache of nine and four positions."""
    made = build(kind, **changes)
    _, cache = walk(made, tokens=4)
    assert made.model.forward.trusted
    return made, cache


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_from_the_third_token_on_all_layers_are_one_call(kind, stacks):
    made = build(kind)
    walk(made, tokens=6)
    assert stacks == [1, 1, *[2, 1, 1], *[2] * 4]
    stacks.clear()
    walk(made, tokens=3)  # another cache
    assert stacks == [2] * 3


def test_the_answer_is_bit_for_bit_that_of_layer_after_layer():
    made, plain = build("qwen3", torch.bfloat16), build("qwen3", torch.bfloat16)
    plain.model.forward.trusted = False
    found, ours = walk(made, tokens=200)  # angles of several blocks of positions; the cache's buffer grows
    expected, kept = walk(plain, tokens=200)
    assert made.model.forward.trusted
    assert torch.equal(found, expected)
    for a, b in zip(ours.layers, kept.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_what_is_done_after_the_layers_is_seen(monkeypatch):
    """A decoder of the usual structure whose forward does something more."""
    made, plain = build(), build(quick=False)
    kind = type(made.model)
    forward = kind.forward

    def doubled(self, *given, **more):
        output = forward(self, *given, **more)
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    monkeypatch.setattr(kind, "forward", doubled)
    assert close(walk(made)[0], walk(plain)[0], 2e-5)
    assert made.model.forward.trusted is False


@pytest.mark.parametrize("changes", [{"sliding_window": 64}, {"layer_types": ["full_attention", "sliding_attention"]}])
def test_windows_are_left_to_transformers(changes):
    assert not isinstance(build("qwen2", use_sliding_window=True, **changes).model.forward, OneStep)


@pytest.mark.parametrize(
    "more",
    [
        {"output_hidden_states": True},
        {"use_cache": False},
        {"attention_mask": torch.tensor([[0] * 3 + [1] * 11])},
        {"position_ids": torch.tensor([[40]])},
        {"attention_mask": torch.ones(1, 14, dtype=torch.int64)},
    ],
    ids=["states", "no cache", "masked", "position", "open"],
)
def test_everything_that_can_be_asked_is_answered(more):
    made, cache = warmed()
    plain = build(quick=False)
    _, kept = walk(plain, tokens=4)
    with torch.inference_mode():
        found = made(torch.tensor([[5]]), past_key_values=cache, **({"use_cache": True} | more))
        expected = plain(torch.tensor([[5]]), past_key_values=kept, **({"use_cache": True} | more))
    assert close(found.logits, expected.logits, 2e-5)
    assert (found.past_key_values is None) == (expected.past_key_values is None)
    assert len(found.hidden_states or ()) == len(expected.hidden_states or ())
    assert cache.get_seq_length() == kept.get_seq_length() == 14


def test_hooks_on_layers_are_called(stacks):
    made, cache = warmed()
    handle = made.model.layers[1].register_forward_hook(lambda _module, _given, output: output * 0)
    stacks.clear()
    zeros = token(made, cache).logits
    assert stacks == [1, 1]
    assert not zeros.any()
    handle.remove()
    assert token(made, cache).logits.any()
    token(made, cache)
    assert stacks[-1] == 2


def test_layers_put_in_later_are_seen(stacks):
    made, other = build(), build()
    walk(made)
    made.model.layers[1] = other.model.layers[0]
    made.model.layers[1].self_attn.layer_idx = 1
    expected = build(quick=False)
    expected.model.layers[1] = build(quick=False).model.layers[0]
    expected.model.layers[1].self_attn.layer_idx = 1
    stacks.clear()
    found = walk(made)[0]
    assert close(found, walk(expected)[0], 2e-5) or stacks.count(2) == 0


def test_fewer_layers_than_there_are():
    (made, cache), plain = warmed(), build(quick=False)
    _, kept = walk(plain, tokens=4)
    made.config.num_hidden_layers = plain.config.num_hidden_layers = 1
    assert close(token(made, cache).logits, token(plain, kept).logits, 2e-5)
    assert cache.layers[1].keys.shape[2] == 13


def test_a_cache_that_others_changed_is_read_again(stacks):
    made, cache = warmed()
    plain = build(quick=False)
    _, kept = walk(plain, tokens=4)
    for change in (
        lambda cache: cache.crop(-3),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 2])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    ):
        change(cache)
        change(kept)
        rows = kept.layers[0].keys.shape[0]
        assert close(token(made, cache, rows=rows).logits, token(plain, kept, rows=rows).logits, 2e-5)
    assert cache.get_seq_length() == kept.get_seq_length()
    assert stacks.count(2) >= 4


def test_long_caches_go_layer_by_layer(monkeypatch, stacks):
    made, _ = warmed()
    monkeypatch.setattr(decoder_step, "_MOST_BYTES", 100)
    stacks.clear()
    found, _ = walk(made)
    assert set(stacks) == {1}
    assert close(found, walk(build(quick=False))[0], 2e-5)


def test_caches_grow_in_one_buffer(monkeypatch, stacks):
    monkeypatch.setattr(cache_room, "_ROOM", 2)
    made, _ = warmed()
    stacks.clear()
    found, _ = walk(made, tokens=40)
    assert stacks == [2] * 40
    assert close(found, walk(build(quick=False), tokens=40)[0], 2e-5)


def test_gradients_and_training_go_the_usual_way(stacks):
    made, cache = warmed()
    stacks.clear()
    made.model.layers[0].input_layernorm.weight.requires_grad_(True)
    made(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    made.model.layers[0].input_layernorm.weight.requires_grad_(False)
    with torch.no_grad():
        made.model.layers[1].train()
        made(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    assert 2 not in stacks


def test_batches_and_single_tokens_take_turns():
    made, plain = build(), build(quick=False)
    many = PROMPT.repeat(3, 1) + torch.arange(3)[:, None]
    for prompt in (PROMPT, many, PROMPT, many):
        assert close(walk(made, prompt)[0], walk(plain, prompt)[0], 2e-5)
