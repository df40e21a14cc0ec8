"""End-to-end latency of whole configurations on the real kernels, interleaved in one run, and what it says of the sums.

A request is run as `generate` runs it: one prefill that asks for the last position's logits, then decode steps over a
growing cache. Configurations take turns round by round, so drift of the machine hits all alike; savings are paired
by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from autotune.search_space.workload import Workload
from autotune.switchable import SwitchableModel

DECODE_STEPS = 16  # timed steps a round; a workload's generated tokens are this step's time multiplied
MIN_ROUNDS, MAX_ROUNDS = 7, 60


@dataclass(frozen=True)
class Interval:
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """One configuration's end-to-end time. `rounds_ms[r]`: the workload's total in round r, for paired comparison."""

    name: str
    prefill_ms: Interval
    decode_ms: Interval  # a step; zeros where nothing is generated
    latency_ms: Interval  # the workload's total
    rounds_ms: tuple[float, ...]


@dataclass(frozen=True)
class EndToEnd:
    runs: tuple[Run, ...]
    noisy: str  # why the numbers should not be trusted, or ""

    def of(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    def saving_ms(self, name: str, baseline: str = "dense") -> Interval:
        """Time saved over the baseline, paired by round."""
        difference = np.asarray(self.of(baseline).rounds_ms) - np.asarray(self.of(name).rounds_ms)
        return interval(difference)

    def speedup(self, name: str, baseline: str = "dense") -> Interval:
        return interval(np.asarray(self.of(baseline).rounds_ms) / np.asarray(self.of(name).rounds_ms))

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> EndToEnd:
        runs = []
        for item in value["runs"]:  # type: ignore[attr-defined]
            parts = {key: Interval(**item[key]) for key in ("prefill_ms", "decode_ms", "latency_ms")}
            runs.append(Run(item["name"], **parts, rounds_ms=tuple(item["rounds_ms"])))
        return cls(tuple(runs), str(value["noisy"]))


def interval(samples: np.ndarray, seed: int = 0, resamples: int = 1000) -> Interval:
    """Median with a bootstrap 95% interval."""
    generator = np.random.default_rng(seed)
    medians = np.median(generator.choice(samples, (resamples, len(samples))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return Interval(float(np.median(samples)), float(low), float(high))


def measure(
    model: SwitchableModel,
    configurations: Mapping[str, Mapping[str, str]],
    workload: Workload,
    seconds: float = 20.0,
    progress: Callable[[int, int], None] | None = None,
) -> EndToEnd:
    """Time configurations (name -> group -> scheme; "dense" must be one of them) in interleaved rounds.

    Args:
        seconds: about how long to measure; the number of rounds follows, between 7 and 60.
    """
    names = list(configurations)
    start = time.perf_counter()
    for name in names:  # warm-up: code paths, packed weights, clocks
        model.select(configurations[name])
        _requests(model, workload)
    rounds = int(np.clip(seconds / (time.perf_counter() - start), MIN_ROUNDS, MAX_ROUNDS))
    samples: dict[str, list[dict[tuple[int, str], float]]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            model.select(configurations[name])
            samples[name].append(_requests(model, workload))
        if progress:
            progress(number + 1, rounds)
    runs = tuple(_run(name, samples[name], workload) for name in names)
    return EndToEnd(runs, _noise(runs))


def _requests(model: SwitchableModel, workload: Workload) -> dict[tuple[int, str], float]:
    """(request index, phase) -> seconds, one sample each."""
    times = {}
    for index, request in enumerate(workload.requests):
        prefill, decode = model.time_request(request.batch, request.prompt, min(request.generated, DECODE_STEPS))
        times[index, "prefill"], times[index, "decode"] = prefill, decode
    return times


def _run(name: str, samples: Sequence[Mapping[tuple[int, str], float]], workload: Workload) -> Run:
    totals, prefill, decode = [], [], []
    for sample in samples:
        total = 0.0
        for index, request in enumerate(workload.requests):
            total += request.weight * (sample[index, "prefill"] + request.generated * sample[index, "decode"])
        totals.append(total * 1e3)
        prefill.append(_weighted(sample, workload, "prefill"))
        decode.append(_weighted(sample, workload, "decode"))
    first, step, total_ms = (interval(np.asarray(values)) for values in (prefill, decode, totals))
    return Run(name, first, step, total_ms, tuple(totals))


def _weighted(sample: Mapping[tuple[int, str], float], workload: Workload, phase: str) -> float:
    """Milliseconds of one prefill, or one decode step, averaged over the workload's mix."""
    return 1e3 * sum(request.weight * sample[index, phase] for index, request in enumerate(workload.requests))


def _noise(runs: Sequence[Run], bound: float = 0.05) -> str:
    wide = [run.name for run in runs if run.latency_ms.high - run.latency_ms.low > 2 * bound * run.latency_ms.median]
    if wide:
        return (
            f"too noisy: the 95% interval of {', '.join(wide)} is wider than +-{bound:.0%}; other work on the machine?"
        )
    return ""
