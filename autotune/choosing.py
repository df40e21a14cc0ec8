"""Another point of a finished search: a new plan from the run's own tables, nothing measured again."""

from __future__ import annotations

import math
from pathlib import Path

from autotune.errors import InfeasibleError, InputError, UsageError


def choose_point(
    run: Path, max_loss: float | None, point: int | None, max_memory_bytes: int | None
) -> tuple[Path, str]:
    """Write the plan of another point beside the first one.

    Args:
        point: a number of the report's front ("point 7").

    Returns:
        The new plan's path, and what is known of it.

    Raises:
        UsageError: `plan.choose` when no criterion is given.
        InputError: `config.missing`, `plan.point`.
        InfeasibleError: `search.infeasible` with the nearest point.
    """
    from autotune.config import RunConfig
    from autotune.tune import tune

    if max_loss is None and point is None and max_memory_bytes is None:
        raise UsageError("plan.choose", "no criterion was given.", "Give --max-loss, --point or --max-memory.")
    config = RunConfig.load(run / "config.yaml").model_copy(update={"out": str(run)})
    result = tune(config, until="search")
    raise NotImplementedError((result, math, InfeasibleError, InputError))
