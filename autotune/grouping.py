"""Finds a model's linear layers and joins those that engines run as one kernel.

Members of one group read the same tensor, have the same parent module and are named together in the fusion table below;
all three, because Phi's fc1 reads what q/k/v read and is still its own kernel. The experts of a layer are joined after
that: all their gates and ups are one group, all their downs another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from autotune.experts import SplitExperts, routers
from autotune.search_space.groups import LayerGroup, Linear

# role -> the attribute names that engines fuse, in the order their rows are stacked.
FUSION: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv", ("q_proj", "k_proj", "v_proj")),
    ("qkv", ("query", "key", "value")),
    ("qkv", ("q_lin", "k_lin", "v_lin")),
    ("qkv", ("q", "k", "v")),
    ("gate_up", ("gate_proj", "up_proj")),
)
# (pattern on the module path, role), the first match wins; anything else is named by its last path component.
ROLES: tuple[tuple[str, str], ...] = (
    (r"(lm_head|embed_out|output_projection)$", "lm_head"),
    (r"attn\.c_attn$|query_key_value$|qkv_proj$|Wqkv$", "qkv"),
    (
        r"attn\.c_proj$|(o_proj|out_proj|out_lin)$|attention\.output\.dense$|(self_attn|attention)\.dense$|attn\.(Wo|o)$",
        "o",
    ),
    (r"(gate_up_proj|mlp\.Wi)$", "gate_up"),
    (r"(mlp\.c_fc|fc1|fc_in|lin1|up_proj|intermediate\.dense|dense_h_to_4h)$", "up"),
    (r"(mlp\.c_proj|fc2|fc_out|lin2|down_proj|output\.dense|dense_4h_to_h|mlp\.Wo)$", "down"),
)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def in_pooler(path: str) -> bool:
    """True inside an encoder's pooler, which reads the embeddings that are judged and is read by nothing here."""
    return "pooler" in path.split(".")


def linear_of(module: nn.Module) -> tuple[int, int, bool] | None:
    """(out_features, in_features, stored transposed) of a linear layer, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features, False
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0]), True
    return None


def group_linears(model: nn.Module, names: Mapping[str, str], inputs: Mapping[str, int]) -> tuple[LayerGroup, ...]:
    """Layer groups in the order the model defines them.

    Args:
        names: parameter path -> checkpoint tensor path.
        inputs: module path -> identity of the tensor it read in a traced forward pass; a linear layer that was not
            called is in no group.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module) and name in inputs}
    apart = routers(model)
    linears = {name: module for name, module in linears.items() if not in_pooler(name) and name not in apart}
    groups, done = [], set()
    for name in linears:
        if name in done:
            continue
        role, members = _fused(name, linears, inputs)
        done.update(members)
        groups.append(_group(role, members, linears, names))
    for path, module in model.named_modules():
        if isinstance(module, SplitExperts):
            groups = _join_experts(path, module, groups)
    return tuple(groups)


def _join_experts(path: str, experts: SplitExperts, groups: list[LayerGroup]) -> list[LayerGroup]:
    """The groups with those of a layer's experts joined: what is first in every expert, what is second in each, ..."""
    inside = [group for group in groups if group.name.startswith(f"{path}.")]
    each = len(inside) // len(experts)
    joined = []
    for first in range(each):
        own = inside[first::each]
        name = own[0].name.removeprefix(f"{path}.0.")
        members = tuple(member for group in own for member in group.members)
        taken, role = experts.per_token, f"experts_{own[0].role}"
        joined.append(LayerGroup(f"{path}.{name}", role, own[0].layer, members, False, len(experts), taken))
    place = groups.index(inside[0]) if inside else 0
    return [*groups[:place], *joined, *groups[place + len(inside) :]]


def _fused(name: str, linears: Mapping[str, nn.Module], inputs: Mapping[str, int]) -> tuple[str, list[str]]:
    parent, _, last = name.rpartition(".")
    for role, names in FUSION:
        paths = [f"{parent}.{item}" for item in names]
        if last in names and all(path in linears for path in paths) and len({inputs[path] for path in paths}) == 1:
            return role, paths
    return _role(name), [name]


def _role(name: str) -> str:
    for pattern, role in ROLES:
        if re.search(pattern, name):
            return role
    return name.rpartition(".")[2]


def _group(role: str, members: list[str], linears: Mapping[str, nn.Module], names: Mapping[str, str]) -> LayerGroup:
    linear = tuple(_linear(path, linears[path], names[f"{path}.weight"]) for path in members)
    parent = members[0].rpartition(".")[0]
    name = f"{parent}.{role}" if len(members) > 1 else members[0]
    index = re.search(r"\.(\d+)\.", name)
    return LayerGroup(name, role, int(index.group(1)) if index else None, linear, role == "lm_head")


def _linear(path: str, module: nn.Module, tensor: str) -> Linear:
    shape = linear_of(module)
    assert shape is not None
    return Linear(tensor, path, shape[0], shape[1], module.bias is not None, shape[2])
