"""Turns a chosen point into a plan: every tensor, every reason, every hash."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal, cast

from autotune import __version__, cache_choice
from autotune.cache_choice import CacheChoice
from autotune.compress.database import WeightDatabase
from autotune.compress.sequential import METHOD, Files
from autotune.decide import configuration, of_layers, weight_bytes
from autotune.finalists import Point
from autotune.folding import Fold
from autotune.kernels.kv_formats import format_of
from autotune.kernels.spec import kernel as kernel_named
from autotune.kernels.spec import kernel_hash
from autotune.plan import (
    GroupEntry,
    KeptEntry,
    KVCache,
    Limits,
    ModelRef,
    Plan,
    Prediction,
    Provenance,
    Recompression,
    Recovery,
    SchemeSpec,
    SmoothedInputs,
    Smoothing,
    TensorEntry,
)
from autotune.result import Result
from autotune.search.problem import GroupOptions, Option
from autotune.search_space.groups import LayerGroup
from autotune.search_space.schemes import scheme
from autotune.search_space.space import SearchSpace
from autotune.store import digest, file_digest

PACKAGES = ("torch", "transformers", "optuna", "numpy", "scipy")


def build_plan(result: Result, point: Point) -> Plan:
    """The plan of one point; equal inputs give equal bytes."""
    session, space, problem, losses = result.session, result.space, result.problem, result.losses
    assert problem is not None and result.front is not None
    spec, config = session.spec, session.config
    chosen = configuration(problem, point.candidate.genotype)
    layers = of_layers(problem, point.candidate.genotype)
    kept = format_of(chosen)
    options = {group.name: option for group, option in layers}
    reasons = {group.name: why(group, option, space) for group, option in layers}
    notes = {group.name: expert_notes(result, group.name, chosen[group.name]) for group in spec.groups}
    has_loss = not config.latency_only
    plan = Plan(
        generator=f"autotune {__version__}",
        model=ModelRef(
            name=spec.name,
            architecture=spec.architecture,
            task=spec.task,
            dtype=spec.dtype,
            sha256=spec.model_hash,
            tied_embeddings=spec.tied_embeddings,
        ),
        target=session.target.name,
        runtime=f"autotune {__version__} on torch",
        workload=str(session.workload),
        budget=Limits(
            max_loss=config.max_loss if has_loss else None,
            max_memory_bytes=config.max_memory_bytes,
            min_speedup=config.min_speedup,
        ),
        schemes={name: SchemeSpec.of(name) for name in sorted({option.scheme for option in options.values()})},
        groups=tuple(_group(group, options[group.name], has_loss, len(notes[group.name])) for group in spec.groups),
        tensors=tuple(e for g in spec.groups for e in _tensors(g, chosen, reasons, spec.dtype, notes[g.name])),
        kept=tuple(KeptEntry(tensor=t.tensor, shape=t.shape, reason=t.reason) for t in spec.kept),
        kv_cache=cast(Literal["int8", "fp8"] | None, kept),
        cache=None if result.cache is None else _cache(result.cache, kept, has_loss),
        prediction=Prediction(
            latency_us=point.candidate.latency_us,
            dense_latency_us=problem.latency_us(problem.dense),
            loss_nats=point.candidate.predicted_loss_nats if has_loss else None,
            search_kl_nats=point.candidate.evaluation.kl_nats if has_loss else None,
            weight_bytes=weight_bytes(problem, point.candidate.genotype),
            dense_weight_bytes=weight_bytes(problem, problem.dense),
        ),
        provenance=Provenance(
            latency_table=result.table.hash,
            loss_table=None if losses is None else digest(losses.to_csv().encode()),
            documents=session.documents.digest if has_loss else None,
            kernels={o.kernel: kernel_hash(kernel_named(o.kernel)) for o in options.values()},
            packages={name: version(name) for name in PACKAGES},
            seed=config.seed,
            trials=len(result.front.trials),
        ),
        smoothing=_smoothing(session.opened.folds),
    )
    return recompressed(plan, point.files, result.database) if point.files and result.database else plan


def _smoothing(folds: Sequence[Fold]) -> Smoothing | None:
    if not folds:
        return None
    sites = [item.site for item in folds]
    return Smoothing(
        sites=tuple(
            SmoothedInputs(group=site.group, source=site.source, heads=site.heads, repeat=site.repeat) for site in sites
        ),
        exponents=digest([item.exponents for item in folds]),
    )


def recompressed(plan: Plan, files: Files, database: WeightDatabase) -> Plan:
    """The plan with weights of its own in some groups."""
    groups = tuple(group.name for group in plan.groups if group.name in files)
    weights = digest([file_digest(database.folder / files[name]) for name in groups])
    reasons = tuple(
        entry.model_copy(update={"reason": f"{entry.reason}; compressed again for the inputs it gets in this plan"})
        if entry.group in files
        else entry
        for entry in plan.tensors
    )
    about = Recompression(method=METHOD, groups=groups, weights=weights)
    return plan.model_copy(update={"tensors": reasons, "recompression": about})


def _cache(found: CacheChoice, chosen: str | None, has_loss: bool) -> KVCache:
    item = found.of(chosen)
    return KVCache(
        reason=cache_choice.why(found, chosen),
        cache_bytes=item.cache_bytes,
        dense_cache_bytes=found.formats[0].cache_bytes,
        loss_nats=item.loss_nats if has_loss else None,
        formats=tuple(other.name for other in found.formats if other.name is not None),
    )


def recovered(plan: Plan, recovery: Recovery) -> Plan:
    """The plan with some groups trained; what its loss table says of them no longer holds."""
    groups = tuple(
        group.model_copy(update={"predicted_loss_nats": None}) if group.name in recovery.groups else group
        for group in plan.groups
    )
    reasons = tuple(
        entry.model_copy(update={"reason": f"{entry.reason}, before it was trained"})
        if entry.group in recovery.groups
        else entry
        for entry in plan.tensors
    )
    prediction = plan.prediction.model_copy(update={"loss_nats": None})
    update = {"groups": groups, "tensors": reasons, "prediction": prediction, "recovery": recovery}
    return plan.model_copy(update=update)


def why(group: GroupOptions, chosen: Option, space: SearchSpace) -> str:
    """One sentence for people: what the group got and what spoke against the others."""
    dense = group.options[0]
    if chosen is dense:
        reasons = [e.legality.reason for e in space.entries if e.group == group.name and not e.legality.usable]
        faster = [option for option in group.options[1:] if option.latency_us < dense.latency_us]
        if not group.options[1:]:
            return "kept dense: " + ("; ".join(dict.fromkeys(reasons)) or "no other scheme is legal here")
        if not faster:
            return "kept dense: no measured scheme is faster here"
        return "kept dense: the loss others would cost buys more time in other groups"
    saved = dense.latency_us - chosen.latency_us
    status = next(e.legality.status for e in space.entries if (e.group, e.scheme) == (group.name, chosen.scheme))
    if saved < 0 or status == "memory_only":
        return _for_memory(dense, chosen, status == "memory_only")
    text = (
        f"{chosen.scheme} saves {saved / 1e3:.3f} ms of {dense.latency_us / 1e3:.3f} ms for {chosen.loss_nats:.1e} nats"
    )
    faster = [option for option in group.options if option.latency_us < chosen.latency_us]
    if faster:
        best = min(faster, key=lambda option: option.latency_us)
        extra = chosen.latency_us - best.latency_us
        text += f"; {best.scheme} would save {extra / 1e3:.3f} ms more for {best.loss_nats:.1e} nats"
    else:
        text += "; nothing measured is faster"
    return text


def expert_notes(result: Result, group: str, name: str) -> dict[int, str]:
    """Expert -> why its weights under the scheme were not made for the tokens it gets."""
    if result.database is None or scheme(name).is_dense:
        return {}
    return result.database.notes(group, name)


def _for_memory(dense: Option, chosen: Option, unpacked: bool) -> str:
    less = (dense.weight_bytes - chosen.weight_bytes) / 2**20
    times = f"{chosen.latency_us / 1e3:.3f} ms against {dense.latency_us / 1e3:.3f}"
    text = f"{chosen.scheme} is {less:.2f} MiB smaller than dense, {times}, for {chosen.loss_nats:.1e} nats"
    return f"{text}: for memory only, it is unpacked in every call" if unpacked else f"{text}: for memory"


def _group(group: LayerGroup, option: Option, has_loss: bool, hardly_reached: int) -> GroupEntry:
    return GroupEntry(
        name=group.name,
        role=group.role,
        layer=group.layer,
        kernel=option.kernel,
        predicted_latency_us=option.latency_us,
        latency_status="estimated" if option.estimated else "measured",
        predicted_loss_nats=option.loss_nats if has_loss else None,
        weight_bytes=option.weight_bytes,
        experts=group.experts,
        experts_per_token=group.experts_per_token,
        experts_hardly_reached=hardly_reached,
    )


def _tensors(
    group: LayerGroup, chosen: dict[str, str], reasons: dict[str, str], dtype: str, notes: dict[int, str]
) -> list[TensorEntry]:
    name, size = chosen[group.name], len(group.parts[0].members)
    return [
        TensorEntry(
            tensor=member.tensor,
            module=member.module,
            shape=(member.out_features, member.in_features),
            group=group.name,
            scheme=None if name == dtype else name,
            reason="; ".join(filter(None, (reasons[group.name], notes.get(number // size)))),
        )
        for number, member in enumerate(group.members)
    ]
