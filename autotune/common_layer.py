"""The decoder layers that native code can stand in for: Llama's, Mistral's and Qwen's kind.

RMSNorm, q/k/v with or without norms a head, rotary positions, grouped-query attention, a gated MLP with SiLU, two
residual sums. Whether a layer is of that kind is asked of its structure here, and of its numbers where it is run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autotune.kernels.linear import FusedGroup, GroupSlice
from autotune.kernels.norm import FusedRMSNorm
from autotune.kv_cache import Keeping

_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION, _HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
DTYPES = (torch.bfloat16, torch.float32)
_SAME = 0.02  # of what the layer adds to its input: roundings differ, and 8-bit activations turn them into steps


def is_common(layer: nn.Module) -> bool:
    if {name for name, _ in layer.named_children()} != _CHILDREN:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    inside = {name for name, _ in attention.named_children()}  # type: ignore[union-attr]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in sorted(_HEAD_NORMS & inside)]
    return (
        inside in (_ATTENTION, _ATTENTION | _HEAD_NORMS)
        and {name for name, _ in mlp.named_children()} == _MLP  # type: ignore[union-attr]
        and "silu" in type(mlp.act_fn).__name__.lower()  # type: ignore[union-attr]
        and all(isinstance(norm, FusedRMSNorm) for norm in norms)
        and not list(attention.parameters(recurse=False))  # type: ignore[union-attr]
        and all(hasattr(attention, name) for name in ("head_dim", "scaling", "layer_idx"))
    )


def members_of(layer: nn.Module) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Where the groups' members are: the modules that hold them, and their names, in the order of rows."""
    attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    assert attention is not None and mlp is not None
    return [
        (attention._modules, ("q_proj", "k_proj", "v_proj")),
        (attention._modules, ("o_proj",)),
        (mlp._modules, ("gate_proj", "up_proj")),
        (mlp._modules, ("down_proj",)),
    ]


def groups_of(layer: nn.Module) -> tuple[FusedGroup, ...] | None:
    """q/k/v, o, gate/up and down, if that is how the layer's products are grouped."""
    groups = []
    for modules, names in members_of(layer):
        members = [modules[name] for name in names]
        if not all(isinstance(member, GroupSlice) for member in members):
            return None
        group = members[0].group
        if len(group.sizes) != len(names) or any(m.group is not group or m.index != i for i, m in enumerate(members)):
            return None
        groups.append(group)
    return tuple(groups)


def wanted_format(layer: Any) -> str | None:
    """The format that the layer's keys and values are to be kept in."""
    forward = layer.self_attn.forward
    return forward.name if isinstance(forward, Keeping) else None


def may(module: nn.Module, x: torch.Tensor) -> bool:
    """Nobody compiles, trains or wants gradients of x."""
    if torch.compiler.is_compiling() or not x.is_contiguous() or x.device.type != "cpu" or module.training:
        return False
    return not (torch.is_grad_enabled() and x.requires_grad)


def hooks_inside(layer: nn.Module) -> list[Any]:
    """The hooks of all modules inside: live collections, empty as long as nobody watches."""
    inside = [module for module in layer.modules() if module is not layer]
    return [hooks for module in inside for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return float((found.float() - expected.float()).norm()) <= _SAME * float(expected.float().norm())
