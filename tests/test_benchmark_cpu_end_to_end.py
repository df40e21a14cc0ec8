"""The end-to-end benchmark: what it reports of a tiny model, of a plan, and of llama.cpp where that is installed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import tiny

FOLDER = Path(__file__).parent.parent / "benchmarks"
NAMES = ("peers", "peers_child", "peers_llama", "cpu_end_to_end")
KEYS = {"shape", "configuration", "prefill_ms", "decode_ms", "speedup_prefill", "speedup_decode", "weight_bytes"}
CONFIG = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 3, "vocab_size": 128},
    **{"max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True},
    **{"hidden_act": "silu", "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"},
}
SCHEMES = "w8a16-int8,w4a16-int4-g32"
TINY = ["--layers", "2", "--prompt", "8", "--generated", "3", "--threads", "1", "--seconds", "0.01"]
TINY += ["--schemes", SCHEMES]


@pytest.fixture(scope="module")
def bench():
    """Scripts of benchmarks/, which is no package."""
    before = dict(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("cpu_end_to_end")
    sys.path.remove(str(FOLDER))
    for name in NAMES:
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


@pytest.fixture
def shape(bench, tmp_path, monkeypatch):
    """A tiny Qwen3 on this machine, its kernels not timed."""
    folder = tmp_path / "tiny-qwen3"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(bench, "resolve_target", lambda name: (tiny.here(), True))
    monkeypatch.setattr(bench.latency, "profile", tiny.fake_profile)
    return folder


def run(bench, shape, *arguments):
    file = shape.parent / "rows.json"
    assert bench.main(["--shapes", str(shape), *TINY, "--json", str(file), *arguments]) == 0
    return json.loads(file.read_text())


def test_every_uniform_scheme_is_run_beside_dense(bench, shape, capsys):
    value = run(bench, shape, "--llama", "none")
    rows = {row["configuration"]: row for row in value["rows"]}
    assert set(rows) == {"dense", *SCHEMES.split(",")}
    for row in rows.values():
        assert set(row) == KEYS
        assert row["shape"] == "tiny-qwen3-2layers"
        for phase in ("prefill_ms", "decode_ms"):
            assert 0 < row[phase]["low"] <= row[phase]["median"] <= row[phase]["high"]
    assert rows["dense"]["speedup_prefill"] == rows["dense"]["speedup_decode"] == 1.0
    assert rows["dense"]["weight_bytes"] > rows["w8a16-int8"]["weight_bytes"] > rows["w4a16-int4-g32"]["weight_bytes"]
    assert rows["dense"]["weight_bytes"] == 2 * (2 * 64 * (256 + 128 + 256 + 128) + 128 * 64)
    assert set(value["kernels"]["tiny-qwen3-2layers"]) == {"bf16", *SCHEMES.split(",")}
    assert value["machine"]["threads"] >= 1
    assert "w4a16-int4-g32" in capsys.readouterr().out


def test_a_plan_of_the_shape_is_run_and_another_is_left_out(bench, shape, capsys, monkeypatch):
    class Made:
        def __init__(self, opened):
            self.configuration = {group.name: "w8a16-int8" for group in opened.spec.groups}
            members = [member for group in opened.spec.groups for member in group.members]
            self.tensors = [
                type("Entry", (), {"tensor": m.tensor, "shape": (m.out_features, m.in_features)}) for m in members
            ]

    short = bench.shortened(shape, 2, shape.parent)
    same, other = (Made(bench.open_model(str(folder), latency_only=True)) for folder in (short, shape))
    for plan, expected in ((same, True), (other, False)):
        monkeypatch.setattr(bench.Plan, "load", lambda path, plan=plan: plan)
        rows = run(bench, shape, "--llama", "none", "--plan", "anything")["rows"]
        assert ("plan" in {row["configuration"] for row in rows}) == expected
    assert "another shape" in capsys.readouterr().err


def test_llama_cpp_takes_turns(bench, shape):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    value = run(bench, shape, "--llama", "Q4_0,Q8_0")
    rows = {row["configuration"]: row for row in value["rows"]}
    assert {"llama.cpp Q4_0", "llama.cpp Q8_0"} <= set(rows)
    weights = rows["dense"]["weight_bytes"] / 2
    assert rows["llama.cpp Q4_0"]["weight_bytes"] == weights * 18 / 32
    assert rows["llama.cpp Q8_0"]["weight_bytes"] == weights * 34 / 32
    assert "llama-cpp-python" in value["machine"]["packages"]


def test_the_file_for_llama_cpp_holds_the_same_model(bench, tmp_path):
    """Equal weights give equal logits: the tensors are where they belong."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    import peers_llama
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CONFIG)).float().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    state = model.state_dict()
    peers_llama.write(CONFIG, tmp_path / "m.gguf", "F32", lambda name: state[name].numpy())
    engine = peers_llama.Engine(1)
    engine.open("m", tmp_path / "m.gguf", 256)
    ids = [5, 99, 17, 3, 64, 8, 8, 2]
    found = torch.tensor(engine.logits("m", ids))
    expected = model(torch.tensor([ids])).logits[0, -1]
    assert torch.nn.functional.cosine_similarity(found, expected, 0) > 0.9999
    assert torch.allclose(found, expected, atol=0.02 * float(expected.abs().max()))


def test_llama_cpp_that_dies_leaves_ours(bench, monkeypatch, capsys):
    calls = []

    def fake(model, wanted, workload, seconds):
        calls.append(set(wanted))
        if len(calls) == 1:
            raise bench.EngineGone("llama.cpp", "Q4_0", "ended with code -6")
        return "measured"

    monkeypatch.setattr(bench.verify, "measure", fake)
    setting = type("S", (), {"workload": None, "arguments": type("A", (), {"seconds": 1.0})})
    assert bench._measure(None, {"dense": {}, "llama.cpp Q4_0": {bench.LLAMA: "Q4_0"}}, setting) == "measured"
    assert calls == [{"dense", "llama.cpp Q4_0"}, {"dense"}]
    assert "code -6" in capsys.readouterr().err
