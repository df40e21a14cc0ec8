"""Kernels as a torch operator: the same numbers as called directly, in compiled and in exported models."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from native import one_thread  # noqa: F401 - a fixture
from torch import nn

from autotune.errors import DeviceError, InputError
from autotune.kernels import operator
from autotune.kernels.linear import ZEROS, Alternative, FusedGroup, alternative, install
from autotune.kernels.reference import random_weight
from autotune.kernels.spec import KERNELS, kernel, load
from autotune.search_space.rules import lacking
from autotune.search_space.schemes import scheme
from autotune.targets.detect import detect_cpu

FEATURES = detect_cpu().features
HERE = [spec for spec in KERNELS if spec.device == "cpu" and not lacking(spec.limits.features, FEATURES)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
pytestmark = pytest.mark.usefixtures("one_thread")


def _operands(spec, name, dtype, bias=True):
    """A kernel's packed weights, and what the operator takes of them."""
    inputs = 2 * math.lcm(32, scheme(name).weight.group_size or 1, scheme(name).block or 1)
    made = random_weight(name, 24, inputs, dtype, bias, torch.Generator().manual_seed(0))
    packed = load(spec).pack(made, dtype)
    item = operator.operands(spec, name, packed)
    first = item.weights[0] if item.weights[0] is not None else operator.plain(spec.name, packed)
    return packed, ([first, *item.weights[1:]], spec.name, name, 24)


def _input(packed, *shape):
    return torch.randn(*shape, packed.in_features, generator=torch.Generator().manual_seed(1)).to(packed.dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", HERE, ids=lambda spec: spec.name)
def test_the_operator_gives_what_the_kernel_gives(spec, bias):
    for name in spec.schemes:
        for dtype in spec.dtypes:
            packed, rest = _operands(spec, name, DTYPES[dtype], bias)
            for rows in (1, 70):
                x = _input(packed, rows)
                assert torch.equal(torch.ops.autotune.linear(x, *rest), load(spec).run(packed, x)), (name, dtype, rows)


def _modules():
    """One kernel of each file: what differs for torch is how tensors are packed."""
    ordered = sorted(HERE, key=lambda spec: spec.module)
    return [next(specs) for _, specs in groupby(ordered, key=lambda spec: spec.module)]


@pytest.mark.parametrize("spec", _modules(), ids=lambda spec: spec.name)
def test_torch_accepts_the_operator(spec):
    packed, rest = _operands(spec, spec.schemes[-1], DTYPES[spec.dtypes[0]])
    torch.library.opcheck(torch.ops.autotune.linear.default, (_input(packed, 2, 3), *rest))


def test_weights_are_shared_with_the_eager_kernel_where_they_can_be():
    spec = kernel("torch.cpu.unpack")
    packed, (weights, *_) = _operands(spec, "2:4+w4a16-int4-g128", torch.float32)
    assert sum(part.nbytes for part in weights if part is not None) == packed.bytes
    assert weights[0] is packed.data.values


@pytest.mark.parametrize("name", ["onednn.fp32", "onednn.w8a8"])
def test_reordered_weights_are_made_once_and_again_after_a_change(name):
    spec = kernel(name)
    if spec not in HERE:
        pytest.skip("this CPU cannot run the kernel")
    packed, rest = _operands(spec, spec.schemes[0], torch.float32, bias=False)
    x = _input(packed, 5)
    expected = torch.ops.autotune.linear(x, *rest)
    with pytest.MonkeyPatch.context() as patch:  # nothing is reordered any more
        patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
        patch.setattr(torch.ops.onednn, "qlinear_prepack", None)
        assert torch.equal(torch.ops.autotune.linear(x, *rest), expected)
    rest[0][0].neg_()
    assert torch.equal(torch.ops.autotune.linear(x, *rest), -expected)


def test_a_layout_of_another_cpu_is_refused():
    if kernel("torch.cpu.w4a16") not in HERE:
        pytest.skip("this CPU cannot run the kernel")
    packed, (weights, *rest) = _operands(kernel("torch.cpu.w4a16"), "w4a16-int4-g32", torch.float32)
    weights[-1] = weights[-1] + 1
    with pytest.raises(DeviceError, match=r"kernel\.layout.*blocks of"):
        torch.ops.autotune.linear(_input(packed, 2), weights, *rest)


def test_what_cannot_be_in_a_graph_says_so():
    packed, _ = _operands(kernel("torch.cpu.fp32"), "fp32", torch.float32)
    group = FusedGroup(packed.in_features, [24])
    group.add("mine", Alternative(load(kernel("torch.cpu.fp32")).run, packed))
    with pytest.raises(InputError, match=r"kernel\.operator.*not for graphs"):
        torch.export.export(group.slices()[0], (_input(packed, 2),))


def _compressed(plain: nn.Module, kernels: tuple[str, ...]) -> nn.Module:
    """The model's layers grouped and quantized, by kernels that take turns."""
    made, turn = copy.deepcopy(plain), 0
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        for parent, names in ((attention, "qkv"), (attention, "o"), (mlp, ("gate", "up")), (mlp, ("down",))):
            paths = [f"{parent}{name}_proj" for name in names]
            layers = [made.get_submodule(path) for path in paths]
            spec = kernel(kernels[turn % len(kernels)])
            name, turn = spec.schemes[0], turn + 1
            outputs, inputs = sum(item.out_features for item in layers), layers[0].in_features
            weight = random_weight(name, outputs, inputs, torch.float32, False, torch.Generator().manual_seed(turn))
            group = FusedGroup(inputs, [item.out_features for item in layers])
            group.add(name, alternative(spec, name, load(spec).pack(weight, torch.float32)))
            install(made, paths, group)
    return made


@pytest.fixture(scope="module")
def compressed():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=2, vocab_size=100, max_position_embeddings=64, pad_token_id=0, **sizes)
    wanted = ("torch.cpu.fp32", "onednn.fp32", "cpu.w8a8", "cpu.w4a16", "onednn.w8a8", "torch.cpu.w4a16")
    usable = tuple(name for name in wanted if kernel(name) in HERE)
    return _compressed(LlamaForCausalLM(config).eval(), usable)


def _ids(count=7):
    return torch.randint(1, 100, (2, count), generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def test_compiles_without_graph_breaks(compressed):
    """Capture only (`aot_eager` backend): Inductor sees the same single operator per group."""
    compiled = torch.compile(compressed, fullgraph=True, backend="aot_eager")
    for count in (7, 9):
        expected = compressed(_ids(count), use_cache=False).logits
        torch.testing.assert_close(compiled(_ids(count), use_cache=False).logits, expected)


@torch.no_grad()
def test_another_selection_is_compiled_anew():
    packed, _ = _operands(kernel("torch.cpu.fp32"), "fp32", torch.float32)
    group = FusedGroup(packed.in_features, [24])
    group.add("a", alternative(kernel("torch.cpu.fp32"), "fp32", packed))
    member, x = group.slices()[0], _input(packed, 3)
    compiled = torch.compile(member, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), member(x))
    group.select(ZEROS)
    assert not compiled(x).any()


@pytest.mark.slow
@torch.no_grad()
def test_compiles_with_inductor(compressed):
    """Sums of the other layers come in another order, which 8-bit activations turn into steps."""
    found = torch.compile(compressed, fullgraph=True)(_ids(), use_cache=False).logits
    expected = compressed(_ids(), use_cache=False).logits
    assert float((found - expected).norm()) <= 0.01 * float(expected.norm())


class _Logits(nn.Module):
    """A plain tensor out: a transformers output would want its class imported before the program is loaded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


CHILD = """
import sys, torch
import autotune.kernels.operator
program, known = torch.export.load(sys.argv[1]), torch.load(sys.argv[2])
for ids, expected in known:
    torch.testing.assert_close(program.module()(ids), expected)
assert "transformers" not in sys.modules
"""


@torch.no_grad()
def test_an_exported_program_is_complete(compressed, tmp_path):
    """Saved, loaded where nothing but the operator is known, and run on other lengths than it was exported with."""
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(_Logits(compressed), (_ids(),), dynamic_shapes=({1: length},))
    assert "torch.ops.autotune.linear.default" in program.graph_module.code
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save([(_ids(count), _Logits(compressed)(_ids(count))) for count in (7, 20)], tmp_path / "known.pt")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "model.pt2"), str(tmp_path / "known.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
