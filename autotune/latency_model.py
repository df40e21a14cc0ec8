"""From kernels timed alone to a whole model's latency.

    latency of a configuration = sum over phases: rest[phase] + sum over groups of factor[scheme][phase] x table entry

The rest is what is left when every layer group answers zeros. Factors (caches and neighbours are not those of a kernel
timed alone) are fitted on uniform runs, all from one interleaved run: one per scheme and phase, because a scheme can be
as good as its kernel in prompts and not in decode steps, whose calls are short. Mixed configurations are never fitted,
so what the model says of them is a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autotune.profilers.latency import LatencyTable
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.workload import Workload
from autotune.switchable import ZEROS, SwitchableModel
from autotune.verify import EndToEnd, measure

Available = Mapping[str, Sequence[str]]  # group -> usable schemes, the dense one first
FAR = 4.0  # no factor is further from the dense one's: few groups offer the scheme, and noise exceeds what it does
PhaseTimes = dict[str, float]  # phase -> microseconds of the whole workload; phases it does not have are absent


@dataclass(frozen=True)
class Calibration:
    """`Calibration({}, {}, None)` is of a model that was not run: no rest, and isolated times stand for themselves."""

    rest_us: PhaseTimes
    factors: dict[str, dict[str, float]]  # scheme -> phase -> factor on its isolated kernel times
    end_to_end: EndToEnd | None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        return cls(value["rest_us"], value["factors"], EndToEnd.from_json(value["end_to_end"]))

    @property
    def total_rest_us(self) -> float:
        return sum(self.rest_us.values())

    def group_us(self, table: LatencyTable, group: LayerGroup, scheme: str, workload: Workload) -> float:
        """The workload's time in one group, in the model."""
        return sum(self._phases_us(table, group, scheme, workload).values())

    def saving_us(
        self, table: LatencyTable, spec: ModelSpec, configuration: Mapping[str, str], workload: Workload
    ) -> float:
        """Predicted saving over dense, which the rest does not enter."""
        return sum(self.phase_savings_us(table, spec, configuration, workload).values())

    def phase_savings_us(
        self, table: LatencyTable, spec: ModelSpec, configuration: Mapping[str, str], workload: Workload
    ) -> PhaseTimes:
        """The same by phase. Groups that `configuration` does not name stay dense."""
        savings = dict.fromkeys((phase.name for phase in workload.phases), 0.0)
        for group in spec.groups:
            dense = self._phases_us(table, group, spec.dtype, workload)
            chosen = self._phases_us(table, group, configuration.get(group.name, spec.dtype), workload)
            for phase in savings:
                savings[phase] += dense[phase] - chosen[phase]
        return savings

    def _phases_us(self, table: LatencyTable, group: LayerGroup, scheme: str, workload: Workload) -> PhaseTimes:
        factors = self.factors.get(scheme, {})
        alone = isolated_us(table, group, scheme, workload)
        return {phase: factors.get(phase, 1.0) * time_us for phase, time_us in alone.items()}


def isolated_us(table: LatencyTable, group: LayerGroup, scheme: str, workload: Workload) -> PhaseTimes:
    """The workload's total time in this group's kernel, as measured alone."""
    choice = table.best(group, scheme, workload)
    assert choice is not None, (group.name, scheme)  # `prune` dropped what has no time
    times: PhaseTimes = {}
    for phase, call_us in zip(workload.phases, choice.phases_us, strict=True):
        times[phase.name] = times.get(phase.name, 0.0) + phase.count * call_us
    return times


def uniform(spec: ModelSpec, available: Available, scheme: str) -> dict[str, str]:
    """`scheme` on every group that offers it, dense on the rest."""
    return {group.name: scheme if scheme in available[group.name] else spec.dtype for group in spec.groups}


def uniform_configurations(spec: ModelSpec, available: Available) -> dict[str, dict[str, str]]:
    """What a fit needs to see run: "dense", "zeros" and "uniform SCHEME" for every scheme."""
    configurations = {"dense": uniform(spec, available, spec.dtype), "zeros": dict.fromkeys(available, ZEROS)}
    return configurations | {f"uniform {name}": uniform(spec, available, name) for name in _compressed(spec, available)}


def calibrate(
    model: SwitchableModel,
    table: LatencyTable,
    available: Available,
    workload: Workload,
    seconds: float = 20.0,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Run the uniform configurations, interleaved, and fit."""
    result = measure(model, uniform_configurations(model.spec, available), workload, seconds, progress)
    return fit(result, table, model.spec, available, workload)


def fit(
    result: EndToEnd, table: LatencyTable, spec: ModelSpec, available: Available, workload: Workload
) -> Calibration:
    """Rest and factors from a run that holds the uniform configurations by their names.

    Uniform configurations then have exactly the savings measured, in every phase, unless a factor is held within `FAR`
    times the dense one's: a scheme that seems free, because of noise, would be taken everywhere.
    """
    schemes = _compressed(spec, available)
    alone = {g.name: {name: isolated_us(table, g, name, workload) for name in available[g.name]} for g in spec.groups}
    rest: PhaseTimes = {}
    factors: dict[str, dict[str, float]] = {name: {} for name in (spec.dtype, *schemes)}
    for phase in dict.fromkeys(phase.name for phase in workload.phases):
        dense_us = {group: times[spec.dtype][phase] for group, times in alone.items()}
        linear_us = result.saving_ms("zeros", phase=phase).median * 1e3  # of all groups, dense
        dense = factors[spec.dtype][phase] = max(0.0, linear_us) / sum(dense_us.values())
        for name in schemes:
            changed = [group for group, times in alone.items() if name in times]
            # Savings are paired by round, so that drift of the machine within the run cancels.
            saved_us = result.saving_ms(f"uniform {name}", phase=phase).median * 1e3
            after_us = dense * sum(dense_us[group] for group in changed) - saved_us
            factor = after_us / sum(alone[group][name][phase] for group in changed)
            factors[name][phase] = min(max(factor, dense / FAR), dense * FAR)
        rest[phase] = max(0.0, float(np.median(result.of("dense").phases_ms[phase])) * 1e3 - linear_us)
    return Calibration(rest, factors, result)


def _compressed(spec: ModelSpec, available: Available) -> list[str]:
    return sorted({name for schemes in available.values() for name in schemes} - {spec.dtype})
