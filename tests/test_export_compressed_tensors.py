"""compressed-tensors checkpoints: transformers with default arguments computes exactly what the plan says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_export_saved import saved_run
from torch import nn

from autotune.errors import InputError
from autotune.export import compressed_tensors
from autotune.export.saved import SavedGroup, open_saved
from autotune.kernels.reference import dequantize, quantize_activations
from autotune.model import load_model
from autotune.plan import Plan
from autotune.search_space.schemes import scheme

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[1, 5, 9, 2, 31, 7, 40, 3], [8, 8, 2, 60, 11, 0, 4, 21]])
MIXED = {  # every scheme of the CPU kernels, and a dense group
    "model.layers.0.self_attn.qkv": "w8a8-int8",
    "model.layers.0.self_attn.o_proj": "w4a16-int4-g32",
    "model.layers.0.mlp.gate_up": "w4a16-int4-g64",
    "model.layers.0.mlp.down_proj": "w8a16-int8",
    "model.layers.1.self_attn.qkv": "w4a16-int4-g128",
    "model.layers.1.mlp.gate_up": "w8a8-int8",
    "model.layers.1.mlp.down_proj": "w4a16-int4-g128",
    "lm_head": "w8a8-int8",
}
SPARSE = {
    "model.layers.0.self_attn.qkv": "2:4+w8a8-int8",
    "model.layers.0.self_attn.o_proj": "2:4",
    "model.layers.0.mlp.gate_up": "2:4+w4a16-int4-g128",
    "model.layers.0.mlp.down_proj": "w8a8-fp8",
    "model.layers.1.mlp.gate_up": "2:4+w8a8-fp8",
    "model.layers.1.mlp.down_proj": "w8a8-int8",
}


class _Reference(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> None:
        super().__init__()
        self.weight, self.bias, self.activation = weight, bias, scheme(name).activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.activation is None else quantize_activations(x, self.activation)
        return nn.functional.linear(x, self.weight, self.bias)


@torch.inference_mode()
def _reference_logits(saved: SimpleNamespace) -> torch.Tensor:
    """Dequantized weights and per-token fake quantization, in the plan's dtype."""
    model = load_model(saved.opened)
    for group in saved.opened.spec.groups:
        weight = saved.weights[group.name]
        parts = dequantize(weight).to(saved.opened.dtype).split([m.out_features for m in group.members])
        for member, part in zip(group.members, parts, strict=True):
            parent, _, name = member.module.rpartition(".")
            bias = model.get_submodule(member.module).bias
            setattr(model.get_submodule(parent), name, _Reference(part, bias, weight.scheme))
    return _outputs(model)


@torch.inference_mode()
def _consumer_logits(folder: Path, auto: str = "AutoModelForCausalLM") -> torch.Tensor:
    import transformers

    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return _outputs(model)


def _outputs(model: nn.Module) -> torch.Tensor:
    output = model(IDS)
    return output.last_hidden_state if "last_hidden_state" in output else output.logits


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("schemes", [MIXED, SPARSE], ids=["mixed", "sparse-fp8"])
def test_plain_transformers_computes_the_plan_exactly(tmp_path: Path, kind: str, schemes: dict[str, str]) -> None:
    saved = saved_run(tmp_path, kind, schemes)
    report = compressed_tensors.write(saved.run, tmp_path / "out", saved.source)
    assert report.schemes == saved.plan.configuration
    assert torch.equal(_consumer_logits(tmp_path / "out"), _reference_logits(saved))


def test_other_architectures(tmp_path: Path) -> None:
    for kind, auto in (("phi", "AutoModelForCausalLM"), ("bert", "AutoModel")):
        names = {"self_attn.qkv": "w8a8-int8", "mlp.fc1": "w4a16-int4-g32", "lm_head": "w8a16-int8"}
        names |= {"attention.self.qkv": "w8a8-int8", "intermediate.dense": "w4a16-int4-g128"}
        layers = ("", "model.layers.0.", "encoder.layer.0.")
        saved = saved_run(
            tmp_path / kind, kind, {layer + key: value for layer in layers for key, value in names.items()}
        )
        assert len({entry.scheme for entry in saved.plan.tensors}) > 2
        report = compressed_tensors.write(saved.run, tmp_path / kind / "out", saved.source)
        assert any("BertModel" in note for note in report.notes) is (kind == "bert")
        assert torch.equal(_consumer_logits(tmp_path / kind / "out", auto), _reference_logits(saved))


@pytest.mark.parametrize("head", ["w8a8-int8", "w4a16-int4-g128", "fp32"])
def test_tied_embeddings(tmp_path: Path, head: str) -> None:
    """A compressed lm_head is stored beside the embedding and untied in the config; a dense one stays shared."""
    saved = saved_run(tmp_path, "llama", {"lm_head": head, "model.layers.0.mlp.gate_up": "w8a8-int8"}, tied=True)
    report = compressed_tensors.write(saved.run, tmp_path / "out", saved.source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (head == "fp32")
    assert any("lm_head" in note for note in report.notes) is (head != "fp32")
    assert torch.equal(_consumer_logits(tmp_path / "out"), _reference_logits(saved))


def test_bf16_and_members_with_and_without_bias(tmp_path: Path) -> None:
    saved = saved_run(tmp_path, "qwen2", MIXED, dtype="bf16")
    compressed_tensors.write(saved.run, tmp_path / "out", saved.source)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.self_attn.k_proj.bias" in tensors and "model.layers.0.self_attn.o_proj.bias" not in tensors
    assert {t.dtype for name, t in tensors.items() if name.endswith("scale")} == {torch.bfloat16}
    ours, theirs = _reference_logits(saved).float(), _consumer_logits(tmp_path / "out").float()
    assert float((ours - theirs).norm() / ours.norm()) < 2e-2  # bf16 activations: their scales are rounded to bf16


def test_generates(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    saved = saved_run(tmp_path, "llama", MIXED)
    compressed_tensors.write(saved.run, tmp_path / "out", saved.source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape[1] == IDS.shape[1] + 3


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from autotune.cli import app

    saved = saved_run(tmp_path, "llama", SPARSE)
    done = CliRunner().invoke(
        app, ["export", str(saved.run), "--to", "compressed-tensors", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0 and "no speed-up" in " ".join(done.output.split())
    assert torch.equal(_consumer_logits(tmp_path / "out"), _reference_logits(saved))
    again = CliRunner().invoke(app, ["export", str(saved.run), "--out", str(tmp_path / "out")])
    assert isinstance(again.exception, InputError) and again.exception.code == "export.exists"


def test_packing_is_the_consumers_own() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    generator = torch.Generator().manual_seed(0)
    for bits in compressed_tensors.PACKABLE_BITS:
        for columns in (32, 40, 128):
            half = 2 ** (bits - 1)
            codes = torch.randint(-half, half, (5, columns), dtype=torch.int8, generator=generator)
            packed = compressed_tensors.pack_int32(codes, bits)
            assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)
            if columns * bits % 32 == 0:
                assert torch.equal(packed, pack_to_int32(codes, bits))


def test_config_is_the_original_plus_one_key(tmp_path: Path) -> None:
    saved = saved_run(tmp_path, "llama", MIXED)
    compressed_tensors.write(saved.run, tmp_path / "out", saved.source)
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = ours.pop("quantization_config")
    assert ours == json.loads((saved.source / "config.json").read_text())
    targets = [name for group in quantization["config_groups"].values() for name in group["targets"]]
    assert len(set(targets)) == len(targets) and not any(name.startswith("re:") for name in targets)
    assert sorted(targets + quantization["ignore"]) == sorted(entry.module for entry in saved.plan.tensors)
    assert quantization["format"] == "mixed-precision" and all(
        g["format"] for g in quantization["config_groups"].values()
    )
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert Plan.load(tmp_path / "out" / "plan.json") == saved.plan


def test_a_dense_plan_is_a_plain_checkpoint(tmp_path: Path) -> None:
    saved = saved_run(tmp_path, "llama", {"lm_head": "2:4"})
    compressed_tensors.write(saved.run, tmp_path / "out", saved.source)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(_consumer_logits(tmp_path / "out"), _reference_logits(saved))


def test_layers_that_engines_fuse_must_agree(tmp_path: Path) -> None:
    saved = saved_run(tmp_path, "llama", {})
    opened = open_saved(saved.run)
    q, k, v = opened.groups[0].members
    split = (SavedGroup("q", scheme("w8a8-int8"), (q,)), SavedGroup("kv", scheme("w8a16-int8"), (k, v)))
    with pytest.raises(InputError, match=r"export\.unsupported.*fused"):
        compressed_tensors.check(replace(opened, groups=split))


def test_dequantize_true_raises_for_mixed_plans(tmp_path: Path) -> None:
    """A limit of transformers that our documentation states; when this fails, the documentation can be relaxed."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    saved = saved_run(tmp_path, "llama", MIXED)
    compressed_tensors.write(saved.run, tmp_path / "out", saved.source)
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
        )
