"""The front as JSON, for the run folder: exact, so that a resumed run decides the same."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from autotune.search.problem import Candidate, Evaluation, Front, Trial


def encode_evaluation(value: Evaluation) -> dict[str, Any]:
    return asdict(value)


def decode_evaluation(value: dict[str, Any]) -> Evaluation:
    return Evaluation(tuple(value["tokens"]), tuple(value["kl"]), tuple(value["dnll"]))


def encode_front(front: Front) -> dict[str, Any]:
    return asdict(front)


def decode_front(value: dict[str, Any]) -> Front:
    candidates = tuple(
        Candidate(
            **{
                **item,
                "genotype": tuple(item["genotype"]),
                "evaluation": decode_evaluation(item["evaluation"]),
            }
        )
        for item in value["candidates"]
    )
    trials = tuple(Trial(**{**item, "genotype": tuple(item["genotype"])}) for item in value["trials"])
    return Front(candidates, tuple(value["pareto"]), trials, value["sampler_seconds"])
