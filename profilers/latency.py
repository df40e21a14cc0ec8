"""Profile: every usable kernel of every scheme on every shape a model has -> LatencyTable.

On this machine kernels are run: in a child process, against each other, on random weights, each only after its output
has passed the gate on the very shape. A kernel that is wrong, crashes or hangs becomes a `failed` row with the reason
and the run goes on without it. Rows are kept one by one, as they arrive, so a killed run goes on where it stopped and a
second one measures nothing. For a target that is not this machine rows are `estimated` from its roofline.

Sums over a model are not made here: see `LatencyTable.best` and the fit of the rest of the model elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from autotune.errors import DeviceError
from autotune.kernels.spec import KERNELS, kernel_hash
from autotune.profilers import environment, roofline
from autotune.profilers.isolate import ChildDied, ChildTimeout, stream
from autotune.profilers.jobs import CACHES_TO_STREAM, Job, needed
from autotune.profilers.table import Choice, LatencyRow, LatencyTable
from autotune.profilers.timer import Protocol
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.groups import ModelSpec
from autotune.search_space.space import SearchSpace
from autotune.search_space.workload import Workload
from autotune.store import Memo, digest
from autotune.targets.target import Target

__all__ = ["Choice", "LatencyRow", "LatencyTable", "Progress", "estimate", "profile"]

DEFAULT = Protocol()
PROTOCOL_VERSION = 1  # raise it when the meaning of a measurement changes
MEMORY_SHARE = 0.4  # of the target's memory that copies of one shape's weights may take
STEP_TIMEOUT_S = 60.0
START_TIMEOUT_S = 180.0  # torch is imported, perhaps from a cold disk
Progress = Callable[[int, int, str], None]  # rows done, rows in all, what was done last


def profile(
    spec: ModelSpec,
    space: SearchSpace,
    target: Target,
    workload: Workload,
    memo: Memo,
    *,
    kernels: Sequence[KernelSpec] | None = None,
    threads: int | None = None,
    protocol: Protocol = DEFAULT,
    attempts: int = 1,
    progress: Progress | None = None,
    step_timeout_s: float = STEP_TIMEOUT_S,
) -> LatencyTable:
    """The latency of everything the space allows.

    Args:
        kernels: None: the shipped table.
        threads: None: one for each of the target's cores.
        attempts: a row that came out noisy is measured again by a later call, up to this many times in all.
        progress: called after every row.

    Raises:
        DeviceError: `profile.child` when the measuring process cannot even start.
    """
    kernels = KERNELS if kernels is None else kernels
    here = needed(spec, space, target, workload, kernels, "runs")
    if not here:
        return estimate(spec, space, target, workload, kernels)
    threads = threads or host_threads(target)
    env = environment.child_env(threads)
    print_hash = environment.short_hash(environment.fingerprint(threads, env, target.device))
    ledger = _Ledger(memo, print_hash, protocol, attempts)
    rows = {job: row for job in here if (row := ledger.recall(job)) is not None}
    todo = [job for job in here if job not in rows]
    run = _Run(target, threads, env, protocol, step_timeout_s)
    for job, row, lasting in run.measure(todo):
        rows[job] = row
        if lasting:
            ledger.keep(job, row)
        if progress:
            progress(len(rows), len(here), f"{job}: {_brief(row)}")
    elsewhere = needed(spec, space, target, workload, kernels, "estimated")
    estimated = [roofline.estimate(job, target.ceilings) for job in elsewhere]
    return LatencyTable(target.name, print_hash, (*(rows[job] for job in here), *estimated))


def time_jobs(
    jobs: Sequence[Job], target: Target, protocol: Protocol = DEFAULT, step_timeout_s: float = STEP_TIMEOUT_S
) -> Iterator[tuple[Job, LatencyRow]]:
    """Measure jobs on this machine and remember nothing; rows come as they are done, those of one shape together."""
    threads = host_threads(target)
    run = _Run(target, threads, environment.child_env(threads), protocol, step_timeout_s)
    for job, row, _ in run.measure(jobs):
        yield job, row


def remembered(jobs: Sequence[Job], target: Target, memo: Memo) -> Iterator[LatencyRow]:
    """Rows of jobs that `profile` measured before on this machine as it is now; nothing is measured."""
    threads = host_threads(target)
    env = environment.child_env(threads)
    ledger = _Ledger(
        memo, environment.short_hash(environment.fingerprint(threads, env, target.device)), DEFAULT, attempts=1
    )
    for job in jobs:
        if (row := ledger.recall(job)) is not None and row.status == "measured":
            yield row


def host_threads(target: Target) -> int:
    """Threads of a measuring process: one a core; beside a CUDA device torch's host side needs few."""
    return target.cores if target.device == "cpu" else min(8, os.cpu_count() or 1)


def estimate(
    spec: ModelSpec, space: SearchSpace, target: Target, workload: Workload, kernels: Sequence[KernelSpec] | None = None
) -> LatencyTable:
    """The same table for a target that is not here, every row `estimated` from its roofline."""
    jobs = needed(spec, space, target, workload, KERNELS if kernels is None else kernels, "estimated")
    rows = tuple(roofline.estimate(job, target.ceilings) for job in jobs)
    return LatencyTable(target.name, digest(target.to_json())[:12], rows)


@dataclass(frozen=True)
class _Ledger:
    """Rows on disk, by everything that decides them."""

    memo: Memo
    fingerprint: str
    protocol: Protocol
    attempts: int

    def recall(self, job: Job) -> LatencyRow | None:
        """The latest attempt's row, unless it is noisy and another attempt is allowed."""
        for attempt in reversed(range(self.attempts)):
            if value := self.memo.get(self._key(job, attempt)):
                row = LatencyRow.from_json(value)
                return row if not row.noisy or attempt == self.attempts - 1 else None
        return None

    def keep(self, job: Job, row: LatencyRow) -> None:
        attempt = next((n for n in range(self.attempts) if self.memo.get(self._key(job, n)) is None), 0)
        self.memo.put(self._key(job, attempt), row.to_json())

    def _key(self, job: Job, attempt: int) -> str:
        parts = [job.identity(), kernel_hash(job.kernel), self.fingerprint, asdict(self.protocol), attempt]
        return f"latency/{digest([PROTOCOL_VERSION, *parts])}"


@dataclass
class _Run:
    """Drives measuring children until every job has a row."""

    target: Target
    threads: int
    env: dict[str, str]
    protocol: Protocol
    step_timeout_s: float
    memory_bytes: int = 0
    blamed: tuple[list[int], str] | None = None  # the jobs the child said it was starting, and the stage
    again: set[Job] = field(default_factory=set)  # too good to be true once
    starved: set[Job] = field(default_factory=set)  # killed once, perhaps for memory

    def measure(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, LatencyRow, bool]]:
        """Yield (job, row, whether it will be so next time)."""
        self.memory_bytes = self.memory_bytes or int(self.target.memory_bytes * MEMORY_SHARE)
        todo = dict(enumerate(jobs))
        while todo:
            before, self.blamed = (len(todo), len(self.again), len(self.starved)), None
            load = environment.load()
            try:
                for event in self._child(todo):
                    for number, row in self._rows(event, todo, load):
                        yield todo.pop(number), row, True
            except (ChildTimeout, ChildDied) as error:
                yield from self._after_death(error, todo)
            if before == (len(todo), len(self.again), len(self.starved)):
                raise DeviceError(
                    "profile.child", f"the measuring process ended without measuring {todo.popitem()[1]}."
                )

    def _child(self, todo: dict[int, Job]) -> Iterator[dict[str, Any]]:
        args = {
            "units": _units(todo, self.target.last_cache_bytes),
            "threads": self.threads,
            "protocol": asdict(self.protocol),
            "memory_bytes": self.memory_bytes,
        }
        worker = "autotune.profilers.worker:time_jobs"
        return stream(worker, args, self.step_timeout_s, self.env, max(START_TIMEOUT_S, self.step_timeout_s))

    def _rows(
        self, event: dict[str, Any], todo: dict[int, Job], load: environment.Load
    ) -> Iterator[tuple[int, LatencyRow]]:
        if event["event"] == "start":
            self.blamed = (event["ids"], event["stage"])
        elif event["event"] == "failed":
            for number in event["ids"]:
                if number in todo:  # packing may fail after a check of one of its jobs has
                    yield number, todo[number].row(None, "failed", reason=event["reason"])
        else:
            job = todo[event["id"]]
            median, low, high = event["times_us"]
            doubt = roofline.too_good(job, median, event["packed_bytes"], self.target.ceilings)
            if doubt and job not in self.again:
                self.again.add(job)
                return
            reasons = [event["note"], f"suspicious, also when measured again: {doubt}" if doubt else ""]
            if event["noisy"]:
                reasons.append(f"noisy: drift {event['drift']:+.0%}; at the start {load}")
            reason = "; ".join(text for text in reasons if text)
            noisy = event["noisy"] or bool(doubt)
            packed, rounds = event["packed_bytes"], event["rounds"]
            yield event["id"], job.row((median, low, high), "measured", packed, rounds, noisy, reason)

    def _after_death(
        self, error: ChildTimeout | ChildDied, todo: dict[int, Job]
    ) -> Iterator[tuple[Job, LatencyRow, bool]]:
        """Fail what the child was at, and the same kernel on other rows: one packed copy has to serve them all.

        Unless it may have died of memory: then there is a second try with half of it.
        """
        if self.blamed is None:
            hint = f"{error.message} {error.hint}"
            raise DeviceError(
                "profile.child", "the measuring process did not get to its first kernel.", hint
            ) from error
        ids, stage = self.blamed
        jobs = [todo[number] for number in ids if number in todo]
        killed = isinstance(error, ChildDied) and error.signal_number == 9
        if killed and not self.starved.issuperset(jobs):
            self.starved.update(jobs)
            self.memory_bytes //= 2
            return
        reason = _how(error, stage, self.step_timeout_s)
        blamed = {(job.kernel, job.scheme, job.shape): job.rows for job in jobs}
        for number, job in list(todo.items()):
            if (rows := blamed.get((job.kernel, job.scheme, job.shape))) is not None:
                told = reason if job in jobs else f"not tried, as with {rows} rows it was {reason}"
                yield todo.pop(number), job.row(None, "failed", reason=told), not killed


def _how(error: ChildTimeout | ChildDied, stage: str, limit_s: float) -> str:
    doing = {"pack": "packing", "check": "being checked", "time": "being timed"}[stage]
    if isinstance(error, ChildTimeout):
        return f"stopped after {limit_s:g} s without a sign of life while {doing}"
    if error.signal_number:
        return f"killed by signal {error.signal_number} while {doing}"
    return f"gone with exit code {error.returned} while {doing}"


def _brief(row: LatencyRow) -> str:
    time = "failed" if row.median_us is None else f"{row.median_us:.1f} us"
    return f"{time} ({row.reason})" if row.reason else time


def _units(todo: dict[int, Job], last_cache_bytes: int) -> list[dict[str, Any]]:
    """Jobs by shape, as the worker takes them."""
    units: dict[Any, dict[str, Any]] = {}
    for number, job in todo.items():
        shape = {"members": job.members, "in_features": job.in_features, "bias": job.bias, "dtype": job.dtype}
        unit = units.setdefault((job.shape, job.dtype), {**shape, "jobs": []})
        unit["jobs"].append(
            {
                "id": number,
                "kernel": asdict(job.kernel),
                "scheme": job.scheme,
                "rows": job.rows,
                "rotate_bytes": job.resident_bytes or CACHES_TO_STREAM * last_cache_bytes,
                "resident": job.resident_bytes is not None,
            }
        )
    return list(units.values())
