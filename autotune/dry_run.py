"""What a run would do, before anything is measured: groups, legal schemes, and expected minutes, memory and disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autotune import samples, tables
from autotune.config import RunConfig
from autotune.profilers.memory import weight_bytes
from autotune.run import RunFolder, silent
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.schemes import scheme
from autotune.search_space.space import Entry, SearchSpace
from autotune.session import MEMORY_SHARE, Session, open_session

_FORWARD_SHARE = 0.4  # of the peak rate that a whole forward pass reaches; measured 0.3 to 0.6 on small models
_SECONDS_PER_ROW = 0.15  # one kernel latency: gate, warm-up, 20 rounds
_SECONDS_PER_WEIGHT = 2e-8  # a compressed weight: clipping search when it is made, unpacked a few times
_PYTHON_BYTES = 2**29  # Python, torch and transformers


def print_dry_run(config: RunConfig, console: Console, recover: float | None = None) -> None:
    """Print the plan of work; nothing is written but the probe of this machine.

    Args:
        recover: minutes that the plan is to be trained for afterwards, if it is.
    """
    session = open_session(RunFolder(Path(config.out)), config, silent)
    space = tables.build_space(session)
    spec = session.spec
    console.print(f"{spec.name}: {spec.architecture}, {spec.dtype}, {len(spec.groups)} layer groups")
    console.print(f"target {session.target.name} ({session.target.model}), workload {session.workload}")
    table = Table("groups", "shape", "schemes", "not legal, because", box=None, pad_edge=False)
    for groups in _alike(spec):
        entries = [entry for entry in space.entries if entry.group == groups[0].name]
        table.add_row(*_row(groups, entries))
    console.print(table)
    if not session.config.latency_only:
        console.print(_samples(session))
    minutes, memory, disk = _expected(session, space)
    console.print(f"about {minutes:.0f} min, {memory / 2**30:.1f} GiB of memory, {disk / 2**20:.0f} MiB of disk")
    if recover is not None:
        from autotune.recover.gains import kinds
        from autotune.recover.searched import price

        most = price(recover, len(kinds(entry.scheme for entry in space.usable())))
        console.print(f"then recovery: {recover:g} min of training for the plan, up to {most:.0f} with what finds it,")
        console.print("and a second search and certification")


def _alike(spec: ModelSpec) -> list[list[LayerGroup]]:
    """Groups of equal role and shape, together."""
    alike: dict[tuple[object, ...], list[LayerGroup]] = {}
    for group in spec.groups:
        key = (group.role, group.out_features, group.in_features, group.experts, group.experts_per_token)
        alike.setdefault(key, []).append(group)
    return list(alike.values())


def _row(groups: Sequence[LayerGroup], entries: Sequence[Entry]) -> tuple[str, str, str, str]:
    first = groups[0]
    legal = ", ".join(f"{e.scheme} ({e.legality.status})" for e in entries if e.legality.usable)
    illegal = "; ".join(f"{e.scheme}: {e.legality.reason}" for e in entries if not e.legality.usable)
    shape = f"{first.parts[0].out_features} x {first.in_features}"
    if first.experts > 1:
        shape = f"{first.experts} experts of {shape}, {first.experts_per_token} a token"
    return f"{len(groups)} x {first.role}", shape, legal, illegal


def _samples(session: Session) -> str:
    config = session.config
    tokens = f"calibration {config.calibration_tokens:,}, score {config.score_tokens:,} in documents of"
    tokens += f" {config.score_length}, search {config.search_tokens:,}, certification {config.certify_tokens:,} tokens"
    text = f"{tokens}; {config.trials} trials, {config.finalists} finalists; losses in {session.arithmetic}"
    text += ", block by block from disk" if session.streams else ""
    note = samples.reduced(config, session.spec)
    return f"{text}\n{note}" if note else text


def _expected(session: Session, space: SearchSpace) -> tuple[float, float, float]:
    """(minutes, bytes of memory, bytes of disk), rough: arithmetic over the machine's measured ceilings."""
    spec, config = session.spec, session.config
    wanted = [e for e in space.usable() if not scheme(e.scheme).is_dense]
    disk = sum(weight_bytes(scheme(e.scheme), spec.group(e.group), spec.dtype) for e in wanted)
    rows = len({(e.scheme, g.out_features, g.in_features) for e in space.usable() for g in [spec.group(e.group)]})
    seconds = 60.0 + rows * 2 * _SECONDS_PER_ROW
    runnable = 2 * spec.dense_bytes + disk
    if config.latency_only:
        return seconds / 60, runnable + _PYTHON_BYTES, disk
    seconds += _loss_seconds(session) + _SECONDS_PER_WEIGHT * sum(spec.group(e.group).weights for e in wanted)
    # The dense model and, beside it, a candidate's weights or what scoring keeps of a batch of documents.
    losses = 2 * samples.parameters(spec) * (2 if session.arithmetic == "bf16" else 4) + 2**30
    # What is needed at least: a large model keeps both at once where memory is plenty.
    memory = max(runnable, losses) if session.large else runnable + losses
    if session.streams:  # and nothing is run that does not fit
        fits = runnable <= MEMORY_SHARE * session.place.memory_bytes
        memory = max(_streamed_bytes(session), runnable if fits else 0)
    return seconds / 60, memory + _PYTHON_BYTES, disk


def _streamed_bytes(session: Session) -> int:
    """The largest block in the arithmetic of losses, and what compression and scoring keep of documents."""
    layers: dict[int | None, int] = {}
    for group in session.spec.groups:
        layers[group.layer] = layers.get(group.layer, 0) + group.weights
    return max(layers.values()) * (2 if session.arithmetic == "bf16" else 4) + 2 * 2**30


def _loss_seconds(session: Session) -> float:
    """Every token that passes through the model costs two operations a weight."""
    config, ceilings = session.config, session.target.ceilings.tera_ops
    weights = sum(group.weights_per_token for group in session.spec.groups)
    # Scoring: a forward pass, and for every draw a backward pass and one or two products of equal cost.
    tokens = config.calibration_tokens + config.score_tokens * (1 + 2.5 * config.score_draws)
    work = {session.arithmetic: tokens + config.search_tokens * (config.trials + 15)}
    work[session.spec.dtype] = work.get(session.spec.dtype, 0.0) + config.certify_tokens * (config.finalists + 1)
    return sum(2 * weights * count / (ceilings.get(name, 0.1) * 1e12 * _FORWARD_SHARE) for name, count in work.items())
