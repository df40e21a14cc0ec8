"""Interleaved timing: candidates take turns A B C, B C A, ... so that slow drift and a busy neighbour hit all of them.

A sample is `inner` calls in a row, enough to last `sample_s`; a round is one sample of each candidate. The figure is
the median over rounds with a seeded bootstrap interval (95%); two candidates are compared by their ratio *within*
rounds, where what slows both cancels. A candidate whose interval is wide, or whose halves or fastest tenth disagree, is
timed on and, if that does not help, says `noisy`: noise is reported, never averaged away. The clock is an argument.

Follows nvbench (stop on spread) and Google Benchmark (interleaved repetitions). Not an absolute clock: it cannot see a
neighbour that was there from the first round to the last; `environment.load` can.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.errors import UsageError

BOOTSTRAP = 1000
Call = Callable[[], None]
Clock = Callable[[], float]  # seconds, monotonic


@dataclass(frozen=True)
class Protocol:
    """How a candidate is timed; part of every measurement's key."""

    rounds: int = 20
    max_rounds: int = 60  # a noisy candidate is timed up to here
    min_rounds: int = 5  # a slow one may stop here, once it has used `max_candidate_s`
    sample_s: float = 0.0015
    warm_s: float = 0.2  # wide vector units need this long to reach their clock
    max_candidate_s: float = 3.0
    max_run_s: float = 15.0  # all candidates together; then those with `min_rounds` stop
    max_half_width: float = 0.05  # of the median: wider is noisy
    max_drift: float = 0.05  # between the halves of the run: more is noisy
    max_spread: float = (
        0.10  # of the median over the 10th percentile: noise only slows, so a fast tenth tells the truth
    )
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call. `drift`: second half's median over the first's, minus one."""

    median_us: float
    low_us: float
    high_us: float
    rounds: int
    noisy: bool
    drift: float
    samples_us: tuple[float, ...]  # one a round, in order; `ratio` pairs them


@dataclass(frozen=True)
class Ratio:
    """a / b with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def apart(self) -> bool:
        """True when the interval excludes 1: the difference is real."""
        return self.high < 1.0 or self.low > 1.0


def measure(
    candidates: Mapping[str, Call],
    protocol: Protocol = Protocol(),
    before: Mapping[str, Call] | None = None,
    starting: Callable[[str], None] | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time the candidates against each other.

    Args:
        before: runs untimed ahead of a candidate's every sample, to put caches in the state they will be in.
        starting: told the candidate's name ahead of its every sample, so that a crash can be attributed.
    """
    if not candidates or protocol.rounds < 2:
        raise UsageError("timer.nothing", "Timing needs at least one candidate and two rounds.")
    run = _Run(candidates, protocol, before or {}, starting or (lambda name: None), clock)
    with _no_gc():
        run.warm()
        run.calibrate()
        for number in range(protocol.max_rounds):
            if not run.round(number):
                break
    return {name: timing(samples, protocol) for name, samples in run.samples.items()}


def timing(samples_us: list[float], protocol: Protocol) -> Timing:
    """Median, interval and noise of one candidate's samples."""
    values = np.asarray(samples_us)
    median = float(np.median(values))
    low, high = _interval(values, protocol.seed)
    half = len(values) // 2
    drift = float(np.median(values[half:]) / np.median(values[:half]) - 1.0) if half else 0.0
    wide = (high - low) / 2 > protocol.max_half_width * median
    spread = median > (1 + protocol.max_spread) * float(np.quantile(values, 0.1))
    noisy = wide or spread or abs(drift) > protocol.max_drift
    return Timing(median, low, high, len(values), noisy, drift, tuple(samples_us))


def ratio(a: Timing, b: Timing, seed: int = 0) -> Ratio:
    """How many times as long `a` takes as `b`, from rounds both were timed in."""
    count = min(len(a.samples_us), len(b.samples_us))
    values = np.asarray(a.samples_us[:count]) / np.asarray(b.samples_us[:count])
    low, high = _interval(values, seed)
    return Ratio(float(np.median(values)), low, high)


class _Run:
    """One interleaved run: `inner` repetitions and the samples so far, by candidate."""

    def __init__(
        self,
        candidates: Mapping[str, Call],
        protocol: Protocol,
        before: Mapping[str, Call],
        starting: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self.candidates, self.protocol, self.before = candidates, protocol, before
        self.starting, self.clock = starting, clock
        self.inner = dict.fromkeys(candidates, 1)
        self.started_s, self.round_started_s = clock(), 0.0
        self.samples: dict[str, list[float]] = {name: [] for name in candidates}
        self.spent_s = dict.fromkeys(candidates, 0.0)

    def warm(self) -> None:
        """Call everything in turn, at least twice each, until `warm_s` has passed."""
        start = self.clock()
        for turn in range(10_000):
            for name, call in self.candidates.items():
                self.starting(name)
                call()
            if turn >= 1 and self.clock() - start >= self.protocol.warm_s:
                return

    def calibrate(self) -> None:
        """Repetitions a sample needs to last `sample_s`, found by doubling: one call alone may be below the clock."""
        for name in self.candidates:
            while (elapsed := self._sample(name)) < self.protocol.sample_s and self.inner[name] < 2**20:
                factor = self.protocol.sample_s / elapsed if elapsed > 0 else 16.0
                self.inner[name] = math.ceil(self.inner[name] * min(16.0, max(1.1, 1.1 * factor)))

    def round(self, number: int) -> bool:
        """One sample of each candidate that needs one, starting a place later each round; False when none does."""
        names = list(self.candidates)
        turn = number % len(names)
        self.round_started_s = self.clock() - self.started_s
        active = [name for name in names[turn:] + names[:turn] if self._needs_more(name)]
        for name in active:
            elapsed = self._sample(name)
            self.samples[name].append(elapsed / self.inner[name] * 1e6)
            self.spent_s[name] += elapsed
        return bool(active)

    def _needs_more(self, name: str) -> bool:
        samples, protocol = self.samples[name], self.protocol
        out_of_time = self.spent_s[name] >= protocol.max_candidate_s
        if len(samples) >= protocol.min_rounds and (out_of_time or self.round_started_s >= protocol.max_run_s):
            return False
        if len(samples) < protocol.rounds:
            return True
        # Look again only every few rounds: stopping at the first quiet look would favour lucky streaks.
        return len(samples) % 5 != 0 or timing(samples, protocol).noisy

    def _sample(self, name: str) -> float:
        call, inner = self.candidates[name], self.inner[name]
        self.starting(name)
        if prepare := self.before.get(name):
            prepare()
        start = self.clock()
        for _ in range(inner):
            call()
        return self.clock() - start


def _interval(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the median, 95%."""
    picks = np.random.default_rng(seed).integers(0, len(values), (BOOTSTRAP, len(values)))
    medians = np.median(values[picks], axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
