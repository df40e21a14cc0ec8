"""`autotune recover RUN`: trains a finished run's configuration after compression, certifies and saves it.

    RUN/recovered/   plan.json   the plan, which says what was trained and on how much
                     model/      what `autotune.load` loads, as the run's own
                     recovery.json   the curve and what was measured; its keys are in docs/report.md
                     weights/    the codes, as the database keeps them
                     checkpoint/ where an unfinished training stands; the same command goes on from there

The run's own plan and model are not touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from autotune import planning, verify
from autotune.certify import Certificate, certify
from autotune.compress.database import WeightDatabase, serialized
from autotune.config import RunConfig
from autotune.errors import InputError, UsageError, VerificationError
from autotune.finalists import Point
from autotune.finished import reload
from autotune.kernels.allocator import give_back, keep_large_blocks
from autotune.model import load_tokenizer
from autotune.models import LOOK_SHARES, Models
from autotune.plan import Plan, Recovery
from autotune.recover import candidates, texts, training
from autotune.recover.distill import BATCH_TOKENS, BLOCK_SHARE, RATE, Distillation, Recipe
from autotune.recover.offer import TOKENS
from autotune.recover.quantizer import Master
from autotune.recover.student import Student
from autotune.recover.texts import Sequences
from autotune.recover.training import Trained
from autotune.reference_model import ReferenceModel
from autotune.result import Result
from autotune.run import Reporter, silent
from autotune.search.problem import Evaluation
from autotune.session import Session
from autotune.store import digest, locked, read_json, write_bytes, write_json
from autotune.teacher import Teacher
from autotune.verify import EndToEnd

METHOD = "block by block, then end to end on KL to the dense model; masks fixed, rounding straight-through"
VERSION = "recover/2"  # part of every key; change it whenever the codes would change


@dataclass(frozen=True)
class Options:
    """`minutes` or `tokens`; `data`: a text, JSONL or folder; `point`: see `candidates.find`."""

    minutes: float | None = None
    tokens: int | None = None
    data: Path | None = None
    point: str | None = None
    seed: int = 0
    device: str = "auto"
    rate: float = RATE
    block_share: float = BLOCK_SHARE
    batch_tokens: int = BATCH_TOKENS


@dataclass(frozen=True)
class Job:
    """What is trained: a configuration of a run, its compressed groups, and the text."""

    result: Result  # with every scheme that has weights
    name: str
    chosen: dict[str, str]
    sequences: Sequences
    folder: Path

    @property
    def session(self) -> Session:
        return self.result.session

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(name for name, scheme in self.chosen.items() if scheme != self.session.spec.dtype)

    @property
    def database(self) -> WeightDatabase:
        assert self.result.database is not None
        return self.result.database

    @property
    def key(self) -> str:
        """Of everything but the budget that decides the codes."""
        files = [self.database.entries[name, self.chosen[name]] for name in self.groups]
        return digest(
            [VERSION, self.session.spec.model_hash, self.chosen, files, self.sequences.name, self.sequences.digest]
        )


def recover(
    run: Path, options: Options, report: Reporter = silent, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Train, certify and save; returns the content of recovery.json.

    Args:
        should_stop: asked after every step; the best state so far is then finished and saved.

    Raises:
        UsageError: `recover.budget`, `recover.latency_only`, `recover.device`.
        InputError: `config.missing`, `plan.choose`, `plan.point`, `recover.nothing`, `recover.too_few`, `data.*`.
        VerificationError: `recover.no_gain` when training did not lower the loss.
        BusyError: `store.locked`.
    """
    _check(run, options)
    keep_large_blocks()
    with locked(run):
        job = _job(run, options)
        device = _device(options.device)
        recipe = Recipe(0, options.seed, options.batch_tokens, options.rate, options.block_share)
        distillation = _distillation(job, recipe, device)
        distillation.recipe = recipe = replace(recipe, steps=_steps(job, options, distillation))
        inputs = [job.key, str(device)]
        done = _finished(job, digest([inputs, repr(recipe)]))
        if done is not None:
            return done
        trained = training.train(
            distillation,
            job.folder / "checkpoint",
            inputs,
            lambda step, steps, note: report("recover", step, steps, note),
            should_stop,
        )
        if trained.best.steps == 0:
            hint = "Give more tokens, or other --data."
            raise VerificationError("recover.no_gain", "training did not lower the loss; nothing was written.", hint)
        database, weights = _store(job, distillation)
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
        key = "stopped" if trained.stopped else digest([inputs, repr(recipe)])
        value = _conclude(job, database, about, trained, report) | {"key": key}
        write_json(job.folder / "recovery.json", value)
        if not trained.stopped:
            shutil.rmtree(job.folder / "checkpoint", ignore_errors=True)
        return value


def _check(run: Path, options: Options) -> None:
    config = RunConfig.load(run / "config.yaml")
    if options.minutes is not None and options.tokens is not None:
        raise UsageError("recover.budget", "--minutes and --tokens exclude each other.", "Give one of them.")
    if config.latency_only:
        raise UsageError("recover.latency_only", f"{run} has no losses.", "Tune without --latency-only first.")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UsageError("recover.device", f"there is no device {name!r} here.", "Use --device cpu.")
    return torch.device(name)


def _job(run: Path, options: Options) -> Job:
    result, name, chosen = candidates.find(reload(run), run, options.point)
    session = result.session
    length = min(texts.LENGTH, session.opened.positions)
    if options.data is None:
        documents = session.documents
        source = f"{documents.name}, calibration documents"
        found = texts.from_documents(source, documents.calibration, texts.held_out(documents), length, options.seed)
    else:
        tokenizer, vocabulary = load_tokenizer(session.opened.folder), session.opened.vocabulary
        found = texts.read(options.data, tokenizer, vocabulary, session.documents, length, options.seed)
    return Job(result, name, chosen, found, run / "recovered")


def _distillation(job: Job, recipe: Recipe, device: torch.device) -> Distillation:
    spec = job.session.spec
    if mixed := [group.name for group in spec.groups if group.name in job.groups and group.experts > 1]:
        what = f"{mixed[0]} is one of {len(mixed)} groups of experts"
        raise InputError(
            "recover.experts", f"{what}, which are not trained yet.", "Name a --point that keeps them dense."
        )
    masters = {
        group.name: Master(job.database.load(group, job.chosen[group.name]), device)
        for group in spec.groups
        if group.name in job.groups
    }
    student = Student(job.session.reference().to(device), spec, masters)
    return Distillation(student, job.sequences, recipe)


def _steps(job: Job, options: Options, distillation: Distillation) -> int:
    """Minutes become steps once, written down before they are acted on: a resumed recovery does the same."""
    if options.minutes is None:
        step = distillation.count * job.sequences.train.shape[1]
        return max(1, (options.tokens or TOKENS) // step)
    file = job.folder / "budget.json"
    key = digest([job.key, repr(distillation.recipe), options.minutes, torch.get_num_threads()])
    if file.is_file() and read_json(file, "recover").get("key") == key:
        return int(read_json(file, "recover")["steps"])
    steps = training.steps_for_minutes(distillation, options.minutes)
    write_json(file, {"key": key, "minutes": options.minutes, "steps": steps})
    return steps


def _finished(job: Job, key: str) -> dict[str, Any] | None:
    """What an equal recovery wrote."""
    file = job.folder / "recovery.json"
    if not (file.is_file() and (job.folder / "plan.json").is_file()):
        return None
    value: dict[str, Any] = read_json(file, "recover")
    return value if value.get("key") == key else None


def _store(job: Job, distillation: Distillation) -> tuple[WeightDatabase, str]:
    """(the database of the trained codes, the hash of them all)."""
    folder = job.folder / "weights"
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
    job: Job, database: WeightDatabase, about: Recovery, trained: Trained, report: Reporter
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
        models.runnable.save(job.folder / "model", session.opened, plan, database)
    plan.save(job.folder / "plan.json")
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
        "schema_version": 1,
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
    }
