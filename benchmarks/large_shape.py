"""Does the loop hold at a size people use? Qwen3-0.6B's shape (vocabulary 32,000) with random weights, measured here.

    python benchmarks/large_shape.py --latency-only [--workload decode] [--json FILE]
    python benchmarks/large_shape.py [--workload decode] [--json FILE]

With `--latency-only` only config.json is read. Without it a random checkpoint is written first and the whole loop runs
at its default settings: losses scored, searched and certified within 1%, on the samples that the defaults take for a
model of this size. That shows what the stages cost, and NOTHING about accuracy, because the losses of random weights
mean nothing, nor does the speed-up that a budget of such losses allows.

`autotune.tune.tune` runs in a child process with nothing measured before (its own AUTOTUNE_HOME), so time and memory
are those of a first run. The floor: under 15 minutes and 12 GiB; for `--workload decode` a saving predicted within 15%,
where the search's own prediction may be further off only if the report says so; and with `--latency-only` a measured
speed-up of 1.8 or more. Exit code 1 when one of them fails. Nothing else should
run meanwhile.

Rows written by `--json` (a list with one object):
    shape, workload, latency_only    what was run; threads: those torch uses
    samples                          sample sizes as resolved for the model; null with `--latency-only`
    load_before, load_after          load average over a minute
    noisy                            why the end-to-end numbers should not be trusted, or ""
    wall_seconds                     the child's, imports and report included
    stage_seconds                    stage -> seconds, as the run recorded them
    peak_tree_gib                    most memory of the process tree: the largest sum of what the processes alive at one
                                     moment had needed at their peaks (VmHWM; 4 samples a second)
    peak_process_gib                 most memory of a single process of the tree, as the kernel counted it
    dense_prefill_ms, dense_decode_ms, plan_prefill_ms, plan_decode_ms    medians end to end; decode is one step
    dense_ms, plan_ms                the whole workload
    speedup, speedup_low, speedup_high    dense over plan, paired by round, with a 95% interval
    search_saving_ms, predicted_saving_ms, measured_saving_ms    of the plan over dense: as the search believed it, by
                                     the calibration before; fitted to the uniform schemes of the run that measured it,
                                     which drift of the machine does not enter (null: the plan is such a scheme)
    search_error, saving_error       |that / measured - 1|
    verdict                          what the report says of its predictions
    median_error, spearman           the report's, over all points that were measured; null when they are too few
    schemes                          scheme -> number of layer groups
    kernel_rows, noisy_rows          latencies in the table, and how many of them are noisy
    checks                           name -> whether this part of the floor holds
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from make_random import make

from autotune.config import RunConfig
from autotune.errors import AutotuneError
from autotune.plan import Plan
from autotune.profilers.table import LatencyTable
from autotune.run import RunFolder
from autotune.samples import FLOORS
from autotune.verify import EndToEnd

SHAPES = Path(__file__).parent / "shapes"
MOST_SECONDS, MOST_GIB, LEAST_SPEEDUP, MOST_ERROR = 15 * 60, 12.0, 1.8, 0.15


class TreeMemory:
    """Samples the memory of a process and its descendants while it runs (Linux)."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.peak_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> TreeMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            self.peak_bytes = max(self.peak_bytes, sum(map(_peak_bytes, _descendants(self.root))))


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found, todo = [], [root]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def _peak_bytes(process: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def run(config: RunConfig, minutes: float) -> tuple[float, float, float]:
    """Tune in a child; returns (seconds, most bytes of the tree, most bytes of one process).

    Raises:
        SystemExit: when the child failed or took too long; its process group is ended.
    """
    settings = config.model_dump(mode="json", exclude_unset=True)  # defaults depend on the model
    command = [sys.executable, __file__, "--child", json.dumps(settings)]
    environment = os.environ | {"AUTOTUNE_HOME": str(Path(config.out).with_name("home"))}
    start = time.monotonic()
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to stop"))
    try:
        with TreeMemory(child.pid) as memory:
            code = child.wait(minutes * 60)
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"stopped after {time.monotonic() - start:.0f} s") from error
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
    if code:
        raise SystemExit(f"the loop ended with exit code {code} after {time.monotonic() - start:.0f} s")
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return time.monotonic() - start, memory.peak_bytes, largest


def child(text: str) -> None:
    """The loop, with one line a stage."""
    from autotune.tune import tune

    start = time.monotonic()
    last = ""

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal last
        if stage != last or done == total:
            print(f"{time.monotonic() - start:7.1f} s  {stage} {done}/{total} {note}", file=sys.stderr, flush=True)
        last = stage

    try:
        tune(RunConfig.of(**json.loads(text)), report)
    except AutotuneError as error:
        print(f"{error.code}: {error.message} {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


def row(config: RunConfig, shape: str, load_before: float, measured: tuple[float, float, float]) -> dict[str, Any]:
    """What the run folder and the process say, under the keys documented above."""
    folder = Path(config.out)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    table = LatencyTable.from_csv(folder / "latency.csv")
    prediction = report["prediction"]
    chosen = next(item["name"] for item in report["front"] if item["chosen"])
    said = Plan.load(folder / "plan.json").prediction
    believed = (said.dense_latency_us - said.latency_us) / 1e3
    predicted = next((p["predicted_saving_ms"] for p in prediction["points"] if p["name"] == chosen), None)
    runs = EndToEnd.from_json(json.loads((folder / "endtoend.json").read_text(encoding="utf-8")))
    saved = runs.saving_ms(chosen).median
    speedup = report["plan"]["speedup"]
    wall, tree, largest = measured
    value = {
        "shape": shape,
        "workload": config.workload,
        "latency_only": config.latency_only,
        "samples": None if config.latency_only else {name: getattr(RunFolder(folder).config, name) for name in FLOORS},
        "threads": torch.get_num_threads(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "noisy": "; ".join(text for text in report["warnings"] if "nois" in text),
        "wall_seconds": round(wall, 1),
        "stage_seconds": report["seconds"],
        "peak_tree_gib": tree / 2**30,
        "peak_process_gib": largest / 2**30,
        **{f"{which}_{key}": report[which][key]["median"] for which in ("dense", "plan") for key in _PHASES},
        "dense_ms": report["dense"]["latency_ms"]["median"],
        "plan_ms": report["plan"]["latency_ms"]["median"],
        "speedup": speedup["median"],
        "speedup_low": speedup["low"],
        "speedup_high": speedup["high"],
        "search_saving_ms": believed,
        "predicted_saving_ms": predicted,
        "measured_saving_ms": saved,
        "search_error": abs(believed / saved - 1) if saved else None,
        "saving_error": abs(predicted / saved - 1) if saved and predicted is not None else None,
        "verdict": prediction["verdict"],
        "median_error": prediction["median_error"],
        "spearman": prediction["spearman"],
        "schemes": report["schemes"],
        "kernel_rows": len(table.rows),
        "noisy_rows": sum(item.noisy for item in table.rows),
    }
    return value | {"checks": checks(value)}


_PHASES = ("prefill_ms", "decode_ms")


def checks(value: dict[str, Any]) -> dict[str, bool]:
    """The floor, part by part; speed and prediction are asked of the decode workload only, speed without losses."""
    found = {
        "under 15 minutes": value["wall_seconds"] < MOST_SECONDS,
        "under 12 GiB": max(value["peak_tree_gib"], value["peak_process_gib"]) < MOST_GIB,
    }
    if value["workload"] == "decode" and value["latency_only"]:
        found["1.8x dense or more"] = value["speedup"] >= LEAST_SPEEDUP
    if value["workload"] == "decode":
        before, fitted = value["search_error"], value["saving_error"]
        close = before is not None and before <= MOST_ERROR
        found["saving predicted within 15%"] = close if fitted is None else fitted <= MOST_ERROR
        found["before the run too, or said"] = close or value["verdict"].startswith("too noisy")
    return found


def table(value: dict[str, Any]) -> str:
    savings = {
        name: "none" if value[f"{key}_saving_ms"] is None else f"{value[f'{key}_saving_ms']:.1f} ms"
        for key, name in (("search", "before"), ("predicted", "fitted"), ("measured", "measured"))
    }
    errors = ["-" if value[key] is None else f"{value[key]:.1%}" for key in ("search_error", "saving_error")]
    lines = [
        ("shape, workload", f"{value['shape']}, {value['workload']}, {value['threads']} threads"),
        ("losses", "not measured" if value["latency_only"] else "of RANDOM weights: they mean nothing"),
        *((f"  {name}", f"{count:,}") for name, count in (value["samples"] or {}).items()),
        *((f"  {name}", f"{seconds:.1f} s") for name, seconds in value["stage_seconds"].items()),
        ("whole loop", f"{value['wall_seconds']:.0f} s"),
        ("peak memory", f"{value['peak_tree_gib']:.2f} GiB, largest process {value['peak_process_gib']:.2f} GiB"),
        ("prefill", f"{value['dense_prefill_ms']:.2f} ms dense, {value['plan_prefill_ms']:.2f} ms plan"),
        ("decode step", f"{value['dense_decode_ms']:.2f} ms dense, {value['plan_decode_ms']:.2f} ms plan"),
        ("speed-up", f"{value['speedup']:.2f}x ({value['speedup_low']:.2f} to {value['speedup_high']:.2f})"),
        ("saving", ", ".join(f"{saving} {name}" for name, saving in savings.items())),
        ("  errors", f"{errors[0]} before, {errors[1]} fitted to the run; {value['verdict']}"),
        ("schemes", ", ".join(f"{count} x {name}" for name, count in value["schemes"].items())),
        ("kernel latencies", f"{value['kernel_rows']}, {value['noisy_rows']} of them noisy"),
        ("load", f"{value['load_before']:.1f} before, {value['load_after']:.1f} after; {value['noisy'] or 'quiet'}"),
        *((f"{name}?", "yes" if holds else "NO") for name, holds in value["checks"].items()),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole loop at the shape of a 0.6B model.")
    parser.add_argument("--latency-only", action="store_true", help="no weights, no losses")
    parser.add_argument("--workload", default="decode", help="as for `autotune tune`")
    parser.add_argument("--shape", type=Path, default=SHAPES / "qwen3-0.6b-vocab32k", help="a folder with config.json")
    parser.add_argument("--out", type=Path, default=Path("runs/large-shape"), help="where to work; must not exist yet")
    parser.add_argument("--minutes", type=float, default=30.0, help="give up after this long")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; remove it or give another --out, so that nothing is reused")
    model, settings = arguments.shape, {"max_loss": None, "latency_only": True}
    if not arguments.latency_only:
        model, settings = arguments.out / "random", {}
        make(arguments.shape, model, seed=0)
    common = {"model": str(model), "out": str(arguments.out / "run"), "workload": arguments.workload}
    config = RunConfig.of(**common, **settings)
    load_before = os.getloadavg()[0]
    value = row(config, arguments.shape.name, load_before, run(config, arguments.minutes))
    print(table(value))
    if arguments.json:
        arguments.json.write_text(json.dumps([value], indent=1) + "\n")
    return sys.exit(0 if all(value["checks"].values()) else 1)


if __name__ == "__main__":
    main()
