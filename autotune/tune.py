"""The whole loop, top to bottom: from a model to a certified plan.

    open -> space -> profile -> prune -> compress -> score -> calibrate -> search -> finalists -> certify -> choose

Every stage is a function that reuses its artifact in the run folder when its inputs have not changed, so a killed run
resumes where it was and ends in the same plan. Only one process holds a run folder at a time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune import decide, planning, tables
from autotune.certify import Certificate
from autotune.compress.database import WeightDatabase
from autotune.config import RunConfig
from autotune.decide import Point
from autotune.kernels.allocator import keep_large_blocks
from autotune.plan import Plan
from autotune.profilers.latency import LatencyTable
from autotune.reference_model import ReferenceModel
from autotune.run import Reporter, RunFolder, silent
from autotune.score import LossTable
from autotune.search.problem import Front, Problem
from autotune.search_space.space import SearchSpace
from autotune.session import Session, open_session
from autotune.store import locked
from autotune.switchable import SwitchableModel, switchable
from autotune.teacher import Teacher
from autotune.verify import Calibration, EndToEnd

STAGES = ("profile", "score", "search", "verify", "apply", "report")


@dataclass
class Result:
    """What a run knows so far; stages that have not run are None."""

    session: Session
    space: SearchSpace
    table: LatencyTable
    database: WeightDatabase | None = None
    losses: LossTable | None = None
    calibration: Calibration | None = None
    problem: Problem | None = None
    front: Front | None = None
    points: tuple[Point, ...] = ()
    end_to_end: EndToEnd | None = None
    certificates: dict[str, Certificate] | None = None
    chosen: Point | None = None
    plan: Plan | None = None
    report: dict[str, Any] | None = None


def tune(
    config: RunConfig, report: Reporter = silent, until: str = "report", stop: threading.Event | None = None
) -> Result:
    """Run the loop up to a stage, in `config.out`.

    Args:
        stop: when set during the search, the best plan so far is finished and saved.

    Raises:
        AutotuneError: see `autotune.errors`; everything finished before is kept and reused by the next call.
    """
    folder = RunFolder(Path(config.out))
    with locked(folder.path):
        keep_large_blocks()
        config.save(folder.path / "config.yaml")
        return _stages(folder, config, report, until, stop or threading.Event())


def _stages(folder: RunFolder, config: RunConfig, report: Reporter, until: str, stop: threading.Event) -> Result:
    session = open_session(folder, config, report)
    space = tables.build_space(session)
    table = tables.profile(session, space)
    space = tables.prune_space(session, space, table)
    result = Result(session, space, table)
    if until == "profile":
        return result

    teacher = None
    if not config.latency_only:
        model = session.reference()
        result.database = tables.compress(session, space, model)
        reference = ReferenceModel(model, session.spec, result.database)
        result.losses = tables.loss_table(session, space, reference)
        teacher = Teacher(reference, session.search_documents, decide.LOOK_SHARES)
    if until == "score":
        return result

    runnable = _runnable(session, space, table, result.database)
    result.calibration = tables.calibrate_latency(session, space, table, runnable)
    result.problem = decide.build_problem(session, space, table, result.losses, result.calibration)
    result.front = decide.run_search(session, result.problem, teacher, stop.is_set)
    result.points = tuple(decide.pick_points(session, result.problem, result.front))
    if until == "search":
        return result

    result.end_to_end = decide.measure_points(session, result.problem, result.points, runnable)
    judge = runnable or (teacher and teacher.model)
    result.certificates = decide.certify_points(session, result.problem, result.points, judge)
    result.chosen = decide.choose(result.points, result.certificates, result.end_to_end, not config.latency_only)
    trials = len(result.front.trials)
    result.plan = planning.build_plan(session, space, table, result.losses, result.problem, result.chosen, trials)
    result.plan.save(folder.path / "plan.json")
    if until == "verify":
        return result
    if runnable is not None and session.opened.checkpoint is not None:
        report("save", 0, 1)
        runnable.save(folder.path / "model", session.opened, result.plan, result.database)
        report("save", 1, 1)
    if until == "apply":
        return result

    from autotune.report.numbers import build_report
    from autotune.report.write import write_report

    report("report", 0, 1)
    result.report = build_report(result, runnable)
    write_report(folder.path, result.report)
    report("report", 1, 1)
    return result


def _runnable(
    session: Session, space: SearchSpace, table: LatencyTable, database: WeightDatabase | None
) -> SwitchableModel | None:
    """The real model on its kernels, every surviving scheme packed; None for a target that is not this machine."""
    if not session.local:
        return None
    session.report("pack", 0, 1)
    cache = session.target.last_cache_bytes
    return switchable(session.opened, space, table, session.workload, database, cache, session.progress("pack"))
