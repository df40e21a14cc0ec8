"""What a run knows so far: the artifacts of its stages, None where a stage has not run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autotune.cache_choice import CacheChoice
from autotune.certify import Certificate
from autotune.compress.database import WeightDatabase
from autotune.compress.smoothing import Choice
from autotune.finalists import Point
from autotune.latency_model import Calibration
from autotune.plan import Plan
from autotune.profilers.latency import LatencyTable
from autotune.score import LossTable
from autotune.search.problem import Front, Problem
from autotune.search_space.space import SearchSpace
from autotune.session import Session
from autotune.verify import EndToEnd


@dataclass
class Result:
    session: Session
    space: SearchSpace
    table: LatencyTable
    smoothed: tuple[Choice, ...] = ()
    database: WeightDatabase | None = None
    losses: LossTable | None = None
    floor_nats: float | None = None  # KL that the arithmetic of losses costs by itself; None: fp32, or not measured
    calibration: Calibration | None = None
    cache: CacheChoice | None = None  # None: the KV cache is kept as the model is run, and not counted
    problem: Problem | None = None
    front: Front | None = None
    points: tuple[Point, ...] = ()
    end_to_end: EndToEnd | None = None
    refit: Calibration | None = None  # the same from the finalists' run, to judge predictions by
    certificates: dict[str, Certificate] | None = None
    chosen: Point | None = None
    reason: str = ""  # why that one
    plan: Plan | None = None
    report: dict[str, Any] | None = None
