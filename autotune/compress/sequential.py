"""Chosen configurations compressed again, block by block, on the inputs that their own compressed blocks give.

The database compresses every group for the inputs of the dense model, so that its entries go together in any way. Once
the way is chosen, a group's inputs x' are known: those that come out of the compressed groups before it, its own
rounding of activations included. Its weights are then made for these (the sequential order of GPTQ, arXiv 2210.17323),
and aim at what the dense group gives for the dense model's inputs x, so that they also make up for what earlier groups
lost (as GPTAQ, arXiv 2504.02692, does column by column): with the moments C = E[x x'^T] and H = E[x' x'^T] the best
weights before compression are

    T = W (C + d I) (H + d I)^-1,   which minimise E|W x - T x'|^2 + d |W - T|^2,

and any method then compresses T for the Hessian H. Configurations that agree on all groups so far share states and
weights. Left as the database has them: groups whose inputs are still those of the dense model, and experts, whose
tokens the router may send elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from autotune.compress import methods
from autotune.compress.calibrate import InputStatistics
from autotune.compress.curvature import damped
from autotune.compress.database import WeightDatabase, own_name, serialized
from autotune.compress.walk import Walk
from autotune.kernels.products import accumulate, matmul
from autotune.kernels.reference import quantize_activations
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.schemes import scheme
from autotune.store import digest, write_bytes

METHOD = "block by block on its own inputs, towards the dense model's outputs"
VERSION = "sequential/1"  # part of every entry's name; change it whenever the codes would change
TOWARDS = 0.1  # d, as a share of H's mean diagonal
_CHECK_EVERY = 4  # documents set aside to judge methods by, as in calibration

Files = dict[str, str]  # group -> file, of the groups that were compressed again


class Switched(Protocol):
    """What `ReferenceModel` is here: a model whose groups run dense, or entries of a database."""

    model: nn.Module
    spec: ModelSpec

    def select(self, configuration: Mapping[str, str]) -> None: ...

    def dense_weight(self, group: LayerGroup) -> torch.Tensor: ...


@dataclass(frozen=True)
class Settings:
    """`method`: of `methods.METHODS`, or `AUTO`. `towards`: the share d; None compresses W itself for H."""

    method: str = methods.AUTO
    towards: float | None = TOWARDS


@dataclass
class _Branch:
    """Configurations that have agreed so far, on what `key` is a hash of; `states` are those after it."""

    names: tuple[str, ...]
    key: str
    states: list[torch.Tensor]
    files: Files = field(default_factory=dict)
    compressed: bool = False  # anything, so that inputs are no longer the dense model's


@dataclass
class _Moments:
    """Sums over tokens: x' x'^T and x x'^T, and how many."""

    hessian: torch.Tensor
    cross: torch.Tensor | None
    tokens: int = 0

    def add(self, true: torch.Tensor, dense: torch.Tensor | None) -> None:
        """Inputs (tokens, in_features) that the group gets, and that the dense one gets."""
        accumulate(self.hessian, true, true)
        if self.cross is not None and dense is not None:
            accumulate(self.cross, dense, true)
        self.tokens += len(true)


class Recompression:
    """One pass over the blocks for any number of configurations. New entries appear in `database`, which must be the
    one that `model` reads."""

    def __init__(
        self,
        model: Switched,
        database: WeightDatabase,
        documents: Sequence[torch.Tensor],
        settings: Settings | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model, self.database, self.documents = model, database, documents
        self.settings = settings or Settings()
        self.progress = progress
        self.walk = Walk(model.model, model.spec.groups)

    def possible(self) -> bool:
        """False for an architecture whose blocks cannot be run one by one."""
        self.model.select({})
        return self.walk.faithful(self.documents[0])

    @torch.inference_mode()
    def run(self, configurations: Mapping[str, Mapping[str, str]]) -> dict[str, Files]:
        """Configuration -> files of the groups compressed again, all in the database's folder.

        Args:
            configurations: name -> group -> scheme.
        """
        self.model.select({})
        dense = [self.walk.enter(document) for document in self.documents]
        data = digest([document.tolist() for document in self.documents])
        key = digest([VERSION, self.settings.method, self.settings.towards, self.model.spec.model_hash, data])
        branches = [_Branch(tuple(configurations), key, dense)]
        stages = len(self.walk.blocks) + 1
        for number in range(stages):
            groups = self._groups(number)
            wanted = [name for b in branches for name in b.names if _renews(groups, configurations[name])]
            inputs, dense = self._dense(number, dense, bool(wanted))
            grown = []
            for branch in branches:
                for names in _agreeing(branch.names, groups, configurations):
                    chosen = configurations[names[0]]
                    own = _Branch(names, branch.key, branch.states, dict(branch.files), branch.compressed)
                    grown.append(self._block(own, number, chosen, inputs, dense))
            branches = grown
            if self.progress:
                self.progress(number + 1, stages)
        self.model.select({})
        return {name: branch.files for branch in branches for name in branch.names}

    def _groups(self, number: int) -> list[LayerGroup]:
        return self.walk.inside[number] if number < len(self.walk.blocks) else self.walk.outside

    def _dense(
        self, number: int, states: list[torch.Tensor], wanted: bool
    ) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
        """(group -> the dense model's inputs, document by document; its states at the block's exit)."""
        self.model.select({})
        kept: dict[str, list[torch.Tensor]] = {}
        if wanted and self.settings.towards is not None:
            kept = {group.name: [] for group in self._groups(number) if group.experts == 1}
        last = number == len(self.walk.blocks)
        exits = []
        for document, state in zip(self.documents, states, strict=True):
            watch = {name: kept[name].append for name in kept}
            found = self.walk.inputs(number, document, state, watch, full=not last) if watch or not last else None
            exits.append(state if found is None else found)
        return kept, exits

    def _block(
        self,
        branch: _Branch,
        number: int,
        chosen: Mapping[str, str],
        inputs: Mapping[str, list[torch.Tensor]],
        dense: list[torch.Tensor],
    ) -> _Branch:
        """The branch after one more block; `dense`: the dense states at its exit."""
        here: dict[str, str] = {}
        for group in self._groups(number):
            name = chosen[group.name]
            branch.key = digest([branch.key, group.name, name, self.database.entries.get((group.name, name))])
            if scheme(name).is_dense:
                continue
            entry = name
            if branch.compressed and group.experts == 1:
                file = f"{branch.key[:32]}.safetensors"
                if not (self.database.folder / file).is_file():
                    self.model.select(here)
                    self._compress(branch, number, group, name, inputs.get(group.name), file)
                entry = own_name(name, file)
                self.database.entries[group.name, entry] = branch.files[group.name] = file
            here[group.name] = entry
            branch.compressed = True
        if not branch.compressed:
            branch.states = dense
        elif number < len(self.walk.blocks):
            self.model.select(here)
            pairs = zip(self.documents, branch.states, strict=True)
            branch.states = [self.walk.through(number, document, state) for document, state in pairs]
        return branch

    def _compress(
        self,
        branch: _Branch,
        number: int,
        group: LayerGroup,
        name: str,
        dense: list[torch.Tensor] | None,
        file: str,
    ) -> None:
        """Write a group's weights for the inputs that reach it now."""
        item = scheme(name)
        size, device = group.in_features, self.documents[0].device
        fit, check = (_moments(size, dense is not None and kind == "fit", device) for kind in ("fit", "check"))
        for place, (document, state) in enumerate(zip(self.documents, branch.states, strict=True)):
            aside = _set_aside(place, len(self.documents))

            def see(x: torch.Tensor, place: int = place, aside: tuple[bool, bool] = aside) -> None:
                true = x.float() if item.activation is None else quantize_activations(x.float(), item.activation)
                wanted = None if dense is None else dense[place].float()
                if aside[0]:
                    fit.add(true, wanted)
                if aside[1]:
                    check.add(true, None)

            self.walk.inputs(number, document, state, {group.name: see})
        hessian = fit.hessian.div_(fit.tokens)
        seen = InputStatistics(hessian.diagonal(), hessian, check.hessian.div_(check.tokens), check.tokens)
        weight = self.model.dense_weight(group)
        if fit.cross is not None and self.settings.towards is not None:
            weight = target(weight, hessian, fit.cross.div_(fit.tokens), self.settings.towards)
        made = methods.compress(self.settings.method, weight, seen, [item])[0]
        content = serialized(made.weight, f"{made.method}, sequential", made.layer_error)
        write_bytes(self.database.folder / file, content)


def target(weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor, share: float) -> torch.Tensor:
    """(out, in) fp32: the weights whose outputs for the inputs that come are nearest the dense ones."""
    curvature = damped(hessian, share)
    pulled = cross.clone()
    pulled.diagonal().add_(curvature.diagonal() - hessian.diagonal())
    wanted = matmul(weight, pulled).t()
    lower, failed = torch.linalg.cholesky_ex(curvature)
    if failed:
        return weight
    found = torch.cholesky_solve(wanted, lower).t().contiguous()
    return found if bool(found.isfinite().all()) else weight


def _moments(size: int, cross: bool, device: torch.device) -> _Moments:
    zeros = torch.zeros(size, size, device=device)
    return _Moments(zeros, torch.zeros_like(zeros) if cross else None)


def _set_aside(place: int, count: int) -> tuple[bool, bool]:
    """(whether weights are fitted to a document, whether they are judged by it); the only one is for both."""
    if count < _CHECK_EVERY:
        last = place == count - 1
        return not last or count == 1, last
    aside = place % _CHECK_EVERY == _CHECK_EVERY - 1
    return not aside, aside


def _renews(groups: Sequence[LayerGroup], chosen: Mapping[str, str]) -> bool:
    return any(not scheme(chosen[group.name]).is_dense for group in groups)


def _agreeing(
    names: Sequence[str], groups: Sequence[LayerGroup], configurations: Mapping[str, Mapping[str, str]]
) -> list[tuple[str, ...]]:
    """Names in parts that choose the same for these groups."""
    parts: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parts.setdefault(tuple(configurations[name][group.name] for group in groups), []).append(name)
    return [tuple(part) for part in parts.values()]


def own_entries(database: WeightDatabase, files: Files, chosen: Mapping[str, str]) -> dict[str, str]:
    """Group -> entry that runs, of a configuration (group -> scheme) some of whose groups have files of their own."""
    named = {}
    for group, name in chosen.items():
        named[group] = name
        if group in files:
            named[group] = own_name(name, files[group])
            database.entries[group, named[group]] = files[group]
    return named


def with_files(database: WeightDatabase, files: Files, chosen: Mapping[str, str]) -> WeightDatabase:
    """The database with a configuration's own weights in the place of those for all configurations."""
    own = {(group, chosen[group]): file for group, file in files.items() if group in chosen}
    return WeightDatabase(database.folder, database.entries | own)
