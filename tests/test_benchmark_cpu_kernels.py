"""The kernel benchmark: what it reports of ours and of peers, and what it makes of engines that die."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
NAMES = ("cpu_shapes", "cpu_own", "peers", "peers_child", "cpu_kernels")
KEYS = {
    *("shape", "n", "k", "m", "weights", "scheme", "kernel", "latency_us", "speedup_over_bf16", "speedup_low"),
    *(
        "speedup_high",
        "gb_per_s",
        "roofline_share",
        "read_share",
        "packed_bytes",
        "working_set_bytes",
        "rounds",
        "noisy",
    ),
}
TINY = ["--rounds", "3", "--seconds", "0.1", "--threads", "1", "--cache-bytes", "65536", "--no-roofline"]
PATTERNS = ["--schemes", "w8a16-int8,w4a16-int4-g32", "--peers"]


@pytest.fixture(scope="module")
def bench():
    """Scripts of benchmarks/, which is no package."""
    before = dict(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("cpu_kernels")
    sys.path.remove(str(FOLDER))
    for name in NAMES:
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


@pytest.fixture(scope="module")
def ours(bench, tmp_path_factory):
    """JSON of a small benchmark of kernels that need no compiler."""
    file = tmp_path_factory.mktemp("bench") / "kernels.json"
    arguments = ["--shapes", "128x256", "--m", "1,64", "--kernels", "torch.cpu.*,onednn.*", *PATTERNS, "none"]
    assert bench.main([*arguments, *TINY, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_rows_say_what_was_measured(ours):
    assert ours["failed"] == []
    assert ours["machine"]["threads"] == 1
    assert set(ours["machine"]["packages"]) == {"autotune"}
    for row in ours["rows"]:
        assert set(row) == KEYS
        assert (row["shape"], row["n"], row["k"], row["roofline_share"]) == ("128x256", 128, 256, None)
        assert row["latency_us"]["low"] <= row["latency_us"]["median"] <= row["latency_us"]["high"]
        assert row["rounds"] >= 3
        assert row["gb_per_s"] == pytest.approx(row["packed_bytes"] / row["latency_us"]["median"] / 1e3)


def test_every_cell_has_the_same_candidates_and_a_dense_one(ours):
    cells = {}
    for row in ours["rows"]:
        cells.setdefault((row["m"], row["weights"]), set()).add((row["kernel"], row["scheme"]))
    assert set(cells) == {(m, weights) for m in (1, 64) for weights in ("cold", "hot")}
    assert len(set(map(frozenset, cells.values()))) == 1
    found = cells[1, "cold"]
    assert ("torch.cpu.bf16", "bf16") in found
    assert ("torch.cpu.w8a16", "w8a16-int8") in found
    assert {scheme for _, scheme in found} <= {"bf16", "w8a16-int8", "w4a16-int4-g32", "read"}


def test_every_cell_says_what_share_of_reading_a_kernel_reaches(ours):
    for row in ours["rows"]:
        cell = [r for r in ours["rows"] if (r["m"], r["weights"]) == (row["m"], row["weights"])]
        read = next(r for r in cell if r["kernel"] == "read")
        assert read["packed_bytes"] == 128 * 256 * 2
        assert row["read_share"] == pytest.approx(row["gb_per_s"] / read["gb_per_s"])


def test_cold_weights_outgrow_the_cache_and_hot_ones_do_not(ours):
    for row in ours["rows"]:
        if row["weights"] == "cold":
            assert row["working_set_bytes"] >= 4 * 65536
        else:
            assert row["working_set_bytes"] <= max(row["packed_bytes"], 65536 / 4)


def test_the_fastest_dense_kernel_is_the_baseline(bench):
    from autotune.profilers.timer import Protocol, timing

    case = bench.Case(4, 8, 1, (1,), True, 1)
    times = {"slow bf16": 8.0, "fast bf16": 4.0, "ours w8a16-int8": 1.0}
    described = {
        name: {
            **{"kernel": name.split()[0], "scheme": name.split()[1], "packed_bytes": 2000.0},
            **{"working_set_bytes": 4000.0, "multiplications": 2},
        }
        for name in times
    }
    timings = {name: timing([2 * time_us] * 5, Protocol()) for name, time_us in times.items()}
    rows = list(bench.rows_of(case, "s", described, timings))
    assert [row["kernel"] for row in rows] == ["ours", "fast", "slow"]
    assert [row["speedup_over_bf16"] for row in rows] == pytest.approx([4.0, 1.0, 0.5])
    assert rows[0]["latency_us"]["median"] == pytest.approx(1.0)
    assert rows[0]["gb_per_s"] == pytest.approx(2.0)
    shares = [row["roofline_share"] for row in bench.with_roofline(rows, [(1000, 50.0), (8000, 10.0)])]
    assert shares == pytest.approx([0.2, 0.05, 0.025])


def test_copies_and_graphs(bench):
    case = bench.Case(1, 1, 1, (1,), True, 2**20)
    assert case.copies(2**20) == 4
    assert case.copies(2**30) == 1
    assert [len(graph) for graph in case.graphs(2**20)] == [4]  # few rows: as much as a call should read
    many = bench.Case(1, 1, 64, (64,), True, 2**20)
    assert [len(graph) for graph in many.graphs(2**20)] == [1, 1, 1, 1]
    assert [len(graph) for graph in many.graphs(2**18)] == [2] * 8
    assert bench.Case(1, 1, 64, (64,), False, 2**20).copies(2**10) == 1


def test_shapes_by_name(bench):
    from cpu_shapes import chosen

    assert chosen(["llama-3.1-8b.gate_up", "5x7"]) == {"llama-3.1-8b.gate_up": (28672, 4096), "5x7": (5, 7)}
    assert chosen(["demo"])["demo.qkv"] == (1024, 768)
    assert chosen(["qwen3-0.6b"])["qwen3-0.6b.o"] == (1024, 2048)
    with pytest.raises(Exception, match="no shape"):
        chosen(["qwen"])


def test_an_engine_that_dies_costs_its_candidates_only(bench, monkeypatch):
    """It is started again without what it was at, whether it was being loaded or timed."""

    class Fake:
        def __init__(self, engine, threads, python):
            self.engine, self.about = engine, {"package": engine, "version": "1"}

        def load(self, case):
            if self.engine == "autotune" and "bad w8" not in case.barred:
                raise bench.EngineGone("autotune", "bad w8", "ended with code -11")
            name = f"{self.engine}.k bf16"
            item = {"name": name, "kernel": f"{self.engine}.k", "scheme": "bf16", "packed_bytes": 8.0}
            item |= {"working_set_bytes": 8.0, "multiplications": 1}
            return {"candidates": [item] if case.wants(item["kernel"], "bf16") else [], "failed": []}

        def sample(self, name, settle_s):
            if self.engine == "openvino":
                raise bench.EngineGone("openvino", name, "no answer")
            return 1e-3

    monkeypatch.setattr(bench, "Remote", Fake)
    machine = bench.Machine(1, 64, sys.executable, ("openvino",), {"packages": {}})
    engines = bench.Engines(machine)
    case = bench.Case(4, 8, 1, (1,), True, 64)
    rows = bench.time_cell(engines, case, "s", bench.Protocol(rounds=3, min_rounds=3, sample_s=1e-9, warm_s=0.0))
    assert [row["kernel"] for row in rows] == ["autotune.k"]
    assert [failure["kernel"] for failure in engines.failed] == ["bad", "openvino.k"]


@pytest.mark.parametrize("package", ["onnxruntime", "openvino", "torchao"])
def test_peers_are_timed_beside_ours(bench, package, tmp_path):
    """Their outputs are compared with the reference before; anything wrong would be in `failed`."""
    for needed in sys.modules["peers"].ENGINES[package][1]:
        pytest.importorskip(needed)
    file = tmp_path / "peer.json"
    kernels = {"onnxruntime": "onnxruntime.*", "openvino": "openvino.*", "torchao": "torchao.int8.a16"}[package]
    arguments = ["--shapes", "128x256", "--m", "4", "--weights", "hot", "--kernels", kernels, "--peers", package]
    assert bench.main([*arguments, *TINY, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["failed"] == []
    mine = [row for row in found["rows"] if row["kernel"].startswith(package)]
    assert len(mine) == {"onnxruntime": 7, "openvino": 9, "torchao": 1}[package]
    assert all(row["speedup_over_bf16"] > 0 for row in mine)
