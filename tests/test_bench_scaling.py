"""The scaling benchmark: the same entries held whole and streamed, the same codes together and apart."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("bench_scaling", BENCHMARKS / "compression_scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))
    for name in ("compression_rivals", "make_random"):
        sys.modules.pop(name, None)


def test_every_size_is_compressed_both_ways(bench, tmp_path, monkeypatch):
    def child(home, mode, method, arguments):
        return bench.compress(home / "model", home / mode, mode, method, arguments.schemes, arguments.tokens)

    monkeypatch.setattr(bench, "child", child)  # in this process: starting one takes seconds
    arguments = ["--blocks", "1,2", "--width", "128", "--tokens", "64", "--json", str(tmp_path / "rows.json")]
    assert bench.main(arguments) == 0
    value = json.loads((tmp_path / "rows.json").read_text())
    assert [row["blocks"] for row in value["models"]] == [1, 2]
    assert value["models"][0]["parameters"] < value["models"][1]["parameters"]
    for row in value["models"]:
        assert row["same_bytes"]
        assert row["whole"]["entries"] == row["streamed"]["entries"] > 10
        assert row["streamed"]["peak_bytes"] >= row["streamed"]["before_bytes"] > 0
    assert [row["group"] for row in value["groups"]] == ["qkv", "gate_up", "down"]
    for row in value["groups"]:
        assert row["same_codes"]
        assert row["swept"] == 7
        assert all(row[name] > 0 for name in row if name.endswith("_s"))


def test_a_child_prints_what_it_measured(bench, tmp_path, capsys):
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_text(json.dumps(bench.config(128, 1)))
    bench.make(shape, tmp_path / "model", 0)
    capsys.readouterr()
    call = [str(tmp_path / "model"), str(tmp_path / "out"), "streamed", "wanda", ",".join(bench.SOME), "64"]
    assert bench.main(["--child", *call]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
