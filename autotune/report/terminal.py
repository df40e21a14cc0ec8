"""What the command line prints: the end of a run, a plan as a table, two plans compared.

Colour only emphasizes; every word is there without it, and nothing from a model is read as rich markup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autotune.report import words
from autotune.report.words import Report

if TYPE_CHECKING:
    from autotune.plan import GroupEntry, Plan

STATE_STYLES = {"certified": "bold green", "not_certified": "bold yellow", "violated": "bold red"}


def print_summary(report: Report, console: Console, next_command: str = "autotune export --help") -> None:
    """The end of `autotune tune`: what was gained, what it cost, how sure that is, and what to type next."""
    plan = report["plan"]
    head = f"{report['model']['name']} on {report['target']['name']}: {words.speedup_text(report)}"
    console.print()
    console.print(Text(head if words.measured(report) else f"{head} ({words.timing(report)})", style="bold"))
    console.print(Text(words.workload(report), style="dim"))
    console.print()
    console.print(_numbers(report))
    console.print()
    statement = Text(
        plan["statement"][:1].upper() + plan["statement"][1:], style=STATE_STYLES.get(plan["certified"], "")
    )
    if plan["loss_upper_95"] is not None or words.perplexity_rise(report) is not None:
        statement.append(f": {words.loss(report)}", style="default not bold")
    console.print(statement)
    counts = sorted(report["schemes"].items(), key=lambda item: -item[1])
    console.print(Text("Schemes: " + ", ".join(words.many(count, scheme) for scheme, count in counts)))
    if cache := report.get("kv_cache"):
        console.print(Text(f"KV cache: {cache['why']}"))
    console.print(Text(f"Chosen: {plan['why']}"))
    for notice in words.notices(report):
        console.print(Text(f"Note: {notice}", style="yellow"))
    _samples(report, console)
    console.print()
    console.print(Text("Next: ").append(next_command, style="bold"), soft_wrap=True)


def _numbers(report: Report) -> Table:
    dense, plan = report["dense"], report["plan"]
    table = _table("", "dense", "plan", "", right=(1, 2, 3))
    for name, key in (("prefill", "prefill_ms"), ("decode step", "decode_ms"), ("workload", "latency_ms")):
        before, after = dense[key], plan[key]
        if before and after:
            gain = words.times(before["median"] / after["median"]) if after["median"] else ""
            table.add_row(name, words.ms(before["median"]), words.ms(after["median"]), gain)
    if not words.measured(report):
        times = words.ms(words.dense_ms(report)), words.ms(words.plan_ms(report))
        table.add_row(f"workload, {words.timing(report)}", *times, words.times(words.speedup(report)))
    smaller = words.signed(f"{plan['weight_bytes'] / dense['weight_bytes'] - 1:+.0%}")
    table.add_row("weights", words.size(dense["weight_bytes"]), words.size(plan["weight_bytes"]), smaller)
    rise = words.perplexity_rise(report)
    if rise is not None:
        table.add_row("perplexity", f"{dense['perplexity']:.2f}", f"{plan['perplexity']:.2f}", words.percent(rise))
    return table


def _samples(report: Report, console: Console) -> None:
    samples = report["samples"]
    if not samples:
        return
    console.print()
    console.print(Text("The same prompt, continued by both:"))
    for name in ("prompt", "dense", "plan"):
        console.print(Text(name, style="dim"))
        console.print(Padding(Text(words.line(samples[name], 600)), (0, 0, 0, 2), expand=False))


def print_plan_table(plan: Plan, console: Console | None = None) -> None:
    """Every layer group of a plan: scheme, kernel, predicted time and loss, bytes, and why where it is kept dense."""
    console = console or Console()
    _print_plan_head(plan, console)
    table = _table("group", "scheme", "kernel", "time", "loss (nats)", "weights", right=(3, 4, 5))
    schemes = plan.configuration
    for group in plan.groups:
        times = words.us(group.predicted_latency_us)
        if group.latency_status == "estimated":
            times = f"~{times}"
        loss, size = words.nats(group.predicted_loss_nats), words.size(group.weight_bytes)
        table.add_row(*map(Text, (group.name, schemes[group.name], group.kernel, times, loss, size)))
    console.print(table)
    kept = {entry.group: entry.reason for entry in plan.tensors if entry.scheme is None}
    for name, reason in kept.items():
        console.print(Text(f"{name} stays {plan.model.dtype}: {reason}", style="dim"))
    if plan.estimated:
        console.print(Text("~ estimated from the target's ceilings, not measured", style="yellow"))


def _print_plan_head(plan: Plan, console: Console) -> None:
    prediction = plan.prediction
    console.print(Text(f"{plan.model.name} on {plan.target}, {plan.workload}", style="bold"))
    times = words.change(words.ms(prediction.dense_latency_us / 1e3), words.ms(prediction.latency_us / 1e3))
    sizes = words.change(words.size(prediction.dense_weight_bytes), words.size(prediction.weight_bytes))
    gain = prediction.dense_latency_us / prediction.latency_us if prediction.latency_us else 1.0
    console.print(Text(f"predicted {times} ({words.times(gain)}), weights {sizes}, digest {plan.digest()[:12]}"))
    if plan.cache is not None:
        console.print(Text(f"KV cache {plan.kv_cache or 'as the model'}: {plan.cache.reason}"))


def print_plan_diff(plan_a: Plan, plan_b: Plan, console: Console | None = None) -> None:
    """What `plan_b` does differently: the settings, then every group whose scheme or kernel differs."""
    console = console or Console()
    settings = _settings(plan_a, plan_b)
    if settings.row_count:
        console.print(settings)
    a, b = plan_a.configuration, plan_b.configuration
    groups_a, groups_b = ({group.name: group for group in plan.groups} for plan in (plan_a, plan_b))
    table = _table("group", "first", "second", "time", "weights", right=(3, 4))
    names = list(dict.fromkeys([*groups_a, *groups_b]))
    for name in names:
        one, two = groups_a.get(name), groups_b.get(name)
        if one and two and a[name] == b[name] and one.kernel == two.kernel:
            continue
        cells = name, _choice(one, a), _choice(two, b), *_differences(one, two)
        table.add_row(*map(Text, cells))
    if table.row_count:
        console.print(table)
    same = len(names) - table.row_count
    console.print(Text(f"{table.row_count} of {len(names)} groups differ, {same} are the same."))


def _settings(plan_a: Plan, plan_b: Plan) -> Table:
    table = _table("", "first", "second")
    one, two = plan_a.prediction, plan_b.prediction
    rows = {
        "model": (plan_a.model.name, plan_b.model.name),
        "model sha256": ((plan_a.model.sha256 or words.NONE)[:12], (plan_b.model.sha256 or words.NONE)[:12]),
        "target": (plan_a.target, plan_b.target),
        "runtime": (plan_a.runtime, plan_b.runtime),
        "workload": (plan_a.workload, plan_b.workload),
        "max loss": (str(plan_a.budget.max_loss), str(plan_b.budget.max_loss)),
        "KV cache": (plan_a.kv_cache or "as the model", plan_b.kv_cache or "as the model"),
        "predicted time": (words.ms(one.latency_us / 1e3), words.ms(two.latency_us / 1e3)),
        "predicted loss": (words.nats(one.loss_nats), words.nats(two.loss_nats)),
        "weights": (words.size(one.weight_bytes), words.size(two.weight_bytes)),
    }
    for name, (first, second) in rows.items():
        if first != second:
            table.add_row(name, Text(first), Text(second))
    return table


def _choice(group: GroupEntry | None, schemes: dict[str, str]) -> str:
    return f"{schemes[group.name]} ({group.kernel})" if group else "absent"


def _differences(one: GroupEntry | None, two: GroupEntry | None) -> tuple[str, str]:
    if not one or not two:
        return words.NONE, words.NONE
    slower = two.predicted_latency_us - one.predicted_latency_us
    larger = two.weight_bytes - one.weight_bytes
    return _signed(words.us(slower), slower), _signed(words.size(larger), larger)


def _signed(text: str, value: float) -> str:
    return f"+{text}" if value > 0 else words.signed(text)


def _table(*names: str, right: tuple[int, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index in right else "left", overflow="fold")
    return table
