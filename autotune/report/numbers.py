"""`report.json`: everything the pictures, the page and the terminal say, as one plain value.

Built once at the end of a run from its artifacts; nothing is measured here but the two sample continuations. Keys are
documented in `docs/report.md`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from autotune import __version__, cache_choice, samples
from autotune.compress.sequential import METHOD
from autotune.decide import configuration, of_layers, weight_bytes
from autotune.documents import BUNDLED
from autotune.finalists import front_ratio
from autotune.kernels.machine_code import machine_code
from autotune.kernels.spec import kernel
from autotune.model import load_tokenizer
from autotune.planning import PACKAGES, expert_notes, why
from autotune.report.numbers_front import front_rows
from autotune.report.numbers_groups import group_rows
from autotune.report.numbers_prediction import prediction
from autotune.routing import MOST_TOKENS
from autotune.verify import EndToEnd

if TYPE_CHECKING:
    from autotune.models import Models
    from autotune.result import Result

SCHEMA_VERSION = 2
SAMPLE_TOKENS = 48


def build_report(result: Result, models: Models) -> dict[str, Any]:
    """The content of report.json for a run that has reached its choice."""
    session = result.session
    assert result.problem and result.front and result.chosen and result.plan
    predicted = prediction(result)
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
        "schemes": dict(Counter(o.scheme for _, o in of_layers(result.problem, result.chosen.candidate.genotype))),
        "kv_cache": cache_choice.to_json(result.cache, result.plan.kv_cache),
        "kept_dense": _kept_dense(result),
        "smoothing": _smoothing(result),
        "recompression": _recompression(result),
        "groups": group_rows(result),
        "front": front_rows(result),
        "prediction": predicted,
        "calibration": _calibration(result),
        "seconds": session.folder.seconds(),
        "optuna": _optuna(result),
        "warnings": _warnings(result, predicted),
        "versions": {name: version(name) for name in (*PACKAGES, "safetensors", "tokenizers")},
        "samples": _samples(result, models),
    }


def _model(result: Result) -> dict[str, Any]:
    spec = result.session.spec
    return {
        "name": spec.name,
        "architecture": spec.architecture,
        "task": spec.task,
        "dtype": spec.dtype,
        "sha256": spec.model_hash,
        "parameters": samples.parameters(spec),
        "groups": len(spec.groups),
        "tied_embeddings": spec.tied_embeddings,
    }


def _target(result: Result) -> dict[str, Any]:
    target = result.session.target
    keys = ("name", "model", "device", "cores", "features")
    value = {key: target.to_json()[key] for key in keys}
    value |= {"local": result.session.local, "ceilings": target.to_json()["ceilings"]}
    return value | {"machine_code": _machine_codes(result)}


def _machine_codes(result: Result) -> dict[str, str]:
    """Of the plan's kernels, on a CUDA device that is here; "" for a library's."""
    assert result.plan
    target = result.session.target
    if not result.session.local or target.compute_capability is None:
        return {}
    names = sorted({group.kernel for group in result.plan.groups if group.kernel})
    return {name: machine_code(kernel(name), target.compute_capability) for name in names}


def _budget(result: Result) -> dict[str, Any]:
    session, config = result.session, result.session.config
    return {
        "max_loss": None if config.latency_only else config.max_loss,
        "max_memory_bytes": config.max_memory_bytes,
        "min_speedup": config.min_speedup,
        "limit_nats": _finite(session.limit),
        "search_limit_nats": None if config.latency_only else _finite(session.search_limit),
        "loss_ratio": _loss_ratio(result),
    }


def _loss_ratio(result: Result) -> dict[str, float] | None:
    """dNLL over KL, by which the search documents' KL was turned into a bound of the loss."""
    if result.session.config.latency_only or result.front is None:
        return None
    ratio = front_ratio(result.front, result.session.search_limit)
    return {"mean": ratio.mean, "error": ratio.error, "spread": ratio.spread}


def _data(result: Result) -> dict[str, Any] | None:
    session = result.session
    if session.config.latency_only:
        return None
    used = {
        "calibration": session.calibration_documents,
        "score": session.score_documents,
        "search": session.search_documents,
        "certification": session.certification_documents,
    }
    return {
        "name": session.documents.name,
        "digest": session.documents.digest,
        "unit": session.documents.tokens,
        "documents": {name: len(documents) for name, documents in used.items()},
        "tokens": {name: sum(map(len, documents)) for name, documents in used.items()},
        "reduced": samples.reduced(session.config, session.spec) or None,
        "arithmetic": session.arithmetic,
        "floor_nats": result.floor_nats,
    }


def _dense(result: Result) -> dict[str, Any]:
    problem = result.problem
    assert problem is not None
    certificate = _certificate(result)
    return _measured(result.end_to_end, "dense") | {
        "perplexity": certificate.dense_perplexity if certificate and not _encoder(result) else None,
        "weight_bytes": weight_bytes(problem, problem.dense),
    }


def _plan(result: Result) -> dict[str, Any]:
    chosen, certificate = result.chosen, _certificate(result)
    assert chosen is not None and result.plan is not None
    encoder = _encoder(result)
    value = _measured(result.end_to_end, chosen.name) | {
        "perplexity": certificate.perplexity if certificate and not encoder else None,
        "weight_bytes": result.plan.prediction.weight_bytes,
        "predicted_latency_ms": chosen.candidate.latency_us / 1e3,
        "predicted_kl_nats": None if result.losses is None else chosen.candidate.predicted_loss_nats,
        "kl_nats": None,
        "loss_upper_95": None,
        "certified": "not_applicable",
        "statement": "certification not applicable: no loss was measured",
        "why": result.reason,
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
        if result.end_to_end is None:
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


def _smoothing(result: Result) -> dict[str, Any]:
    rows = [
        {"group": c.fold.site.group, "source": c.fold.site.source, "kind": c.kind, "left": c.left, "worst": c.worst}
        for c in result.smoothed
    ]
    return {"mode": result.session.config.smoothing, "groups": rows}


def _recompression(result: Result) -> dict[str, Any] | None:
    """Every finalist's loss on the search documents with the database's weights, and with weights of its own."""
    made = [(point, point.own) for point in result.points if point.own is not None]
    if not made:
        return None
    rows = [
        {
            "name": point.name,
            "groups": len(own.files),
            "kl_nats_before": own.before.kl_nats,
            "kl_nats_after": own.after.kl_nats,
            "dnll_nats_before": own.before.dnll_nats,
            "dnll_nats_after": own.after.dnll_nats,
            "taken": own.better,
        }
        for point, own in made
    ]
    return {"method": METHOD, "finalists": rows}


def _kept_dense(result: Result) -> dict[str, str]:
    assert result.problem and result.chosen
    pairs = of_layers(result.problem, result.chosen.candidate.genotype)
    return {g.name: why(g, o, result.space) for g, o in pairs if o is g.options[0]}


def _calibration(result: Result) -> dict[str, Any] | None:
    calibration = result.calibration
    if calibration is None or calibration.end_to_end is None:
        return None
    rest_ms = {phase: rest_us / 1e3 for phase, rest_us in calibration.rest_us.items()}
    return {"rest_ms": rest_ms, "factors": calibration.factors}


def _optuna(result: Result) -> dict[str, Any]:
    assert result.front is not None
    total = sum(result.session.folder.seconds().values())
    seconds = result.front.sampler_seconds
    return {"trials": len(result.front.trials), "seconds": seconds, "share": seconds / total if total else 0.0}


def _warnings(result: Result, predicted: dict[str, Any] | None) -> list[str]:
    session = result.session
    warnings = []
    if not session.config.latency_only and session.documents.name == BUNDLED:
        warnings.append("losses and certificate are for the bundled text, not your task: give --data")
    if not session.config.latency_only and session.documents.tokens.startswith("bytes"):
        warnings.append("the model folder has no tokenizer: bytes stand in for tokens, losses mean little")
    if not session.config.latency_only and (note := samples.reduced(session.config, session.spec)):
        warnings.append(note)
    if result.floor_nats is not None:
        floor = f"{result.floor_nats:.1e} {'of relative squared error' if _encoder(result) else 'nats a token'}"
        warnings.append(f"losses were measured in bf16 products, which by themselves cost {floor}")
    warnings += _expert_warnings(result)
    if not session.local:
        warnings.append(
            f"latencies are estimated from the {session.target.ceilings.source} roofline of {session.target.name}"
        )
    elif result.end_to_end is None:
        what = "dense and packed weights together are larger than memory: nothing was run end to end"
        warnings.append(f"{what}, latencies are sums of the kernels' own, and no compressed model was saved")
    if session.opened.checkpoint is None:
        warnings.append("no weights were given: random ones were timed, there is no compressed model to load")
    if result.end_to_end and result.end_to_end.noisy:
        warnings.append(result.end_to_end.noisy)
    if predicted and predicted["holds"] is False and predicted["verdict"] not in warnings:
        warnings.append(predicted["verdict"])
    noisy = sum(row.noisy for row in result.table.rows)
    if noisy:
        warnings.append(f"{noisy} of {len(result.table.rows)} kernel latencies are noisy")
    return warnings


def _expert_warnings(result: Result) -> list[str]:
    groups = [group for group in result.session.spec.groups if group.experts > 1]
    if not groups:
        return []
    warnings = ["kernel latencies of experts assume that tokens choose them with equal probability"]
    session = result.session
    if session.place.recording and any(phase.tokens > MOST_TOKENS for phase in session.workload.phases):
        what = f"passes of more than {MOST_TOKENS} tokens are launched one operator after the other"
        warnings.append(f"{what}, as the host sends tokens to experts: their times hold what launching costs")
    if result.problem and result.chosen:
        chosen = configuration(result.problem, result.chosen.candidate.genotype)
        every = [(g.name.rpartition(".")[0], number) for g in groups for number in range(g.experts)]
        few = {
            (group.name.rpartition(".")[0], number)
            for group in groups
            for number in expert_notes(result, group.name, chosen[group.name])
        }
        if few:
            what = f"calibration hardly reached {len(few)} of {len(set(every))} experts"
            warnings.append(f"{what}: they were compressed for all tokens of their layer")
    return warnings


def _samples(result: Result, models: Models) -> dict[str, str] | None:
    """The same prompt continued by the dense and by the compressed model."""
    session = result.session
    tokenizer = load_tokenizer(session.opened.folder)
    if not models.runs or tokenizer is None or session.config.latency_only or _encoder(result):
        return None
    model = models.runnable
    assert model is not None
    assert result.chosen and result.problem
    ids = session.documents.search[0][:64]
    texts = {"prompt": str(tokenizer.decode(ids))}
    chosen = configuration(result.problem, result.chosen.candidate.genotype)
    for name, selected in (("dense", {}), ("plan", result.chosen.entries(chosen))):
        model.select(selected)
        texts[name] = str(tokenizer.decode(model.continue_prompt(ids, SAMPLE_TOKENS)))
    return texts


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
