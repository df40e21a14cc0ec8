"""`report.html`: the whole report as one self-contained page.

Nothing is loaded from anywhere: plotly.js is inlined once, and the page's own policy forbids every request and every
script but the two written here, by their hashes. All text is escaped by construction (`markup`).
"""

from __future__ import annotations

import base64
import hashlib

from plotly.offline import get_plotlyjs

from autotune.report import charts, charts_device, page_assets, page_recovered, page_tables, words
from autotune.report.charts import Chart
from autotune.report.front import has_loss
from autotune.report.markup import Html, join, script_json, tag
from autotune.report.words import Report
from autotune.store import canonical_json


def render(report: Report) -> str:
    drawn = _charts(report)
    scripts = (get_plotlyjs(), page_assets.SCRIPT)
    body = tag(
        "main",
        _head(report),
        _notices(report),
        _tiles(report),
        page_tables.speed_table(report),
        join(_section(identity, report) for identity in drawn),
        _groups(report),
        page_recovered.section(report),
        _samples(report),
        _run(report),
    )
    data = Html(script_json(canonical_json(drawn)))
    return "<!doctype html>\n" + tag(
        "html",
        _html_head(report, scripts),
        tag(
            "body",
            body,
            tag("script", data, type="application/json", id="charts"),
            join(tag("script", Html(script)) for script in scripts),
        ),
        lang="en",
    )


def _html_head(report: Report, scripts: tuple[str, ...]) -> Html:
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{report['model']['name']} on {report['target']['name']}: autotune report"),
        tag("style", Html(page_assets.CSS)),
    )


def _charts(report: Report) -> dict[str, Chart]:
    """In the order of the page; those with nothing to show are left out."""
    drawn = {
        "front": charts.front_chart(report),
        "layers": charts_device.heat_chart(report),
        "sensitivity": charts.sensitivity_chart(report),
        "prediction": charts.saving_chart(report),
        "roofline": charts_device.roofline_chart(report),
        "bytes": charts_device.bytes_chart(report),
    }
    return {name: chart for name, chart in drawn.items() if chart is not None}


def _head(report: Report) -> Html:
    line = f"{words.workload(report)}. Budget: {words.budget(report)}."
    made = f"{report['generator']}, {report['created']}"
    title = tag("h1", f"{report['model']['name']} on {report['target']['name']}")
    return tag("header", title, tag("p", line, tag("br"), made, class_="muted"))


def _notices(report: Report) -> Html:
    said = words.notices(report)
    return tag("ul", *(tag("li", text) for text in said), class_="warnings") if said else Html("")


def _tiles(report: Report) -> Html:
    dense, plan = report["dense"], report["plan"]
    gain = words.speedup_text(report)
    if plan["speedup"]:
        low, high = words.times(plan["speedup"]["low"]), words.times(plan["speedup"]["high"])
        gain += f" ({words.between(low, high)})"
    if words.timing(report) != "measured":
        gain += f", {words.timing(report)}"
    times = words.change(words.ms(words.dense_ms(report)), words.ms(words.plan_ms(report)))
    smaller = plan["weight_bytes"] / dense["weight_bytes"] - 1
    sizes = words.change(words.size(dense["weight_bytes"]), words.size(plan["weight_bytes"]))
    tiles = [_tile("Time of one workload", times, gain), _tile("Weights", sizes, words.signed(f"{smaller:+.0%}"))]
    if dense["perplexity"] is not None and plan["perplexity"] is not None:
        both = f"{dense['perplexity']:.2f} → {plan['perplexity']:.2f}"
        tiles.append(_tile("Perplexity", both, words.loss(report).removeprefix("perplexity ")))
    elif plan["loss_upper_95"] is not None:
        tiles.append(_tile("Relative squared error", f"≤ {plan['loss_upper_95']:.3g}", "95% bound"))
    tiles.append(_tile("Accuracy", words.STATES[plan["certified"]], plan["statement"], plan["certified"]))
    return tag("div", *tiles, class_="tiles")


def _tile(name: str, big: str, was: str, state: str = "") -> Html:
    number = tag("div", big, class_=f"big {state}".strip())
    return tag("div", tag("div", name, class_="name"), number, tag("div", was, class_="was"), class_="tile")


def _section(identity: str, report: Report) -> Html:
    title, note = _captions(report)[identity]
    return tag("section", tag("h2", title), tag("p", note, class_="note"), tag("div", id=identity, class_="chart"))


def _captions(report: Report) -> dict[str, tuple[str, str]]:
    front = "Lower left is better. The front the search found, the finalists and what it was compared with"
    front += ", with its loss on the search documents." if has_loss(report) else "; no loss was measured."
    if report["budget"]["limit_nats"] and not words.is_encoder(report):
        front += " The budget limits the rise of perplexity; KL tracks it closely but is a different number."
    reference = charts.sensitivity_reference(report)
    return {
        "front": ("Latency against loss", front),
        "layers": ("Layer by layer", "What each group got, and the time that saves. Hover for the reason."),
        "sensitivity": (
            "Sensitivity",
            f"Loss if this group alone were {reference}, most sensitive first; the colour is what the plan gave it.",
        ),
        "prediction": ("Is the prediction true?", _prediction(report)),
        "roofline": (
            "Roofline",
            f"Every group, dense and chosen, against the device's ceilings ({report['target']['ceilings']['source']}). "
            "Hollow: estimated, not measured.",
        ),
        "bytes": ("Where the bytes are", "Weights by projection and scheme."),
    }


def _prediction(report: Report) -> str:
    prediction = report["prediction"]
    if not prediction:
        return ""
    said = "Predicted against measured saving over dense, which is harder than predicting totals."
    if prediction["median_error"] is not None:
        said += f" Median error {prediction['median_error']:.1%}."
    if prediction["spearman"] is not None:
        said += f" Rank correlation {prediction['spearman']:.2f}."
    if prediction["search"]["median_error"] is not None:
        said += f" As the search believed before (hollow): median error {prediction['search']['median_error']:.1%}."
    verdict = str(prediction["verdict"])
    return f"{said} {verdict[:1].upper()}{verdict[1:]}"


def _groups(report: Report) -> Html:
    counts = ", ".join(words.many(count, scheme) for scheme, count in report["schemes"].items())
    note = f"{counts}. Open a row for every scheme that was considered, with its time, loss and reason."
    if cache := report.get("kv_cache"):
        note += f" KV cache: {cache['why']}."
    title = tag("h2", "Why each group got what it got")
    kept = report["kept_dense"]
    dense = page_tables.facts(kept) if kept else Html("")
    head = tag("h3", "Kept dense") if kept else Html("")
    return tag("section", title, tag("p", note, class_="note"), page_tables.group_table(report), head, dense)


def _samples(report: Report) -> Html:
    samples = report["samples"]
    if not samples:
        return Html("")
    parts = [(tag("h3", name), tag("pre", samples[key])) for name, key in (("Dense", "dense"), ("Plan", "plan"))]
    both = tag("div", *(tag("div", *part) for part in parts), class_="columns")
    return tag("section", tag("h2", "The same prompt, continued by both"), tag("pre", samples["prompt"]), both)


def _run(report: Report) -> Html:
    return tag("section", tag("h2", "This run"), page_tables.setting(report), page_tables.run_tables(report))
