"""Saved models as exporters read them: complete and of one plan, or refused before anything is written.

`saved_run` makes the runs that the other tests of exporters use.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autotune import runtime
from autotune.compress import database
from autotune.errors import InputError
from autotune.export import compressed_tensors
from autotune.export.saved import open_saved
from autotune.kernels.linear import FusedGroup, install
from autotune.kernels.reference import dequantize
from autotune.kernels.spec import GroupWeight
from autotune.model import load_model, open_model
from autotune.plan import GroupEntry, KeptEntry, Limits, ModelRef, Plan, Prediction, Provenance, SchemeSpec, TensorEntry
from autotune.search_space.groups import ModelSpec
from autotune.search_space.schemes import scheme

SCHEMES = {
    "model.layers.0.self_attn.qkv": "w8a8-int8",
    "model.layers.1.mlp.gate_up": "w4a16-int4-g64",
    "lm_head": "2:4",
}


def make_model(kind: str, tied: bool, seed: int = 0) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "tie_word_embeddings": tied,
    }
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attention_bias=True))
    if kind == "qwen2":  # q, k and v have a bias, o has none
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    if kind == "phi":  # fc1 reads what q, k and v read; q, k, v and lm_head have biases
        return transformers.PhiForCausalLM(transformers.PhiConfig(**sizes))
    if kind == "bert":  # loaded without its head, and its tensors have other names than its layers
        sizes |= {"num_hidden_layers": 1}
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=32))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=128, n_layer=1, n_head=4, vocab_size=64))


def make_plan(spec: ModelSpec, schemes: dict[str, str]) -> Plan:
    used = {group.name: schemes.get(group.name, spec.dtype) for group in spec.groups}
    return Plan(
        generator="test",
        model=ModelRef(
            name="tiny",
            architecture=spec.architecture,
            task=spec.task,
            dtype=spec.dtype,
            sha256=spec.model_hash,
            tied_embeddings=spec.tied_embeddings,
        ),
        target="test",
        runtime="test",
        workload="chat",
        budget=Limits(max_loss=None, max_memory_bytes=None, min_speedup=None),
        schemes={name: SchemeSpec.of(name) for name in sorted(set(used.values()))},
        groups=tuple(
            GroupEntry(
                name=group.name,
                role=group.role,
                layer=group.layer,
                kernel="test",
                predicted_latency_us=1.0,
                latency_status="estimated",
                predicted_loss_nats=None,
                weight_bytes=1,
            )
            for group in spec.groups
        ),
        tensors=tuple(
            TensorEntry(
                tensor=member.tensor,
                module=member.module,
                shape=(member.out_features, member.in_features),
                group=group.name,
                scheme=None if used[group.name] == spec.dtype else used[group.name],
                reason="test",
            )
            for group in spec.groups
            for member in group.members
        ),
        kept=tuple(KeptEntry(tensor=t.tensor, shape=t.shape, reason=t.reason) for t in spec.kept),
        prediction=Prediction(
            latency_us=1.0,
            dense_latency_us=1.0,
            loss_nats=None,
            search_kl_nats=None,
            weight_bytes=1,
            dense_weight_bytes=1,
        ),
        provenance=Provenance(
            latency_table="", loss_table=None, documents=None, kernels={}, packages={}, seed=0, trials=0
        ),
    )


def saved_run(
    folder: Path, kind: str, schemes: dict[str, str], tied: bool = False, dtype: str = "fp32"
) -> SimpleNamespace:
    """A model folder, a run whose model folder holds it under the schemes, and the canonical weights."""
    make_model(kind, tied).to(torch.bfloat16 if dtype == "bf16" else torch.float32).save_pretrained(folder / "source")
    (folder / "source" / "chat_template.jinja").write_text("{{ messages }}")
    opened = open_model(str(folder / "source"), dtype)
    spec, model = opened.spec, load_model(opened)
    plan = make_plan(spec, schemes)
    weights, shared = {}, set()
    for group in spec.groups:
        name = schemes.get(group.name, spec.dtype)
        bias = database.stacked_bias(model, group, opened.dtype)
        stacked = database.stacked_weight(model, group)
        if name == spec.dtype:
            weights[group.name] = GroupWeight(name, dense=stacked.to(opened.dtype), bias=bias)
            if group.role == "lm_head" and spec.tied_embeddings:
                shared.add(group.name)
        else:
            made = tiny.rounded(stacked, torch.ones(group.in_features), scheme(name))
            weights[group.name] = GroupWeight(name, made.dense, made.codes, made.scales, bias, made.zeros)
    for group in spec.groups:
        fused = FusedGroup(group.in_features, [member.out_features for member in group.members])
        install(model, [member.module for member in group.members], fused)
    run = folder / "run"
    runtime.save(run / "model", folder / "source", plan, model, weights, shared)
    plan.save(run / "plan.json")
    return SimpleNamespace(run=run, source=folder / "source", opened=opened, plan=plan, weights=weights)


def test_members_are_the_rows_of_their_group(tmp_path: Path) -> None:
    run = saved_run(tmp_path, "llama", SCHEMES)
    opened = open_saved(run.run)
    for group in opened.groups:
        rows = torch.cat([dequantize(member.weight) for member in group.members])
        assert torch.equal(rows, dequantize(run.weights[group.name]))
        assert group.scheme.name == run.plan.configuration[group.name]
    assert "model.embed_tokens.weight" in opened.kept and not any("proj" in name for name in opened.kept)


def test_run_and_model_folder_give_the_same(tmp_path: Path) -> None:
    run = saved_run(tmp_path, "llama", SCHEMES)
    assert open_saved(run.run).plan == open_saved(run.run / "model").plan
    with pytest.raises(InputError, match=r"export\.weights.*holds no compressed model"):
        open_saved(run.source)


def test_a_run_whose_plan_moved_on_is_refused(tmp_path: Path) -> None:
    run = saved_run(tmp_path, "llama", SCHEMES)
    make_plan(run.opened.spec, {}).save(run.run / "plan.json")
    with pytest.raises(InputError, match=r"export\.weights.*another plan"):
        open_saved(run.run)


def test_a_scheme_that_means_something_else_is_refused(tmp_path: Path) -> None:
    run = saved_run(tmp_path, "llama", SCHEMES)
    changed = run.plan.schemes | {"2:4": SchemeSpec.of("w8a8-int8")}
    plan = run.plan.model_copy(update={"schemes": changed})
    plan.save(run.run / "model" / "plan.json")
    path = run.run / "model" / runtime.WEIGHTS
    save_file(load_file(path), path, metadata={"plan": plan.digest()})
    with pytest.raises(InputError, match=r"export\.unsupported.*lm_head"):
        open_saved(run.run / "model")


def test_conv1d_is_refused(tmp_path: Path) -> None:
    saved = saved_run(tmp_path, "gpt2", {"transformer.h.0.mlp.c_fc": "w8a8-int8"})
    with pytest.raises(InputError, match=r"export\.unsupported.*c_attn.*Conv1D"):
        compressed_tensors.write(saved.run, tmp_path / "out", saved.source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage", ["lm_head::positions", "model.norm.weight", "model.layers.0.self_attn.qkv::bias", "other plan", "extra"]
)
def test_missing_pieces_are_errors(tmp_path: Path, damage: str) -> None:
    saved = saved_run(tmp_path, "llama", SCHEMES)
    path = saved.run / "model" / runtime.WEIGHTS
    tensors = load_file(path)
    tensors.pop(damage, None)
    if damage == "extra":
        tensors["surprise"] = torch.zeros(1)
    digest = "0" if damage == "other plan" else saved.plan.digest()
    save_file(tensors, path, metadata={"format": "autotune/1", "plan": digest})
    with pytest.raises(InputError, match=r"export\.weights"):
        compressed_tensors.write(saved.run, tmp_path / "out", saved.source)
    assert not (tmp_path / "out").exists()


def test_another_models_source_is_refused(tmp_path: Path) -> None:
    saved = saved_run(tmp_path, "llama", SCHEMES)
    make_model("qwen3", False).config.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"export\.source"):
        compressed_tensors.write(saved.run, tmp_path / "out", tmp_path / "other")


def test_killed_while_writing_leaves_no_folder(tmp_path: Path) -> None:
    saved = saved_run(tmp_path, "llama", SCHEMES)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from autotune.export import compressed_tensors as module\n"
        "module.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"module.write(Path({str(saved.run)!r}), Path({str(tmp_path / 'out')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.*.tmp"))
    compressed_tensors.write(saved.run, tmp_path / "out", saved.source)
    assert not list(tmp_path.glob(".out.*.tmp"))
