"""`benchmarks/gpu/run.py` as it will meet a bare machine: without our heavier packages, from a checkout."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_no_time_is_a_row_too(tmp_path):
    chosen = ["--shapes", "32x64", "--kernels", "none", "--no-probe", "--minutes", "0"]
    process = run(*chosen, "--device", "cpu", "--only", "correctness", "--out", "out", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    rows = read(tmp_path / "out/correctness.csv")
    runs = [row for row in rows if row["status"] != "not legal"]  # AMX kernels where there are no tiles
    assert runs and {row["status"] for row in runs} == {"not reached"}
