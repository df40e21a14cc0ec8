"""`autotune recover`: training after compression. A part of `cli`; same rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console(highlight=False)


def recover(
    run: Annotated[Path, typer.Argument(help="The folder of a run made by `autotune tune`.")],
    minutes: Annotated[float | None, typer.Option(help="Time to train, turned into a number of tokens.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on; one million if nothing is said.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text, JSONL or a folder to train on; what search and certification use is left out."),
    ] = None,
    point: Annotated[
        str | None,
        typer.Option(
            help="searched (with what training wins back), a point of the front by number or name, nearest, or "
            "'uniform SCHEME'; default the run's plan."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the text.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: where to train.")] = "auto",
) -> None:
    """Train what compression cost back into the weights of a finished run's plan, and certify the result."""
    from autotune.errors import UsageError
    from autotune.progress import stoppable

    for name, budget in (("--minutes", minutes), ("--tokens", tokens)):
        if budget is not None and not budget > 0:
            raise UsageError("recover.budget", f"{name} {budget} is not a budget.", "Give a number above zero.")
    from autotune.recover.job import SEARCHED, TOKENS, Options

    if point == SEARCHED:
        _say_price(run, minutes, tokens or TOKENS)
    with stoppable(console, "keeping the best state so far") as (bars, stop):
        from autotune.recover.run import recover as train
        from autotune.report.recovered import redraw

        value = train(run, Options(minutes, tokens, data, point, seed, device), bars, stop.is_set)
        redraw(run)
    _print(run, value)
    _check_certificate(run, value)


def _check_certificate(run: Path, value: dict[str, Any]) -> None:
    from autotune.errors import VerificationError

    certificate = value["certificate"]
    if certificate["state"] in ("not_certified", "violated"):
        hint = f"Give more --minutes, or more --data; plan and model are in {run / 'recovered'}."
        raise VerificationError(f"certify.{certificate['state']}", certificate["statement"] + ".", hint)


def then_recover(run: Path, minutes: float, tune: Callable[[], None]) -> None:
    """`autotune tune --recover MINUTES`: recovers also where the plan is not certified or nothing met the budget. Where
    training promises nothing better than a certified plan, that is no error."""
    from autotune.errors import InfeasibleError, UsageError, VerificationError

    if not minutes > 0:
        raise UsageError("recover.budget", f"--recover {minutes} is not a budget.", "Give minutes above zero.")
    certified = True
    try:
        tune()
    except (InfeasibleError, VerificationError) as error:
        if not (run / "front.json").is_file():  # nothing was searched
            raise
        certified = False
        console.print(f"{error.code}: {error.message}", markup=False)
    try:
        recover(run, minutes=minutes, point="searched")
    except InfeasibleError as error:
        if not certified:
            raise
        console.print(f"{error.code}: {error.message} The plan stands. {error.hint}", markup=False)


def _say_price(run: Path, minutes: float | None, tokens: int) -> None:
    """What it takes at most, before it begins."""
    from autotune.config import RunConfig
    from autotune.recover.gains import kinds
    from autotune.recover.searched import again, price
    from autotune.search_space.schemes import SCHEMES

    wanted = list(RunConfig.load(run / "config.yaml").schemes or ("default",))
    if "default" in wanted:
        wanted.remove("default")
        wanted += [item.name for item in SCHEMES]
    count = len(kinds(wanted))
    said = "{:,.0f} tokens" if minutes is None else "{:.0f} min"
    training, more = (said.format(of) for of in (price(minutes or tokens, count), again(minutes or tokens)))
    console.print(f"up to {training} of training in all, {count} kinds of scheme to measure, then it is certified;")
    console.print(f"{more} more where none of the first candidates fits")


def _print(run: Path, value: dict[str, Any]) -> None:
    if value["searched"]:
        _print_search(value["searched"])
    about, search, certificate = value["recovery"], value["search_documents"], value["certificate"]
    console.print(f"{value['configuration']}: {len(about['groups'])} layer groups trained on {about['data']},")
    rate = about["tokens"] / value["seconds"] if value["seconds"] else 0.0
    cut = " (stopped early)" if value["stopped"] else ""
    console.print(f"{about['tokens']:,} tokens in {value['seconds'] / 60:.1f} min, {rate:,.0f} tokens/s{cut}")
    kept = search["kl_nats"] / search["kl_nats_before"] if search["kl_nats_before"] else 1.0
    before, after = search["kl_nats_before"], search["kl_nats"]
    console.print(f"KL to dense on the search documents {before:.5f} -> {after:.5f} nats, {kept:.0%} of it is left")
    if value["promise"]:
        held = "within" if value["promise"]["holds"] else "OUTSIDE"
        console.print(f"promised {_between(value['promise'])}: measured {held} the interval")
    loss = certificate["loss"]
    bounds = f"loss {loss['mean']:.5f}, at most {loss['upper']:.5f} (95%), budget {certificate['limit']:.5f}"
    console.print(f"{certificate['statement']}: {bounds}")
    if value["speedup"]:
        speedup = value["speedup"]
        console.print(f"{speedup['median']:.2f}x dense end to end ({speedup['low']:.2f} to {speedup['high']:.2f})")
    if value.get("noisy"):
        console.print(f"note: {value['noisy']}")
    if value["unique_tokens"] < about["tokens"]:
        seen = about["tokens"] / value["unique_tokens"]
        console.print(
            f"note: the text has {value['unique_tokens']:,} tokens and was seen {seen:.1f} times; --data gives more"
        )
    saved = run / "recovered" / "model"
    if saved.is_dir():
        console.print(f"plan and model are in {run / 'recovered'}: autotune.load('{saved}')", soft_wrap=True)


def _print_search(found: dict[str, Any]) -> None:
    for item in found["factors"]:
        sets = " and ".join(f"{one['left']:.0%}" for one in item["sets"])
        end, corrected = (_between(item[key], "{:.0%}") for key in ("at_budget", "corrected"))
        console.print(f"{item['kind']}: {sets} of the loss left after {item['steps']} steps, {end} promised by the end")
        console.print(f"  {corrected} by what candidates were left with")
    console.print(f"the plan takes {found['plan_latency_ms']:.3g} ms")
    if found["noisy"]:
        console.print(f"note: {found['noisy']}")
    for item in found["candidates"]:
        losses = f"one-shot {item['one_shot_nats']:.5f}, after {found['short_steps']} steps {item['short_nats']:.5f}"
        losses += f", promised {_between(item['short_promised'])}"
        mark = "taken; " if item["chosen"] else ""
        end = f"by the end {_between(item['expected'])} nats, promised {_between(item['promised'])}"
        console.print(f"{item['name']}: {mark}{item['latency_ms']:.3g} ms; KL {losses}; {end}")


def _between(promise: dict[str, float], form: str = "{:.5f}") -> str:
    """With its interval: a promise in nats, or a share."""
    middle, low, high = (form.format(promise[key]) for key in ("nats" if "nats" in promise else "left", "low", "high"))
    return f"{middle} ({low} to {high})"
