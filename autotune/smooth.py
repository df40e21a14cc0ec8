"""The stage that makes a model's inputs easier to round before anything is compressed: see `compress.smoothing`.

What it finds becomes part of the opened model: every model loaded from there on is the folded one, and nothing after
this stage knows of it but the database's keys and what is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from autotune.compress import smoothing
from autotune.compress.smoothing import Choice
from autotune.documents import MAX_DOCUMENT_TOKENS, take
from autotune.folding import Fold, Site, fold, sites
from autotune.models import Models
from autotune.search_space.schemes import scheme
from autotune.search_space.space import SearchSpace
from autotune.session import Session

TOKENS = 4_096  # of the calibration documents: scales need means, not Hessians


def smooth(session: Session, space: SearchSpace, models: Models) -> tuple[Session, tuple[Choice, ...]]:
    """The session on the folded model, and what was folded; the same session where that is nothing."""
    mode = session.config.smoothing
    if mode == smoothing.OFF or session.config.latency_only or session.streams:  # streamed: nothing to try scales on
        return session, ()
    wanted = [[entry.group, entry.scheme] for entry in space.usable()]
    tokens = min(TOKENS, session.config.calibration_tokens)
    inputs = [smoothing.VERSION, mode, session.spec.model_hash, session.documents.digest, tokens, wanted]

    def compute() -> list[Choice]:
        session.report("smooth", 0, 1)
        dense = _whole(models)
        documents = session.place.put(take(session.documents.calibration, tokens, MAX_DOCUMENT_TOKENS))
        places = sites(dense, session.spec.groups, documents[0], session.spec.tied_embeddings)
        schemes = {g.name: [scheme(entry.scheme) for entry in space.schemes(g.name)] for g in session.spec.groups}
        found = smoothing.choose(dense, session.spec.groups, places, schemes, documents, mode)
        session.report("smooth", 1, 1)
        return found

    choices = session.folder.json_stage("smoothing", inputs, compute, _encode, _decode)
    if not choices:
        return session, ()
    folds = tuple(choice.fold for choice in choices)
    if "dense" in vars(models):
        fold(_whole(models), folds)
    models.session = folded = session.with_model(replace(session.opened, folds=folds))
    return folded, tuple(choices)


def _whole(models: Models) -> nn.Module:
    assert isinstance(models.dense, nn.Module)
    return models.dense


def _encode(choices: list[Choice]) -> list[dict[str, Any]]:
    return [asdict(choice) for choice in choices]


def _decode(rows: list[Mapping[str, Any]]) -> list[Choice]:
    return [
        Choice(
            Fold(
                Site(**{**row["fold"]["site"], "readers": tuple(row["fold"]["site"]["readers"])}),
                tuple(row["fold"]["exponents"]),
            ),
            row["kind"],
            row["left"],
            row["worst"],
        )
        for row in rows
    ]
