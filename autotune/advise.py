"""What binds a model on a device, and which scheme shifts it: arithmetic over a config and a target, no weights read.

Every time is the least that the target's ceilings allow (`profilers.roofline`), so gains are upper bounds. They count
linear layers, attention with its KV cache, and one launch a layer group; norms, activations, sampling and whatever a
runtime adds are not in them. Where all of a scheme's shapes were measured on such a device, its gain is of measured
layers and says so. A scheme without a kernel of ours gets the bound of an ideal one, marked as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from autotune.attention_cost import Attention, attention_of
from autotune.export.runtimes import runtimes
from autotune.kernels.spec import KERNELS
from autotune.kernels.spec import kernel as kernel_named
from autotune.model import open_model, read_config
from autotune.profilers import latency, measured, roofline
from autotune.profilers.jobs import Job, residency
from autotune.profilers.memory import model_bytes
from autotune.profilers.table import LatencyTable, shape_of
from autotune.search_space import workload as workload_module
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.rules import legality
from autotune.search_space.schemes import SCHEMES, Scheme, scheme
from autotune.search_space.space import DEFAULT
from autotune.search_space.workload import Phase, Workload
from autotune.session import resolve_target
from autotune.store import Memo, user_folder
from autotune.targets.target import Target

CONTEXTS = (1024, 4096, 16384, 65536)
_IDEAL = "ideal"  # stands for a kernel that does not exist
_WIDTH = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class PhaseAdvice:
    """One pass of a dense model. Parts: `weights` read by layers that memory binds, `arithmetic` of those that it does
    not and of attention, `cache` read; None where it is not known."""

    name: str  # "prefill" or "decode"
    tokens: int
    context: int  # positions attended to
    count: float
    parts_us: dict[str, float | None]
    measured_us: float | None  # of the linear layers, where all were measured

    @property
    def least_us(self) -> float:
        return sum(part or 0.0 for part in self.parts_us.values())

    @property
    def binds(self) -> str:
        return max(self.parts_us, key=lambda name: self.parts_us[name] or 0.0)


@dataclass(frozen=True)
class SchemeAdvice:
    """One scheme on every group that can have it, the others dense. Gains are over dense; None: a rate is not known."""

    name: str
    groups: int  # that can have it
    weight_bytes: int  # of the model
    fits: bool  # with the KV cache of the workload
    gains: dict[str, float] | None  # phase, and "workload"
    source: str  # "measured", "bound", or "ideal kernel"
    kernels: tuple[str, ...]
    reason: str  # where there is no kernel
    runtimes: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    model: str
    target: str
    device: str  # the vendor's name
    ceilings: str  # "measured", "measured while busy" or "datasheet"
    workload: str
    groups: int
    dense_bytes: int
    dense_fits: bool  # with the KV cache of the workload
    memory_bytes: int
    cache_bytes: dict[int, int]  # context -> bytes, the workload's longest one first; empty where it is not known
    phases: tuple[PhaseAdvice, ...]
    schemes: tuple[SchemeAdvice, ...]  # the largest gain first
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        phases = [asdict(phase) | {"least_us": phase.least_us, "binds": phase.binds} for phase in self.phases]
        return {"schema_version": 1, **asdict(self), "phases": phases}


def advise(
    model: str, target: str, workload: str, dtype: str | None = None, schemes: Sequence[str] | None = None
) -> Advice:
    """What binds each phase of a workload, and what every scheme can gain at most.

    Args:
        model: a folder, a config.json, or org/name@revision; weights are neither fetched nor read.
        schemes: names, `default` for all that are searched by default.

    Raises:
        AutotuneError: as `open_model`, `resolve_target`, `workload.parse` and `schemes.scheme` do.
    """
    wanted = _schemes(schemes)
    parsed = workload_module.parse(workload)
    chosen, local = resolve_target(target)
    opened = open_model(model, dtype, shapes_only=True)
    attention = attention_of(read_config(opened.folder), opened.spec.task == "causal-lm")
    return _Bounds(opened.spec, chosen, local, parsed, attention, tuple(wanted)).advice(opened.positions)


def _schemes(names: Sequence[str] | None) -> list[Scheme]:
    default = [item for item in SCHEMES if not item.is_dense]
    if names is None:
        return default
    named = [scheme(name) for name in names if name != DEFAULT]
    return list(dict.fromkeys([*(default if DEFAULT in names else []), *named]))


@dataclass(frozen=True)
class _Bounds:
    spec: ModelSpec
    target: Target
    local: bool
    workload: Workload
    attention: Attention | str
    wanted: tuple[Scheme, ...]

    def advice(self, positions: int) -> Advice:
        ceilings = self.target.ceilings
        source = "measured while busy" if ceilings.busy else ceilings.source
        schemes = [self._scheme(item) for item in self.wanted]
        schemes.sort(key=lambda item: -(item.gains or {}).get("workload", 0.0))
        return Advice(
            model=f"{self.spec.name}, {self.spec.dtype}",
            target=self.target.name,
            device=self.target.model,
            ceilings=source,
            workload=str(self.workload),
            groups=len(self.spec.groups),
            dense_bytes=self.spec.dense_bytes,
            dense_fits=self._fits(self.spec.dense_bytes),
            memory_bytes=self.target.memory_bytes,
            cache_bytes=self._cache_by_context(positions),
            phases=tuple(self._phase(phase, context) for phase, context in self._phases),
            schemes=tuple(schemes),
            notes=tuple(self._notes()),
        )

    @property
    def _phases(self) -> list[tuple[Phase, int]]:
        """Phases with the positions attended to; a generation's on average."""
        contexts = []
        for request in self.workload.requests:
            contexts.append(request.prompt)
            if request.generated:
                contexts.append(request.prompt + (request.generated + 1) // 2)
        return list(zip(self.workload.phases, contexts, strict=True))

    @cached_property
    def _kinds(self) -> list[tuple[LayerGroup, int]]:
        """Groups that differ in shape, each with how many are like it."""
        kinds: dict[object, list[LayerGroup]] = {}
        for group in self.spec.groups:
            kinds.setdefault(_kind(group), []).append(group)
        return [(groups[0], len(groups)) for groups in kinds.values()]

    def _fits(self, weight_bytes: int) -> bool:
        return weight_bytes + max(self._cache_by_context(0).values(), default=0) <= self.target.memory_bytes

    def _notes(self) -> Iterator[str]:
        if self.target.ceilings.source == "datasheet":
            yield f"Ceilings are not measured. {self.target.notes}"
        if self.target.ceilings.busy:
            yield "Ceilings were measured while others used this machine: they are too low, and not all alike."
        if isinstance(self.attention, str):
            yield f"The KV cache is not counted: {self.attention}."
        if self.target.ceilings.launch_us <= 0:
            yield "What a launch costs on this target is not known, and not counted."
        yield "Memory is that of weights and KV cache; activations and the runtime come on top."

    # ---- dense, by what binds

    def _phase(self, phase: Phase, context: int) -> PhaseAdvice:
        ceilings, dense = self.target.ceilings, scheme(self.spec.dtype)
        parts: dict[str, float | None] = {"weights": 0.0, "arithmetic": 0.0, "cache": None, "launches": None}
        for group, count in self._kinds:
            job = self._job(group, dense, self._kernels(group, dense)[0], phase)
            read_us, compute_us = roofline.read_us(job, ceilings), roofline.compute_us(job, ceilings)
            kind = "weights" if read_us >= compute_us else "arithmetic"
            parts[kind] = (parts[kind] or 0.0) + count * phase.calls(group) * max(read_us, compute_us)
        if (costs := self._attention_us(phase, context)) is not None:
            cache_us, compute_us = costs
            parts["cache"] = cache_us if cache_us >= compute_us else 0.0
            parts["arithmetic"] = (parts["arithmetic"] or 0.0) + (compute_us if compute_us > cache_us else 0.0)
        if ceilings.launch_us > 0:
            parts["launches"] = ceilings.launch_us * sum(count * phase.calls(group) for group, count in self._kinds)
        timed = self._measured(dense)
        index = self.workload.phases.index(phase)
        return PhaseAdvice(phase.name, phase.tokens, context, phase.count, parts, timed[index] if timed else None)

    def _attention_us(self, phase: Phase, context: int) -> tuple[float, float] | None:
        """(reading the cache, multiplying) of one pass."""
        if isinstance(self.attention, str):
            return None
        new = phase.tokens // phase.batch
        read = self.attention.cache_bytes(context, phase.batch, _WIDTH[self.spec.dtype])
        work = self.attention.operations(new, context, phase.batch)
        ceilings = self.target.ceilings
        return read / ceilings.bandwidth(float("inf")) / 1e3, work / ceilings.tera_ops[self.spec.dtype] / 1e6

    def _cache_by_context(self, positions: int) -> dict[int, int]:
        if isinstance(self.attention, str) or not self.attention.causal:
            return {}
        batch = max(request.batch for request in self.workload.requests)
        longest = max(request.prompt + request.generated for request in self.workload.requests)
        wanted = [longest, *(context for context in CONTEXTS if longest < context <= positions)]
        return {n: self.attention.cache_bytes(n, batch, _WIDTH[self.spec.dtype]) for n in wanted}

    # ---- schemes

    def _scheme(self, item: Scheme) -> SchemeAdvice:
        dense = scheme(self.spec.dtype)
        kernels = {_kind(group): self._kernels(group, item) for group, _ in self._kinds}
        having = [group for group in self.spec.groups if kernels[_kind(group)]]
        own = tuple(dict.fromkeys(k.name for found in kernels.values() for k in found if k.name != _IDEAL))
        plan = {g.name: (item if kernels[_kind(g)] else dense).name for g in self.spec.groups}
        size = model_bytes(self.spec, plan)
        before, after = self._measured(dense), self._measured(item, plan)
        source = "measured" if before and after else "bound" if own else "ideal kernel"
        if not (before and after):
            before, after = self._least(dense, {}), self._least(item, kernels)
        reason = "" if own else self._reason(item)
        gains = None if not having or before is None or after is None else self._gains(before, after)
        names = tuple(str(runtime) for runtime in runtimes(item, self.target))
        if own:
            names = ("autotune", *names)
        return SchemeAdvice(item.name, len(having), size, self._fits(size), gains, source, own, reason, names)

    def _gains(self, before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
        """Phase -> dense over this, with what the scheme leaves alone in both."""
        rest = []
        for phase, context in self._phases:
            rest.append(max(self._attention_us(phase, context) or (0.0, 0.0)))
        totals: dict[str, list[float]] = {}
        for place, (phase, _) in enumerate(self._phases):
            for name in (phase.name, "workload"):
                sums = totals.setdefault(name, [0.0, 0.0])
                sums[0] += phase.count * (before[place] + rest[place])
                sums[1] += phase.count * (after[place] + rest[place])
        return {name: first / second for name, (first, second) in totals.items()}

    def _least(self, item: Scheme, kernels: Mapping[object, Sequence[KernelSpec]]) -> list[float] | None:
        """Least microseconds of all groups in each phase, launches included; None where a rate is not known."""
        dense, totals = scheme(self.spec.dtype), [0.0] * len(self._phases)
        for group, alike in self._kinds:
            own = kernels.get(_kind(group), ())
            chosen = item if own else dense
            options = [
                [
                    phase.calls(group) * roofline.least_us(self._job(group, chosen, spec, phase), self.target.ceilings)
                    for phase, _ in self._phases
                ]
                for spec in own or self._kernels(group, dense)
                if spec.compute_format in self.target.ceilings.tera_ops
            ]
            if not options:
                return None
            counts = [phase.count for phase, _ in self._phases]
            best = min(options, key=lambda times: sum(n * t for n, t in zip(counts, times, strict=True)))
            totals = [total + alike * time for total, time in zip(totals, best, strict=True)]
        return totals

    def _kernels(self, group: LayerGroup, item: Scheme) -> tuple[KernelSpec, ...]:
        """Ours that take the group under the scheme on this target; else an ideal one, if the format fits the group."""
        answer = legality(item, group, self.spec.dtype, self.target, KERNELS, self.local)
        if answer.usable:
            return tuple(kernel_named(name) for name in answer.kernels)
        ideal = _ideal(item, self.target, self.spec.dtype)
        fits = legality(item, group, self.spec.dtype, self.target, [ideal], self.local).usable
        return (ideal,) if fits else ()

    def _reason(self, item: Scheme) -> str:
        """Why the first group has no kernel of ours."""
        return legality(item, self.spec.groups[0], self.spec.dtype, self.target, KERNELS, self.local).reason

    def _job(self, group: LayerGroup, item: Scheme, spec: KernelSpec, phase: Phase) -> Job:
        resident = residency(self.spec, item, self.target.last_cache_bytes)
        return Job(spec, item.name, *shape_of(group), self.spec.dtype, phase.rows(group), resident)

    # ---- what was measured

    def _measured(self, item: Scheme, plan: Mapping[str, str] | None = None) -> list[float] | None:
        """Measured microseconds of all groups in each phase; None unless every one of them was."""
        totals = [0.0] * len(self._phases)
        for group, alike in self._kinds:
            choice = self._table.best(group, (plan or {}).get(group.name, item.name), self.workload)
            if choice is None:
                return None
            totals = [total + alike * time for total, time in zip(totals, choice.phases_us, strict=True)]
        return totals

    @cached_property
    def _table(self) -> LatencyTable:
        """Rows measured here before, or read from tables of such a device; nothing is measured now."""
        jobs = dict.fromkeys(
            self._job(group, item, spec, phase)
            for group, _ in self._kinds
            for item in (scheme(self.spec.dtype), *self.wanted)
            for spec in self._kernels(group, item)
            if spec.name != _IDEAL and spec.compute_format in self.target.ceilings.tera_ops
            for phase, _ in self._phases
        )
        estimates = tuple(roofline.estimate(job, self.target.ceilings) for job in jobs)
        table = measured.fill(LatencyTable(self.target.name, "", estimates), self.target)
        rows = tuple(row for row in table.rows if row.status == "measured")
        if self.local:
            memo = Memo(user_folder() / "measurements.sqlite")
            try:
                rows = (*rows, *latency.remembered(list(jobs), self.target, memo))
            finally:
                memo.close()
        return replace(table, rows=rows)


def _kind(group: LayerGroup) -> object:
    """What a group's times depend on."""
    return shape_of(group), group.experts, group.experts_per_token, group.last_token_only


def _ideal(item: Scheme, target: Target, dtype: str) -> KernelSpec:
    """A kernel that does not exist: it multiplies in the narrowest format that both operands have."""
    narrow = {"int": "int8", "float": "fp8"}[item.activation.kind] if item.activation else dtype
    sparse = item.sparsity == "2:4" and "sparse24" in target.features
    device: Any = target.device
    return KernelSpec(_IDEAL, (item.name,), device, (dtype,), "", compute_format=narrow, sparse_compute=sparse)
