"""The command `autotune`: one function a command, each a thin layer over the package.

Exit codes are those of `autotune.errors`; every error is one line with a stable code and what to do next. torch and
transformers are imported only by commands that need them, so `--help` is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from autotune import advise_command
from autotune.config import RunConfig, parse_bytes, parse_loss
from autotune.errors import AutotuneError, UsageError
from autotune.recover_command import recover, then_recover
from autotune.table_commands import app as tables_app

if TYPE_CHECKING:
    from autotune.result import Result

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__.split("\n")[0]
)
plan_app = typer.Typer(
    no_args_is_help=True, help="Look at plans, compare them, choose another point of a finished search."
)
targets_app = typer.Typer(no_args_is_help=False, invoke_without_command=True, help="Device profiles.")
app.add_typer(plan_app, name="plan")
app.add_typer(targets_app, name="targets")
app.add_typer(tables_app, name="tables")
app.command()(recover)
app.command()(advise_command.advise)
console = Console(highlight=False)

ModelArgument = Annotated[str, typer.Argument(help="A model folder, a config.json, or org/name@revision.")]
RunArgument = Annotated[Path, typer.Argument(help="The folder of a run made by `autotune tune`.")]


@app.command()
def tune(
    model: ModelArgument,
    max_loss: Annotated[str, typer.Option(help="Allowed rise of perplexity on held-out documents.")] = "1%",
    target: Annotated[str, typer.Option(help="auto (this machine), a profile's name, or a YAML file.")] = "auto",
    workload: Annotated[str, typer.Option(help="chat, decode, prefill, or batch,prompt,generated.")] = "chat",
    max_memory: Annotated[
        str | None, typer.Option(help="Bound on the bytes of weights and KV cache, such as 4GiB.")
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Fail unless the plan is this much faster than dense.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Text or JSONL; without it a bundled text is used.")] = None,
    trials: Annotated[int | None, typer.Option(help="Evaluations of the search.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for the search, turned into a number of trials.")] = None,
    recover_: Annotated[
        float | None,
        typer.Option("--recover", help="Then search with what training wins back, and train the best so many minutes."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    fast: Annotated[
        bool, typer.Option("--fast", help="Exact solutions of the estimated tables only, no study.")
    ] = False,
    latency_only: Annotated[bool, typer.Option("--latency-only", help="No weights needed; losses stay empty.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show groups, schemes and costs; measure nothing.")
    ] = False,
    schemes: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated schemes to allow, also ones not searched by default; `default`: all that are."
        ),
    ] = None,
    compression: Annotated[
        str | None,
        typer.Option(help="auto (by layer error), joint, gptq, signround, wanda, hwpq, magnitude; with --fast wanda."),
    ] = None,
    kv_cache: Annotated[str, typer.Option(help="bf16 (as the model is run), int8, fp8, or auto: searched.")] = "bf16",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; by default the checkpoint's.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting of config.yaml, KEY=VALUE.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME.")] = None,
) -> None:
    """Find the fastest plan within the budget, prove it, apply it, report it."""
    if trials is not None and minutes is not None:
        raise UsageError("config.trials", "--trials and --minutes exclude each other.", "Give one of them.")
    values: dict[str, Any] = {
        "model": model,
        "out": str(out or Path("runs") / (Path(model.partition("@")[0]).name or "model")),
        "max_loss": None if latency_only else parse_loss(max_loss),
        "max_memory_bytes": parse_bytes(max_memory) if max_memory else None,
        "min_speedup": min_speedup,
        "target": target,
        "workload": workload,
        "data": str(data) if data else None,
        "dtype": dtype,
        "kv_cache": kv_cache,
        "schemes": tuple(name.strip() for name in schemes.split(",")) if schemes else None,
        "seed": seed,
        "minutes": minutes,
        "fast": fast,
        "latency_only": latency_only,
    }
    if trials is not None:
        values["trials"] = trials
    if compression is not None:
        values["compression"] = compression
    config = RunConfig.of(**(values | _settings(set_ or [])))
    if dry_run:
        from autotune.dry_run import print_dry_run

        print_dry_run(config, console, recover_)
        return
    if recover_ is None:
        _finish(_run(config, "report"))
    else:
        then_recover(Path(config.out), recover_, lambda: _finish(_run(config, "report")))


@app.command()
def profile(
    run: Annotated[Path | None, typer.Argument(help="The folder of a run made by `autotune tune`.")] = None,
    shapes: Annotated[Path | None, typer.Option(help="A config.json instead of a run: its shapes, no weights.")] = None,
    out: Annotated[Path, typer.Option(help="With --shapes: the CSV to write.")] = Path("latency.csv"),
    target: Annotated[str, typer.Option(help="With --shapes: auto, cpu, a profile's name, or a YAML file.")] = "auto",
    workload: Annotated[str, typer.Option(help="With --shapes: chat, decode, prefill, or B,P,G.")] = "chat",
    dtype: Annotated[str | None, typer.Option(help="With --shapes: bf16 or fp32.")] = None,
) -> None:
    """Measure the kernels of an existing run's model or of a config.json's shapes."""
    if (run is None) == (shapes is None):
        raise UsageError("profile.what", "give either a run folder or --shapes CONFIG_JSON.", "One of the two.")
    if shapes is not None:
        from autotune.shapes import profile_shapes

        table = profile_shapes(shapes, target, workload, dtype, lambda done, total, text: console.print(text))
        table.to_csv(out)
        measured = sum(row.status == "measured" for row in table.rows)
        console.print(f"{len(table.rows)} latencies, {measured} of them measured, in {out}")
        return
    assert run is not None
    result = _run(_config(run), "profile")
    console.print(f"{len(result.table.rows)} latencies in {run / 'latency.csv'}")


@app.command()
def score(run: RunArgument) -> None:
    """Compress and estimate every scheme's loss."""
    result = _run(_config(run), "score")
    console.print(f"{len(result.losses.rows) if result.losses else 0} losses in {run / 'loss.csv'}")


@app.command()
def search(run: RunArgument) -> None:
    """Search on the measured tables."""
    result = _run(_config(run), "search")
    assert result.front is not None
    console.print(f"{len(result.front.candidates)} configurations evaluated, {len(result.front.pareto)} on the front")


@app.command()
def verify(run: RunArgument) -> None:
    """Run the finalists end to end and certify them."""
    result = _run(_config(run), "verify")
    for name, certificate in (result.certificates or {}).items():
        console.print(f"{name}: {certificate.statement}")


@app.command()
def apply(run: RunArgument) -> None:
    """Write the compressed model to RUN/model."""
    _run(_config(run), "apply")
    console.print(f'{run / "model"}: load it with `autotune.load("{run / "model"}")`')


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="Format, by the name of its exporter.")] = "compressed-tensors",
    model: Annotated[Path | None, typer.Option(help="The original model folder, where the run's has moved.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
) -> None:
    """Write the compressed model in a format that other tools load."""
    from autotune.export import exporters

    item = exporters.exporter(to)
    done = exporters.load(item).write(run, out, model, force)
    console.print(f"{out}: {done.bytes / 2**20:.1f} MiB of weights for {item.consumers}")
    for note in done.notes:
        console.print(f"note: {note}")


@app.command()
def report(run: RunArgument) -> None:
    """Draw the report again."""
    _finish(_run(_config(run), "report"))


@plan_app.command("show")
def plan_show(plan: Annotated[Path, typer.Argument(help="plan.json or a run folder.")]) -> None:
    """Every group's scheme, kernel, predicted latency and loss."""
    from autotune.plan import Plan
    from autotune.report.terminal import print_plan_table

    print_plan_table(Plan.load(_plan_path(plan)), console)


@plan_app.command("diff")
def plan_diff(first: Path, second: Path) -> None:
    """What two plans decide differently."""
    from autotune.plan import Plan
    from autotune.report.terminal import print_plan_diff

    print_plan_diff(Plan.load(_plan_path(first)), Plan.load(_plan_path(second)), console)


@plan_app.command("validate")
def plan_validate(
    plan: Path, model: Annotated[str | None, typer.Option(help="Also check that it fits this model.")] = None
) -> None:
    """Check a plan file, and with --model that it was made for that model."""
    from autotune.plan import Plan

    loaded = Plan.load(_plan_path(plan))
    if model:
        from autotune.model import open_model

        spec = open_model(model, loaded.model.dtype).spec
        members = [member for group in spec.groups for member in group.members]
        loaded.check_model(spec.model_hash, {m.tensor: (m.out_features, m.in_features) for m in members})
    console.print(f"{plan}: valid, sha256 {loaded.digest()}")


@plan_app.command("choose")
def plan_choose(
    run: RunArgument,
    max_loss: Annotated[str | None, typer.Option(help="Another loss budget.")] = None,
    point: Annotated[str | None, typer.Option(help="A point of the front: its number, or its name.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Another bound on bytes.")] = None,
) -> None:
    """Write the plan of another point of a finished search; nothing is measured again."""
    from autotune.choosing import choose_point

    plan, statement = choose_point(
        run,
        parse_loss(max_loss) if max_loss else None,
        point,
        parse_bytes(max_memory) if max_memory else None,
    )
    console.print(f"{plan}: {statement}")


@targets_app.callback()
def targets(context: typer.Context) -> None:
    """List the shipped profiles."""
    if context.invoked_subcommand is None:
        from autotune.targets import target

        for name in target.names():
            item = target.load(name)
            console.print(f"{name:14} {item.device:5} {item.model} ({item.ceilings.source} ceilings)")


@targets_app.command("show")
def targets_show(name: str) -> None:
    """One profile in full."""
    import yaml

    from autotune.session import resolve_target

    console.print(yaml.safe_dump(resolve_target(name)[0].to_json(), sort_keys=False))


@targets_app.command("detect")
def targets_detect() -> None:
    """What this machine is, and its measured ceilings."""
    targets_show("auto")


@app.command()
def doctor() -> None:
    """What this machine can run, and what keeps it from more."""
    from autotune.doctor import print_doctor

    print_doctor(console)


@app.command()
def clean(
    measurements: Annotated[bool, typer.Option("--measurements", help="Also forget this machine's latencies.")] = False,
    run: Annotated[Path | None, typer.Argument(help="A run folder whose intermediate files to remove.")] = None,
) -> None:
    """Remove what can be made again: a run's database and memo, or the stored measurements."""
    from autotune.cleaning import clean as remove

    for path, size in remove(run, measurements):
        console.print(f"removed {path} ({size / 2**20:.1f} MiB)")


def main() -> None:
    """Entry point: errors become one line and their exit code."""
    try:
        status = app(standalone_mode=False)
        if status == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        if status:
            sys.exit(status)
    except AutotuneError as error:
        _fail(error)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; what was measured is kept, the same command resumes")
        sys.exit(130)
    except (typer.Exit, SystemExit) as error:
        sys.exit(getattr(error, "exit_code", getattr(error, "code", 0)))
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        if type(error).__name__ == "Abort":
            sys.exit(130)
        raise


def _fail(error: AutotuneError) -> None:
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    stderr.print(f"[bold red]error[/] [bold]{error.code}[/]: ", end="")
    stderr.print(f"{error.message} {error.hint}".strip(), markup=False)
    sys.exit(error.exit_code)


def _run(config: RunConfig, until: str) -> Result:
    """Run the loop with a progress bar; the first Ctrl-C ends the search early, the second stops."""
    from autotune.progress import stoppable

    with stoppable(console, "finishing the best plan so far") as (bars, stop):
        from autotune.tune import tune as run_tune

        return run_tune(config, bars, until, stop)


def _finish(result: Result) -> None:
    from autotune.errors import InfeasibleError, VerificationError
    from autotune.report.terminal import print_summary

    assert result.report is not None and result.chosen is not None
    folder = result.session.folder.path
    saved = folder / "model"
    then = f", or in Python: autotune.load('{saved}')" if saved.is_dir() else ""
    print_summary(result.report, console, f"open {folder}/report.html{then}")
    state = result.report["plan"]["certified"]
    if state in ("not_certified", "violated"):
        hint = f"Give more --data, or a larger --max-loss; plan and report are in {folder}."
        raise VerificationError(f"certify.{state}", result.report["plan"]["statement"] + ".", hint)
    wanted, speedup = result.session.config.min_speedup, result.report["plan"]["speedup"]
    if wanted and speedup and speedup["median"] < wanted:
        what = f"the plan is {speedup['median']:.2f}x dense end to end, --min-speedup asks for {wanted}."
        raise InfeasibleError("search.min_speedup", what, f"The plan is in {folder}.")


def _config(run: Path) -> RunConfig:
    config = RunConfig.load(run / "config.yaml")
    return config.model_copy(update={"out": str(run)})


def _plan_path(path: Path) -> Path:
    return path / "plan.json" if path.is_dir() else path


def _settings(pairs: list[str]) -> dict[str, Any]:
    import yaml

    values = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise UsageError("config.set", f"--set {pair!r} is not KEY=VALUE.", "For example --set search_tokens=4096.")
        values[key] = yaml.safe_load(value)
    return values
