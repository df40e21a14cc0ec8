"""How fast is every CPU kernel, ours and other packages', on the layers of real models? One interleaved run a cell.

    python benchmarks/cpu_kernels.py --shapes 4096x4096 --m 1,64 --weights cold     # minutes
    python benchmarks/cpu_kernels.py --json FILE                                    # everything: hours
    python benchmarks/cpu_kernels.py --shapes demo --kernels 'cpu.*,openvino.*' --schemes 'w4*' --m 1

A cell is a shape (outputs x inputs), a number of rows m, and where the weights are: `cold`, copies that add up to four
last caches or more are taken in turn, or `hot`, copies of a quarter of it (one copy where it is larger, or from 64 rows
on). All candidates of a cell take turns, 20 rounds or more: every kernel of the project's table that this machine can
run, each checked against its reference on this shape, and the peers that can be imported (ONNX Runtime, OpenVINO,
torchao), each checked roughly. Every engine is a process of its own with the same number of threads, and sleeps while
another works. Activations are bf16 for ours and torchao, fp32 for ONNX Runtime and OpenVINO. These two run graphs of
several copies, and our native kernels as many copies in one native call, as a decode step runs a model's layers: what
a call costs around the multiplication is spread. Torch's kernels and torchao's are called from Python, one at a time.

Written by `--json`, after every cell: one object with `machine` (cpu, cache, threads, load before and after, packages),
`read_gb_per_s` (working set in bytes, best read bandwidth of all threads: before or after, the better), `failed` (what
could not be run, with reasons) and `rows`, one per cell and candidate:
    shape, n, k           the layer: outputs x inputs
    m                     rows
    weights               "cold" or "hot"
    scheme, kernel        what is computed, and by what; peers are named PACKAGE.FORMAT. "read": nothing is computed,
                          the bytes of the dense weights are read as the weights are (a reduction of torch)
    latency_us            {median, low, high}: one multiplication, everything it needs included; 95%
    speedup_over_bf16     over the fastest dense bf16 kernel of the cell: median of ratios paired by round
    speedup_low, speedup_high    its 95% interval
    gb_per_s              bytes of packed weights over the median
    roofline_share        that over the read bandwidth at this working set; null with --no-roofline
    read_share            gb_per_s over that of "read" in the same cell: the share of what memory gave at that time
    packed_bytes          of one weight, as the kernel holds it
    working_set_bytes     of all copies taken in turn
    rounds, noisy         samples; whether their spread or drift is more than the timer trusts
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cpu_own import READ
from cpu_shapes import SHAPES, chosen
from peers import ENGINES, KERNEL_PEERS, SETTLE_S, Case, EngineGone, Remote, available

from autotune.profilers import environment, isolate, probe
from autotune.profilers.timer import Protocol, Timing, measure, ratio
from autotune.store import write_json
from autotune.targets import detect
from autotune.targets.target import Ceilings

OURS = "autotune"


@dataclass
class Machine:
    """What all cells share."""

    threads: int
    last_cache_bytes: int
    python: str  # of the peers
    peers: tuple[str, ...]
    about: dict[str, Any]
    curves: list[list[tuple[int, float]]] = field(default_factory=list)

    def probe(self) -> None:
        """Read bandwidth over the working set, now."""
        sizes = probe.working_sets(self.last_cache_bytes, detect.detect().memory_bytes)
        args = {"sizes": sizes, "threads": self.threads}
        env = environment.child_env(self.threads)
        found = isolate.call("autotune.profilers.probe:measure", args, 180.0, env)
        self.curves.append([(int(size), float(rate)) for size, rate in found["read_gb_per_s"]])

    def curve(self) -> list[tuple[int, float]]:
        """The best seen at every working set."""
        return [(points[0][0], max(rate for _, rate in points)) for points in zip(*self.curves, strict=True)]


class Engines:
    """Processes by engine, started when first asked for, and again after one died; `barred` is what died in them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.barred: list[str] = []
        self.failed: list[dict[str, Any]] = []
        self._running: dict[str, Remote] = {}

    def load(self, case: Case, shape: str) -> dict[str, tuple[Remote, dict[str, Any]]]:
        """Candidates by name, with who runs them."""
        found = {}
        for engine in (OURS, *self.machine.peers):
            answer = self._load(engine, case, shape)
            for item in answer["candidates"]:
                found[item["name"]] = (self._running[engine], item)
            self.failed += [{"shape": shape, "m": case.m, **failure} for failure in answer["failed"]]
        return found

    def _load(self, engine: str, case: Case, shape: str) -> dict[str, Any]:
        for _ in range(8):
            try:
                if engine not in self._running:
                    python = sys.executable if engine == OURS else self.machine.python
                    remote = self._running[engine] = Remote(engine, self.machine.threads, python)
                    about = remote.about
                    self.machine.about["packages"][about["package"]] = about["version"]
                return self._running[engine].load(replace(case, barred=tuple(self.barred)))
            except EngineGone as gone:
                self.lost(gone, case, shape)
                if not gone.at:
                    break
        return {"candidates": [], "failed": []}

    def lost(self, gone: EngineGone, case: Case, shape: str) -> None:
        """Note a death; what it was at is not tried again."""
        print(f"  {gone}", file=sys.stderr, flush=True)
        kernel, _, scheme = gone.at.partition(" ")
        self.failed.append({"shape": shape, "m": case.m, "kernel": kernel, "scheme": scheme, "reason": str(gone)})
        if gone.at:
            self.barred.append(gone.at)
        self._running.pop(gone.engine, None)

    def close(self) -> None:
        for remote in self._running.values():
            remote.close()
        self._running.clear()


class Turns:
    """A clock on which only what an engine timed passes, and calls that advance it."""

    def __init__(self) -> None:
        self.timed_s = 0.0
        self._last: Remote | None = None

    def clock(self) -> float:
        return self.timed_s

    def sample(self, remote: Remote, name: str) -> None:
        settle_s = 0.0 if remote is self._last else SETTLE_S
        self._last = remote
        self.timed_s += remote.sample(name, settle_s)


def time_cell(engines: Engines, case: Case, shape: str, protocol: Protocol) -> list[dict[str, Any]]:
    """Rows of one cell. When an engine dies, all start over, without what it was at."""
    while True:
        start = time.monotonic()
        candidates = engines.load(case, shape)
        taken_s = time.monotonic() - start
        print(f"\n{shape}, m = {case.m}: {len(candidates)} candidates, loaded in {taken_s:.0f} s", flush=True)
        if not candidates:
            return []
        turns = Turns()
        calls = {name: partial(turns.sample, remote, name) for name, (remote, _) in candidates.items()}
        try:
            timings = measure(calls, protocol, clock=turns.clock)
        except EngineGone as gone:
            engines.lost(gone, case, shape)
            continue
        described = {name: item for name, (_, item) in candidates.items()}
        return list(rows_of(case, shape, described, timings))


def rows_of(
    case: Case, shape: str, described: dict[str, dict[str, Any]], timings: dict[str, Timing]
) -> Iterator[dict[str, Any]]:
    """One row a candidate, fastest first; the baseline is the fastest dense bf16 kernel among them."""
    single = {name: _scaled(timings[name], item["multiplications"]) for name, item in described.items()}
    dense = [single[name] for name, item in described.items() if item["scheme"] == "bf16"]
    baseline = min(dense, key=lambda timing: timing.median_us, default=None)
    rates = {name: item["packed_bytes"] / single[name].median_us / 1e3 for name, item in described.items()}
    read = next((rates[name] for name, item in described.items() if item["scheme"] == READ), None)
    for name, item in sorted(described.items(), key=lambda pair: single[pair[0]].median_us):
        timing = single[name]
        speedup = ratio(baseline, timing) if baseline else None
        yield {
            "shape": shape,
            "n": case.n,
            "k": case.k,
            "m": case.m,
            "weights": "cold" if case.cold else "hot",
            "scheme": item["scheme"],
            "kernel": item["kernel"],
            "latency_us": {"median": timing.median_us, "low": timing.low_us, "high": timing.high_us},
            "speedup_over_bf16": speedup.value if speedup else None,
            "speedup_low": speedup.low if speedup else None,
            "speedup_high": speedup.high if speedup else None,
            "gb_per_s": rates[name],
            "roofline_share": None,
            "read_share": rates[name] / read if read else None,
            "packed_bytes": item["packed_bytes"],
            "working_set_bytes": item["working_set_bytes"],
            "rounds": timing.rounds,
            "noisy": timing.noisy,
        }


def _scaled(timing: Timing, count: int) -> Timing:
    """From a sample of `count` multiplications to one."""
    return replace(
        timing,
        median_us=timing.median_us / count,
        low_us=timing.low_us / count,
        high_us=timing.high_us / count,
        samples_us=tuple(sample / count for sample in timing.samples_us),
    )


def with_roofline(rows: list[dict[str, Any]], curve: list[tuple[int, float]]) -> list[dict[str, Any]]:
    """Rows with the share of the read bandwidth at their working set."""
    ceilings = Ceilings(tuple(curve), {}, 0.0)
    return [
        row | {"roofline_share": row["gb_per_s"] / ceilings.bandwidth(row["working_set_bytes"])} if curve else row
        for row in rows
    ]


def table(rows: list[dict[str, Any]]) -> str:
    head = rows[0]
    lines = [f"{head['shape']} ({head['n']} x {head['k']}), m = {head['m']}, {head['weights']}"]
    for row in rows:
        time_us, share, read = row["latency_us"], row["roofline_share"], row["read_share"]
        speedup = row["speedup_over_bf16"]
        lines.append(
            f"  {row['kernel']:32}{row['scheme']:20}{time_us['median']:12.1f} us"
            f" [{time_us['low']:.1f}, {time_us['high']:.1f}]".ljust(92)
            + ("" if speedup is None else f"{speedup:7.2f}x")
            + f"{row['gb_per_s']:8.1f} GB/s"
            + ("" if share is None else f"{share:7.0%}")
            + ("" if read is None else f"{read:7.0%} of read")
            + (" noisy" if row["noisy"] else "")
        )
    return "\n".join(lines)


def run(arguments: argparse.Namespace, machine: Machine) -> list[dict[str, Any]]:
    """Every cell, written and printed as it is measured."""
    engines, rows = Engines(machine), list[dict[str, Any]]()
    protocol = Protocol(
        rounds=arguments.rounds,
        min_rounds=arguments.rounds,
        max_rounds=3 * arguments.rounds,
        sample_s=1e-9,  # the engines repeat calls themselves
        warm_s=0.0,
        max_candidate_s=arguments.seconds,
        max_run_s=arguments.seconds,
    )
    try:
        for name, (n, k) in arguments.shapes.items():
            for cold in (kind == "cold" for kind in arguments.weights):
                for m in arguments.m:
                    case = Case(
                        n, k, m, tuple(arguments.m), cold, machine.last_cache_bytes,
                        schemes=tuple(arguments.schemes), kernels=tuple(arguments.kernels),
                    )  # fmt: skip
                    found = time_cell(engines, case, name, protocol)
                    rows += found
                    curve = machine.curve() if machine.curves else []
                    if found:
                        print(table(with_roofline(found, curve)), flush=True)
                    save(arguments.json, machine, rows, engines.failed)
        if machine.curves:
            engines.close()
            machine.probe()
    finally:
        engines.close()
    machine.about["load_after"] = os.getloadavg()[0]
    save(arguments.json, machine, rows, engines.failed)
    print(f"\nload {machine.about['load_before']:.1f} before, {machine.about['load_after']:.1f} after")
    for failure in engines.failed:
        print(f"not run: {failure['kernel']} {failure['scheme']} on {failure['shape']}: {failure['reason']}")
    return rows


def save(path: Path | None, machine: Machine, rows: list[dict[str, Any]], failed: list[dict[str, Any]]) -> None:
    if path is None:
        return
    curve = machine.curve() if machine.curves else []
    value = {"machine": machine.about, "read_gb_per_s": curve, "failed": failed, "rows": with_roofline(rows, curve)}
    write_json(path, value)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="CPU kernels against each other, ours and other packages'.")
    made.add_argument("--shapes", type=_shapes, default=SHAPES, help="names, first parts of names, or NxK")
    made.add_argument("--m", type=_numbers, default=[1, 4, 16, 64, 512], help="rows, comma-separated")
    made.add_argument("--weights", type=_words, default=["cold", "hot"], help="cold, hot or both")
    made.add_argument("--schemes", type=_words, default=["*"], help="patterns; bf16 is always timed")
    made.add_argument("--kernels", type=_words, default=["*"], help="patterns, as 'cpu.*'; dense ones are always timed")
    made.add_argument("--peers", type=_words, default=list(KERNEL_PEERS), help="packages, or none")
    made.add_argument("--peers-python", default=sys.executable, help="an interpreter that can import them")
    made.add_argument(
        "--rounds", type=int, default=20, help="the least; noisy candidates get up to three times as many"
    )
    made.add_argument("--seconds", type=float, default=20.0, help="timed, for a cell; beyond it no more than --rounds")
    made.add_argument("--threads", type=int, help="default: one a core")
    made.add_argument("--cache-bytes", type=int, help="of the last cache; default: as detected")
    made.add_argument("--no-roofline", action="store_true", help="do not measure the read bandwidth (12 s, twice)")
    made.add_argument("--json", type=Path)
    return made


def _words(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in _words(text)]


def _shapes(text: str) -> dict[str, tuple[int, int]]:
    return chosen(_words(text))


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    arguments = made.parse_args(argv)
    if unknown := set(arguments.weights) - {"cold", "hot"}:
        made.error(f"--weights takes cold and hot, not {unknown.pop()!r}")
    wanted = tuple(name for name in arguments.peers if name != "none")
    if unknown := set(wanted) - set(KERNEL_PEERS):
        made.error(f"--peers takes {', '.join(KERNEL_PEERS)} or none, not {unknown.pop()!r}")
    target = detect.detect()
    threads = arguments.threads or target.cores
    peers = tuple(available(wanted, arguments.peers_python))
    last_cache_bytes = arguments.cache_bytes or target.last_cache_bytes
    about: dict[str, Any] = {
        "cpu": target.model,
        "last_cache_bytes": last_cache_bytes,
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "packages": {},
    }
    machine = Machine(threads, last_cache_bytes, arguments.peers_python, peers, about)
    for name in wanted:
        if name not in peers:
            print(f"{name}: not installed ({', '.join(ENGINES[name][1])}), left out", file=sys.stderr)
    if not arguments.no_roofline:
        machine.probe()
    run(arguments, machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
