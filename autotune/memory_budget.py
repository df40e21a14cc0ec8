"""Whether --max-memory can be met at all by the schemes searched, said before anything is measured."""

from __future__ import annotations

from autotune import cache_choice
from autotune.errors import InfeasibleError
from autotune.kernels.spec import KERNELS
from autotune.profilers.memory import model_bytes, weight_bytes
from autotune.search_space.groups import LayerGroup
from autotune.search_space.rules import legality
from autotune.search_space.schemes import MORE, SCHEMES, Scheme, scheme
from autotune.search_space.space import DEFAULT, SearchSpace
from autotune.session import Session

_NAMED = 4  # schemes that a hint lists


def check(session: Session, space: SearchSpace) -> None:
    """Raises InfeasibleError `search.infeasible` when no choice of usable schemes is small enough, naming what is."""
    limit = session.config.max_memory_bytes
    if limit is None:
        return
    least = model_bytes(session.spec, {group.name: _smallest(session, space, group) for group in session.spec.groups})
    kept = cache_choice.least_bytes(session)
    least += kept
    if least <= limit:
        return
    names = [item.name for item in _would_fit(session, limit)]
    what = (
        f"no configuration has {limit / 2**20:.2f} MiB; the nearest is {least / 2**20:.2f} MiB, the smallest searched."
    )
    if not names:
        fixed = f"{session.spec.kept_bytes / 2**20:.2f} MiB are tensors that none of them touches"
        cache = f", {kept / 2**20:.2f} MiB the KV cache of the workload" if kept else ""
        hint = f"No scheme is small enough: {fixed}{cache}."
        raise InfeasibleError("search.infeasible", what, hint)
    more = f" ({len(names) - _NAMED} others too)" if len(names) > _NAMED else ""
    hint = f"These would do, slower than dense where they save memory only{more}: {', '.join(names[:_NAMED])}. "
    raise InfeasibleError("search.infeasible", what, f"{hint}Allow more: --schemes {DEFAULT},{names[0]}.")


def _smallest(session: Session, space: SearchSpace, group: LayerGroup) -> str:
    """A tied head that stays dense costs nothing, being the embedding."""
    names = [entry.scheme for entry in space.schemes(group.name)]
    if group.role == "lm_head" and session.spec.tied_embeddings:
        return space.dense
    return min(names, key=lambda name: weight_bytes(scheme(name), group, session.spec.dtype))


def _would_fit(session: Session, limit: int) -> list[Scheme]:
    """Schemes, most bits first, that would meet the limit were they named and used in all groups that can."""
    dense = session.spec.dtype
    found = []
    for item in (*SCHEMES, *MORE):
        if item.is_dense:
            continue
        plan = {}
        for group in session.spec.groups:
            answer = legality(item, group, dense, session.target, KERNELS, session.local, for_memory=True)
            tied = group.role == "lm_head" and session.spec.tied_embeddings
            plan[group.name] = item.name if answer.usable and not tied else dense
        if model_bytes(session.spec, plan) + cache_choice.least_bytes(session) <= limit:
            found.append(item)
    return sorted(found, key=lambda item: -item.bits_per_weight)
