"""The whole loop, top to bottom: from a model to a certified plan.

    open -> space -> profile -> prune -> smooth -> compress -> score -> calibrate -> search -> recompress -> finalists
    -> certify -> choose

Every stage is a function that reuses its artifact in the run folder when its inputs have not changed, so a killed run
resumes where it was and ends in the same plan. Only one process holds a run folder at a time.
"""

from __future__ import annotations

import threading
from pathlib import Path

from autotune import cache_choice, decide, finalists, planning, recompress, smooth, tables
from autotune.config import RunConfig
from autotune.errors import InfeasibleError
from autotune.kernels.allocator import keep_large_blocks
from autotune.models import Models
from autotune.recover.offer import offer, offers, to_json
from autotune.result import Result
from autotune.run import Reporter, RunFolder, silent
from autotune.session import Session, open_session
from autotune.store import locked

STAGES = ("profile", "score", "search", "verify", "apply", "report")


def tune(
    config: RunConfig, report: Reporter = silent, until: str = "report", stop: threading.Event | None = None
) -> Result:
    """Run the loop up to a stage, in `config.out`.

    Args:
        stop: when set during the search, the best plan so far is finished and saved.

    Raises:
        AutotuneError: see `autotune.errors`; everything finished before is kept and reused by the next call.
    """
    keep_large_blocks()
    folder = RunFolder(Path(config.out))
    session = open_session(folder, config, report)
    with locked(folder.path):  # only now: input that cannot be used leaves no folder, and no run's settings replaced
        session.config.save(folder.path / "config.yaml")
        return _stages(session, until, stop or threading.Event())


def _stages(session: Session, until: str, stop: threading.Event) -> Result:
    folder, config, report = session.folder, session.config, session.report
    cache_choice.named(session)  # what cannot be is said before anything is measured
    space = tables.build_space(session)
    table = tables.profile(session, space)
    space = tables.prune_space(session, space, table)
    result = Result(session, space, table)
    if until == "profile":
        return result

    models = Models(session, space, table)
    session, result.smoothed = smooth.smooth(session, space, models)
    result.session = session
    if not config.latency_only:
        result.database = models.database = tables.compress(session, space, models)
        result.losses = tables.loss_table(session, space, models)
        result.space = models.space = space = tables.prune_losses(session, space, table, result.losses)
        result.floor_nats = tables.arithmetic_floor(session, models)
    cache_losses = cache_choice.losses(session, models)
    if not config.latency_only:
        models.done_with_losses()
    if until == "score":
        return result

    result.calibration = tables.calibrate_latency(session, space, table, models)
    result.cache = cache_choice.choice(session, models, cache_losses)
    models.done_with_kernels()
    result.problem = decide.build_problem(session, space, table, result.losses, result.calibration, result.cache)
    result.front = decide.run_search(session, result.problem, models, stop.is_set)
    result.points = _points(result, models)
    if until == "search":
        return result

    result.points = recompress.recompress(session, result.problem, result.points, models)
    models.done_with_losses()
    result.end_to_end = decide.measure_points(session, result.problem, result.points, models)
    result.refit = tables.refit_latency(session, space, table, result.end_to_end)
    result.certificates = decide.certify_points(session, result.problem, result.points, models)
    certified = not config.latency_only
    result.chosen, result.reason = finalists.choose(result.points, result.certificates, result.end_to_end, certified)
    result.plan = planning.build_plan(result, result.chosen)
    result.plan.save(folder.path / "plan.json")
    if until == "verify":
        return result
    if models.runs and session.opened.checkpoint is not None:
        _save_model(result, models)
    if until == "apply":
        return result

    from autotune.report.numbers import build_report
    from autotune.report.recovered import with_recovery
    from autotune.report.write import write_report

    report("report", 0, 1)
    made = build_report(result, models) | {"recovery": to_json(offer(result, models))}
    result.report = with_recovery(folder.path, made)
    write_report(folder.path, result.report)
    report("report", 1, 1)
    return result


def _points(result: Result, models: Models) -> tuple[finalists.Point, ...]:
    """The points worth running; where nothing meets the budget, the error says what may mend it."""
    assert result.problem is not None and result.front is not None
    try:
        return tuple(finalists.pick_points(result.session, result.problem, result.front))
    except InfeasibleError as error:
        found = offers(result, models)
        if not found:
            raise
        hint = " Or: ".join([error.hint, *(item.sentence for item in found)])
        raise InfeasibleError(error.code, error.message, hint) from error


def _save_model(result: Result, models: Models) -> None:
    session, plan, chosen = result.session, result.plan, result.chosen
    assert plan is not None and chosen is not None
    folder = session.folder.path / "model"
    weights = None if models.database is None else chosen.weights(models.database, plan.configuration)

    def compute() -> str:
        session.report("save", 0, 1)
        assert models.runnable is not None
        models.runnable.save(folder, session.opened, plan, weights)
        session.report("save", 1, 1)
        return plan.digest()

    session.folder.stage(
        "apply", plan.digest(), compute, lambda _: None, lambda: plan.digest() if folder.is_dir() else compute()
    )
