"""A finished run, read again: its tables and its front, nothing computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autotune import cache_choice, decide, smooth, tables
from autotune.config import RunConfig
from autotune.errors import InputError
from autotune.models import Models
from autotune.result import Result
from autotune.run import Reporter, RunFolder, silent
from autotune.search.codec import decode_front
from autotune.session import open_session
from autotune.store import read_json


def reload(run: Path, report: Reporter = silent) -> Result:
    """Every stage up to the search finds its artifact. Only the holder of the folder's lock may call this.

    Raises:
        InputError: `config.missing`, `plan.choose` when the run has no finished search.
    """
    config = RunConfig.load(run / "config.yaml").model_copy(update={"out": str(run)})
    folder = RunFolder(run)
    if not (folder.path / "front.json").is_file():
        raise InputError("plan.choose", f"{folder.path} has no finished search.", "Run `autotune search` on it first.")
    session = open_session(folder, config, report)
    space = tables.build_space(session)
    table = tables.profile(session, space)
    space = tables.prune_space(session, space, table)
    result = Result(session, space, table)
    models = Models(session, space, table)
    session, result.smoothed = smooth.smooth(session, space, models)
    result.session = session
    if not config.latency_only:
        result.database = models.database = tables.compress(session, space, models)
        result.losses = tables.loss_table(session, space, models)
        result.space = models.space = space = tables.prune_losses(session, space, table, result.losses)
    result.calibration = tables.calibrate_latency(session, space, table, models)
    result.cache = cache_choice.choice(session, models, cache_choice.losses(session, models))
    result.problem = decide.build_problem(session, space, table, result.losses, result.calibration, result.cache)
    result.front = decode_front(read_json(folder.path / "front.json", "run"))
    return result


def with_lossy(result: Result) -> Result:
    """The same with the schemes that had left the space for their loss alone, in space and problem."""
    session, table = result.session, result.table
    assert result.calibration is not None
    space = tables.prune_space(session, tables.build_space(session), table)
    problem = decide.build_problem(session, space, table, result.losses, result.calibration, result.cache)
    return replace(result, space=space, problem=problem)
