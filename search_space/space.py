"""The search space: for every layer group, every scheme with its legality, its kernels and the reason.

Schemes leave the space with a reason, never silently: not legal, or dominated once latencies are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autotune.errors import InputError
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.rules import Legality, legality
from autotune.search_space.schemes import MORE, SCHEMES, Scheme, scheme
from autotune.targets.target import Target

DEFAULT = "default"  # among names of schemes: all that are searched when none is named


@dataclass(frozen=True)
class Entry:
    """One (group, scheme) pair."""

    group: str
    scheme: str
    legality: Legality


@dataclass(frozen=True)
class SearchSpace:
    target: str
    dtype: str
    dense: str  # name of the dense scheme
    entries: tuple[Entry, ...]

    def schemes(self, group: str) -> tuple[Entry, ...]:
        """The usable schemes of a group, the dense one first."""
        usable = [entry for entry in self.entries if entry.group == group and entry.legality.usable]
        return tuple(sorted(usable, key=lambda entry: entry.scheme != self.dense))

    def usable(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.legality.usable)

    def without(self, dropped: Mapping[tuple[str, str], str]) -> SearchSpace:
        """Mark (group, scheme) pairs illegal, each with its reason."""

        def entry_after(entry: Entry) -> Entry:
            reason = dropped.get((entry.group, entry.scheme))
            return entry if reason is None else replace(entry, legality=Legality("illegal", reason))

        return replace(self, entries=tuple(entry_after(entry) for entry in self.entries))


def build(
    spec: ModelSpec,
    target: Target,
    kernels: Sequence[KernelSpec],
    local: bool,
    allowed: Sequence[str] | None = None,
) -> SearchSpace:
    """Every scheme of every group with its legality.

    Args:
        allowed: the only compressed schemes to use, by name, `DEFAULT` for all of `SCHEMES`; those named may be of
            `MORE`, and may be used for memory only where no kernel makes them fast.

    Raises:
        InputError: `scheme.unknown`; `space.no_dense` when a group cannot even run dense on this target.
    """
    dense = scheme(spec.dtype)
    names = None if allowed is None else _named(allowed)
    more = [item for item in MORE if names and item.name in names]
    candidates = [item for item in (*SCHEMES, *more) if item is dense or not item.is_dense]
    entries: list[Entry] = []
    for group in spec.groups:
        found = [_entry(item, group, spec, target, kernels, local, names, dense) for item in candidates]
        answer = found[candidates.index(dense)].legality
        if not answer.usable:
            what = f"{group.name} cannot run as {dense.name} on {target.name}: {answer.reason}."
            raise InputError("space.no_dense", what, "Try --dtype, or another target.")
        entries += found
    return SearchSpace(target.name, spec.dtype, dense.name, tuple(entries))


def _entry(
    item: Scheme,
    group: LayerGroup,
    spec: ModelSpec,
    target: Target,
    kernels: Sequence[KernelSpec],
    local: bool,
    names: dict[str, bool] | None,
    dense: Scheme,
) -> Entry:
    if names is not None and item is not dense and item.name not in names:
        return Entry(group.name, item.name, Legality("illegal", "excluded by --schemes"))
    for_memory = names is not None and names.get(item.name, False)
    return Entry(group.name, item.name, legality(item, group, spec.dtype, target, kernels, local, for_memory))


def _named(allowed: Sequence[str]) -> dict[str, bool]:
    """Scheme -> whether it was named itself, and not by `DEFAULT`."""
    names = {item.name: False for item in SCHEMES} if DEFAULT in allowed else {}
    return names | {scheme(name).name: True for name in allowed if name != DEFAULT}
