"""`benchmarks/gpu/run.py` as it will meet a bare machine: without our heavier packages, from a checkout."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autotune.errors import DeviceError
from autotune.profilers.table import LatencyTable

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "gpu"
ABSENT = ("optuna", "pydantic", "rich", "matplotlib", "plotly", "typer", "scipy", "transformers", "safetensors")
PHASES = ("decode batch 1", "decode batch 16", "prefill 2048")
BARE = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # importing it raises ImportError
sys.argv = ["run.py", *sys.argv[1:]]
import runpy
runpy.run_path({str(FOLDER / "run.py")!r}, run_name="__main__")
"""


def run(*arguments, folder):
    command = [sys.executable, "-P", "-c", BARE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=170)


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("module", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_part_imports_on_a_bare_machine(module):
    code = BARE.partition("sys.argv")[0] + f"sys.path[:0] = [{str(FOLDER)!r}, {str(ROOT)!r}]\nimport {module}"
    process = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_without_a_card_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    process = run("--out", str(tmp_path / "out"), folder=tmp_path)
    assert process.returncode == 5 and "no CUDA device" in process.stderr
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_on_the_cpu(tmp_path):
    """The same cells, children, gate and files as on a card."""
    chosen = ["--shapes", "32x64,48x80", "--kernels", "onednn.w8a8,cpu.24.w4a16", "--no-probe"]
    process = run(*chosen, "--device", "cpu", "--only", "smoke,int4", "--out", "out", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    smoke, timed = read(tmp_path / "out/smoke.csv"), read(tmp_path / "out/int4.csv")
    assert {row["status"] for row in smoke} <= {"correct", "not legal"} and len(smoke) >= 12
    legal = [row for row in timed if row["status"] == "measured"]
    assert legal and all(float(row["us"]) > 0 and row["torch"] and row["date"] for row in legal)
    odd = [row for row in smoke if row["scheme"] == "2:4+w4a16-int4-g128"]
    assert {row["status"] for row in odd} == {"not legal"} and "scale group 128" in odd[0]["reason"]
    dense = {
        (row["shape"], row["m"]): float(row["us"])
        for row in legal
        if row["scheme"] == "bf16" and row["speedup"] == "1.0"
    }
    assert len(dense) == 10  # a baseline for every shape and rows
    assert len(LatencyTable.from_csv(tmp_path / "out/latency.csv").rows) == len(legal)


@pytest.mark.slow
def test_whole_models_are_rehearsed_on_the_cpu(tmp_path):
    """The tiny model through transformers, its groups switched in place, two configurations in three phases."""
    command = [
        sys.executable,
        str(FOLDER / "run.py"),
        "--device",
        "cpu",
        "--only",
        "end_to_end",
        "--no-probe",
        "--out",
        "out",
    ]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=170)
    assert process.returncode == 0, process.stderr
    rows = read(tmp_path / "out/end_to_end.csv")
    assert [row["status"] for row in rows] == ["measured"] * 6, rows
    assert {row["shape"] for row in rows} == {f"tiny {phase}" for phase in PHASES}
    assert all(float(row["us"]) > 0 for row in rows)


def test_experts_routed_by_the_device_are_rehearsed_on_the_cpu(tmp_path):
    process = run("--device", "cpu", "--only", "mixture", "--no-probe", "--out", "out", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    rows = read(tmp_path / "out/mixture.csv")
    assert [row["status"] for row in rows] == ["measured"] * 6, rows
    assert {(row["shape"], row["m"]) for row in rows} == {("tiny", "1"), ("tiny", "4"), ("tiny", "16")}
    assert all(float(row["us"]) > 0 and "away from the host's routing" in row["reason"] for row in rows)


def test_no_time_is_a_row_too(tmp_path):
    chosen = ["--shapes", "32x64", "--kernels", "none", "--no-probe", "--minutes", "0"]
    process = run(*chosen, "--device", "cpu", "--only", "correctness", "--out", "out", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    rows = read(tmp_path / "out/correctness.csv")
    runs = [row for row in rows if row["status"] != "not legal"]  # AMX kernels where there are no tiles
    assert runs and {row["status"] for row in runs} == {"not reached"}


@pytest.fixture
def benchmark_of(monkeypatch, tmp_path):
    """The modules of the benchmark, and one that writes below `tmp_path`."""
    monkeypatch.syspath_prepend(str(FOLDER))
    cells, correctness, run = (importlib.import_module(name) for name in ("cells", "correctness", "run"))
    target = run.detect.detect_cpu()
    shape = {"32x64": (32, 64)}
    bench = run.Bench(target, tmp_path, time.monotonic() + 60, ("none",), shape, "bf16", {"fingerprint": "0"})
    return cells, correctness, run, bench


def child_is_gone(*_, **__):
    raise DeviceError("isolate.ChildFailed", "out of memory.", "Try again.")
    yield


def test_a_lost_child_leaves_rows_that_say_so(benchmark_of, monkeypatch, tmp_path):
    cells, correctness, _, bench = benchmark_of
    monkeypatch.setattr(cells, "time_jobs", child_is_gone)
    monkeypatch.setattr(correctness, "stream", child_is_gone)
    bench.table("decode", {}, (1,))
    bench.check("smoke", {}, (1,))
    for name in ("decode", "smoke"):
        lost = [row for row in read(tmp_path / f"{name}.csv") if row["status"] != "not legal"]
        assert lost and {(row["status"], row["reason"]) for row in lost} == {
            ("not reached", "out of memory. Try again.")
        }


def test_what_was_measured_before_a_part_failed_is_written(benchmark_of, monkeypatch, tmp_path):
    cells, _, run, bench = benchmark_of
    monkeypatch.setattr(run, "WRITE_S", 0.0)
    cell = cells.cells({"32x64": (32, 64)}, (1, 2), bench.target, ("none",))[0][0]
    seen = []

    def rows():
        yield cell.row("decode", status="measured", us=2.0, low_us=1.9, high_us=2.1)
        seen.extend(read(tmp_path / "decode.csv"))  # before the part has ended
        raise RuntimeError("a defect of this benchmark")

    with pytest.raises(RuntimeError, match="a defect"):
        bench.keep("decode", rows())
    assert [row["us"] for row in seen] == ["2.0"] == [row["us"] for row in read(tmp_path / "decode.csv")]
    assert [row["us"] for row in bench.rows] == [2.0]


def test_without_measured_ceilings_the_tables_are_made(benchmark_of, monkeypatch, tmp_path, capsys):
    _, _, run, bench = benchmark_of
    monkeypatch.setattr(run.probe, "probe", lambda *_: next(child_is_gone()))
    assert run.probed(bench.target, tmp_path) == bench.target
    assert "out of memory" in capsys.readouterr().err
