"""The report's numbers as words, said the same way in pictures, page and terminal.

Every function takes values or the report dict and returns plain, unescaped text; what does not apply reads as "–".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Report = Mapping[str, Any]

NONE = "\u2013"  # an en dash
STATES = {
    "certified": "Certified",
    "not_certified": "Not certified",
    "violated": "Budget violated",
    "not_applicable": "Not applicable",
}


def line(text: object, length: int) -> str:
    """One line of at most `length` characters."""
    joined = " ".join(str(text).split())
    return joined if len(joined) <= length else joined[: length - 1] + "…"


def times(factor: float) -> str:
    return f"{factor:.2f}\u00d7"


def many(count: int, what: str) -> str:
    return f"{count} \u00d7 {what}"


def between(low: str, high: str) -> str:
    return f"{low}\u2013{high}"


def signed(text: str) -> str:
    """Minus signs as typography has them."""
    return text.replace("-", "\u2212")


def digits(value: float) -> str:
    """Three, or all of a whole number's."""
    return f"{value:#.3g}" if 0.001 <= abs(value) < 99.95 else f"{value:,.0f}" if abs(value) >= 1 else f"{value:.2g}"


def ms(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{digits(value)} ms"


def us(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{digits(value)} µs"


def interval_ms(value: Mapping[str, float] | None) -> str:
    """`5.01 ms (4.95–5.10)`."""
    if value is None:
        return NONE
    low, high = digits(value["low"]), digits(value["high"])
    return f"{ms(value['median'])} ({between(low, high)})"


def size(count: float | None) -> str:
    """Bytes in decimal units, as disks and model cards count."""
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def change(before: str, after: str) -> str:
    """`28.3 → 15.4 ms`: a shared unit is said once."""
    number, _, unit = before.partition(" ")
    return f"{number} → {after}" if unit and after.endswith(f" {unit}") else f"{before} → {after}"


def count(value: float) -> str:
    """1234567 -> `1.23 M`."""
    for unit in ("", " k", " M", " B"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def percent(value: float | None) -> str:
    return NONE if value is None else signed(f"{value:+.2%}")


def nats(value: float | None) -> str:
    return NONE if value is None else f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def rate(value: float) -> str:
    """Operations a second, given in 1e9: 2500 -> `2.5 TOP/s`."""
    return f"{value / 1000:.3g} TOP/s" if value >= 1000 else f"{value:.3g} GOP/s"


def measured(report: Report) -> bool:
    """True when the plan was timed end to end."""
    return report["plan"]["latency_ms"] is not None


def timing(report: Report) -> str:
    """How the times were come by: `measured`, `estimated` (another device) or `predicted` (this device, not run)."""
    return "measured" if measured(report) else "predicted" if report["target"]["local"] else "estimated"


def plan_ms(report: Report) -> float:
    plan = report["plan"]
    return float(plan["latency_ms"]["median"] if plan["latency_ms"] else plan["predicted_latency_ms"])


def dense_ms(report: Report) -> float:
    """Measured, or predicted as the plan is: the plan's time and what its groups save."""
    if report["dense"]["latency_ms"]:
        return float(report["dense"]["latency_ms"]["median"])
    saved_us = sum(group["dense_latency_us"] - group["latency_us"] for group in report["groups"])
    return float(report["plan"]["predicted_latency_ms"] + saved_us / 1e3)


def speedup(report: Report) -> float:
    """Of the workload, dense over plan."""
    given = report["plan"]["speedup"]
    return float(given["median"]) if given else dense_ms(report) / max(plan_ms(report), 1e-9)


def speedup_text(report: Report) -> str:
    if abs(speedup(report) - 1) < 0.005:
        return "as fast as dense"
    return f"{times(speedup(report))} faster" if speedup(report) >= 1 else f"{times(1 / speedup(report))} slower"


def most_saved_us(report: Report) -> float:
    return max((group["dense_latency_us"] - group["latency_us"] for group in report["groups"]), default=0.0)


def saving_unit(report: Report) -> tuple[str, float]:
    """The unit that suits what groups save, and its microseconds."""
    return ("ms", 1e3) if most_saved_us(report) >= 1000 else ("µs", 1.0)


def kernel_timing(report: Report) -> str:
    chosen = (option["status"] for group in report["groups"] for option in group["options"] if option["chosen"])
    return "estimated" if "estimated" in chosen or not report["target"]["local"] else "from measured kernels"


def workload(report: Report) -> str:
    """`chat: batch 1, 128 prompt and 64 generated tokens`; a mix lists its shares."""
    requests = report["workload"]["requests"]
    parts = [f"batch {request['batch']}, {_tokens(request)}" for request in requests]
    if len(parts) > 1:
        parts = [f"{r['weight']:.0%} of {part}" for r, part in zip(requests, parts, strict=True)]
    name = str(report["workload"]["name"])
    said = "; ".join(parts)
    return said if any(mark in name for mark in ",*") else f"{name}: {said}"


def _tokens(request: Mapping[str, Any]) -> str:
    if not request["generated"]:
        return f"{request['prompt']} tokens"
    return f"{request['prompt']} prompt and {request['generated']} generated tokens"


def is_encoder(report: Report) -> bool:
    return bool(report["model"]["task"] == "encoder")


def loss_axis(report: Report) -> str:
    """What `kl_nats` holds."""
    if is_encoder(report):
        return "relative squared error of the outputs"
    return "KL divergence from the dense model (nats per token)"


def loss_limit(report: Report) -> str:
    """`perplexity +1%`."""
    what, limit = _loss_limit(report)
    return f"{what} {limit}"


def _loss_limit(report: Report) -> tuple[str, str]:
    limit = report["budget"]["max_loss"]
    return ("relative squared error", f"{limit:g}") if is_encoder(report) else ("perplexity", f"+{100 * limit:g}%")


def budget(report: Report) -> str:
    """`perplexity at most +1%, weights at most 800 MB`."""
    limits = report["budget"]
    parts = []
    if limits["max_loss"] is not None:
        parts.append(" at most ".join(_loss_limit(report)))
    if limits["max_memory_bytes"] is not None:
        parts.append(f"weights at most {size(limits['max_memory_bytes'])}")
    if limits["min_speedup"] is not None:
        parts.append(f"at least {times(limits['min_speedup'])} faster")
    return ", ".join(parts) or "none"


def perplexity_rise(report: Report) -> float | None:
    before, after = report["dense"]["perplexity"], report["plan"]["perplexity"]
    return None if before is None or after is None else float(after / before - 1)


def loss(report: Report) -> str:
    """`perplexity +0.62%, at most +0.91% (95%)`; for encoders only the bound."""
    rise, upper = perplexity_rise(report), report["plan"]["loss_upper_95"]
    what = "relative squared error" if is_encoder(report) else "perplexity"
    bound = None if upper is None else f"{upper:.3g}" if is_encoder(report) else percent(upper)
    if rise is None and bound is None:
        return "loss not measured"
    if rise is None:
        return f"{what} at most {bound} (95%)"
    return f"{what} {percent(rise)}" + (f", at most {bound} (95%)" if bound else "")


def notices(report: Report) -> list[str]:
    """What a reader must know before believing a number: how times were come by, a failed budget, every warning."""
    said = []
    target = report["target"]["name"]
    warnings = [str(warning) for warning in report["warnings"]]
    if timing(report) == "estimated" and not any("estimated" in warning for warning in warnings):
        said.append(f"Times are estimated from the ceilings of {target}, which is not this machine; none was measured.")
    elif timing(report) == "predicted":
        said.append("Times are predicted from kernels measured alone; the plan was not run end to end.")
    said += _memory_only(report)
    if report["plan"]["certified"] == "not_certified":
        said.append("The loss budget is not certified: the data could not show that the plan stays inside it.")
    if report["plan"]["certified"] == "violated":
        said.append("The loss budget is violated by this plan.")
    if report.get("recovery"):
        said.append(str(report["recovery"]["sentence"]))
    return said + warnings


def _memory_only(report: Report) -> list[str]:
    """Which schemes of the plan save memory and no time, if any does."""
    chosen = [o for group in report["groups"] for o in group["options"] if o["chosen"] and o["status"] == "memory_only"]
    if not chosen:
        return []
    names = ", ".join(sorted({str(option["scheme"]) for option in chosen}))
    groups = f"{len(chosen)} of {len(report['groups'])} groups"
    return [
        f"{groups} are compressed for memory only ({names}): no kernel here makes them fast, they are unpacked anew."
    ]
