"""The page's tables: why every group got what it got, and what the run took and used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autotune.report import palette, words
from autotune.report.grid import Cell, grid
from autotune.report.markup import Html, join, tag
from autotune.report.words import Report

_LOSS = ("loss_nats", "low_nats", "high_nats")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> Html:
    """`numbers`: columns to align right."""

    def cells(name: str, values: Sequence[object]) -> Html:
        return join(tag(name, v, class_="number" if i in numbers else None) for i, v in enumerate(values))

    body = join(tag("tr", cells("td", row)) for row in rows)
    top = tag("thead", tag("tr", cells("th", head))) if head else Html("")
    return tag("div", tag("table", top, tag("tbody", body)), class_="scroll")


def facts(rows: Mapping[str, object]) -> Html:
    body = join(tag("tr", tag("td", key), tag("td", value)) for key, value in rows.items())
    return tag("table", tag("tbody", body), class_="facts")


def scheme_name(scheme: object) -> Html:
    swatch = tag("span", class_="swatch", style=f"background:{palette.colour(str(scheme))}")
    return join([swatch, scheme])


def group_table(report: Report) -> Html:
    names = ("group", "scheme", "time per workload", "loss", "weights", "why")
    head = tag("div", *(tag("span", name) for name in names), class_="row head")
    return tag("div", head, *(_group(cell) for cell in grid(report["groups"]).cells), class_="groups")


def _group(cell: Cell) -> Html:
    group = cell.group
    before, after = words.us(group["dense_latency_us"]), words.us(group["latency_us"])
    summary = tag(
        "summary",
        tag("b", cell.label),
        tag("span", scheme_name(group["scheme"])),
        tag("span", after if before == after else words.change(before, after)),
        tag("span", words.nats(group["loss_nats"])),
        tag("span", words.size(group["weight_bytes"])),
        tag("span", group["why"], class_="muted"),
        class_="row",
    )
    shape = f"{group['in_features']} → {group['out_features']}, {words.count(group['weights'])} weights"
    text = f": {_experts(group['experts'])}{shape}; runs on {group['kernel']}{_compression(group['compression'])}"
    note = tag("p", tag("b", group["name"]), text, class_="note")
    return tag("details", summary, tag("div", note, _options(group["options"]), class_="inside"))


def _experts(experts: dict[str, Any] | None) -> str:
    if experts is None:
        return ""
    few = f", {experts['hardly_reached']} hardly reached by calibration" if experts["hardly_reached"] else ""
    return f"{experts['count']} experts, {experts['per_token']} a token{few}; each "


def _compression(made: dict[str, Any] | None) -> str:
    if made is None:
        return ""
    error = made["layer_error"]
    left = "" if error is None else f", which leaves {100 * error:.2g}% of its output's power as error"
    return f"; compressed by {made['method']}{left}"


def _options(options: Sequence[dict[str, Any]]) -> Html:
    trained = any(option.get("recovered_nats") is not None for option in options)
    names = ["scheme", "status", "time", "loss (nats, 95%)", "weights", "reason"]
    names[4:4] = ["if trained"] if trained else []
    rows = []
    for option in options:
        cells: list[object] = [
            scheme_name(option["scheme"]),
            "chosen" if option["chosen"] else option["status"].replace("_", " "),
            words.us(option["latency_us"]),
            _loss(option),
            words.size(option["weight_bytes"]),
            option["reason"],
        ]
        cells[4:4] = [_loss(option, "recovered_")] if trained else []
        rows.append(tag("tr", *(tag("td", cell) for cell in cells), class_="chosen" if option["chosen"] else None))
    head = tag("tr", *(tag("th", name) for name in names))
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll")


def _loss(option: Mapping[str, Any], column: str = "") -> str:
    keys = [f"{column}{key}" for key in (("nats", "low_nats", "high_nats") if column else _LOSS)]
    mean, low, high = (words.nats(option.get(key)) for key in keys)
    return mean if words.NONE in (mean, low, high) else f"{mean} ({words.between(low, high)})"


def speed_table(report: Report) -> Html:
    """Prefill, a decode step and the whole workload."""
    dense, plan = report["dense"], report["plan"]
    how = " (95%)" if words.measured(report) else ""
    rows = []
    for name, key in (("prefill", "prefill_ms"), ("one decode step", "decode_ms"), ("whole workload", "latency_ms")):
        before, after = dense[key], plan[key]
        if before is None and after is None:
            continue
        gain = words.times(before["median"] / after["median"]) if before and after and after["median"] else words.NONE
        rows.append((name, words.interval_ms(before), words.interval_ms(after), gain))
    if not rows:
        both = words.ms(words.dense_ms(report)), words.ms(words.plan_ms(report))
        rows = [("whole workload", *both, words.times(words.speedup(report)))]
    return table((words.timing(report), f"dense{how}", f"plan{how}", "speed-up"), rows, numbers=(1, 2, 3))


def run_tables(report: Report) -> Html:
    seconds = report["seconds"]
    rows = [(stage, f"{value:,.1f} s") for stage, value in seconds.items()]
    rows.append(("all", f"{sum(seconds.values()):,.1f} s"))
    optuna = report["optuna"]
    search = (
        f"{optuna['trials']} trials; Optuna itself took {optuna['seconds']:.1f} s, {optuna['share']:.1%} of the run."
    )
    stages = tag("div", tag("h3", "Time taken"), table((), rows, numbers=(1,)), tag("p", search, class_="note"))
    versions = tag("div", tag("h3", "Versions"), table((), report["versions"].items()))
    more = (_calibration(report), _smoothing(report), _recompression(report))
    return tag("div", stages, versions, *more, class_="columns")


def _smoothing(report: Report) -> Html:
    made = report.get("smoothing")
    if not made or not made["groups"]:
        return Html("")
    rows = [(row["group"], row["kind"], row["source"], f"{row['left']:.0%}") for row in made["groups"]]
    note = "Loud inputs were made quieter where they come from, by powers of two, and weights larger: the same model."
    drawn = table(("group", "scale", "folded into", "error left"), rows, numbers=(3,))
    return tag("div", tag("h3", "Scaled before rounding"), drawn, tag("p", note, class_="note"))


def _recompression(report: Report) -> Html:
    made = report.get("recompression")
    if not made:
        return Html("")
    rows = [
        (row["name"], row["groups"], words.nats(row["kl_nats_before"]), words.nats(row["kl_nats_after"]), _taken(row))
        for row in made["finalists"]
    ]
    head = ("finalist", "groups", "loss before", "after", "taken")
    note = f"Finalists were compressed once more, {made['method']}; the lower loss on the search documents is taken."
    drawn = table(head, rows, numbers=(1, 2, 3))
    return tag("div", tag("h3", "Compressed again"), drawn, tag("p", note, class_="note"))


def _taken(row: Mapping[str, Any]) -> str:
    return "after" if row["taken"] else "before"


def _calibration(report: Report) -> Html:
    calibration = report["calibration"]
    if not calibration:
        return Html("")
    rest = calibration["rest_ms"]
    rows = [
        (scheme_name(name), *(f"{factors[phase]:.3f}" for phase in rest))
        for name, factors in calibration["factors"].items()
    ]
    note = (
        f"A prediction is {words.ms(sum(rest.values()))} for everything that is not a layer group, plus "
        "each group's kernel time measured alone, times its scheme's factor in that phase."
    )
    drawn = table(("factor", *rest), rows, numbers=tuple(range(1, len(rest) + 1)))
    return tag("div", tag("h3", "Calibration"), drawn, tag("p", note, class_="note"))


def setting(report: Report) -> Html:
    """Model, target, workload, budget and data, as they were."""
    model, target, data = report["model"], report["target"], report["data"]
    tied = ", tied embeddings" if model["tied_embeddings"] else ""
    rows: dict[str, object] = {
        "model": f"{model['architecture']}, {words.count(model['parameters'])} parameters, {model['dtype']}{tied}",
        "model sha256": model["sha256"] or "none: made from a bare config.json",
        "layer groups": model["groups"],
        "target": f"{target['model']} ({target['device']}, {target['cores']} cores)",
        "features": ", ".join(target["features"]) or "none",
        "ceilings": f"from {target['ceilings']['source']}, {target['ceilings']['launch_us']:g} µs a kernel call",
        **({"machine code": codes} if (codes := _machine_codes(report)) else {}),
        "workload": words.workload(report),
        "budget": words.budget(report),
        "chosen": report["plan"]["why"],
    }
    ratio = report["budget"]["loss_ratio"]
    if ratio:
        said = f"{ratio['mean']:.2f} ± {ratio['error']:.2f}, between configurations ± {ratio['spread']:.2f}"
        rows["loss per nat of KL, while searching"] = said
    if data:
        sets = [f"{key} {data['documents'][key]:,} with {data['tokens'][key]:,}" for key in data["documents"]]
        rows |= {"data": f"{data['name']} ({data['digest'][:12]}), tokens: {data['unit']}"}
        rows |= {"documents, tokens": "; ".join(sets)}
    return facts(rows)


def _machine_codes(report: Report) -> str:
    """Each kernel's tensor-core instruction, and the largest share of the compute peak that it reached alone."""
    said = []
    for name, code in report["target"].get("machine_code", {}).items():  # reports of before have none
        rows = [row for group in report["groups"] for row in group["roofline"] if row["kernel"] == name]
        share = max((row["peak_share"] for row in rows), default=None)
        reached = "" if share is None else f" (up to {share:.0%} of the compute peak)"
        said.append(f"{name}: {code or 'a library, which chooses its own'}{reached}")
    return "; ".join(said)
