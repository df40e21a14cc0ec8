"""A latency table for a model's shapes alone: from a config.json, no weights, so that one card answers for any size."""

from __future__ import annotations

from pathlib import Path

from autotune.kernels.spec import KERNELS
from autotune.model import open_model
from autotune.profilers import latency, measured
from autotune.profilers.latency import Progress
from autotune.profilers.table import LatencyTable
from autotune.search_space import workload as workload_module
from autotune.search_space.space import build
from autotune.session import resolve_target
from autotune.store import Memo, user_folder


def profile_shapes(
    config: Path, target: str, workload: str, dtype: str | None, progress: Progress | None = None
) -> LatencyTable:
    """Every kernel on every shape of the model that `config` describes, measured here or estimated for elsewhere.

    Raises:
        AutotuneError: as `open_model`, `resolve_target` and `workload.parse` do.
    """
    spec = open_model(str(config), dtype, latency_only=True).spec
    chosen, local = resolve_target(target)
    phases = workload_module.parse(workload)
    space = build(spec, chosen, KERNELS, local)
    if not local:
        return measured.fill(latency.estimate(spec, space, chosen, phases, KERNELS), chosen)
    memo = Memo(user_folder() / "measurements.sqlite")
    try:
        return latency.profile(spec, space, chosen, phases, memo, progress=progress)
    finally:
        memo.close()
