"""The stages that measure: latency table, weight database, loss table and end-to-end calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from autotune import memory_budget, streamed_score
from autotune.compress import database
from autotune.compress.database import WeightDatabase
from autotune.kernels.cpu import build
from autotune.kernels.spec import KERNELS, kernel_hash
from autotune.latency_model import Calibration, fit
from autotune.latency_model import calibrate as calibrate_model
from autotune.models import Models
from autotune.profilers import latency, measured
from autotune.profilers.latency import LatencyTable
from autotune.profilers.prune import prune
from autotune.profilers.table import Choice
from autotune.score import LossRow, LossTable, score
from autotune.search_space import space as space_module
from autotune.search_space.groups import LayerGroup
from autotune.search_space.space import SearchSpace
from autotune.session import Session
from autotune.store import Memo, file_digest, user_folder, write_text
from autotune.streamed_reference import StreamedReference
from autotune.verify import FORMAT, EndToEnd


def build_space(session: Session) -> SearchSpace:
    space = space_module.build(session.spec, session.target, KERNELS, session.local, session.config.schemes)
    memory_budget.check(session, space)
    return space


def profile(session: Session, space: SearchSpace) -> LatencyTable:
    """Measured on this machine, or estimated from the target's roofline."""
    path = session.folder.path / "latency.csv"

    def compute() -> LatencyTable:
        if not session.local:
            estimates = latency.estimate(session.spec, space, session.target, session.workload, KERNELS)
            return measured.fill(estimates, session.target)
        if session.target.device == "cpu":
            build.prepare()
        memo = Memo(user_folder() / "measurements.sqlite")
        try:
            progress = session.progress("profile")
            return latency.profile(session.spec, space, session.target, session.workload, memo, progress=progress)
        finally:
            memo.close()

    return session.folder.stage(
        "profile",
        _profile_inputs(session, space),
        compute,
        lambda table: table.to_csv(path),
        lambda: LatencyTable.from_csv(path),
    )


def _profile_inputs(session: Session, space: SearchSpace) -> list[Any]:
    usable = [[entry.group, entry.scheme, entry.legality.kernels] for entry in space.usable()]
    hashes = {spec.name: kernel_hash(spec) for spec in KERNELS if spec.device == session.target.device}
    shapes = [
        [g.name, [m.out_features for m in g.members], g.in_features, g.bias, *_experts(g)] for g in session.spec.groups
    ]
    target = session.target.to_json() | {"ceilings": None}  # measured ceilings vary and do not enter measured rows
    elsewhere = [] if session.local else [file_digest(path) for path in measured.files()]
    return [shapes, session.spec.dtype, target, str(session.workload), usable, hashes, *elsewhere]


def _experts(group: LayerGroup) -> list[int]:
    return [group.experts, group.experts_per_token] if group.experts > 1 else []


def prune_space(session: Session, space: SearchSpace, table: LatencyTable) -> SearchSpace:
    """Drop, with the reason, what failed to measure or is dominated."""
    keep_bytes = session.config.max_memory_bytes is not None
    return space.without(prune(session.spec, space, table, session.workload, keep_bytes))


def compress(session: Session, space: SearchSpace, models: Models) -> WeightDatabase:
    """Calibrate, then compress every surviving entry that is not in the database yet."""
    config = session.config
    folder = session.folder.path / "database"
    wanted = [[entry.group, entry.scheme] for entry in space.usable()]
    documents = [session.documents.digest, config.calibration_tokens]
    documents += [session.opened.folded] if session.opened.folds else []

    def compute() -> WeightDatabase:
        session.report("compress", 0, 1, "calibration")
        texts, progress = session.calibration_documents, session.progress("compress")
        method, folded = config.compression, session.opened.folded
        return database.build(models.dense, session.spec, space, texts, folder, method, progress, folded)

    def decode(rows: list[list[str]]) -> WeightDatabase:
        found = WeightDatabase(folder, {(group, scheme): name for group, scheme, name in rows})
        return found if all((folder / name).is_file() for name in found.entries.values()) else compute()

    return session.folder.json_stage(
        "compress",
        [database.METHOD, config.compression, session.spec.model_hash, documents, wanted],
        compute,
        lambda value: [[group, scheme, name] for (group, scheme), name in value.entries.items()],
        decode,
    )


def loss_table(session: Session, space: SearchSpace, models: Models) -> LossTable:
    """Estimated loss of every surviving entry, by the Fisher Gram diagonal."""
    config = session.config
    path = session.folder.path / "loss.csv"
    settings = [config.score_tokens, config.score_length, config.score_draws, config.seed]
    assert models.database is not None

    def compute() -> LossTable:
        progress = session.progress("score")
        found, documents = models.reference, session.score_documents
        if isinstance(found, StreamedReference):
            return streamed_score.score(found, space, documents, config.score_draws, config.seed, progress)
        return score(found, space, documents, config.score_draws, config.seed, progress)

    return session.folder.stage(
        "score",
        [settings, session.documents.digest, sorted([*key, name] for key, name in models.database.entries.items())],
        compute,
        lambda table: write_text(path, table.to_csv()),
        lambda: LossTable.from_csv(path.read_text(encoding="utf-8")),
    )


def prune_losses(session: Session, space: SearchSpace, table: LatencyTable, losses: LossTable) -> SearchSpace:
    """Drop, with the reason, what no plan could want now that losses are known: see `_unwanted`."""
    rows = {(row.group, row.scheme): row for row in losses.rows}
    dropped: dict[tuple[str, str], str] = {}
    for group in session.spec.groups:
        names = [entry.scheme for entry in space.schemes(group.name) if entry.scheme != space.dense]
        choices = {name: table.best(group, name, session.workload) for name in names}
        for name in names:
            if reason := _unwanted(session, name, choices, {other: rows[group.name, other] for other in names}):
                dropped[group.name, name] = reason
    return space.without(dropped)


def _unwanted(
    session: Session, name: str, choices: Mapping[str, Choice | None], losses: Mapping[str, LossRow]
) -> str | None:
    """Why a group should not be searched with a scheme: it breaks the budget alone, or another is better at both.

    The budget is compared with half the lower bound of the estimated KL, because perplexity may rise by as little as
    half of it, and because `plan choose` may ask for a somewhat larger one. Better at both: at least as fast, measured,
    not larger where memory is budgeted, and the intervals of the losses do not touch.
    """
    own, loss = choices[name], losses[name]
    if loss.low_nats / 2 > session.limit:
        return f"costs {loss.loss_nats:.2g} nats in this group alone; the budget is {session.limit:.2g}"
    assert own is not None  # `prune` dropped what has no time
    for other, choice in choices.items():
        if choice is None or other == name or "estimated" in (choice.status, own.status):
            continue
        larger = session.config.max_memory_bytes is not None and choice.packed_bytes > own.packed_bytes
        if choice.latency_us <= own.latency_us and losses[other].high_nats <= loss.low_nats and not larger:
            spared = f"{losses[other].loss_nats:.2g} against {loss.loss_nats:.2g} nats"
            return f"{other} is at least as fast here and loses less: {spared}"
    return None


def arithmetic_floor(session: Session, models: Models) -> float | None:
    """KL, in nats a token, of the dense model in bf16 products from itself in fp32; None where losses are in fp32."""
    if session.arithmetic == "fp32":
        return None
    assert models.database is not None
    inputs = [session.spec.model_hash, session.documents.digest, session.config.search_tokens]
    return session.folder.json_stage(
        "arithmetic", [*inputs, session.config.search_length], lambda: models.teacher.floor(), float, float
    )


def available_schemes(space: SearchSpace, session: Session) -> dict[str, list[str]]:
    """Group -> usable schemes, the dense one first."""
    return {group.name: [entry.scheme for entry in space.schemes(group.name)] for group in session.spec.groups}


def calibrate_latency(
    session: Session, space: SearchSpace, table: LatencyTable, models: Models, stage: str = "calibration"
) -> Calibration:
    """Rest of the model and factors per scheme and phase from interleaved runs; with nothing to run, none is added."""
    if not models.runs:
        return Calibration({}, {}, None)
    available = available_schemes(space, session)

    def compute() -> Calibration:
        assert models.runnable is not None
        progress = session.progress("calibrate")
        return calibrate_model(models.runnable, table, available, session.workload, 15.0, progress)

    return session.folder.json_stage(
        stage, [FORMAT, table.hash, available, str(session.workload)], compute, asdict, Calibration.from_json
    )


def refit_latency(
    session: Session, space: SearchSpace, table: LatencyTable, end_to_end: EndToEnd | None
) -> Calibration | None:
    """The latency model fitted to the finalists' run: a shared machine drifts between runs, not within one."""
    if end_to_end is None:
        return None
    return fit(end_to_end, table, session.spec, available_schemes(space, session), session.workload)
