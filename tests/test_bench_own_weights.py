"""The benchmarks of recompression and of smoothing, on tiny models: their rows, and that gains are paired."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model("llama", tmp_path_factory.mktemp("bench") / "model", initializer_range=0.15)


def test_sequential(model, tmp_path):
    data = tiny.write_documents(tmp_path / "data.jsonl", 24, 60)
    arguments = [str(model), "--schemes", "w4a16-int4-g64", "--tokens", "300", "--calibration", "400"]
    arguments += ["--data", str(data), "--json", str(tmp_path / "rows.json")]
    assert load("sequential").main([*arguments, "--towards", "none,0.1"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["way"] for row in rows] == ["stitched", "none", "0.1"]
    assert rows[0]["less"] is None
    for row in rows[1:]:
        assert row["less"]["mean"] == pytest.approx(rows[0]["kl_nats"]["mean"] - row["kl_nats"]["mean"])
    assert rows[2]["kl_nats"]["mean"] < rows[0]["kl_nats"]["mean"]


def test_smoothing(model, tmp_path):
    arguments = [str(model), "--schemes", "w8a8-int8", "--tokens", "300", "--calibration", "600", "--methods", "wanda"]
    assert load("smoothing").main([*arguments, "--modes", "off,auto", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"], row["mode"]) for row in rows] == [
        (kind, mode) for kind in ("as it is", "loud") for mode in ("off", "auto")
    ]
    loss = {(row["model"], row["mode"]): row["kl_nats"] for row in rows}
    assert loss["loud", "off"] > 3 * loss["as it is", "off"]
    assert loss["loud", "auto"] < 0.5 * loss["loud", "off"]
