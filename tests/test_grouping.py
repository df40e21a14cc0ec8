"""Layer groups: same input, same parent, named together in the fusion table; all three."""

from __future__ import annotations

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from autotune.grouping import group_linears, linear_of
from autotune.model import open_model


def build(names, inputs, width=8):
    """Groups of a module tree with linears at dotted paths; `inputs`: path -> what it reads."""
    root = nn.Module()
    for path in names:
        parent = root
        *parts, last = path.split(".")
        for part in parts:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(width, width, bias=False))
    paths = {name: name for name, _ in root.named_parameters()}
    return [
        (group.name, group.role, [member.module for member in group.members])
        for group in group_linears(root, paths, inputs)
    ]


QKV = ["layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.0.attn.v_proj"]


def test_q_k_v_that_read_the_same_tensor_are_one_group():
    assert build(QKV, dict.fromkeys(QKV, 1)) == [("layers.0.attn.qkv", "qkv", QKV)]


def test_rows_are_stacked_in_the_tables_order_not_the_models():
    order = [QKV[2], QKV[0], QKV[1]]
    assert build(order, dict.fromkeys(order, 1))[0][2] == QKV


def test_another_input_makes_another_group():
    """Cross-attention: k and v read the encoder's output."""
    assert len(build(QKV, dict(zip(QKV, (1, 2, 2), strict=True)))) == 3


def test_another_parent_makes_another_group():
    paths = [QKV[0], "layers.0.other.k_proj", "layers.0.attn.v_proj"]
    assert len(build(paths, dict.fromkeys(paths, 1))) == 3


def test_layers_not_named_together_stay_apart():
    """Phi: fc1 reads what q/k/v read and is its own kernel."""
    paths = [*QKV, "layers.0.attn.fc1"]
    assert [role for _, role, _ in build(paths, dict.fromkeys(paths, 1))] == ["qkv", "up"]


def test_a_layer_that_is_not_called_is_in_no_group():
    assert build(QKV, {QKV[0]: 1}) == [(QKV[0], "q_proj", [QKV[0]])]


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.layers.3.self_attn.o_proj", "o"),
        ("model.layers.3.self_attn.dense", "o"),
        ("model.layers.3.mlp.down_proj", "down"),
        ("model.layers.3.mlp.gate_up_proj", "gate_up"),
        ("model.layers.3.self_attn.qkv_proj", "qkv"),
        ("transformer.h.3.attn.c_attn", "qkv"),
        ("transformer.h.3.attn.c_proj", "o"),
        ("transformer.h.3.mlp.c_fc", "up"),
        ("transformer.h.3.mlp.c_proj", "down"),
        ("encoder.layer.3.attention.output.dense", "o"),
        ("encoder.layer.3.intermediate.dense", "up"),
        ("encoder.layer.3.output.dense", "down"),
        ("lm_head", "lm_head"),
        ("model.layers.3.something", "something"),
    ],
)
def test_roles_by_name(path, role):
    assert build([path], {path: 1}) == [(path, role, [path])]


def test_shapes_are_out_by_in_whatever_the_storage():
    assert linear_of(nn.Linear(3, 5)) == (5, 3, False)
    assert linear_of(Conv1D(5, 3)) == (5, 3, True)
    assert linear_of(nn.Embedding(5, 3)) is None


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("llama", ["qkv", "o", "gate_up", "down"] * 2 + ["lm_head"]),
        ("gpt2", ["qkv", "o", "up", "down", "lm_head"]),
        ("bert", ["qkv", "o", "up", "down"]),
    ],
)
def test_groups_of_real_architectures(models, name, roles):
    groups = open_model(str(models(name))).spec.groups
    assert [group.role for group in groups] == roles
    assert [group.last_token_only for group in groups] == [role == "lm_head" for role in roles]
    assert {group.layer for group in groups if group.role != "lm_head"} == set(range(max(1, roles.count("o"))))
    assert all(member.transposed == (name == "gpt2") for group in groups[:-1] for member in group.members)
