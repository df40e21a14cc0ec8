"""Finalists compressed again, each for the inputs it really has, and the better weights taken.

Of every finalist both losses are measured on the search documents, with the database's weights and with its own. The
lower one decides what is certified, saved and exported; certification sees neither loss. Plans chosen later from the
same run find what was decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from autotune.compress import methods
from autotune.compress.database import WeightDatabase
from autotune.compress.sequential import METHOD, VERSION, Recompression, Settings, own_entries
from autotune.decide import configuration
from autotune.documents import MAX_DOCUMENT_TOKENS, take
from autotune.finalists import OwnWeights, Point
from autotune.models import Models
from autotune.reference_model import ReferenceModel
from autotune.search.codec import decode_evaluation, encode_evaluation
from autotune.search.problem import Problem
from autotune.session import Session
from autotune.store import digest, read_json

Made = dict[str, OwnWeights]  # configuration, as `_name` has it -> its weights

TOKENS = 8_192  # of the calibration documents: each group of each finalist costs a pass (docs/measured.md)
_STAGE = "recompress"


def recompress(session: Session, problem: Problem, points: Sequence[Point], models: Models) -> tuple[Point, ...]:
    """The points, finalists with their own weights. Does nothing where settings say so, or where blocks of the
    architecture cannot be run one by one."""
    if session.config.latency_only or not session.config.recompress:
        return tuple(points)
    assert models.database is not None
    database = models.database

    def compute() -> Made:
        return _make(session, problem, points, models)

    def decode(value: Mapping[str, Any]) -> Made:
        made = _decode(value)
        return made if _complete(made, database) else compute()

    made = session.folder.json_stage(_STAGE, _inputs(session, problem, points, database), compute, _encode, decode)
    for point in points:
        chosen = configuration(problem, point.candidate.genotype)
        if _name(chosen) in made:
            own = own_entries(models.weights or database, made[_name(chosen)].files, chosen)
            models.add_own({(g, own[g]): file for g, file in made[_name(chosen)].files.items()})
    return _carried(problem, points, made)


def found(session: Session, problem: Problem, points: Sequence[Point], database: WeightDatabase) -> tuple[Point, ...]:
    """The points with what an earlier run made for them, if it did; nothing is computed."""
    key = digest(_inputs(session, problem, points, database))
    if session.folder.records().get(_STAGE, {}).get("key") != key:
        return tuple(points)
    made = _decode(read_json(session.folder.path / f"{_STAGE}.json", "run"))
    return _carried(problem, points, made) if _complete(made, database) else tuple(points)


def _make(session: Session, problem: Problem, points: Sequence[Point], models: Models) -> Made:
    session.report(_STAGE, 0, 1)
    weights = models.weights
    assert weights is not None
    if type(models.reference) is not ReferenceModel:  # another kind has not all its weights in memory
        return {}
    documents = take(session.documents.calibration, _tokens(session), MAX_DOCUMENT_TOKENS)
    settings, steps = Settings(_method(session)), session.progress(_STAGE)
    renewed = Recompression(models.reference, weights, session.place.put(documents), settings, steps)
    wanted = {
        _name(chosen): chosen
        for chosen in (configuration(problem, p.candidate.genotype) for p in points if p.finalist)
        if len(set(chosen.values()) - {session.spec.dtype})
    }
    if not wanted or not renewed.possible():
        return {}
    made = {}
    before = {_name(configuration(problem, p.candidate.genotype)): p.candidate.evaluation for p in points}
    for name, files in renewed.run(wanted).items():
        stitched = before[name]
        if len(stitched.tokens) < len(session.search_documents):  # seen by the first look alone
            stitched = models.teacher.measure(wanted[name])
        own = own_entries(weights, files, wanted[name])
        made[name] = OwnWeights(files, stitched, models.teacher.measure(own))
    return made


def _tokens(session: Session) -> int:
    return min(TOKENS, session.config.calibration_tokens)


def _method(session: Session) -> str:
    """The run's own; where that takes no Hessian and recompression was asked for, the best of those that do."""
    name = session.config.compression
    return name if methods.takes_hessian(name) else methods.AUTO


def _inputs(session: Session, problem: Problem, points: Sequence[Point], database: WeightDatabase) -> list[Any]:
    config = session.config
    chosen = [configuration(problem, point.candidate.genotype) for point in points if point.finalist]
    files = [[database.entries.get(item) for item in one.items()] for one in chosen]
    settings = [VERSION, _method(session), _tokens(session), config.search_tokens, config.search_length]
    return [settings, session.spec.model_hash, session.documents.digest, chosen, files]


def _carried(problem: Problem, points: Sequence[Point], made: Made) -> tuple[Point, ...]:
    return tuple(_with(p, made.get(_name(configuration(problem, p.candidate.genotype)))) for p in points)


def _with(point: Point, own: OwnWeights | None) -> Point:
    if own is None or not point.finalist:
        return point
    candidate = replace(point.candidate, evaluation=own.after) if own.better else point.candidate
    return replace(point, candidate=candidate, own=own)


def _complete(made: Made, database: WeightDatabase) -> bool:
    return all((database.folder / file).is_file() for own in made.values() for file in own.files.values())


def _name(chosen: Mapping[str, str]) -> str:
    """A configuration by its content: points change their names when others join them."""
    return digest(dict(chosen))[:16]


def _encode(made: Made) -> dict[str, Any]:
    rows = {
        name: {"files": own.files, "before": encode_evaluation(own.before), "after": encode_evaluation(own.after)}
        for name, own in made.items()
    }
    return {"method": METHOD, "configurations": rows}


def _decode(value: Mapping[str, Any]) -> Made:
    return {
        name: OwnWeights(dict(row["files"]), decode_evaluation(row["before"]), decode_evaluation(row["after"]))
        for name, row in value["configurations"].items()
    }
