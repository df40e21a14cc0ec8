"""Single tokens through native decoder layers: transformers' answers and caches, and only where they are the same."""

from __future__ import annotations

import copy

import pytest
import sanitized
import torch
import transformers
from native import AVX2, NATIVE

from autotune import cache_room, runtime
from autotune.decoder import OneToken, fuse_decoder_layers
from autotune.errors import DeviceError
from autotune.kernels import reference
from autotune.kernels.cpu import decoder as native
from autotune.kernels.linear import ZEROS, Alternative, FusedGroup, alternative, install
from autotune.kernels.spec import KERNELS, GroupWeight, load
from autotune.search_space.rules import lacking
from autotune.targets.detect import detect_cpu

FEATURES = detect_cpu().features
pytestmark = pytest.mark.skipif("cxx" not in FEATURES, reason="there is no C++ compiler")

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,  # biases
    "qwen3": transformers.Qwen3Config,  # norms a head
    "granite": transformers.GraniteConfig,  # Llama's modules, but its residual sums are scaled
    "gemma3": transformers.Gemma3TextConfig,  # four norms a layer
    "olmo2": transformers.Olmo2Config,  # norms behind the products
}
PROMPT = torch.randint(1, 256, (1, 9), generator=torch.Generator().manual_seed(1))
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def build(kind="llama", dtype=torch.float32, schemes=("w8a16-int8",), quick=True, **changes):
    """A tiny model with weights large enough to matter, every group under a scheme (in turn), quickened or not."""
    torch.manual_seed(0)
    values = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    values |= {"num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512, "head_dim": 16}
    values |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    values |= {"sliding_window": None} if kind == "mistral" else {}
    config = CONFIGS[kind](**(values | changes))
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
        elif name.endswith("bias"):
            parameter.data = 0.3 * torch.randn_like(parameter)
        elif "layers" in name:
            parameter.data *= 6
    number = 0
    for layer in range(config.num_hidden_layers):
        for members in GROUPS:
            paths = [f"model.layers.{layer}.{name}" for name in members]
            put(made, paths, schemes[number % len(schemes)], dtype)
            number += 1
    if quick:
        runtime.quicken(made)
    return made


def put(made, paths, name, dtype):
    linears = [made.get_submodule(path) for path in paths]
    group = FusedGroup(linears[0].in_features, [linear.out_features for linear in linears])
    dense = torch.cat([linear.weight.detach() for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    group.add(name, packed(name, dense, bias, dtype))
    install(made, paths, group)


def packed(name, dense, bias, dtype):
    if name in ("fp32", "bf16"):
        weight, module = GroupWeight(name, dense=dense, bias=bias), "autotune.kernels.torch.dense"
    else:
        scales = dense.float().abs().amax(1, keepdim=True) / 127
        scales = (scales.bfloat16().float() * 1.02).bfloat16().float()
        codes = (dense.float() / scales).round().clamp(-127, 127).to(torch.int8)
        weight, module = GroupWeight(name, codes=codes, scales=scales, bias=bias), "autotune.kernels.cpu.integer"
    spec = next(item for item in KERNELS if item.module == module and name in item.schemes)
    missing = lacking(spec.limits.features, FEATURES)
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    assert reference.canonical(weight) is not None if weight.codes is not None else True
    return alternative(spec, name, load(spec).pack(weight, dtype))


def steps(made):
    return [layer.forward for layer in made.model.layers]


def trusted(made):
    return [step._trusted if isinstance(step, OneToken) else None for step in steps(made)]


@torch.inference_mode()
def walk(made, prompt=PROMPT, tokens=10, **more):
    """Logits of every step of a fixed continuation, and the cache in the end."""
    output = made(prompt, use_cache=True, **more)
    logits = []
    for number in range(tokens):
        token = torch.full((len(prompt), 1), 7 + number)
        output = made(token, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[:, -1])
    return torch.stack(logits), output.past_key_values


def close(found, expected, tolerance):
    return float((found.float() - expected.float()).norm()) <= tolerance * float(expected.float().norm())


@pytest.fixture
def calls(monkeypatch):
    """Tokens of each time that a native layer ran."""
    made = []
    step = native.step

    def counted(stack, tokens, threads):
        made.extend([tokens.count] * stack.number)
        return step(stack, tokens, threads)

    monkeypatch.setattr(native, "step", counted)
    return made


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_and_caches_are_those_of_transformers(kind, dtype, tolerance, batch, calls):
    prompt = PROMPT.repeat(batch, 1) + torch.arange(batch)[:, None]
    expected, kept = walk(build(kind, dtype, quick=False), prompt)
    made = build(kind, dtype)
    found, ours = walk(made, prompt)
    assert trusted(made) == [True, True]
    assert calls == [batch] * 22  # the second token, the first that finds all layers trusted, runs both ways
    assert made.model.forward.trusted
    assert close(found, expected, tolerance)
    assert ours.get_seq_length() == kept.get_seq_length() == 19
    for a, b in zip(ours.layers, kept.layers, strict=True):
        assert a.keys.shape == b.keys.shape
        assert close(a.keys, b.keys, tolerance) and close(a.values, b.values, tolerance)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 8}, {"num_key_value_heads": 1}, {"head_dim": 20}])
def test_other_numbers_of_heads_and_odd_widths(changes):
    expected, _ = walk(build(quick=False, **changes))
    made = build(**changes)
    found, _ = walk(made)
    assert trusted(made) == [True, True]
    assert close(found, expected, 2e-5)


@pytest.mark.parametrize(
    ("kind", "changes"), [("granite", {"residual_multiplier": 0.3}), ("gemma3", {}), ("olmo2", {})]
)
def test_layers_of_another_kind_stay_as_they_are(kind, changes):
    expected, _ = walk(build(kind, quick=False, **changes))
    made = build(kind, **changes)
    found, _ = walk(made)
    assert True not in trusted(made)
    assert close(found, expected, 2e-5)


def test_other_activations_are_not_taken_for_silu():
    assert fuse_decoder_layers(build(quick=False, hidden_act="gelu")) == 0


def test_kernels_of_torch_and_own_ones_mix(calls):
    """A product without a C function runs in Python, in the middle of the native layer."""
    schemes = ("w8a16-int8", "fp32", "w8a8-int8", "w8a16-int8", "fp32")
    expected, _ = walk(build(schemes=schemes, quick=False))
    made = build(schemes=schemes)
    found, _ = walk(made)
    assert trusted(made) == [True, True] and calls
    assert close(found, expected, 5e-3)  # a step of 8-bit activations may fall to the other side


def test_what_fails_in_a_product_is_raised_and_the_next_token_works():
    made = build(schemes=("fp32",))
    walk(made)  # the first token runs both ways
    expected, _ = walk(made)
    group = made.model.layers[1].mlp.up_proj.group
    working = group.choice

    def broken(*_):
        raise DeviceError("kernel.memory", "none left")

    group._alternatives["fp32"] = Alternative(broken, working.packed)
    with pytest.raises(DeviceError, match=r"kernel\.memory.*none left"):
        walk(made)
    group._alternatives["fp32"] = working
    assert torch.equal(walk(made)[0], expected)


def test_selecting_other_weights_is_seen(calls):
    made = build()
    for layer in made.model.layers:
        group = layer.mlp.down_proj.group
        group.add("again", Alternative(group.choice.run, group.choice.packed))  # without a C function: Python runs it
    before, _ = walk(made)
    for layer in made.model.layers:
        layer.mlp.down_proj.group.select("again")
    assert close(walk(made)[0], before, 1e-6)
    for layer in made.model.layers:
        for members in GROUPS:
            layer.get_submodule(members[0]).group.select(ZEROS)
    calls.clear()
    zeros, _ = walk(made)
    assert calls == [1] * 20
    made_of_nothing = made.model.norm(made.model.embed_tokens(torch.tensor([[16]]))) @ made.lm_head.weight.t()
    assert close(zeros[-1], made_of_nothing[0], 1e-5)


def test_layers_are_not_judged_by_zeros(calls):
    made = build()
    group = made.model.layers[0].mlp.down_proj.group
    group.select(ZEROS)
    walk(made)
    assert trusted(made) == [None, True]
    group.select("w8a16-int8")
    walk(made)
    assert trusted(made) == [True, True]


def test_groups_put_in_later_are_seen():
    made, other = build("qwen2"), build("qwen2")
    walk(made)
    for members in GROUPS:
        paths = [f"model.layers.0.{name}" for name in members]
        group = other.get_submodule(paths[0]).group
        install(made, paths, group)
        group.select(ZEROS)
    expected, _ = walk(other)
    assert close(walk(made)[0], expected, 1e-6)


def test_caches_grow_crop_and_go_on(monkeypatch):
    monkeypatch.setattr(cache_room, "_ROOM", 2)
    plain, made = build(quick=False), build()
    expected, kept = walk(plain, tokens=40)
    found, ours = walk(made, tokens=40)
    assert close(found, expected, 2e-5)
    kept.crop(-20)
    ours.crop(-20)
    with torch.inference_mode():
        for token in (3, 4, 5):
            ids = torch.tensor([[token]])
            a = made(ids, past_key_values=ours, use_cache=True).logits
            b = plain(ids, past_key_values=kept, use_cache=True).logits
            assert close(a, b, 2e-5)
    assert ours.get_seq_length() == 9 + 40 - 20 + 3


def test_copies_of_a_cache_do_not_share(calls):
    made = build()
    walk(made)
    with torch.inference_mode():
        _, cache = walk(made, tokens=3)
        twin = copy.deepcopy(cache)
        first = made(torch.tensor([[3]]), past_key_values=cache, use_cache=True).logits
        made(torch.tensor([[200]]), past_key_values=twin, use_cache=True)
        again = made(torch.tensor([[5]]), past_key_values=cache, use_cache=True).logits
        fresh = walk(made, tokens=3)[1]
        assert torch.equal(made(torch.tensor([[3]]), past_key_values=fresh, use_cache=True).logits, first)
        assert torch.equal(made(torch.tensor([[5]]), past_key_values=fresh, use_cache=True).logits, again)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_is_the_same(how, padded):
    prompt = PROMPT.repeat(2, 1) + torch.arange(2)[:, None]
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0 if padded else 1
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False} | how
    with torch.inference_mode():
        expected = build(quick=False).generate(prompt, **arguments)
        assert torch.equal(build().generate(prompt, **arguments), expected)


def test_hooks_still_see_their_modules(calls):
    made = build()
    walk(made)
    seen = []
    handle = made.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    calls.clear()
    walk(made, tokens=4)
    assert len(seen) == 5 and len(calls) == 4  # the prompt and every token; the other layer is native
    handle.remove()
    calls.clear()
    walk(made, tokens=4)
    assert len(seen) == 5 and len(calls) == 8


def test_a_model_without_packed_weights_can_be_copied():
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    runtime.quicken(made)
    walk(made)
    twin = copy.deepcopy(made)
    assert all(step.layer is layer for step, layer in zip(steps(twin), twin.model.layers, strict=True))
    assert torch.equal(walk(twin)[0], walk(made)[0])


def test_a_cache_of_other_sequences_or_numbers_is_not_touched(calls):
    made = build()
    walk(made)
    with torch.inference_mode():
        _, cache = walk(made, tokens=2)
        calls.clear()
        with pytest.raises(RuntimeError):  # transformers' own refusal: nothing was written past the cache's end
            made(torch.full((3, 1), 5), past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.double(), layer.values.double()
        with pytest.raises(RuntimeError):
            made(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    assert calls == []


def test_new_norm_weights_are_seen():
    made, plain = build(), build(quick=False)
    walk(made)
    for model in (made, plain):
        norm = model.model.layers[0].post_attention_layernorm
        norm.weight = torch.nn.Parameter(norm.weight * 3, requires_grad=False)
    assert close(walk(made)[0], walk(plain)[0], 2e-5)


def test_training_and_gradients_go_the_usual_way(calls):
    made = build()
    walk(made)
    calls.clear()
    with torch.no_grad():
        output = made(PROMPT, use_cache=True)
        made.train()
        made(torch.tensor([[3]]), past_key_values=output.past_key_values, use_cache=True)
    assert calls == []


def test_a_layer_that_answers_differently_is_left_alone(calls, monkeypatch):
    made = build()
    expected, _ = walk(build(quick=False))
    made.model.layers[1].self_attn.scaling *= 0.5
    monkeypatch.setattr(
        type(made.model.layers[1].self_attn), "forward", _rescaled(type(made.model.layers[1].self_attn))
    )
    found, _ = walk(made)
    assert trusted(made) == [True, False]
    assert close(found, expected, 2e-5)


def _rescaled(kind):
    """The module's own forward, but a layer whose scaling was halved doubles it: not what its attributes say."""
    forward = kind.forward

    def doubled(self, *given, **more):
        kept, self.scaling = self.scaling, self.head_dim**-0.5
        try:
            return forward(self, *given, **more)
        finally:
            self.scaling = kept

    return doubled


def test_without_a_compiler_nothing_is_changed(monkeypatch):
    made = build(quick=False)
    runtime.fuse_norms(made)
    monkeypatch.setattr(native, "available", lambda: False)
    assert fuse_decoder_layers(made) == 0
    assert not any(isinstance(step, OneToken) for step in steps(made))


@pytest.mark.parametrize("instructions", [NATIVE, AVX2], ids=["native", "avx2"])
def test_sanitizers_find_nothing_in_the_native_layer(tmp_path, instructions):
    """Buffers of exactly the size needed, odd sizes, every code of a cache, and the exponential by the library's."""
    sanitized.run("decoder", instructions, tmp_path)
