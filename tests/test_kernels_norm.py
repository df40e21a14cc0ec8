"""RMSNorm as one native call: what transformers' modules give, and only where it gives that."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from autotune.errors import DeviceError
from autotune.kernels import norm
from autotune.kernels.norm import FusedRMSNorm, fuse_norms
from autotune.targets.detect import detect_cpu

pytestmark = pytest.mark.skipif("cxx" not in detect_cpu().features, reason="there is no C++ compiler")


def module(kind=LlamaRMSNorm, width=64, dtype=torch.bfloat16, seed=0):
    made = kind(width, eps=1e-6)
    made.weight.data = 1 + 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype)


def near(found, expected):
    """One rounding of bf16 apart; in fp32 sums that were added up in another order show."""
    steps = 2 if found.dtype == torch.bfloat16 else 32
    return torch.allclose(found.float(), expected.float(), rtol=steps * torch.finfo(found.dtype).eps, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("shape", [(1, 64), (3, 65), (1, 1, 15), (2, 7, 1024), (1, 8, 3, 128), (700, 130), (0, 64)])
def test_it_gives_what_transformers_gives(dtype, kind, shape):
    ours = module(kind, shape[-1], dtype)
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 20).to(dtype)
    with torch.no_grad():
        found = FusedRMSNorm(ours.weight, ours.variance_epsilon)(x)
        assert found.dtype == dtype and found.shape == x.shape
        assert near(found, ours(x))


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e15])
def test_any_magnitude(scale):
    ours = module()
    x = (torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * scale).bfloat16()
    with torch.no_grad():
        assert near(FusedRMSNorm(ours.weight, 1e-6)(x), ours(x))


def test_nan_and_infinity_come_through():
    ours = module()
    x = torch.ones(2, 64).bfloat16()
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    with torch.no_grad():
        found, expected = FusedRMSNorm(ours.weight, 1e-6)(x), ours(x)
    assert torch.equal(found.isnan(), expected.isnan())


def test_a_view_that_is_not_contiguous():
    ours = module(width=32)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()[:, ::2]
    with torch.no_grad():
        assert near(FusedRMSNorm(ours.weight, 1e-6)(x), ours(x))


def llama(dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def test_a_models_norms_are_exchanged_and_nothing_else_changes():
    model, ids = llama(), torch.arange(10).view(1, 10)
    names, modes = set(model.state_dict()), model.model.norm.training
    with torch.no_grad():
        before = model(ids).logits
        assert fuse_norms(model) == 5  # two a layer, one at the end
        assert fuse_norms(model) == 0
        assert torch.allclose(model(ids).logits, before, atol=0.02)
    assert {type(m).__name__ for m in model.modules() if "RMSNorm" in type(m).__name__} == {"FusedRMSNorm"}
    assert (set(model.state_dict()), model.model.norm.training) == (names, modes)


def test_weights_assigned_later_are_used():
    model = llama()
    fuse_norms(model)
    state = {name: tensor * 2 if "norm" in name else tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        expected = LlamaRMSNorm(64, eps=1e-6).bfloat16()
        expected.weight.data = state["model.norm.weight"]
        assert near(model.model.norm(x), expected(x))


def test_norms_that_compute_something_else_stay():
    model = nn.Sequential(module(GemmaRMSNorm), nn.LayerNorm(64).bfloat16(), module())
    assert fuse_norms(model) == 1
    assert [type(item).__name__ for item in model] == ["GemmaRMSNorm", "LayerNorm", "FusedRMSNorm"]


def test_gradients_and_other_types_take_torchs_way():
    fused = FusedRMSNorm(module(dtype=torch.float32).weight, 1e-6)
    x = torch.randn(3, 64, requires_grad=True)
    fused(x).sum().backward()
    expected = x.detach().clone().requires_grad_()
    module(dtype=torch.float32)(expected).sum().backward()
    assert torch.allclose(x.grad, expected.grad, atol=1e-6)
    with torch.no_grad():
        assert fused(torch.ones(1, 64).double()).shape == (1, 64)


def test_it_compiles():
    fused = FusedRMSNorm(module().weight, 1e-6)
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        assert near(torch.compile(fused, backend="eager", fullgraph=True)(x), fused(x))


def test_without_a_compiler_nothing_is_exchanged(monkeypatch):
    def refuse(*_):
        raise DeviceError("kernel.compiler", "there is none.")

    monkeypatch.setattr(norm, "rms_norm", refuse)
    model = llama()
    assert fuse_norms(model) == 0
    with torch.no_grad():
        assert model(torch.arange(4).view(1, 4)).logits.isfinite().all()


def test_weights_that_are_not_in_memory_are_left():
    with torch.device("meta"):
        model = nn.Sequential(LlamaRMSNorm(64))
    assert fuse_norms(model) == 0


@torch.no_grad()
def test_elsewhere_than_on_a_cpu_torch_computes_it():
    ours = FusedRMSNorm(module().weight, 1e-6).to("meta")
    found = ours(torch.empty(3, 64, dtype=torch.bfloat16, device="meta"))
    assert found.is_meta and found.dtype == torch.bfloat16 and found.shape == (3, 64)
