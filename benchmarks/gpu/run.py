"""Everything to measure on a GPU that can be had for minutes: correctness first, then tables, into a folder of CSVs.

    python3 benchmarks/gpu/run.py --out FOLDER                  all of it, within 8 minutes
    python3 benchmarks/gpu/run.py --only prefill,decode         some of it
    python3 benchmarks/gpu/run.py --device cpu --only decode --shapes 256x512      a rehearsal without a GPU

Runs from a checkout, nothing installed: torch, triton, numpy, pandas and pyyaml (transformers for
`end_to_end`). Rows
carry the device, driver, libraries and date. A kernel that fails is a row with its reason; what there was no time for
is one too. The card is measured as it is found: no setting of it is changed.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import geometric_mean
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # the children see these too

import correctness
import shapes
from cells import Row, cells, timed, with_speedups

from autotune.errors import DeviceError
from autotune.kernels.spec import kernel_hash
from autotune.profilers import environment, probe
from autotune.profilers.latency import host_threads
from autotune.profilers.table import LatencyRow, LatencyTable
from autotune.store import Memo, write_json, write_text
from autotune.targets import cuda_driver, detect
from autotune.targets.target import Target

# name -> share of the time that is left when it starts
PARTS = {
    "smoke": 0.2,
    "prefill": 0.3,
    "decode": 0.45,
    "int4": 0.4,
    "end_to_end": 0.6,
    "mixture": 0.4,
    "correctness": 1.0,
}
WRITE_S = 5.0  # how often the rows of a part that is at work are written


@dataclass
class Bench:
    """What all parts share: the device, the time, and rows so far."""

    target: Target
    out: Path
    end_s: float
    patterns: tuple[str, ...]
    only_shapes: dict[str, tuple[int, int]]
    dtype: str
    provenance: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    latencies: list[LatencyRow] = field(default_factory=list)

    def shapes(self, default: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        return self.only_shapes or default

    def deadline(self, part: str) -> float:
        now = time.monotonic()
        return now + PARTS[part] * max(0.0, self.end_s - now)

    def table(self, name: str, default: dict[str, tuple[int, int]], rows: Sequence[int], *only: str) -> None:
        """Time all kernels (or those of the patterns `only`) on these shapes and rows."""
        fits, misfits = cells(self.shapes(default), rows, self.target, only or self.patterns, self.dtype)
        rows_of_table = timed(name, fits, misfits, self.target, self.deadline(name), self.dtype)
        self.keep(name, self._noting_latencies(rows_of_table), lambda found: with_speedups(found, self.dtype))

    def _noting_latencies(self, rows: Iterable[tuple[Row, LatencyRow | None]]) -> Iterator[Row]:
        for row, latency in rows:
            if latency is not None:
                self.latencies.append(latency)
            yield row

    def check(self, name: str, some: dict[str, tuple[int, int]], rows: Sequence[int]) -> None:
        fits, misfits = cells(self.shapes(some), rows, self.target, self.patterns, self.dtype)
        fits.sort(key=lambda cell: cell.outputs * cell.inputs)  # smallest first: most cells for the time there is
        threads = host_threads(self.target)
        self.keep(name, correctness.checked(fits, misfits, self.deadline(name), threads, self.dtype))

    def keep(
        self, name: str, rows: Iterable[Row], finish: Callable[[list[Row]], list[Row]] = lambda found: found
    ) -> None:
        """A part's rows, written every few seconds and at its end, whatever ends it: the rest may be cut off."""
        found, written_s = list[Row](), time.monotonic()
        try:
            for row in rows:
                found.append(row)
                if time.monotonic() - written_s > WRITE_S:
                    self.write(name, finish(found))
                    written_s = time.monotonic()
        finally:
            kept = finish(found)
            self.rows += kept
            self.write(name, kept)
            print(summary(name, kept), flush=True)

    def write(self, name: str, rows: list[Row]) -> None:
        state = cuda_driver.state() if self.target.device == "cuda" else None
        now = f"SM {state.sm_mhz} MHz, {state.temperature_c} C" if state else ""
        write_csv(self.out / f"{name}.csv", [row | self.provenance | {"card_after": now} for row in rows])
        if self.latencies:
            fingerprint = self.provenance["fingerprint"]
            LatencyTable(self.target.name, fingerprint, tuple(self.latencies)).to_csv(self.out / "latency.csv")


def smoke(bench: Bench) -> None:
    """Every kernel once, in both phases, on a shape of ordinary size: what is broken shows within seconds."""
    bench.check("smoke", {"1024x1024": (1024, 1024)}, (1, 64))


def prefill(bench: Bench) -> None:
    bench.table("prefill", _of_model("llama-3.1-8b"), (2048, 4096))


def decode(bench: Bench) -> None:
    large = shapes.named(",".join(shapes.LARGE))
    bench.table("decode", {**large, **_of_model("llama-3.1-8b")}, (1, 4, 16))


def int4(bench: Bench) -> None:
    """int4 kernels against torch's tinygemm (`cuda.int4`), every number of rows it is good for."""
    bench.table("int4", shapes.named("8192x8192,4096x4096"), (1, 2, 4, 8, 16), "*w4a16-int4-g128")


def check_all(bench: Bench) -> None:
    """40 shapes and rows from 1 to 4096."""
    odd = {f"{outputs}x{inputs}": (outputs, inputs) for outputs, inputs in shapes.ODD}
    bench.check("correctness", {**odd, **shapes.SHAPES}, (1, 2, 3, 7, 16, 17, 33, 128, 515, 4096))


def end_to_end(bench: Bench) -> None:
    import end_to_end as whole

    models = ("llama-3.1-8b", "llama-3.2-1b") if bench.target.device == "cuda" else ("tiny",)
    bench.keep("end_to_end", whole.measured(bench.target.device, bench.deadline("end_to_end"), bench.rows, models))


def mixture(bench: Bench) -> None:
    """Experts chosen by the device, inside a graph."""
    import mixture as layers

    names = ("qwen3-30b-a3b", "mixtral-8x7b") if bench.target.device == "cuda" else ("tiny",)
    bench.keep("mixture", layers.measured(bench.target.device, bench.deadline("mixture"), names))


RUN: dict[str, Callable[[Bench], None]] = {
    "smoke": smoke,
    "prefill": prefill,
    "decode": decode,
    "int4": int4,
    "end_to_end": end_to_end,
    "mixture": mixture,
    "correctness": check_all,
}


def _of_model(name: str) -> dict[str, tuple[int, int]]:
    return {f"{name}.{role}": shape for role, shape in shapes.MODELS[name].items()}


def summary(name: str, rows: list[Row]) -> str:
    """A line a kernel, scheme and rows: the geometric mean of its speed-ups, or what became of it."""
    lines = [f"\n{name}: {len(rows)} rows, " + ", ".join(f"{n} {state}" for state, n in _counts(rows).items())]
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["scheme"], row["m"]), []).append(row)
    for (kernel, item, m), members in groups.items():
        gains = [row["speedup"] for row in members if row["speedup"]]
        if gains:
            time_us = geometric_mean([row["us"] for row in members if row["us"]])
            lines.append(f"  {kernel:24}{item:22}m {m:<6}{geometric_mean(gains):6.2f}x{time_us:12.1f} us")
    failures = [row for row in rows if row["status"] == "failed"]
    lines += [
        f"  failed: {row['kernel']} {row['scheme']} {row['shape']} m {row['m']}: {row['reason']}"
        for row in failures[:12]
    ]
    return "\n".join(lines)


def _counts(rows: list[Row]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in rows:
        found[row["status"]] = found.get(row["status"], 0) + 1
    return found


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def provenance(target: Target, threads: int) -> dict[str, Any]:
    found = environment.fingerprint(threads, environment.child_env(threads), target.device)
    card = found.get("cuda", {"device": found["cpu"], "torch": found["torch"]})
    names = ("device", "driver", "compute_capability", "sm_mhz", "memory_mhz")
    kept = {name: card.get(name, "") for name in (*names, "torch", "cuda", "triton", "cublas", "cusparselt")}
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")  # noqa: UP017 - Python 3.10 runs this too
    return {**kept, "fingerprint": environment.short_hash(found), "date": date}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    made.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the CSVs")
    made.add_argument("--minutes", type=float, default=7.5, help="for all parts together")
    made.add_argument("--kernels", default="*", help="patterns of kernels; dense ones are always timed")
    made.add_argument("--shapes", type=shapes.named, default={}, help="instead of each table's own")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal with CPU kernels")
    made.add_argument("--no-probe", action="store_true", help="do not measure the device's ceilings first")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    arguments = made.parse_args(argv)
    parts = [name for name in arguments.only.split(",") if name]
    if unknown := set(parts) - set(PARTS):
        made.error(f"--only takes {', '.join(PARTS)}, not {unknown.pop()!r}")
    target = detect.detect_gpu() if arguments.device == "cuda" else detect.detect_cpu()
    if target is None:
        print("There is no CUDA device here; nothing was measured. Try --device cpu for a rehearsal.", file=sys.stderr)
        return 5
    arguments.out.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    if not arguments.no_probe:
        target = probed(target, arguments.out)
    about = provenance(target, host_threads(target))
    bench = Bench(
        target, arguments.out, started_s + 60 * arguments.minutes, tuple(arguments.kernels.split(",")),
        arguments.shapes, "bf16", about,
    )  # fmt: skip
    hashes = {name: kernel_hash(spec)[:12] for name, spec in _specs(target).items()}
    write_json(arguments.out / "about.json", {"target": target.to_json(), "kernels": hashes, **about})
    print(", ".join(f"{name} {value}" for name, value in about.items() if value), flush=True)
    for name in (name for name in PARTS if name in parts):
        try:
            RUN[name](bench)
        except Exception as error:  # the next part may still work, and the card will not be here again soon
            print(f"\n{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        print(f"  {time.monotonic() - started_s:.0f} s since the start", flush=True)
    return 0


def probed(target: Target, out: Path) -> Target:
    """With measured ceilings, or those of its data sheet where the probe fails: the tables need no ceilings."""
    memo = Memo(out / "probe.sqlite")
    try:
        return probe.probe(target, memo)
    except DeviceError as error:
        print(f"\nprobe: {error.message} {error.hint}", file=sys.stderr, flush=True)
        return target
    finally:
        memo.close()


def _specs(target: Target) -> dict[str, Any]:
    from autotune.kernels.spec import KERNELS

    return {spec.name: spec for spec in KERNELS if spec.device == target.device}


if __name__ == "__main__":
    sys.exit(main())
