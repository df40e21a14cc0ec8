"""What the first use of the native CPU kernels costs on a machine, and every later start.

    python benchmarks/cpu_first_use.py [--repeat 5] [--json FILE]

Every library is compiled into an empty user folder in a process of its own, then loaded by fresh processes that find it
there. Loading counts everything between wanting a function and having it: reading and hashing the sources, asking the
compiler for its version, checking the file, dlopen. torch is imported before the clock starts.

Rows written by `--json` (a list):
    library            name of the library; "all" is one process that takes all of them, compiled side by side
    compile_seconds    first use
    load_ms            median of a later start
    load_ms_low, load_ms_high    fastest and slowest
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from autotune.kernels.cpu import build
from autotune.store import write_json

_CHILD = """
import sys, time
import torch
from autotune.kernels.cpu import build
start = time.perf_counter()
if len(sys.argv) > 2:
    build.prepare()
for name in sys.argv[1:]:
    build.library(name)
print(time.perf_counter() - start)
"""


def seconds(names: list[str], home: str) -> float:
    """One fresh process that takes these libraries."""
    environment = os.environ | {"AUTOTUNE_HOME": home}
    found = subprocess.run([sys.executable, "-c", _CHILD, *names], env=environment, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{', '.join(names)}: {found.stderr.strip()}")
    return float(found.stdout)


def measure(names: list[str], repeat: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as home:
        compiled = seconds(names, home)
        loads = [1e3 * seconds(names, home) for _ in range(repeat)]
    middle = statistics.median(loads)
    return {"compile_seconds": compiled, "load_ms": middle, "load_ms_low": min(loads), "load_ms_high": max(loads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = build.libraries()
    rows: list[dict[str, object]] = []
    print(f"{'library':14} {'first use, s':>14} {'later, ms':>12}")
    for label, taken in [*((name, [name]) for name in names), ("all", names)]:
        row = {"library": label, **measure(taken, arguments.repeat)}
        rows.append(row)
        print(f"{label:14} {row['compile_seconds']:14.1f} {row['load_ms']:12.1f}", flush=True)
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
