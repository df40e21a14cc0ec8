"""The compression benchmark: every method on the same model and tokens, differences paired by document."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_compress_sweep import correlated, error, weights

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("bench_compression", BENCHMARKS / "compression.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))
    for name in ("compression_rivals", "compression_peers", "compression_shipped"):
        sys.modules.pop(name, None)


def test_experts_are_compressed_one_by_one(bench, tmp_path):
    data = tiny.write_documents(tmp_path / "data.jsonl")
    folder = tiny.make_model("moe", tmp_path / "model", num_hidden_layers=1)
    opened = bench.open_model(str(folder))
    stitched = bench.Stitched(bench.load_model(opened, torch.float32), opened.spec)
    assert [len(stitched.dense[f"model.layers.0.mlp.experts.down_proj[{n}]"]) for n in range(4)] == [64] * 4
    arguments = [str(folder), "--data", str(data), "--tokens", "200", "--json", str(tmp_path / "rows.json")]
    assert bench.main([*arguments, "--methods", "joint,wanda", "--formats", "w4a16-int4-g64"]) == 0
    [written] = json.loads((tmp_path / "rows.json").read_text())
    assert [row["method"] for row in written["rows"]] == ["joint", "wanda"]
    assert 0 < written["rows"][0]["layer_error"] < written["rows"][1]["layer_error"]


def test_a_tied_heads_new_weights_leave_the_embedding_alone(bench, tmp_path):
    opened = bench.open_model(str(tiny.make_model("llama", tmp_path / "model", tie_word_embeddings=True)))
    model = bench.load_model(opened, torch.float32)
    stitched = bench.Stitched(model, opened.spec)
    before = model.model.embed_tokens.weight.clone()
    stitched.weights = {name: weight * 0 for name, weight in stitched.dense.items()}
    stitched.select({"all": "zeros"})
    assert not model.lm_head.weight.any()
    assert torch.equal(model.model.embed_tokens.weight, before)


@pytest.fixture(scope="module")
def value(bench, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compression")
    data = tiny.write_documents(folder / "data.jsonl")
    arguments = [str(models("llama")), "--data", str(data), "--json", str(folder / "rows.json")]
    assert bench.main([*arguments, "--tokens", "200", "--formats", "int8,2:4,2:4+int8"]) == 0
    [written] = json.loads((folder / "rows.json").read_text())
    return written


def test_every_method_is_measured_in_every_format(bench, value):
    assert [(row["format"], row["method"]) for row in value["rows"]] == [
        (name, method) for name in ("int8", "2:4", "2:4+int8") for method in bench.ALL
    ]
    for row in value["rows"]:
        kl = row["kl_nats"]
        assert 0 < kl["low"] <= kl["mean"] <= kl["high"]
        expected = value["dense_perplexity"] * math.exp(row["dnll_nats"]["mean"])
        assert row["perplexity"] == pytest.approx(expected)
        assert row["layer_error"] > 0
    found = {(row["format"], row["method"]): row["kl_nats"]["mean"] for row in value["rows"]}
    assert len({found["2:4", method] for method in ("joint", "prune-then-gptq", "wanda", "magnitude")}) == 4


def test_differences_are_those_of_the_means(value):
    for row in value["rows"]:
        joint = next(r for r in value["rows"] if (r["method"], r["format"]) == ("joint", row["format"]))
        if row is joint:
            assert row["over_joint"] is None
        else:
            assert row["over_joint"]["mean"] == pytest.approx(row["kl_nats"]["mean"] - joint["kl_nats"]["mean"])


def test_the_model_is_dense_again_between_two_configurations(bench, models):
    opened = bench.open_model(str(models("gpt2")))
    model = bench.load_model(opened, torch.float32)
    stitched = bench.Stitched(model, opened.spec)
    document = tiny.tokens(1)[0]
    before = stitched.outputs(document)
    stitched.weights = {name: torch.zeros_like(weight) for name, weight in stitched.dense.items()}
    stitched.select({"all": "x"})
    assert not torch.equal(stitched.outputs(document), before)
    stitched.select({})
    assert torch.equal(stitched.outputs(document), before)


def test_sparsegpt_prunes_better_than_wanda_and_leaves_two_of_four(bench):
    from compression_rivals import sparsegpt

    from autotune.compress import wanda

    hessian, weight = correlated(), weights()
    found, kept = sparsegpt(weight, hessian)
    assert torch.equal(kept.view(24, -1, 4).sum(-1), torch.full((24, 32), 2))
    assert not bool(found[~kept].any())
    assert error(weight, found, hessian) < error(weight, weight * wanda.mask_24(weight, hessian.diagonal()), hessian)


def test_another_packages_weights_are_judged_by_the_same_code(bench, models, tmp_path, monkeypatch):
    """A peer that rounds as `wanda` does loses what `wanda` loses."""

    def rounds(model, tokenizer, documents):
        layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        item, method, made = bench.EVERY["int8"], bench.ALL["wanda"], {}
        for name, module in layers.items():
            inputs = bench.InputStatistics(torch.ones(module.in_features))
            made[name] = bench.valued(method(module.weight.detach(), inputs, [item])[0], item)
        return made

    monkeypatch.setitem(bench.PEERS, "auto-round", ("torch", {"int8": rounds}))
    data = tiny.write_documents(tmp_path / "data.jsonl")
    arguments = [str(models("llama")), "--data", str(data), "--tokens", "200", "--json", str(tmp_path / "rows.json")]
    arguments += ["--formats", "int8", "--methods", "joint,wanda", "--peers", "auto-round", "--keep-head"]
    assert bench.main(arguments) == 0
    [written] = json.loads((tmp_path / "rows.json").read_text())
    joint, wanda, shipped, peer = written["rows"]
    assert [row["method"] for row in written["rows"]] == ["joint", "wanda", "shipped", "auto-round"]
    for row in (joint, wanda, peer):
        apart = row["kl_nats"]["mean"] - shipped["kl_nats"]["mean"]
        assert row["over_shipped"]["mean"] == pytest.approx(apart)
    assert shipped["over_shipped"] is None and shipped["over_joint"]["low"] <= shipped["over_joint"]["high"]
    assert peer["kl_nats"]["mean"] == pytest.approx(wanda["kl_nats"]["mean"], rel=0.5)
    assert peer["over_joint"]["mean"] == pytest.approx(peer["kl_nats"]["mean"] - joint["kl_nats"]["mean"])


def test_what_ships_is_compressed_again_where_that_loses_less(bench, models, tmp_path, monkeypatch):
    import compression_shipped

    data = tiny.write_documents(tmp_path / "data.jsonl", 24, 60)
    call = [str(models("llama")), "--data", str(data), "--tokens", "300", "--calibration", "400"]
    call += ["--formats", "w3a16-int3-g64", "--methods", "joint,shipped", "--json", str(tmp_path / "rows.json")]
    assert bench.main(call) == 0
    joint, shipped = json.loads((tmp_path / "rows.json").read_text())[0]["rows"]
    assert shipped["taken"] and shipped["over_joint"]["mean"] < 0
    monkeypatch.setattr(compression_shipped, "own_entries", lambda made, files, chosen: chosen)  # nothing is won
    assert bench.main(call) == 0
    joint, shipped = json.loads((tmp_path / "rows.json").read_text())[0]["rows"]
    assert shipped["taken"] is False  # then it is joint's, as the database has it
    assert shipped["kl_nats"]["mean"] == pytest.approx(joint["kl_nats"]["mean"], rel=1e-3)


@pytest.mark.parametrize("extra", [["--keep-head"], []])
def test_peers_that_cannot_be_compared_are_refused(bench, extra, monkeypatch, capsys):
    monkeypatch.setitem(bench.PEERS, "auto-round", ("no_such_package", {}))
    with pytest.raises(SystemExit):
        bench.main(["--peers", "auto-round", *extra])
    assert ("no_such_package" if extra else "--keep-head") in capsys.readouterr().err


def test_unknown_names_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--methods", "jiont"])
    assert "jiont" in capsys.readouterr().err
