"""What the KV cache may be kept as, what each format costs and saves: the stages behind `--kv-cache`.

Loss is measured as any configuration's is, on the search documents, with the format alone; time in the real model with
dense weights, interleaved with the cache as it is, so that prompts, native layers and what falls back are all in it. A
format is searched if it saves time beyond what the run can tell, or if memory is budgeted; a named one in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from autotune import verify
from autotune.attention_cost import Attention, attention_of
from autotune.errors import UsageError
from autotune.kernels.kv_formats import FORMATS, GROUP, PREFIX, row_bytes
from autotune.kv_cache import unsupported
from autotune.model import read_config
from autotune.models import Models
from autotune.search.codec import decode_evaluation, encode_evaluation
from autotune.search.problem import GroupOptions, Option
from autotune.session import Session
from autotune.switchable import SwitchableModel
from autotune.verify import EndToEnd, Interval

ROLE = "kv_cache"
AUTO, AS_MODEL = "auto", "bf16"
_SECONDS = 10.0  # of measuring, about
_WIDTH = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Format:
    """`name` None: numbers of the activations' type. `saving_ms`: over those, of the workload, measured."""

    name: str | None
    cache_bytes: int
    loss_nats: float
    saving_ms: Interval


@dataclass(frozen=True)
class CacheChoice:
    """`formats`: the first keeps numbers as they are. `dropped`: format -> why it is not searched."""

    formats: tuple[Format, ...]
    dropped: dict[str, str]
    named: bool = False  # the one format beside the first is settled

    def of(self, name: str | None) -> Format:
        return next(item for item in self.formats if item.name == name)

    def saving_us(self, name: str | None) -> float:
        return self.of(name).saving_ms.median * 1e3


def named(session: Session) -> str | None:
    """The format that was asked for by name.

    Raises:
        UsageError: `kv_cache.unsupported`.
    """
    wanted = session.config.kv_cache
    if wanted in (AUTO, AS_MODEL):
        return None
    if reason := _unsupported(session):
        hint = "Leave --kv-cache at bf16, which keeps keys and values as the model is run."
        raise UsageError("kv_cache.unsupported", f"{wanted} cannot be kept here: {reason}.", hint)
    return wanted


def losses(session: Session, models: Models) -> dict[str, float]:
    """Measured KL (nats a token) of every format considered, alone."""
    formats = _considered(session)
    if not formats or session.config.latency_only:
        return dict.fromkeys(formats, 0.0)

    def compute() -> dict[str, Any]:
        found = {}
        for number, name in enumerate(formats):
            session.report("score", number, len(formats), f"KV cache in {name}")
            found[name] = encode_evaluation(models.teacher.measure({GROUP: PREFIX + name}))
        return found

    config = session.config
    inputs = [session.spec.model_hash, session.documents.digest, config.search_tokens, config.search_length, formats]
    value = session.folder.json_stage("cache_losses", inputs, compute, lambda x: x, lambda x: x)
    return {name: decode_evaluation(value[name]).kl_nats for name in formats}


def choice(session: Session, models: Models, loss_nats: Mapping[str, float]) -> CacheChoice | None:
    """What the search may choose from; None: nothing but the cache as it is, and its bytes do not matter."""
    formats = _considered(session)
    sizes = cache_bytes(session)
    dropped = _left_out(session)
    kept = [Format(None, sizes.get(None, 0), 0.0, Interval(0.0, 0.0, 0.0))]
    times = _times(session, models, formats)
    for name in formats:
        saving = Interval(0.0, 0.0, 0.0) if times is None else times.saving_ms(name)
        item = Format(name, sizes[name], loss_nats[name], saving)
        reason = "" if named(session) else _unwanted(session, item, kept)
        if reason:
            dropped[name] = reason
        else:
            kept.append(item)
    counted = session.config.max_memory_bytes is not None and bool(sizes)
    asked = session.config.kv_cache != AS_MODEL
    return CacheChoice(tuple(kept), dropped, named(session) is not None) if asked or counted else None


def cache_bytes(session: Session) -> dict[str | None, int]:
    """Format -> bytes of the workload's largest cache; empty where that is not known."""
    found = _attention(session)
    if isinstance(found, str) or session.encoder:
        return {}
    largest = max(found.cached_rows(r.prompt + r.generated, r.batch) for r in session.workload.requests)
    width = _WIDTH[session.spec.dtype]
    return {name: largest * row_bytes(name, found.width, width) for name in (None, *FORMATS)}


def least_bytes(session: Session) -> int:
    """Of the cache, under the formats that may be taken; what a bound on memory has to leave for it."""
    sizes, wanted = cache_bytes(session), named(session)
    names = (wanted,) if wanted else (None, *_considered(session))
    return min((sizes[name] for name in names if name in sizes), default=0)


def options(session: Session, found: CacheChoice, rest_us: float) -> tuple[GroupOptions, float]:
    """The cache as one more group of the search, and what is left of the rest: attention's part is at least what the
    best format saves. Bytes count only where memory is budgeted, as weights alone are told elsewhere."""
    counts = session.config.max_memory_bytes is not None
    part_us = min(rest_us, max(found.saving_us(item.name) for item in found.formats))
    rows = []
    for item in found.formats:
        name = session.spec.dtype if item.name is None else PREFIX + item.name
        time_us = max(0.0, part_us - found.saving_us(item.name))
        rows.append(Option(name, "", time_us, item.loss_nats, item.cache_bytes if counts else 0))
    return GroupOptions(GROUP, ROLE, None, tuple(rows)), rest_us - part_us


def why(found: CacheChoice, name: str | None) -> str:
    """One sentence for people."""
    if name is not None:
        item = found.of(name)
        saving = item.saving_ms
        times = f"{saving.median:.3f} ms saved ({saving.low:.3f} to {saving.high:.3f})"
        text = f"{name}: {item.cache_bytes / 2**20:.2f} MiB of {found.formats[0].cache_bytes / 2**20:.2f}"
        reason = f"{text}, {times}, for {item.loss_nats:.1e} nats"
        return f"{reason}; asked for" if found.named else reason
    said = [f"{other}: {reason}" for other, reason in found.dropped.items()]
    said += [f"{i.name} would cost {i.loss_nats:.1e} nats, worth more elsewhere" for i in found.formats[1:]]
    return "kept as the model is run" + (f"; {'; '.join(said)}" if said else "")


def _considered(session: Session) -> list[str]:
    if session.config.kv_cache == AUTO:
        return [] if _unsupported(session) else list(FORMATS)
    wanted = named(session)
    return [wanted] if wanted else []


def _left_out(session: Session) -> dict[str, str]:
    reason = _unsupported(session) if session.config.kv_cache == AUTO else ""
    return dict.fromkeys(FORMATS, reason) if reason else {}


def _unsupported(session: Session) -> str:
    if not session.local:
        return "its time is measured in the model, and this machine is not the target"
    if session.streams:
        return "its loss is measured in the model held whole, and this one is read block by block"
    return unsupported(read_config(session.opened.folder), not session.encoder, session.target.device)


def _attention(session: Session) -> Attention | str:
    return attention_of(read_config(session.opened.folder), not session.encoder)


def _times(session: Session, models: Models, formats: list[str]) -> EndToEnd | None:
    """Dense weights, the cache in every format, in turns."""
    if not formats:
        return None
    configurations: dict[str, dict[str, str]] = {"dense": {}} | {name: {GROUP: PREFIX + name} for name in formats}
    return session.folder.json_stage(
        "cache_times",
        [verify.FORMAT, formats, session.spec.model_hash, str(session.workload)],
        lambda: verify.measure(cast(SwitchableModel, models.runnable), configurations, session.workload, _SECONDS),
        EndToEnd.to_json,
        EndToEnd.from_json,
    )


def _unwanted(session: Session, item: Format, before: list[Format]) -> str:
    """Why a format is not searched, or ""."""
    if item.loss_nats / 2 > session.limit:
        return f"costs {item.loss_nats:.2g} nats alone; the budget is {session.limit:.2g}"
    better = [o for o in before[1:] if o.loss_nats <= item.loss_nats and o.saving_ms.median >= item.saving_ms.median]
    if better:
        return f"{better[0].name} is as small, at least as fast and loses less"
    if item.saving_ms.low <= 0 and session.config.max_memory_bytes is None:
        low, high = item.saving_ms.low, item.saving_ms.high
        return f"saves nothing that the run can tell at this workload ({low:.3f} to {high:.3f} ms)"
    return ""


def to_json(found: CacheChoice | None, chosen: str | None) -> dict[str, Any] | None:
    """What the report says of it."""
    if found is None:
        return None
    rows = [asdict(item) for item in found.formats]
    return {"chosen": chosen, "why": why(found, chosen), "formats": rows, "dropped": found.dropped}
