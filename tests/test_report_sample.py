"""Synthetic `report.json` contents, one of every kind, for the other report tests to draw."""

from __future__ import annotations

import json
import math
import random

DENSE = "bf16"
SPEED = {DENSE: 1.0, "w8a8-int8": 0.46, "w8a16-int8": 0.58, "w4a16-int4-g128": 0.36, "w4a16-int4-g64": 0.38}
BITS = {DENSE: 16.0, "w8a8-int8": 8.0, "w8a16-int8": 8.0, "w4a16-int4-g128": 4.125, "w4a16-int4-g64": 4.25}
LOSS = {DENSE: 0.0, "w8a8-int8": 8e-5, "w8a16-int8": 2e-5, "w4a16-int4-g128": 2.4e-3, "w4a16-int4-g64": 1.5e-3}
SHAPES = {"qkv": (2048, 3072), "o": (2048, 2048), "gate_up": (2048, 11264), "down": (5632, 2048)}


def _option(scheme, chosen, weights, sensitivity):
    if scheme == "w8a8-fp8":
        reason = "cpu_fp8: avx512 machine lacks fp8"
        keys = ("latency_us", "loss_nats", "low_nats", "high_nats", "weight_bytes")
        return {"scheme": scheme, "status": "illegal", "reason": reason, "chosen": False} | dict.fromkeys(keys)
    loss = LOSS[scheme] * sensitivity
    return {
        "scheme": scheme,
        "status": "runs",
        "reason": "kernels here: onednn",
        "latency_us": weights * SPEED[scheme] / 2.5e4,
        "loss_nats": loss,
        "low_nats": 0.7 * loss,
        "high_nats": 1.35 * loss,
        "weight_bytes": int(weights * BITS[scheme] / 8),
        "chosen": chosen,
    }


def _group(name, role, layer, shape, scheme, sensitivity):
    weights = shape[0] * shape[1]
    options = [_option(item, item == scheme, weights, sensitivity) for item in (*SPEED, "w8a8-fp8")]
    mine = next(option for option in options if option["chosen"])
    roofline = []
    for phase, rows in (("prefill", 128), ("decode", 1)):
        for item in (DENSE, scheme) if scheme != DENSE else (DENSE,):
            ops, size = 2.0 * rows * weights, weights * BITS[item] / 8 + rows * sum(shape) * 2
            floor = max(size / 90e3, ops / (3.2e6 if "w8a8" in item else 1.6e6))
            row = {"phase": phase, "rows": rows, "scheme": item, "kernel": "onednn", "measured_us": floor * 1.4}
            row |= {"floor_us": floor, "bound": "memory" if rows == 1 else "compute", "ops": ops, "bytes": size}
            row["peak_share"] = ops / (3.2e6 if "w8a8" in item else 1.6e6) / row["measured_us"]
            roofline.append(row)
    return {
        "name": name,
        "role": role,
        "layer": layer,
        "scheme": scheme,
        "kernel": "onednn",
        "why": "fastest option inside the budget" if scheme != DENSE else "kept dense: compressed is slower here",
        "compression": {"method": "joint", "layer_error": 0.0023} if scheme != DENSE else None,
        "latency_us": mine["latency_us"],
        "dense_latency_us": options[0]["latency_us"],
        "loss_nats": mine["loss_nats"],
        "weight_bytes": mine["weight_bytes"],
        "dense_bytes": weights * 2,
        "weights": weights,
        "in_features": shape[0],
        "out_features": shape[1],
        "experts": {"count": 8, "per_token": 2, "hardly_reached": 1} if (role, layer) == ("down", 1) else None,
        "options": options,
        "roofline": roofline,
    }


def _groups(layers, generator):
    groups = []
    for layer in range(layers):
        for role, shape in SHAPES.items():
            edge = 4.0 if layer in (0, layers - 1) else 1.0
            sensitivity = edge * math.exp(generator.gauss(0, 0.6)) / layers
            choices = ["w4a16-int4-g128", "w4a16-int4-g64", "w8a8-int8", "w8a16-int8"]
            scheme = choices[min(3, int(sensitivity * layers))]
            block = "self_attn" if role in ("qkv", "o") else "mlp"
            groups.append(_group(f"model.layers.{layer}.{block}.{role}", role, layer, shape, scheme, sensitivity))
    groups.append(_group("lm_head", "lm_head", None, (2048, 32000), DENSE, 2.0))
    return groups


def _interval(median, width=0.02):
    return {"median": median, "low": median * (1 - width), "high": median * (1 + width)}


def _point(name, source, latency, kl, total, **more):
    point = {
        "name": name,
        "source": source,
        "uniform": None,
        "predicted_latency_ms": latency,
        "measured_latency_ms": None,
        "kl_nats": {"mean": kl, "low": kl * 0.8, "high": kl * 1.25},
        "loss": kl * 0.9,
        "weight_bytes": int(total * latency / 30),
        "pareto": False,
        "chosen": False,
        "finalist": False,
        "certified": None,
    }
    return point | more


def _front(dense_ms, plan_ms, total, generator):
    front = [_point("dense", "dense", dense_ms, 0.0, total, uniform=DENSE, measured_latency_ms=_interval(dense_ms))]
    for scheme in list(SPEED)[1:]:
        latency = dense_ms * (0.25 + 0.75 * SPEED[scheme])
        front.append(
            _point(f"uniform {scheme}", f"uniform {scheme}", latency, LOSS[scheme] * 30, total, uniform=scheme)
        )
    for index in range(14):
        latency = plan_ms * (0.85 + index * 0.05)
        kl = 0.03 * math.exp(-index / 2.2)
        more = {"pareto": True, "finalist": index in (2, 3, 4), "chosen": index == 3}
        if more["finalist"]:
            more |= {
                "measured_latency_ms": _interval(plan_ms if index == 3 else latency * 1.02, 0.01),
                "certified": "certified" if index > 2 else None,
            }
        front.append(_point(f"study {index}", f"study {index}", latency, kl, total, **more))
    for index in range(25):
        latency = plan_ms * generator.uniform(1.05, 1.6)
        front.append(_point(f"t{index}", "higgs", latency, 0.02 * math.exp(generator.gauss(0.3, 1)), total))
    return front


def _calibration(rest_ms):
    factors = {scheme: {"prefill": 1.0 + 0.03 * i, "decode": 1.1 + 0.02 * i} for i, scheme in enumerate(SPEED)}
    return {"rest_ms": {"prefill": 0.2 * rest_ms, "decode": 0.8 * rest_ms}, "factors": factors}


def make(layers=12):
    """A certified causal model, tuned and measured on this machine."""
    generator = random.Random(0)
    groups = _groups(layers, generator)
    rest = 4.0
    plan_ms = rest + sum(group["latency_us"] for group in groups) / 1e3
    dense_ms = rest + sum(group["dense_latency_us"] for group in groups) / 1e3
    dense_bytes = sum(group["dense_bytes"] for group in groups) + 4_000_000
    plan_bytes = sum(group["weight_bytes"] for group in groups) + 4_000_000
    counts = {}
    for group in groups:
        counts[group["scheme"]] = counts.get(group["scheme"], 0) + 1
    half = {"calibration": 64, "search": 80, "certification": 160}
    return {
        "schema_version": 2,
        "generator": "autotune 0.1.0",
        "created": "2026-11-21T03:00:00Z",
        "model": {
            "name": "acme/Llama-1B",
            "architecture": "LlamaForCausalLM",
            "task": "causal-lm",
            "dtype": DENSE,
            "sha256": "3f" * 32,
            "parameters": dense_bytes // 2,
            "groups": len(groups),
            "tied_embeddings": False,
        },
        "target": {
            "name": "xeon-8488c",
            "model": "Intel Xeon Platinum 8488C",
            "device": "cpu",
            "cores": 8,
            "features": ["avx512_vnni", "amx_int8"],
            "local": True,
            "machine_code": {},
            "ceilings": {
                "read_gb_per_s": [[2**20, 900.0], [2**25, 310.0], [2**30, 90.0]],
                "tera_ops": {"bf16": 1.6, "int8": 3.2, "fp32": 0.4},
                "launch_us": 2.0,
                "source": "measured",
            },
        },
        "workload": {"name": "chat", "requests": [{"batch": 1, "prompt": 128, "generated": 64, "weight": 1.0}]},
        "budget": {
            "max_loss": 0.01,
            "max_memory_bytes": None,
            "min_speedup": None,
            "limit_nats": 0.00995,
            "search_limit_nats": 0.0078,
            "loss_ratio": {"mean": 0.84, "error": 0.12, "spread": 0.15},
        },
        "data": {
            "name": "stdlib_documents",
            "digest": "ab" * 32,
            "unit": "LlamaTokenizer",
            "documents": half,
            "tokens": {key: value * 1000 for key, value in half.items()},
        },
        "dense": {
            "prefill_ms": _interval(dense_ms * 0.2),
            "decode_ms": _interval(dense_ms * 0.8 / 64),
            "latency_ms": _interval(dense_ms),
            "perplexity": 12.31,
            "weight_bytes": dense_bytes,
        },
        "plan": {
            "prefill_ms": _interval(plan_ms * 0.2),
            "decode_ms": _interval(plan_ms * 0.8 / 64),
            "latency_ms": _interval(plan_ms),
            "perplexity": 12.38,
            "weight_bytes": plan_bytes,
            "predicted_latency_ms": plan_ms * 0.98,
            "kl_nats": {"mean": 0.0077, "low": 0.0069, "high": 0.0085},
            "predicted_kl_nats": 0.0074,
            "loss_upper_95": 0.0087,
            "certified": "certified",
            "statement": "certified on stdlib_documents, 160 documents, 160,000 tokens, 95%",
            "why": "point 3 is as fast as point 2 within what the run can tell, and safer",
            "speedup": _interval(dense_ms / plan_ms),
        },
        "schemes": counts,
        "kept_dense": {"lm_head": "compressed is slower here"},
        "groups": groups,
        "front": _front(dense_ms, plan_ms, dense_bytes, generator),
        "prediction": {
            "points": [
                {
                    "name": f"uniform {scheme}",
                    "predicted_saving_ms": 6 * index,
                    "search_saving_ms": 6.4 * index,
                    "measured_saving_ms": _interval(5.8 * index, 0.06),
                }
                for index, scheme in enumerate(SPEED)
            ],
            "median_error": 0.034,
            "spearman": 1.0,
            "search": {"median_error": 0.1, "spearman": 1.0},
            "drift": {"dense_ms": {"then": 158.0, "now": 150.0}, "savings": 0.91},
            "holds": True,
            "verdict": "predicted savings hold on this machine",
        },
        "calibration": _calibration(rest),
        "seconds": {"open": 1.2, "profile": 94.0, "compress": 61.0, "score": 120.5, "search": 210.0, "certify": 88.0},
        "optuna": {"trials": 220, "seconds": 6.4, "share": 0.03},
        "warnings": ["bundled text, not your task: certify on your own documents with --data FILE"],
        "versions": {"autotune": "0.1.0", "torch": "2.11.0", "transformers": "5.0.0"},
        "samples": {
            "prompt": "The compiler reads the file and",
            "dense": "The compiler reads the file and builds a tree of its expressions.",
            "plan": "The compiler reads the file and builds a tree of its statements.",
        },
    }


def estimated(layers=12):
    """A target that is not this machine: nothing was timed."""
    report = make(layers)
    report["target"] |= {"name": "h100-sxm", "model": "NVIDIA H100 80GB HBM3", "device": "cuda", "local": False}
    for side in ("dense", "plan"):
        report[side] |= {"prefill_ms": None, "decode_ms": None, "latency_ms": None}
    report["plan"]["speedup"] = report["prediction"] = report["calibration"] = None
    for point in report["front"]:
        point["measured_latency_ms"] = None
    for group in report["groups"]:
        for row in group["roofline"]:
            row["measured_us"] = None
        for option in group["options"]:
            option["status"] = "estimated" if option["status"] == "runs" else option["status"]
    return report


def latency_only():
    """A bare config.json: no weights, so no loss, no data, no samples."""
    report = make()
    report["model"] |= {"sha256": None, "name": "config only"}
    report["data"] = report["samples"] = None
    report["budget"] = dict.fromkeys(report["budget"])
    report["dense"]["perplexity"] = None
    nothing = dict.fromkeys(("perplexity", "kl_nats", "predicted_kl_nats", "loss_upper_95"))
    report["plan"] |= nothing | {"certified": "not_applicable", "statement": "certification not applicable"}
    for point in report["front"]:
        point |= {"kl_nats": None, "loss": None}
    for group in report["groups"]:
        group["loss_nats"] = None
        for option in group["options"]:
            option |= {"loss_nats": None, "low_nats": None, "high_nats": None}
    return report


def encoder():
    report = make(6)
    report["model"] |= {"task": "encoder", "architecture": "BertModel", "name": "acme/bert-mini"}
    report["workload"] = {"name": "prefill", "requests": [{"batch": 8, "prompt": 128, "generated": 0, "weight": 1.0}]}
    report["dense"] |= {"perplexity": None, "decode_ms": None}
    report["plan"] |= {"perplexity": None, "decode_ms": None, "loss_upper_95": 0.0087}
    report["samples"] = None
    report["groups"] = report["groups"][:-1]
    return report


def not_certified():
    report = make()
    said = (
        "not certified on stdlib_documents, 160 documents, 160,000 tokens, 95% (about 40,000 more tokens would decide)"
    )
    report["plan"] |= {"certified": "not_certified", "statement": said, "loss_upper_95": 0.0121}
    return report


VARIANTS = {
    "certified": make,
    "estimated": estimated,
    "latency_only": latency_only,
    "encoder": encoder,
    "not_certified": not_certified,
    "one_layer": lambda: make(1),
    "eighty_layers": lambda: make(80),
}


def test_the_samples_are_json():
    for build in VARIANTS.values():
        assert json.loads(json.dumps(build(), allow_nan=False)) == build()
