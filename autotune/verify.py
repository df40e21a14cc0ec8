"""End-to-end latency of whole configurations on the real kernels, interleaved in one run, and what it says of the sums.

A request is run as `generate` runs it: one prefill that asks for the last position's logits, then decode steps over a
growing cache; on a CUDA device both as graphs over a static cache (`passes`), timed on its clock. Configurations take
turns round by round, so drift of the machine hits all alike; savings are paired by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from autotune.search_space.workload import Workload
from autotune.switchable import SwitchableModel

# Timed steps a round, fewer where rounds take long; a workload's generated tokens are the median step multiplied.
DECODE_STEPS, FEWER_STEPS = 16, 8
MIN_ROUNDS, MAX_ROUNDS = 7, 60
FORMAT = "rounds by phase, native layers"  # of what `to_json` writes; stages that store it depend on it


@dataclass(frozen=True)
class Interval:
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """One configuration's end-to-end time. `phases_ms[phase][r]`: the workload's total in a phase ("prefill", "decode")
    in round r, for paired comparison; a phase that the workload does not have is not in it."""

    name: str
    prefill_ms: Interval
    decode_ms: Interval  # a step; zeros where nothing is generated
    latency_ms: Interval  # the workload's total
    phases_ms: dict[str, tuple[float, ...]]

    @property
    def rounds_ms(self) -> tuple[float, ...]:
        """The workload's total in each round."""
        return tuple(sum(parts) for parts in zip(*self.phases_ms.values(), strict=True))


@dataclass(frozen=True)
class EndToEnd:
    runs: tuple[Run, ...]
    noisy: str  # why the numbers should not be trusted, or ""

    def of(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    def saving_ms(self, name: str, baseline: str = "dense", phase: str | None = None) -> Interval:
        """Time saved over the baseline in the workload, or in one phase of it; paired by round."""
        before, after = self.of(baseline), self.of(name)
        if phase is not None:
            return interval(np.asarray(before.phases_ms[phase]) - np.asarray(after.phases_ms[phase]))
        return interval(np.asarray(before.rounds_ms) - np.asarray(after.rounds_ms))

    def speedup(self, name: str, baseline: str = "dense") -> Interval:
        return interval(np.asarray(self.of(baseline).rounds_ms) / np.asarray(self.of(name).rounds_ms))

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> EndToEnd:
        runs = []
        for item in value["runs"]:  # type: ignore[attr-defined]
            parts = {key: Interval(**item[key]) for key in ("prefill_ms", "decode_ms", "latency_ms")}
            phases = {phase: tuple(rounds) for phase, rounds in item["phases_ms"].items()}
            runs.append(Run(item["name"], **parts, phases_ms=phases))
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
        _requests(model, workload, DECODE_STEPS)
    round_s = time.perf_counter() - start
    steps = DECODE_STEPS if MIN_ROUNDS * round_s <= seconds else FEWER_STEPS
    rounds = int(np.clip(seconds / round_s, MIN_ROUNDS, MAX_ROUNDS))
    samples: dict[str, list[dict[tuple[int, str], float]]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            model.select(configurations[name])
            samples[name].append(_requests(model, workload, steps))
        if progress:
            progress(number + 1, rounds)
    runs = tuple(_run(name, samples[name], workload) for name in names)
    return EndToEnd(runs, _noise(runs))


def _requests(model: SwitchableModel, workload: Workload, steps: int) -> dict[tuple[int, str], float]:
    """(request index, phase) -> seconds, one sample each; of at most so many decode steps."""
    times = {}
    for index, request in enumerate(workload.requests):
        prefill, decode = model.time_request(request.batch, request.prompt, min(request.generated, steps))
        times[index, "prefill"], times[index, "decode"] = prefill, decode
    return times


def _run(name: str, samples: Sequence[Mapping[tuple[int, str], float]], workload: Workload) -> Run:
    prefill = [_weighted(sample, workload, "prefill") for sample in samples]
    decode = [_weighted(sample, workload, "decode") for sample in samples]
    phases = {"prefill": tuple(prefill)}  # one per request, so its average is also its total
    if any(request.generated for request in workload.requests):
        phases["decode"] = tuple(_generation(sample, workload) for sample in samples)
    totals = [sum(parts) for parts in zip(*phases.values(), strict=True)]
    first, step, total_ms = (interval(np.asarray(values)) for values in (prefill, decode, totals))
    return Run(name, first, step, total_ms, phases)


def _weighted(sample: Mapping[tuple[int, str], float], workload: Workload, phase: str) -> float:
    """Milliseconds of one prefill, or one decode step, averaged over the workload's mix."""
    return 1e3 * sum(request.weight * sample[index, phase] for index, request in enumerate(workload.requests))


def _generation(sample: Mapping[tuple[int, str], float], workload: Workload) -> float:
    """Milliseconds of all decode steps of the workload."""
    steps = [request.weight * request.generated for request in workload.requests]
    return 1e3 * sum(count * sample[index, "decode"] for index, count in enumerate(steps))


def _noise(runs: Sequence[Run], bound: float = 0.05) -> str:
    wide = [run.name for run in runs if run.latency_ms.high - run.latency_ms.low > 2 * bound * run.latency_ms.median]
    if wide:
        return (
            f"too noisy: the 95% interval of {', '.join(wide)} is wider than +-{bound:.0%}; other work on the machine?"
        )
    return ""
