"""`autotune recover RUN`: trains a finished run's configuration after compression, certifies and saves it.

    RUN/recovered/   plan.json   the plan, which says what was trained and on how much
                     model/      what `autotune.load` loads, as the run's own
                     recovery.json   the curve and what was measured; its keys are in docs/report.md
                     weights/    the codes, as the database keeps them
                     checkpoint/ where an unfinished training stands; the same command goes on from there

The run's own plan and model are not touched. `--point searched` first finds what to train (`searched.py`), in stages of
the run's folder: `recovered_calibration`, `recovered_front` and `recovered_endtoend`, and the losses with their
recovered column in `loss_recovered.csv`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from autotune import planning, verify
from autotune.certify import Certificate, certify
from autotune.compress.database import WeightDatabase, serialized
from autotune.config import RunConfig
from autotune.errors import UsageError, VerificationError
from autotune.finalists import Point
from autotune.finished import reload, with_lossy
from autotune.kernels.allocator import give_back, keep_large_blocks
from autotune.models import LOOK_SHARES, Models
from autotune.plan import Plan, Recovery
from autotune.recover import candidates, training
from autotune.recover.distill import Distillation
from autotune.recover.job import SEARCHED, Job, Options, budget, device_of, sequences_of
from autotune.recover.outcome import Outcome
from autotune.recover.searched import SearchedRecovery
from autotune.recover.training import Trained
from autotune.reference_model import ReferenceModel
from autotune.run import Reporter, silent
from autotune.search.problem import Evaluation
from autotune.store import digest, locked, read_json, write_bytes, write_json
from autotune.teacher import Teacher
from autotune.verify import EndToEnd

FOLDER = "recovered"  # in the run's
SCHEMA_VERSION = 2  # of recovery.json
METHOD = "block by block, then end to end on KL to the dense model; masks fixed, rounding straight-through"


def recover(
    run: Path, options: Options, report: Reporter = silent, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Train, certify and save; returns the content of recovery.json.

    Args:
        should_stop: asked after every step; the best state so far is then finished and saved.

    Raises:
        UsageError: `recover.budget`, `recover.latency_only`, `recover.device`.
        InputError: `config.missing`, `plan.choose`, `plan.point`, `recover.nothing`, `recover.too_few`,
            `recover.memory`, `data.*`.
        InfeasibleError: `recover.no_candidate` where a search promises nothing faster within the budget.
        VerificationError: `recover.no_gain` when training did not lower the loss.
        BusyError: `store.locked`.
    """
    _check(run, options)
    keep_large_blocks()
    with locked(run):
        folder, device = run / FOLDER, device_of(options.device)
        job, distillation, tried = _begin(run, options, device, report, should_stop)
        recipe = distillation.recipe
        inputs = [job.key, str(device)]
        done = _finished(folder, digest([inputs, repr(recipe)]), options.point == SEARCHED)
        if done is not None:
            return done
        trained = training.train(
            distillation,
            folder / "checkpoint",
            inputs,
            lambda step, steps, note: report("recover", step, steps, note),
            should_stop,
        )
        if trained.best.steps == 0:
            hint = "Give more tokens, or other --data."
            raise VerificationError("recover.no_gain", "training did not lower the loss; nothing was written.", hint)
        database, weights = _store(job, folder, distillation)
        about = Recovery(
            method=METHOD,
            groups=job.groups,
            tokens=trained.best.tokens,
            steps=trained.best.steps,
            seed=recipe.seed,
            data=job.sequences.name,
            data_digest=job.sequences.digest,
            weights=weights,
        )
        distillation.student.model.to("meta")
        del distillation
        give_back()
        job.session.place.make_room()
        key = "stopped" if trained.stopped else digest([inputs, repr(recipe)])
        value = _conclude(job, folder, database, about, trained, report)
        value |= {"searched": tried.to_json() if tried else None, "promise": _promise(tried, value), "key": key}
        write_json(folder / "recovery.json", value)
        if not trained.stopped:
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        return value


def _begin(
    run: Path, options: Options, device: torch.device, report: Reporter, should_stop: Callable[[], bool]
) -> tuple[Job, Distillation, Outcome | None]:
    """What is to be trained, its training with all its steps to come, and how it was found where it was searched."""
    result = reload(run, report)
    sequences, wide = sequences_of(result.session, options), with_lossy(result)
    if options.point == SEARCHED:
        found = SearchedRecovery(wide, sequences, options, device, report, should_stop).choose()
        job, steps = found.chosen.job, found.steps
        return job, job.distillation(replace(options.recipe, steps=steps), device), found
    job = Job(wide, *candidates.find(result, run, options.point), sequences)
    distillation = job.distillation(options.recipe, device)
    steps = budget(
        options, sequences, run / FOLDER, job.key, lambda minutes: training.steps_for_minutes(distillation, minutes)
    )
    distillation.recipe = replace(options.recipe, steps=steps)
    return job, distillation, None


def _check(run: Path, options: Options) -> None:
    config = RunConfig.load(run / "config.yaml")
    if options.minutes is not None and options.tokens is not None:
        raise UsageError("recover.budget", "--minutes and --tokens exclude each other.", "Give one of them.")
    if config.latency_only:
        raise UsageError("recover.latency_only", f"{run} has no losses.", "Tune without --latency-only first.")


def _promise(tried: Outcome | None, value: dict[str, Any]) -> dict[str, Any] | None:
    """What was promised for the end, before anything but the sets was trained, and whether its interval holds what was
    measured; None where nothing was searched, or training ended early."""
    if tried is None or value["stopped"]:
        return None
    item, measured = tried.chosen.promised, value["search_documents"]["kl_nats"]
    return item.to_json() | {"holds": item.low <= measured <= item.high}


def _finished(folder: Path, key: str, searched: bool) -> dict[str, Any] | None:
    """What an equal recovery wrote."""
    file = folder / "recovery.json"
    if not (file.is_file() and (folder / "plan.json").is_file()):
        return None
    value: dict[str, Any] = read_json(file, "recover")
    wanted = (SCHEMA_VERSION, key, searched)
    found = value.get("schema_version"), value.get("key"), value.get("searched") is not None
    return value if found == wanted else None


def _store(job: Job, folder: Path, distillation: Distillation) -> tuple[WeightDatabase, str]:
    """(the database of the trained codes, the hash of them all)."""
    folder = folder / "weights"
    entries, data = {}, []
    for name in job.groups:
        item = job.chosen[name]
        content = serialized(distillation.student.groups[name].master.codes(), "recovered", None)
        data.append(digest(content))
        entries[name, item] = f"{data[-1][:32]}.safetensors"
        write_bytes(folder / entries[name, item], content)
    for stale in set(folder.glob("*.safetensors")) - {folder / name for name in entries.values()}:
        stale.unlink()
    return WeightDatabase(folder, entries), digest(data)


def _conclude(
    job: Job, folder: Path, database: WeightDatabase, about: Recovery, trained: Trained, report: Reporter
) -> dict[str, Any]:
    """Measure the recovered configuration, write its plan and its model."""
    session, chosen = job.session, job.chosen
    keep = {(name, chosen[name]) for name in job.groups}
    space = job.result.space
    others = {(e.group, e.scheme): "not recovered" for e in space.usable() if e.scheme != space.dense}
    narrow = space.without({key: reason for key, reason in others.items() if key not in keep})
    models = Models(session, narrow, job.result.table)
    models.database = database
    before, after = _losses(job, models, report)
    models.done_with_losses()
    problem = job.result.problem
    assert problem is not None
    candidate = candidates.candidate_of(problem, chosen, after, "recovered")
    end_to_end = _end_to_end(job, models, report)
    certificate = _certificate(job, models, report)
    plan = planning.recovered(planning.build_plan(job.result, Point("recovered", candidate, True)), about)
    report("save", 0, 1)
    if models.runnable is not None:
        models.runnable.save(folder / "model", session.opened, plan, database)
    plan.save(folder / "plan.json")
    report("save", 1, 1)
    return _value(job, plan, about, trained, (before, after), certificate, end_to_end)


def _losses(job: Job, models: Models, report: Reporter) -> tuple[Evaluation, Evaluation]:
    """On the search documents, with the database's codes and with the trained ones."""
    report("score", 0, 2)
    after = models.teacher.measure(job.chosen)
    report("score", 1, 2)
    reference = ReferenceModel(job.session.reference(), job.session.spec, job.database)
    before = Teacher(reference, job.session.search_documents, LOOK_SHARES).measure(job.chosen)
    report("score", 2, 2)
    return before, after


def _end_to_end(job: Job, models: Models, report: Reporter) -> EndToEnd | None:
    if models.runnable is None:
        return None
    configurations: dict[str, Mapping[str, str]] = {"dense": {}, "recovered": job.chosen}
    return verify.measure(
        models.runnable,
        configurations,
        job.session.workload,
        10.0,
        lambda done, total: report("verify", done, total),
    )


def _certificate(job: Job, models: Models, report: Reporter) -> Certificate:
    session = job.session
    model, documents = models.runnable or models.reference, session.certification_documents
    return certify(
        model,
        [job.chosen],
        documents,
        session.limit,
        session.documents.name,
        lambda done, total: report("certify", done, total),
    )[0]


def _value(
    job: Job,
    plan: Plan,
    about: Recovery,
    trained: Trained,
    losses: tuple[Evaluation, Evaluation],
    certificate: Certificate,
    end_to_end: EndToEnd | None,
) -> dict[str, Any]:
    before, after = losses
    saved = asdict(end_to_end.speedup("recovered")) if end_to_end else None
    return {
        "schema_version": SCHEMA_VERSION,
        "configuration": job.name,
        "plan": plan.digest(),
        "recovery": about.model_dump(mode="json"),
        "left_out_documents": job.sequences.left_out,
        "unique_tokens": job.sequences.tokens,
        "seconds": trained.seconds,
        "stopped": trained.stopped,
        "curve": [asdict(mark) for mark in trained.marks],
        "search_documents": {
            "kl_nats_before": before.kl_nats,
            "kl_nats": after.kl_nats,
            "dnll_nats_before": before.dnll_nats,
            "dnll_nats": after.dnll_nats,
        },
        "certificate": asdict(certificate) | {"statement": certificate.statement},
        "speedup": saved,
        "noisy": end_to_end.noisy if end_to_end else "",
    }
