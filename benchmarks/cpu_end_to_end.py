"""What do the kernels give a whole model? Qwen3-0.6B's shape with random weights: prefill and decode, end to end.

    python benchmarks/cpu_end_to_end.py [--json FILE] [--plan RUN]
    python benchmarks/cpu_end_to_end.py --shapes benchmarks/shapes/qwen3-0.6b-vocab32k --layers 4 --llama none   # quick

Dense, every scheme that this machine can run on all layers that allow it (each on its fastest kernel for this
workload, as measured here), a tuned plan if one is given, and llama.cpp on the same shape where `llama_cpp` and `gguf`
can be imported. All are held in memory and take turns, round by round, as `autotune.verify` runs configurations;
llama.cpp is a process of its own with the same number of threads, and nobody works while another does. Decode steps are
single, after the prompt; the figure is a round's median step. Weights are random: only speed means anything. Memory
needed: about 8 GiB for the full shape.

Written by `--json`: one object with `machine` (cpu, threads, load before and after, packages), `noisy` (shape -> why
its numbers should not be trusted, or ""), `kernels` (shape -> scheme -> kernels chosen) and `rows`:
    shape             folder of the config.json, with the number of layers where --layers was given
    configuration     "dense", a scheme, "plan", or "llama.cpp FORMAT"
    prefill_ms        {median, low, high}: the whole prompt, last position's logits; 95%
    decode_ms         {median, low, high}: one step
    speedup_prefill, speedup_decode    over dense: median of ratios paired by round
    weight_bytes      of what a step multiplies by, output matrix included, as the kernels hold it; llama.cpp: as in the
                      file
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peers import SETTLE_S, EngineGone, Remote, available

from autotune import verify
from autotune.errors import AutotuneError
from autotune.kernels.allocator import keep_large_blocks
from autotune.kernels.spec import KERNELS
from autotune.latency_model import uniform
from autotune.model import OpenModel, open_model
from autotune.plan import Plan
from autotune.profilers import latency
from autotune.profilers.latency import LatencyTable
from autotune.profilers.timer import Protocol
from autotune.search_space import space as space_module
from autotune.search_space.space import SearchSpace
from autotune.search_space.workload import Workload, parse
from autotune.session import resolve_target
from autotune.store import Memo, user_folder, write_json
from autotune.switchable import SwitchableModel, switchable
from autotune.targets.target import Target

SHAPES = Path(__file__).parent / "shapes"
DEFAULT_SHAPES = ("qwen3-0.6b-vocab32k", "qwen3-0.6b")
LLAMA = "llama.cpp"
Configurations = dict[str, dict[str, str]]  # name -> group -> scheme; llama.cpp's: {LLAMA: its name there}


class Together:
    """Our model and llama.cpp behind the face that `verify.measure` knows: one works, the others sleep."""

    def __init__(self, model: SwitchableModel, llama: Remote | None, generated: int) -> None:
        self.spec = model.spec
        self._model, self._llama, self._generated = model, llama, generated
        self._name = ""  # of llama.cpp's model that is selected; "": ours is

    def select(self, configuration: Mapping[str, str]) -> None:
        name = configuration.get(LLAMA, "")
        if bool(name) != bool(self._name):
            time.sleep(SETTLE_S)
        self._name = name
        if not name:
            self._model.select(configuration)

    def time_request(self, batch: int, prompt: int, steps: int) -> tuple[float, float]:
        """All generated tokens are timed, not the few that verification settles for."""
        if not self._name or self._llama is None:
            return self._model.time_request(batch, prompt, self._generated)
        self._llama.at = self._name
        answer = self._llama.ask(600.0, do="request", name=self._name, prompt=prompt, steps=self._generated)
        return answer["prefill_s"], answer["decode_s"]

    def weight_bytes(self, configuration: Mapping[str, str]) -> int:
        self._model.select(configuration)
        return sum(group.packed_bytes for group in self._model.groups.values())


@dataclass
class Setting:
    """What all shapes share."""

    arguments: argparse.Namespace
    target: Target
    threads: int
    workload: Workload
    machine: dict[str, Any]
    noisy: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, dict[str, list[str]]] = field(default_factory=dict)


def prepare(setting: Setting, opened: OpenModel) -> tuple[SearchSpace, LatencyTable]:
    """Which schemes can run, and how fast each kernel is: what packing a model chooses kernels by."""
    arguments, spec = setting.arguments, opened.spec
    names = {entry.scheme for entry in space_module.build(spec, setting.target, KERNELS, True).usable()}
    wanted = [name for name in names if any(fnmatch.fnmatchcase(name, item) for item in arguments.schemes)]
    space = space_module.build(spec, setting.target, KERNELS, True, sorted({*wanted} - {spec.dtype}))
    rounds = arguments.kernel_rounds
    protocol = Protocol(rounds=rounds, min_rounds=min(5, rounds), max_rounds=3 * rounds)
    memo = Memo(user_folder() / "measurements.sqlite")
    try:
        table = latency.profile(
            spec, space, setting.target, setting.workload, memo, threads=setting.threads, protocol=protocol,
            progress=_say_progress,
        )  # fmt: skip
    finally:
        memo.close()
    groups = {group.name: group for group in spec.groups}
    failed = {
        (entry.group, entry.scheme): "no kernel has a time"
        for entry in space.usable()
        if table.best(groups[entry.group], entry.scheme, setting.workload) is None
    }
    return space.without(failed), table


def _say_progress(done: int, total: int, note: str) -> None:
    if sys.stderr.isatty():
        print(f"\r  kernel {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def chosen_kernels(
    opened: OpenModel, space: SearchSpace, table: LatencyTable, workload: Workload
) -> dict[str, list[str]]:
    """scheme -> kernels that run it somewhere in the model."""
    found: dict[str, set[str]] = {}
    for group in opened.spec.groups:
        for entry in space.schemes(group.name):
            choice = table.best(group, entry.scheme, workload)
            assert choice is not None
            found.setdefault(entry.scheme, set()).add(choice.kernel)
    return {scheme: sorted(names) for scheme, names in sorted(found.items())}


def configurations(opened: OpenModel, space: SearchSpace, plan: Plan | None) -> Configurations:
    """Dense, every uniform scheme, and the plan where it is one of this shape."""
    spec = opened.spec
    schemes = {group.name: [entry.scheme for entry in space.schemes(group.name)] for group in spec.groups}
    names = sorted({name for found in schemes.values() for name in found} - {spec.dtype})
    made = {"dense": uniform(spec, schemes, spec.dtype)} | {name: uniform(spec, schemes, name) for name in names}
    if plan is not None:
        shapes = {m.tensor: (m.out_features, m.in_features) for group in spec.groups for m in group.members}
        wanted = plan.configuration
        if shapes != {entry.tensor: entry.shape for entry in plan.tensors}:
            print(f"{spec.name}: the plan is of another shape, left out", file=sys.stderr)
        elif missing := {scheme for group, scheme in wanted.items() if scheme not in schemes[group]}:
            print(f"{spec.name}: the plan needs {', '.join(sorted(missing))}, left out", file=sys.stderr)
        else:
            made["plan"] = wanted
    return made


def load_llama(setting: Setting, folder: Path, kinds: Sequence[str]) -> tuple[Remote | None, dict[str, int]]:
    """llama.cpp with the shape in every format; bytes by the configuration's name."""
    arguments = setting.arguments
    if not kinds or not tuple(available((LLAMA,), arguments.peers_python)):
        return None, {}
    sizes: dict[str, int] = {}
    context = -(-(arguments.prompt + arguments.generated + 1) // 256) * 256
    config = (folder / "config.json").read_text(encoding="utf-8")
    try:
        remote = Remote(LLAMA, setting.threads, arguments.peers_python)
        setting.machine["packages"][remote.about["package"]] = remote.about["version"]
        with tempfile.TemporaryDirectory() as scratch:
            for kind in kinds:
                request = {"name": kind, "kind": kind, "folder": scratch, "config": config, "context": context}
                sizes[f"{LLAMA} {kind}"] = remote.ask(600.0, do="load", **request)["weight_bytes"]
    except EngineGone as gone:
        print(gone, file=sys.stderr)
        return None, {}
    return remote, sizes


def run_shape(setting: Setting, folder: Path, plan: Plan | None) -> list[dict[str, Any]]:
    opened = open_model(str(folder), latency_only=True)
    if opened.spec.task != "causal-lm":
        raise SystemExit(f"{folder} does not generate")
    space, table = prepare(setting, opened)
    setting.kernels[folder.name] = chosen_kernels(opened, space, table, setting.workload)
    model = switchable(opened, space, table, setting.workload, None, setting.target.last_cache_bytes)
    llama, sizes = load_llama(setting, folder, setting.arguments.llama)
    together = Together(model, llama, setting.arguments.generated)
    wanted = configurations(opened, space, plan)
    sizes |= {name: together.weight_bytes(item) for name, item in wanted.items()}
    wanted |= {name: {LLAMA: name.removeprefix(f"{LLAMA} ")} for name in sizes if name.startswith(LLAMA)}
    try:
        result = _measure(together, wanted, setting)
    finally:
        if llama is not None:
            llama.close()
    setting.noisy[folder.name] = result.noisy
    return rows_of(folder.name, result, sizes)


def _measure(together: Together, wanted: Configurations, setting: Setting) -> verify.EndToEnd:
    """Interleaved; without llama.cpp if it dies."""
    model = cast(SwitchableModel, together)
    try:
        return verify.measure(model, wanted, setting.workload, setting.arguments.seconds)
    except EngineGone as gone:
        print(gone, file=sys.stderr)
        ours = {name: item for name, item in wanted.items() if LLAMA not in item}
        return verify.measure(model, ours, setting.workload, setting.arguments.seconds)


def rows_of(shape: str, result: verify.EndToEnd, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    dense = result.of("dense")

    def speedup(run: verify.Run, phase: str) -> float | None:
        """None where nothing is generated."""
        if phase not in run.phases_ms:
            return None
        return float(np.median(np.asarray(dense.phases_ms[phase]) / np.asarray(run.phases_ms[phase])))

    return [
        {
            "shape": shape,
            "configuration": run.name,
            "prefill_ms": asdict(run.prefill_ms),
            "decode_ms": asdict(run.decode_ms),
            "speedup_prefill": speedup(run, "prefill"),
            "speedup_decode": speedup(run, "decode"),
            "weight_bytes": sizes[run.name],
        }
        for run in result.runs
    ]


def table_of(rows: list[dict[str, Any]]) -> str:
    lines = [f"\n{rows[0]['shape']}", f"  {'configuration':24}{'prefill':>30}{'decode step':>34}{'weights':>14}"]
    for row in rows:
        parts = []
        for phase in ("prefill", "decode"):
            time_ms, speedup = row[f"{phase}_ms"], row[f"speedup_{phase}"]
            text = f"{time_ms['median']:.2f} ms [{time_ms['low']:.2f}, {time_ms['high']:.2f}]"
            parts.append(f"{text:>30}" + ("" if speedup is None else f" {speedup:.2f}x"))
        lines.append(f"  {row['configuration']:24}{''.join(parts)}{row['weight_bytes'] / 1e6:>11.1f} MB")
    return "\n".join(lines)


def shortened(folder: Path, layers: int | None, scratch: Path) -> Path:
    """The shape's folder, or a copy of its config.json with fewer layers."""
    if layers is None:
        return folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
    made = scratch / f"{folder.name}-{layers}layers"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return made


def run(setting: Setting) -> list[dict[str, Any]]:
    """Every shape, written and printed as it is measured."""
    arguments, rows = setting.arguments, list[dict[str, Any]]()
    path = arguments.plan
    plan = Plan.load(path / "plan.json" if path.is_dir() else path) if path else None
    with tempfile.TemporaryDirectory() as scratch:
        for folder in arguments.shapes:
            found = run_shape(setting, shortened(folder, arguments.layers, Path(scratch)), plan)
            rows += found
            print(table_of(found), flush=True)
            before, after = setting.machine["load_before"], os.getloadavg()[0]
            setting.machine["load_after"] = after
            print(
                f"  load {before:.1f} before, {after:.1f} after; {setting.noisy[found[0]['shape']] or 'quiet'}",
                flush=True,
            )
            if arguments.json:
                about = {"machine": setting.machine, "noisy": setting.noisy, "kernels": setting.kernels}
                write_json(arguments.json, about | {"rows": rows})
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Whole models, every scheme, and llama.cpp beside them.")
    shapes = [SHAPES / name for name in DEFAULT_SHAPES]
    made.add_argument("--shapes", type=_folders, default=shapes, help="folders with config.json, comma-separated")
    made.add_argument("--layers", type=int, help="so many layers only")
    made.add_argument("--prompt", type=int, default=512, help="tokens")
    made.add_argument("--generated", type=int, default=64, help="tokens, all timed")
    made.add_argument("--schemes", type=_words, default=["*"], help="patterns; dense is always run")
    made.add_argument("--plan", type=Path, help="a run folder or plan.json of the same shape")
    made.add_argument("--llama", type=_kinds, default=["Q4_0", "Q8_0"], help="Q4_0, Q8_0, BF16, or none")
    made.add_argument("--peers-python", default=sys.executable, help="an interpreter that can import llama_cpp")
    made.add_argument("--seconds", type=float, default=300.0, help="about, for a shape; at least 7 rounds")
    made.add_argument("--kernel-rounds", type=int, default=20, help="of timing kernels to choose between them")
    made.add_argument("--threads", type=int, help="default: one a core")
    made.add_argument("--json", type=Path)
    return made


def _words(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _kinds(text: str) -> list[str]:
    return [kind for kind in _words(text) if kind != "none"]


def _folders(text: str) -> list[Path]:
    return [Path(part) for part in _words(text)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    load_before = os.getloadavg()[0]
    try:
        target = resolve_target("auto")[0]
        threads = arguments.threads or target.cores
        torch.set_num_threads(threads)
        keep_large_blocks()
        machine = {"cpu": target.model, "threads": threads, "load_before": load_before}
        machine["packages"] = {"torch": version("torch")}
        workload = parse(f"1,{arguments.prompt},{arguments.generated}")
        run(Setting(arguments, target, threads, workload, machine))
    except AutotuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
