"""From kernels timed alone to a whole model's latency.

    latency of a configuration = rest + sum over groups of factor[scheme] x table entry

The rest is what is left when every layer group answers zeros; the factors (caches and neighbours are not those of a
kernel timed alone) are fitted on uniform runs, one per scheme, all from one interleaved run. Mixed configurations are
never fitted, so what the model says of them is a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.profilers.latency import LatencyTable
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.workload import Workload
from autotune.switchable import ZEROS, SwitchableModel
from autotune.verify import EndToEnd, measure

Available = Mapping[str, Sequence[str]]  # group -> usable schemes, the dense one first


@dataclass(frozen=True)
class Calibration:
    rest_us: float
    factors: dict[str, float]  # scheme -> factor on its isolated kernel times
    end_to_end: EndToEnd | None  # None: nothing was run, so rest is 0 and factors are 1

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        return cls(value["rest_us"], value["factors"], EndToEnd.from_json(value["end_to_end"]))

    def group_us(self, table: LatencyTable, group: LayerGroup, scheme: str, workload: Workload) -> float:
        return self.factors.get(scheme, 1.0) * isolated_us(table, group, scheme, workload)

    def saving_us(
        self, table: LatencyTable, spec: ModelSpec, configuration: Mapping[str, str], workload: Workload
    ) -> float:
        """Predicted saving over dense, which the rest does not enter."""
        return sum(
            self.group_us(table, group, spec.dtype, workload)
            - self.group_us(table, group, configuration.get(group.name, spec.dtype), workload)
            for group in spec.groups
        )


def isolated_us(table: LatencyTable, group: LayerGroup, scheme: str, workload: Workload) -> float:
    """The workload's total time in this group's kernel, as measured alone."""
    choice = table.best(group, scheme, workload)
    assert choice is not None, (group.name, scheme)  # `prune` dropped what has no time
    return choice.latency_us


def uniform(spec: ModelSpec, available: Available, scheme: str) -> dict[str, str]:
    """`scheme` on every group that offers it, dense on the rest."""
    return {group.name: scheme if scheme in available[group.name] else spec.dtype for group in spec.groups}


def uniform_configurations(spec: ModelSpec, available: Available) -> dict[str, dict[str, str]]:
    """What a fit needs to see run: "dense", "zeros" and "uniform SCHEME" for every scheme."""
    names = sorted({name for schemes in available.values() for name in schemes} - {spec.dtype})
    configurations = {"dense": uniform(spec, available, spec.dtype), "zeros": dict.fromkeys(available, ZEROS)}
    return configurations | {f"uniform {name}": uniform(spec, available, name) for name in names}


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
    """Rest and factors from a run that holds the uniform configurations by their names."""
    dense_us = {group.name: isolated_us(table, group, spec.dtype, workload) for group in spec.groups}
    linear_us = result.saving_ms("zeros").median * 1e3  # of all groups, dense
    factors = {spec.dtype: max(0.0, linear_us) / sum(dense_us.values())}
    for name in sorted({name for schemes in available.values() for name in schemes} - {spec.dtype}):
        changed = [group for group in spec.groups if name in available[group.name]]
        before_us = factors[spec.dtype] * sum(dense_us[group.name] for group in changed)
        # Savings are paired by round, so that drift of the machine within the run cancels.
        after_us = before_us - result.saving_ms(f"uniform {name}").median * 1e3
        factors[name] = max(0.0, after_us) / sum(isolated_us(table, group, name, workload) for group in changed)
    rest_us = max(0.0, result.of("dense").latency_ms.median * 1e3 - linear_us)
    return Calibration(rest_us, factors, result)
