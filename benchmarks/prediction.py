"""Do predicted savings hold end to end? Twelve configurations along a finished run's front, on the real kernels.

    python benchmarks/prediction.py RUN [--count 12] [--seconds 60] [--json FILE]

Saving is the time a configuration takes less than dense, over the run's workload. Judging it rather than the total is
the harder test: what dense and compressed have in common predicts a total well whatever the model of latency is.
Configurations are spread evenly over the predicted latencies of the front; uniform schemes are left out, as the
calibration has seen them. Where the front holds fewer (after `--latency-only`), random mixes of the fastest
configuration and dense fill the gaps. All take turns round by round in one run.

Two predictions: the run's own, from the calibration it made earlier, and `refit`, the same model fitted to the uniform
schemes of this very run, which drift of the machine between two runs does not enter.

Written by `--json` (one object):
    run, model, target, workload    what was measured
    load_before, load_after         load average over a minute
    noisy                           why the numbers should not be trusted, or ""
    verdict, drift                  what a report of this run would say of its predictions, and by what the machine
                                    changed since the run's calibration (see docs/report.md)
    dense_ms                        measured, the whole workload
    median_error, spearman          median over rows of |predicted / measured - 1| of the saving; rank correlation
    refit_median_error, refit_spearman    the same for `refit`
    phase_errors                    phase -> median over rows of |refit - measured| in it, over dense's time in it
    rows                            a list of objects, one per configuration:
        name, source                its place from fast to slow, and where it comes from ("front", "mix")
        predicted_saving_ms, refit_saving_ms
        measured_saving_ms          {median, low, high}: paired by round, 95%
        error, refit_error          |predicted / measured - 1| of the saving
        phases                      phase -> {refit_saving_ms, measured_saving_ms}, parts of the above
        schemes                     scheme -> number of layer groups
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from autotune import verify
from autotune.config import RunConfig
from autotune.decide import configuration
from autotune.latency_model import fit, uniform_configurations
from autotune.models import Models
from autotune.report.numbers_prediction import drift, judge
from autotune.result import Result
from autotune.search.problem import Genotype, Problem
from autotune.switchable import SwitchableModel
from autotune.tables import available_schemes
from autotune.tune import tune

DENSE = "dense"


@dataclass(frozen=True)
class Chosen:
    genotype: Genotype
    source: str


def choose(result: Result, count: int) -> list[Chosen]:
    """Up to `count` configurations that are neither dense nor uniform, evenly over predicted latency, fastest first."""
    problem, front = result.problem, result.front
    assert problem is not None and front is not None
    names = {option.scheme for group in problem.groups for option in group.options}
    known = {problem.dense} | {problem.uniform(name) for name in names}
    kept = [front.candidates[index] for index in front.pareto] + list(front.candidates)
    found = {candidate.genotype: "front" for candidate in kept if candidate.genotype not in known}
    if len(found) < count:
        found |= dict.fromkeys((item for item in mixes(problem, count) if item not in known | found.keys()), "mix")
    order = sorted(found, key=problem.latency_us)
    picked = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [Chosen(order[index], found[order[index]]) for index in dict.fromkeys(picked.tolist())]


def mixes(problem: Problem, count: int) -> list[Genotype]:
    """Each group compressed as in a random configuration with growing probability; seeded."""
    generator = np.random.default_rng(0)
    made = []
    for share in np.linspace(1.0, 0.1, count):
        genotype = []
        for group in problem.groups:
            faster = [i for i, option in enumerate(group.options) if option.latency_us < group.options[0].latency_us]
            compressed = faster and generator.random() < share
            genotype.append(int(generator.choice(faster)) if compressed else 0)
        made.append(tuple(genotype))
    return made


def measure(result: Result, chosen: list[Chosen], seconds: float) -> verify.EndToEnd:
    """Dense, uniform schemes and every configuration, named by its place, in one interleaved run."""
    models = Models(result.session, result.space, result.table)
    models.database = result.database
    runnable = models.runnable
    if not isinstance(runnable, SwitchableModel) or result.problem is None:
        raise SystemExit(f"the run's target is {result.session.target.name}, which is not this machine")
    wanted = {str(place): configuration(result.problem, item.genotype) for place, item in enumerate(chosen, 1)}
    known = uniform_configurations(result.session.spec, available_schemes(result.space, result.session))
    return verify.measure(runnable, known | wanted, result.session.workload, seconds)


def compare(result: Result, chosen: list[Chosen], measured: verify.EndToEnd) -> list[dict[str, Any]]:
    problem = result.problem
    assert problem is not None
    session = result.session
    available = available_schemes(result.space, session)
    refit = fit(measured, result.table, session.spec, available, session.workload)
    rows = []
    for place, item in enumerate(chosen, 1):
        predicted = (problem.latency_us(problem.dense) - problem.latency_us(item.genotype)) / 1e3
        names = configuration(problem, item.genotype)
        parts = refit.phase_savings_us(result.table, session.spec, names, session.workload)
        fitted = sum(parts.values()) / 1e3
        saving = measured.saving_ms(str(place), DENSE)
        rows.append(
            {
                "name": str(place),
                "source": item.source,
                "predicted_saving_ms": predicted,
                "refit_saving_ms": fitted,
                "measured_saving_ms": asdict(saving),
                "error": abs(predicted / saving.median - 1) if saving.median else None,
                "refit_error": abs(fitted / saving.median - 1) if saving.median else None,
                "phases": {
                    phase: {
                        "refit_saving_ms": saved_us / 1e3,
                        "measured_saving_ms": asdict(measured.saving_ms(str(place), DENSE, phase)),
                    }
                    for phase, saved_us in parts.items()
                },
                "schemes": dict(Counter(names.values())),
            }
        )
    return rows


def summary(rows: list[dict[str, Any]], prefix: str = "") -> dict[str, float | None]:
    """`prefix`: "" for the run's own prediction, "refit_" for the other."""
    errors = [item[f"{prefix}error"] for item in rows if item[f"{prefix}error"] is not None]
    predicted = [item[f"{prefix or 'predicted_'}saving_ms"] for item in rows]
    measured = [item["measured_saving_ms"]["median"] for item in rows]
    ranked = len(rows) >= 3 and len(set(predicted)) > 1 and len(set(measured)) > 1
    return {
        f"{prefix}median_error": float(np.median(errors)) if errors else None,
        f"{prefix}spearman": float(stats.spearmanr(predicted, measured).statistic) if ranked else None,
    }


def _plain(found: dict[str, float | None], prefix: str) -> dict[str, float | None]:
    return {name.removeprefix(prefix): value for name, value in found.items()}


def phase_errors(rows: list[dict[str, Any]], dense: verify.Run) -> dict[str, float]:
    """Relative to dense's time, not to the saving: a phase that saves nothing would have no error otherwise."""
    errors = {}
    for phase, times in dense.phases_ms.items():
        parts = [item["phases"][phase] for item in rows]
        off = [abs(part["refit_saving_ms"] - part["measured_saving_ms"]["median"]) for part in parts]
        errors[phase] = float(np.median(off) / np.median(times)) if off else 0.0
    return errors


def table(value: dict[str, Any]) -> str:
    lines = [["#", "from", "predicted", "refit", "measured saving", "95%", "error", "refit", "schemes"]]
    for item in value["rows"]:
        saving = item["measured_saving_ms"]
        schemes = ", ".join(f"{count} x {name}" for name, count in sorted(item["schemes"].items()))
        errors = ["-" if item[key] is None else f"{item[key]:.1%}" for key in ("error", "refit_error")]
        spread = f"{saving['low']:.2f} to {saving['high']:.2f}"
        times = (item["predicted_saving_ms"], item["refit_saving_ms"], saving["median"])
        cells = [*(f"{time:.2f} ms" for time in times), spread, *errors, schemes]
        lines.append([item["name"], item["source"], *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for prefix, name in (("", "predicted"), ("refit_", "refit")):
        error, rank = value[f"{prefix}median_error"], value[f"{prefix}spearman"]
        found = "none" if error is None else f"{error:.1%}"
        text.append(f"{name}: median error of the saving {found}, Spearman {'none' if rank is None else f'{rank:.3f}'}")
    text += [f"refit, {phase}: off by {off:.1%} of dense's time" for phase, off in value["phase_errors"].items()]
    text.append(
        f"dense {value['dense_ms']:.2f} ms; load {value['load_before']:.1f} before, {value['load_after']:.1f} after"
    )
    text.append(value["verdict"])
    return "\n".join([*text, value["noisy"]] if value["noisy"] else text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured savings along a run's front.")
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long to measure")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = RunConfig.load(arguments.run / "config.yaml").model_copy(update={"out": str(arguments.run)})
    result = tune(config, until="search")  # finds its artifacts: nothing is computed again
    load_before = os.getloadavg()[0]
    chosen = choose(result, arguments.count)
    measured = measure(result, chosen, arguments.seconds)
    rows = compare(result, chosen, measured)
    search, fitted = summary(rows), summary(rows, "refit_")
    assert result.calibration is not None
    moved = drift(result.calibration.end_to_end, measured)
    value = {
        "run": str(arguments.run),
        "model": result.session.spec.name,
        "target": result.session.target.name,
        "workload": str(result.session.workload),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "noisy": measured.noisy,
        "dense_ms": measured.of(DENSE).latency_ms.median,
        **search,
        **fitted,
        "verdict": judge(_plain(fitted, "refit_"), search, moved, measured.noisy)["verdict"],
        "drift": moved,
        "phase_errors": phase_errors(rows, measured.of(DENSE)),
        "rows": rows,
    }
    print(table(value))
    if arguments.json:
        arguments.json.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
