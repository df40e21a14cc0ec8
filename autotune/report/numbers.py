"""`report.json`: everything the pictures, the page and the terminal say, as one plain value.

Built once at the end of a run from its artifacts; nothing is measured here but the two sample continuations. Keys are
documented in `docs/report.md`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from autotune import __version__
from autotune.decide import Point, configuration
from autotune.documents import BUNDLED
from autotune.kernels.spec import KERNELS
from autotune.model import load_tokenizer
from autotune.planning import PACKAGES, why
from autotune.profilers import roofline
from autotune.profilers.jobs import needed
from autotune.profilers.memory import weight_bytes
from autotune.profilers.table import shape_of
from autotune.search.problem import Candidate, GroupOptions, Option
from autotune.search_space.groups import LayerGroup
from autotune.search_space.schemes import scheme
from autotune.verify import EndToEnd

if TYPE_CHECKING:
    from autotune.models import Models
    from autotune.result import Result

SCHEMA_VERSION = 1
SAMPLE_TOKENS = 48


def build_report(result: Result, models: Models) -> dict[str, Any]:
    """The content of report.json for a run that has reached its choice."""
    session = result.session
    assert result.problem and result.front and result.chosen and result.plan
    return {
        "schema_version": SCHEMA_VERSION,
        "generator": f"autotune {__version__}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": _model(result),
        "target": _target(result),
        "workload": {"name": session.workload.name, "requests": [asdict(r) for r in session.workload.requests]},
        "budget": _budget(result),
        "data": _data(result),
        "dense": _dense(result),
        "plan": _plan(result),
        "schemes": dict(Counter(configuration(result.problem, result.chosen.candidate.genotype).values())),
        "kept_dense": _kept_dense(result),
        "groups": _groups(result),
        "front": _front(result),
        "prediction": _prediction(result),
        "calibration": _calibration(result),
        "seconds": session.folder.seconds(),
        "optuna": _optuna(result),
        "warnings": _warnings(result),
        "versions": {name: version(name) for name in (*PACKAGES, "safetensors", "tokenizers")},
        "samples": _samples(result, models),
    }


def _model(result: Result) -> dict[str, Any]:
    spec = result.session.spec
    parameters = sum(group.weights for group in spec.groups) + sum(math.prod(t.shape) for t in spec.kept)
    if spec.tied_embeddings:
        parameters -= sum(group.weights for group in spec.groups if group.role == "lm_head")
    return {
        "name": spec.name,
        "architecture": spec.architecture,
        "task": spec.task,
        "dtype": spec.dtype,
        "sha256": spec.model_hash,
        "parameters": parameters,
        "groups": len(spec.groups),
        "tied_embeddings": spec.tied_embeddings,
    }


def _target(result: Result) -> dict[str, Any]:
    target = result.session.target
    keys = ("name", "model", "device", "cores", "features")
    value = {key: target.to_json()[key] for key in keys}
    return value | {"local": result.session.local, "ceilings": target.to_json()["ceilings"]}


def _budget(result: Result) -> dict[str, Any]:
    session, config = result.session, result.session.config
    return {
        "max_loss": None if config.latency_only else config.max_loss,
        "max_memory_bytes": config.max_memory_bytes,
        "min_speedup": config.min_speedup,
        "limit_nats": _finite(session.limit),
        "search_limit_nats": None if config.latency_only else _finite(session.search_limit),
    }


def _data(result: Result) -> dict[str, Any] | None:
    session = result.session
    if session.config.latency_only:
        return None
    used = {
        "calibration": session.calibration_documents,
        "search": session.search_documents,
        "certification": session.certification_documents,
    }
    return {
        "name": session.documents.name,
        "digest": session.documents.digest,
        "unit": session.documents.tokens,
        "documents": {name: len(documents) for name, documents in used.items()},
        "tokens": {name: sum(map(len, documents)) for name, documents in used.items()},
    }


def _dense(result: Result) -> dict[str, Any]:
    problem = result.problem
    assert problem is not None
    certificate = _certificate(result)
    return _measured(result.end_to_end, "dense") | {
        "perplexity": certificate.dense_perplexity if certificate and not _encoder(result) else None,
        "weight_bytes": problem.weight_bytes(problem.dense),
    }


def _plan(result: Result) -> dict[str, Any]:
    chosen, certificate = result.chosen, _certificate(result)
    assert chosen is not None
    encoder = _encoder(result)
    value = _measured(result.end_to_end, chosen.name) | {
        "perplexity": certificate.perplexity if certificate and not encoder else None,
        "weight_bytes": chosen.candidate.weight_bytes,
        "predicted_latency_ms": chosen.candidate.latency_us / 1e3,
        "predicted_kl_nats": None if result.losses is None else chosen.candidate.predicted_loss_nats,
        "kl_nats": None,
        "loss_upper_95": None,
        "certified": "not_applicable",
        "statement": "certification not applicable: no loss was measured",
        "speedup": asdict(result.end_to_end.speedup(chosen.name)) if result.end_to_end else None,
    }
    if certificate:
        kl, upper = certificate.kl, certificate.loss.upper
        value |= {
            "kl_nats": {"mean": kl.mean, "low": kl.lower, "high": kl.upper},
            "loss_upper_95": upper if encoder else math.expm1(upper),
            "certified": certificate.state,
            "statement": certificate.statement,
        }
        if not result.session.local:
            value["statement"] += f"; in reference arithmetic, the kernels of {result.session.target.name} did not run"
    elif result.losses is not None:
        value |= {"certified": "not_certified", "statement": "not tested: a safer configuration failed certification"}
    return value


def _encoder(result: Result) -> bool:
    return result.session.spec.task == "encoder"


def _certificate(result: Result) -> Any:
    assert result.chosen is not None
    return (result.certificates or {}).get(result.chosen.name)


def _measured(end_to_end: EndToEnd | None, name: str) -> dict[str, Any]:
    keys = ("prefill_ms", "decode_ms", "latency_ms")
    if end_to_end is None:
        return dict.fromkeys(keys)
    run = end_to_end.of(name)
    return {key: asdict(getattr(run, key)) for key in keys}


def _kept_dense(result: Result) -> dict[str, str]:
    assert result.problem and result.chosen
    options = result.problem.chosen(result.chosen.candidate.genotype)
    pairs = zip(result.problem.groups, options, strict=True)
    return {g.name: why(g, o, result.space) for g, o in pairs if o is g.options[0]}


def _groups(result: Result) -> list[dict[str, Any]]:
    assert result.problem and result.chosen
    options = result.problem.chosen(result.chosen.candidate.genotype)
    return [
        _group(result, group, item, option)
        for group, item, option in zip(result.session.spec.groups, result.problem.groups, options, strict=True)
    ]


def _group(result: Result, group: LayerGroup, item: GroupOptions, chosen: Option) -> dict[str, Any]:
    dense = item.options[0]
    return {
        "name": group.name,
        "role": group.role,
        "layer": group.layer,
        "scheme": chosen.scheme,
        "kernel": chosen.kernel,
        "why": why(item, chosen, result.space),
        "latency_us": chosen.latency_us,
        "dense_latency_us": dense.latency_us,
        "loss_nats": chosen.loss_nats if result.losses else None,
        "weight_bytes": chosen.weight_bytes,
        "dense_bytes": dense.weight_bytes,
        "weights": group.weights,
        "in_features": group.in_features,
        "out_features": group.out_features,
        "options": _options(result, group, item, chosen),
        "roofline": _roofline(result, group, {dense.scheme, chosen.scheme}),
    }


def _options(result: Result, group: LayerGroup, item: GroupOptions, chosen: Option) -> list[dict[str, Any]]:
    survivors = {option.scheme: option for option in item.options}
    intervals = {(row.group, row.scheme): row for row in result.losses.rows} if result.losses else {}
    rows = []
    for entry in (entry for entry in result.space.entries if entry.group == group.name):
        option, loss = survivors.get(entry.scheme), intervals.get((group.name, entry.scheme))
        rows.append(
            {
                "scheme": entry.scheme,
                "status": entry.legality.status,
                "reason": entry.legality.reason,
                "latency_us": option.latency_us if option else None,
                "loss_nats": loss.loss_nats if loss else 0.0 if option and result.losses else None,
                "low_nats": loss.low_nats if loss else None,
                "high_nats": loss.high_nats if loss else None,
                "weight_bytes": option.weight_bytes if option else None,
                "chosen": entry.scheme == chosen.scheme,
            }
        )
    return rows


def _roofline(result: Result, group: LayerGroup, schemes: set[str]) -> list[dict[str, Any]]:
    """Isolated kernel times against the least time the ceilings allow."""
    session = result.session
    status: Any = "runs" if session.local else "estimated"
    jobs = needed(session.spec, result.space, session.target, session.workload, KERNELS, status)
    rows = []
    for phase in session.workload.phases:
        for job in jobs:
            if job.shape != shape_of(group) or job.rows != phase.rows(group) or job.scheme not in schemes:
                continue
            choice = result.table.best(group, job.scheme, session.workload)
            row = next((r for r in result.table.of(group, job.scheme, phase) if r.kernel == job.kernel.name), None)
            if choice is None or choice.kernel != job.kernel.name or row is None or row.median_us is None:
                continue
            rows.append(
                _roof_row(result, phase.name, job, row.median_us, weight_bytes(scheme(job.scheme), group, job.dtype))
            )
    return rows


def _roof_row(result: Result, phase: str, job: Any, measured_us: float, weights: int) -> dict[str, Any]:
    ceilings = result.session.target.ceilings
    moved = weights + roofline.activation_bytes(job)
    working_set = math.inf if job.resident_bytes is None else job.resident_bytes
    memory_us = moved / (ceilings.bandwidth(working_set) * 1e3)
    compute_us = job.operations / (roofline.rate(job.kernel, ceilings) * 1e6)
    bounds = {"memory": memory_us, "compute": compute_us, "launch": ceilings.launch_us}
    return {
        "phase": phase,
        "rows": job.rows,
        "scheme": job.scheme,
        "kernel": job.kernel.name,
        "measured_us": measured_us,
        "floor_us": roofline.least_us(job, ceilings),
        "bound": max(bounds, key=lambda name: bounds[name]),
        "ops": float(job.operations),
        "bytes": float(moved),
    }


def _front(result: Result) -> list[dict[str, Any]]:
    assert result.front is not None
    points = {point.candidate.genotype: point for point in result.points}
    front = result.front
    kept = [front.candidates[index] for index in front.pareto]
    kept += [point.candidate for point in result.points]
    kept += [c for c in front.candidates if not c.source.startswith(("study", "refine"))]
    unique = {candidate.genotype: candidate for candidate in kept}
    pareto = {front.candidates[index].genotype for index in front.pareto}
    rows = [_front_row(result, c, points.get(c.genotype), c.genotype in pareto) for c in unique.values()]
    return sorted(rows, key=lambda row: row["predicted_latency_ms"])


def _front_row(result: Result, candidate: Candidate, point: Point | None, pareto: bool) -> dict[str, Any]:
    assert result.problem and result.chosen
    kl = _mean_interval(candidate.evaluation.kl, candidate.evaluation.tokens) if result.losses else None
    dnll = candidate.evaluation.dnll_nats
    certificate = (result.certificates or {}).get(point.name) if point else None
    run = result.end_to_end.of(point.name) if point and result.end_to_end else None
    dense = candidate.genotype == result.problem.dense
    name = point.name if point else "dense" if dense else candidate.source
    if dense and result.end_to_end:
        run = result.end_to_end.of("dense")
    return {
        "name": name,
        "source": candidate.source,
        "uniform": _uniform(result, candidate),
        "predicted_latency_ms": candidate.latency_us / 1e3,
        "measured_latency_ms": asdict(run.latency_ms) if run else None,
        "kl_nats": kl,
        "loss": None if result.losses is None else dnll if _encoder(result) else math.expm1(dnll),
        "weight_bytes": candidate.weight_bytes,
        "pareto": pareto,
        "chosen": candidate.genotype == result.chosen.candidate.genotype,
        "finalist": bool(point and point.finalist),
        "certified": certificate.state if certificate else None,
    }


def _uniform(result: Result, candidate: Candidate) -> str | None:
    """The scheme's name when this is "that scheme wherever a group offers it"."""
    assert result.problem is not None
    names = {option.scheme for option in result.problem.chosen(candidate.genotype)} - {result.session.spec.dtype}
    if not names:
        return result.session.spec.dtype
    name = next(iter(names))
    return name if len(names) == 1 and result.problem.uniform(name) == candidate.genotype else None


def _mean_interval(sums: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
    """Ratio estimate with a 95% interval over documents."""
    values, weights = np.asarray(sums, float), np.asarray(tokens, float)
    mean = values.sum() / weights.sum()
    residual = values - mean * weights
    error = math.sqrt((residual**2).sum() * len(values) / max(1, len(values) - 1)) / weights.sum()
    return {"mean": float(mean), "low": float(max(0.0, mean - 1.96 * error)), "high": float(mean + 1.96 * error)}


def _prediction(result: Result) -> dict[str, Any] | None:
    """Predicted against measured saving over dense, the only fair test: a constant makes totals easy."""
    if result.end_to_end is None or not result.points or result.problem is None:
        return None
    dense_us = result.problem.latency_us(result.problem.dense)
    points = [
        {
            "name": point.name,
            "predicted_saving_ms": (dense_us - point.candidate.latency_us) / 1e3,
            "measured_saving_ms": asdict(result.end_to_end.saving_ms(point.name)),
        }
        for point in result.points
        if point.name != "dense"
    ]
    return {"points": points, **judge_prediction(points, result.end_to_end.noisy)}


def judge_prediction(points: Sequence[Mapping[str, Any]], noisy: str) -> dict[str, Any]:
    """Median relative error of the saving, rank correlation, and a verdict in words."""
    predicted = np.array([point["predicted_saving_ms"] for point in points])
    measured = np.array([point["measured_saving_ms"]["median"] for point in points])
    if len(points) < 3:
        return {"median_error": None, "spearman": None, "verdict": "too few points to judge"}
    error = float(np.median(np.abs(predicted - measured) / np.maximum(np.abs(measured), 1e-9)))
    distinct = len(set(predicted)) > 1 and len(set(measured)) > 1
    spearman = float(stats.spearmanr(predicted, measured).statistic) if distinct else None
    good = error <= 0.15 and spearman is not None and spearman >= 0.9
    verdict = "predicted savings hold" if good else noisy or "predicted savings are off: trust the measured ones"
    return {"median_error": error, "spearman": spearman, "verdict": verdict}


def _calibration(result: Result) -> dict[str, Any] | None:
    calibration = result.calibration
    if calibration is None or calibration.end_to_end is None:
        return None
    return {"rest_ms": calibration.rest_us / 1e3, "factors": calibration.factors}


def _optuna(result: Result) -> dict[str, Any]:
    assert result.front is not None
    total = sum(result.session.folder.seconds().values())
    seconds = result.front.sampler_seconds
    return {"trials": len(result.front.trials), "seconds": seconds, "share": seconds / total if total else 0.0}


def _warnings(result: Result) -> list[str]:
    session = result.session
    warnings = []
    if not session.config.latency_only and session.documents.name == BUNDLED:
        warnings.append("losses and certificate are for the bundled text, not your task: give --data")
    if not session.config.latency_only and session.documents.tokens.startswith("bytes"):
        warnings.append("the model folder has no tokenizer: bytes stand in for tokens, losses mean little")
    if not session.local:
        warnings.append(
            f"latencies are estimated from the {session.target.ceilings.source} roofline of {session.target.name}"
        )
    if session.opened.checkpoint is None:
        warnings.append("no weights were given: random ones were timed, there is no compressed model to load")
    if result.end_to_end and result.end_to_end.noisy:
        warnings.append(result.end_to_end.noisy)
    noisy = sum(row.noisy for row in result.table.rows)
    if noisy:
        warnings.append(f"{noisy} of {len(result.table.rows)} kernel latencies are noisy")
    return warnings


def _samples(result: Result, models: Models) -> dict[str, str] | None:
    """The same prompt continued by the dense and by the compressed model."""
    session = result.session
    tokenizer = load_tokenizer(session.opened.folder)
    if not session.local or tokenizer is None or session.config.latency_only or _encoder(result):
        return None
    model = models.runnable
    assert model is not None
    assert result.chosen and result.problem
    ids = session.documents.search[0][:64]
    texts = {"prompt": str(tokenizer.decode(ids))}
    chosen = configuration(result.problem, result.chosen.candidate.genotype)
    for name, selected in (("dense", {}), ("plan", chosen)):
        model.select(selected)
        texts[name] = str(tokenizer.decode(model.continue_prompt(ids, SAMPLE_TOKENS)))
    return texts


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
