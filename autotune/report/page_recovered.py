"""The page's section on training after compression: what was found, promised, measured and won."""

from __future__ import annotations

from typing import Any

from autotune.report import words
from autotune.report.markup import Html, tag
from autotune.report.page_tables import facts, table
from autotune.report.words import Report


def section(report: Report) -> Html:
    made = report.get("recovered")
    if not made:
        return Html("")
    parts = [_result(made)]
    if found := made.get("searched"):
        parts += [tag("h3", "What training leaves of a loss"), _factors(found)]
        parts += [tag("h3", "Candidates"), _candidates(found)]
    note = "Beside the plan above: another one, whose weights were trained after compression. It is in recovered/."
    return tag("section", tag("h2", "Trained after compression"), tag("p", note, class_="note"), *parts)


def _result(made: dict[str, Any]) -> Html:
    losses, certificate, speedup = made["search_documents"], made["certificate"], made["speedup"]
    kl = words.change(words.nats(losses["kl_nats_before"]), words.nats(losses["kl_nats"]))
    upper = words.nats(certificate["loss"]["upper"])
    rows: dict[str, object] = {
        "configuration": made["configuration"],
        "trained on": f"{made['tokens']:,} tokens, {made['seconds'] / 60:.1f} min",
        "KL on the search documents": f"{kl} nats",
        "certificate": f"{certificate['statement']}: loss at most {upper}, budget {words.nats(certificate['limit'])}",
    }
    if promise := made.get("promise"):
        held = "holds" if promise["holds"] else "does not hold"
        rows["KL promised before"] = f"{_nats(promise)} nats; the interval {held} what was measured"
    if speedup:
        low, high = words.times(speedup["low"]), words.times(speedup["high"])
        rows["over dense, end to end"] = f"{words.times(speedup['median'])} ({words.between(low, high)})"
    if made.get("noisy"):
        rows["that says little"] = made["noisy"]
    return facts(rows)


def _factors(found: dict[str, Any]) -> Html:
    rows = [
        (
            item["kind"],
            " and ".join(str(len(one["groups"])) for one in item["sets"]),
            " and ".join(_share(one) for one in item["sets"]),
            _share(item["at_budget"]),
            _share(item["corrected"]),
        )
        for item in found["factors"]
    ]
    measured = f"KL left after {found['short_steps']} steps, measured"
    head = ("kind of scheme", "groups trained", measured, f"after {found['steps']} steps, promised", "corrected")
    ratio = found["correction"]
    mean, low, high = (f"{ratio[key]:.2f}" for key in ("ratio", "low", "high"))
    note = f"Corrected: candidates were left with {mean} times ({words.between(low, high)}) what was promised."
    return tag("div", table(head, rows, numbers=(1, 2, 3, 4)), tag("p", note, class_="note"))


def _share(item: dict[str, float]) -> str:
    left, low, high = (f"{item[key]:.0%}" for key in ("left", "low", "high"))
    return f"{left} ({words.between(low, high)})"


def _nats(item: dict[str, float]) -> str:
    return f"{words.nats(item['nats'])} ({words.between(words.nats(item['low']), words.nats(item['high']))})"


def _candidates(found: dict[str, Any]) -> Html:
    rows = [
        (
            f"{item['name']}{', taken' if item['chosen'] else ''}",
            words.ms(item["latency_ms"]),
            words.nats(item["one_shot_nats"]),
            _nats(item["short_promised"]),
            words.nats(item["short_nats"]),
            _nats(item["promised"]),
            _nats(item["expected"]),
        )
        for item in found["candidates"]
    ]
    short = f"after {found['short_steps']} steps"
    head = ("", "time", "KL one-shot", f"{short}, promised", "measured", "by the end, promised", "expected since")
    noisy = f" Times say little: {found['noisy']}." if found["noisy"] else ""
    plan = tag("p", f"The run's plan takes {words.ms(found['plan_latency_ms'])}.{noisy}", class_="note")
    return tag("div", table(head, rows, numbers=(1, 2, 3, 4, 5, 6)), plan)
