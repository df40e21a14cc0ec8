"""Fused groups inside modules: computed once per input, never stale, whatever the order of calls."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn

from autotune.errors import InputError
from autotune.kernels.linear import ZEROS, Alternative, FusedGroup, alternative, install
from autotune.kernels.spec import GroupWeight, Packed, kernel, load

DENSE = kernel("torch.cpu.fp32")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class _Counted:
    """A dense kernel that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, packed: Packed, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return load(DENSE).run(packed, x)


def _fuse(model: nn.Module, modules: Sequence[str], counted: _Counted) -> FusedGroup:
    """Replace linear layers of a model by one group."""
    layers = [model.get_submodule(path) for path in modules]
    transposed = not isinstance(layers[0], nn.Linear)  # GPT-2's Conv1D keeps (in, out)
    weights = [layer.weight.detach().T if transposed else layer.weight.detach() for layer in layers]
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    weight = GroupWeight("fp32", dense=torch.cat(weights).contiguous(), bias=bias)
    group = FusedGroup(weight.dense.shape[1], [part.shape[0] for part in weights])
    group.add("dense", Alternative(counted, load(DENSE).pack(weight, torch.float32)))
    install(model, modules, group)
    return group


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 8), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


@pytest.fixture
def attention():
    torch.manual_seed(0)
    plain = _Attention()
    fused, counted = copy.deepcopy(plain), _Counted()
    group = _fuse(fused, ["q_proj", "k_proj", "v_proj"], counted)
    return plain, fused, group, counted


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16), (1, 1, 16), (0, 16), (2, 0, 16)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_call_serves_all_members(attention, shape, mode):
    plain, fused, group, counted = attention
    x = torch.randn(shape)
    with mode():
        for expected, found in zip(plain(x), fused(x), strict=True):
            torch.testing.assert_close(found, expected)
    assert counted.calls == 1
    assert group._pending.input is None and group._pending.outputs == ()


def test_strided_input(attention):
    plain, fused, _, _ = attention
    x = torch.randn(16, 6).T
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))


@torch.no_grad()
def test_order_and_repetition_do_not_matter(attention):
    plain, fused, _, counted = attention
    x, other = torch.randn(3, 16), torch.randn(3, 16)
    for name, tensor in [("v", x), ("q", x), ("q", x), ("k", other), ("k", x), ("v", other), ("q", other), ("v", x)]:
        found = fused.get_submodule(f"{name}_proj")(tensor)
        torch.testing.assert_close(found, plain.get_submodule(f"{name}_proj")(tensor))
    assert counted.calls <= 7


@torch.no_grad()
def test_a_changed_input_is_computed_again(attention):
    plain, fused, _, counted = attention
    x = torch.randn(3, 16)
    fused.q_proj(x)
    x.mul_(2.0)
    torch.testing.assert_close(fused.k_proj(x), plain.k_proj(x))
    assert counted.calls == 2


@torch.no_grad()
def test_one_member_alone_twice_is_not_stale(attention):
    plain, fused, _, _ = attention
    x = torch.randn(3, 16)
    fused.q_proj(x)
    again = fused.q_proj(x)
    torch.testing.assert_close(again, plain.q_proj(x))


@torch.no_grad()
def test_a_new_tensor_at_the_same_address_is_not_taken_for_the_old(attention):
    plain, fused, _, _ = attention
    for _ in range(20):
        x = torch.randn(3, 16)
        torch.testing.assert_close(fused.q_proj(x), plain.q_proj(x))
        del x  # frees the block, unless something still holds the tensor


@torch.no_grad()
def test_selecting_switches_in_place_and_zeros_is_always_there(attention):
    plain, fused, group, counted = attention
    other = _Attention()
    rows = torch.cat([other.q_proj.weight, other.k_proj.weight, other.v_proj.weight])
    bias = torch.cat([other.q_proj.bias, other.k_proj.bias, other.v_proj.bias])
    packed = load(DENSE).pack(GroupWeight("fp32", dense=rows, bias=bias), torch.float32)
    group.add("other", alternative(DENSE, "fp32", packed))
    x = torch.randn(2, 3, 16)
    assert group.active == "dense"
    torch.testing.assert_close(fused(x), plain(x))
    fused.q_proj(x)  # leaves an output behind that the switch must drop
    group.select("other")
    torch.testing.assert_close(fused(x), other(x))
    assert group.packed_bytes == packed.bytes
    calls = counted.calls
    group.select(ZEROS)
    assert [tuple(y.shape) for y in fused(x)] == [(2, 3, 8), (2, 3, 4), (2, 3, 4)]
    assert not any(y.any() for y in fused(x))
    assert (counted.calls, group.packed_bytes) == (calls, 0)
    group.select("dense")
    torch.testing.assert_close(fused(x), plain(x))


def test_weights_are_registered_once(attention):
    _, fused, group, _ = attention
    assert [module for module in fused.modules() if isinstance(module, FusedGroup)] == [group]
    assert fused.state_dict() == {}
    assert (fused.k_proj.in_features, fused.k_proj.out_features) == (16, 4)


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (lambda fused, group: group.select("dens"), "kernel.alternative"),
        (lambda fused, group: group.remove("dense"), "kernel.alternative"),
        (lambda fused, group: fused(torch.randn(2, 15)), "kernel.input"),
        (lambda fused, group: fused(torch.randn(2, 16).bfloat16()), "kernel.input"),
        (lambda fused, group: group.add(ZEROS, group._alternatives["dense"]), "kernel.weight"),
        (lambda fused, group: FusedGroup(16, [8]).add("a", group._alternatives["dense"]), "kernel.weight"),
    ],
)
def test_misuse_is_refused(attention, act, code):
    _, fused, group, _ = attention
    with pytest.raises(InputError) as caught:
        act(fused, group)
    assert caught.value.code == code


@pytest.fixture
def llamas():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=2, vocab_size=100, max_position_embeddings=64, pad_token_id=0, **sizes)
    plain = LlamaForCausalLM(config).eval()
    fused, counted = copy.deepcopy(plain), _Counted()
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        _fuse(fused, [attention + name for name in ("q_proj", "k_proj", "v_proj")], counted)
        _fuse(fused, [attention + "o_proj"], counted)
        _fuse(fused, [mlp + "gate_proj", mlp + "up_proj"], counted)
        _fuse(fused, [mlp + "down_proj"], counted)
    return plain, fused, counted


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_unchanged(llamas, cache):
    plain, fused, _ = llamas
    ids = torch.randint(1, 100, (2, 7))
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(fused.generate(ids, **options), plain.generate(ids, **options))


def test_gpt2_layers_are_replaced_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=32)).eval()
    fused = copy.deepcopy(plain)
    for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        _fuse(fused, [f"transformer.h.0.{path}"], _Counted())
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, plain(ids).logits)
