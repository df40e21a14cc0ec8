"""The real model with every surviving scheme packed side by side, so that configurations can be run interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotune import runtime
from autotune.compress.database import WeightDatabase, scheme_of, stacked_bias, stacked_weight
from autotune.kernels.kv_formats import format_of
from autotune.kernels.linear import ZEROS, FusedGroup, alternatives, install
from autotune.kernels.reference import random_weight
from autotune.kernels.spec import GroupWeight, kernel
from autotune.kernels.spec import load as load_kernel
from autotune.kv_cache import keep_as
from autotune.model import OpenModel, load_model
from autotune.passes import StaticRequest
from autotune.place import CPU, Place
from autotune.plan import Plan
from autotune.profilers.cuda_timer import Launched, Recording, Replayable
from autotune.profilers.latency import LatencyTable
from autotune.routing import MOST_TOKENS
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.space import SearchSpace
from autotune.search_space.workload import Workload

__all__ = ["ZEROS", "SwitchableModel", "switchable"]


class SwitchableModel:
    """A transformers model whose layer groups run any packed scheme; `select` switches in place."""

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        groups: Mapping[str, FusedGroup],
        resident: bool,
        place: Place = CPU,
        generated: int = 0,
        packers: Mapping[str, _Packer] | None = None,
    ) -> None:
        """`groups`: by the name of the part of a layer group that they are. `resident`: the weights fit the last cache,
        so a request is run once untimed before it is timed. `generated`: tokens that a static cache has room for, where
        passes are recorded. `packers`: by the name of the layer group, for weights that come later."""
        self.model = model
        self.spec = spec
        self.groups = dict(groups)
        self.place = place
        self._resident, self._generated = resident, generated
        self._packers = dict(packers or {})
        self._kv_cache: str | None = None
        self._requests: dict[tuple[int, int], StaticRequest] = {}
        self._recorded: dict[tuple[object, ...], Replayable] = {}

    def select(self, configuration: Mapping[str, str]) -> None:
        """Group -> scheme (or `ZEROS`), and the KV cache's format; what is not named becomes dense."""
        if self._kv_cache != format_of(configuration):
            self._kv_cache = format_of(configuration)
            keep_as(self.model, self._kv_cache)
        for group in self.spec.groups:
            wanted = configuration.get(group.name, self.spec.dtype)
            for part in group.parts:
                if self.groups[part.name].active != wanted:
                    self.groups[part.name].select(wanted)

    def prepare(self, configurations: Sequence[Mapping[str, str]], documents: Sequence[torch.Tensor]) -> None:
        """Nothing to do: all of it is in memory."""

    def add_own(self, weights: WeightDatabase) -> None:
        """Pack what a database has for single configurations (see `own_name`) and this model has not yet."""
        for group in self.spec.groups:
            for entry in _own_entries(weights, group):
                if not self.groups[group.parts[0].name].holds(entry):
                    self._packers[group.name].add(entry, weights)

    @torch.inference_mode()
    def outputs(self, document: torch.Tensor) -> torch.Tensor:
        """Logits (positions, vocabulary), or an encoder's last hidden state (positions, hidden)."""
        output = self.model(document.unsqueeze(0))
        return (output.last_hidden_state if self.spec.task == "encoder" else output.logits)[0]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def time_request(self, batch: int, prompt: int, steps: int) -> tuple[float, float]:
        """(seconds of the prefill, median seconds of a decode step; 0 without steps)."""
        if self.place.recording is not None:
            return self._time_recorded(self.place.recording, batch, prompt, steps)
        ids = torch.arange(batch * prompt).view(batch, prompt) % 97
        if self.spec.task == "encoder":
            return self._timed(lambda: self.model(ids)), 0.0
        if self._resident:
            self.model(ids, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        output = self.model(ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        seconds = []
        for _ in range(steps and steps + 1):  # the first step warms up
            token = output.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            output = self.model(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            seconds.append(time.perf_counter() - start)
        return prefill, sorted(seconds[1:])[len(seconds[1:]) // 2] if steps else 0.0

    def _time_recorded(self, recording: Recording, batch: int, prompt: int, steps: int) -> tuple[float, float]:
        """The same by replays of what each configuration recorded when it was first timed, on the device's clock.

        A decode step is the one right after the prompt: over a static cache all steps cost the same.
        """
        shape = (batch, prompt)
        if shape not in self._requests:
            room = prompt + max(steps, self._generated)
            self._requests[shape] = StaticRequest(self.model, batch, prompt, room, self.place.device)
        request = self._requests[shape]
        prefill = self._replayable(recording, (*shape, "prefill"), batch * prompt, request.prefill)
        if not steps:
            return recording.elapsed(prefill.replay), 0.0
        decode = self._replayable(recording, (*shape, "decode"), batch, request.decode)
        seconds = sorted(recording.elapsed(decode.replay) for _ in range(steps))
        return recording.elapsed(prefill.replay), seconds[len(seconds) // 2]

    def _replayable(
        self, recording: Recording, name: tuple[object, ...], tokens: int, call: Callable[[], object]
    ) -> Replayable:
        """A pass of so many tokens in the active configuration. Where the host sends them to experts it is launched
        anew each time: a graph cannot wait for the host."""
        key = (*name, *(group.active for group in self.groups.values()))
        if key not in self._recorded:

            def once() -> None:
                call()

            once()  # compile and choose configurations first: nothing of that can be recorded
            held = tokens <= MOST_TOKENS or all(group.experts == 1 for group in self.spec.groups)
            self._recorded[key] = recording.record(once) if held else Launched(once)
        return self._recorded[key]

    def _timed(self, call: Callable[[], object]) -> float:
        if self._resident:
            call()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    @torch.inference_mode()
    def continue_prompt(self, ids: torch.Tensor, tokens: int) -> torch.Tensor:
        """Greedy continuation of (positions,) ids; returns the new ids only."""
        ids = ids.to(self.place.device)
        output = self.model.generate(  # type: ignore[operator]
            ids.unsqueeze(0), attention_mask=torch.ones_like(ids).unsqueeze(0), max_new_tokens=tokens, do_sample=False
        )
        return output[0, len(ids) :]  # type: ignore[no-any-return]

    def save(self, folder: Path, opened: OpenModel, plan: Plan, weights: WeightDatabase | None) -> None:
        """Write the plan's compressed model."""
        source = load_model(opened)
        configuration = plan.configuration
        canonical, shared = {}, set()
        for group in self.spec.groups:
            name = configuration[group.name]
            canonical[group.name] = _weight(source, group, name, self.spec.dtype, opened.dtype, weights)
            if name == self.spec.dtype and group.role == "lm_head" and self.spec.tied_embeddings:
                shared.add(group.name)
        runtime.save(folder, opened.folder, plan, self.model, canonical, shared, opened.folds)


def switchable(
    opened: OpenModel,
    space: SearchSpace,
    table: LatencyTable,
    workload: Workload,
    weights: WeightDatabase | None,
    last_cache_bytes: int,
    progress: Callable[[int, int], None] | None = None,
    place: Place = CPU,
) -> SwitchableModel:
    """Load the model and pack every usable scheme with its fastest kernel; random codes where there is no database."""
    spec = opened.spec
    model = load_model(opened).to(place.device)
    runtime.quicken(model)
    groups, packers = {}, {}
    for number, group in enumerate(spec.groups):
        made = [FusedGroup(part.in_features, [member.out_features for member in part.members]) for part in group.parts]
        choices = {entry.scheme: table.best(group, entry.scheme, workload) for entry in space.schemes(group.name)}
        kernels = {name: choice.kernel for name, choice in choices.items() if choice is not None}
        assert len(kernels) == len(choices)
        packers[group.name] = packer = _Packer(
            group, made, kernels, opened.dtype, stacked_bias(model, group, opened.dtype)
        )
        for name in kernels:
            packer.pack(name, _weight(model, group, name, spec.dtype, opened.dtype, weights))
        for name in _own_entries(weights, group):
            assert weights is not None
            packer.add(name, weights)
        for part, fused in zip(group.parts, made, strict=True):
            install(model, [member.module for member in part.members], fused)
            groups[part.name] = fused
        if progress:
            progress(number + 1, len(spec.groups))
    generated = max(request.generated for request in workload.requests)
    return SwitchableModel(model, spec, groups, spec.dense_bytes <= 4 * last_cache_bytes, place, generated, packers)


@dataclass(frozen=True)
class _Packer:
    """Packs a layer group's weights for the kernels of its schemes."""

    group: LayerGroup
    fused: Sequence[FusedGroup]  # one a part
    kernels: Mapping[str, str]  # scheme -> kernel
    dtype: torch.dtype
    bias: torch.Tensor | None

    def pack(self, name: str, weight: GroupWeight) -> None:
        item = kernel(self.kernels[scheme_of(name)])
        count = self.group.experts
        parts = [weight] if count == 1 else [weight.part(self.group.rows(index)) for index in range(count)]
        packs = (load_kernel(item).pack(part, self.dtype) for part in parts)
        for fused, choice in zip(self.fused, alternatives(item, scheme_of(name), packs, count), strict=True):
            fused.add(name, choice)

    def add(self, name: str, weights: WeightDatabase) -> None:
        self.pack(name, weights.load(self.group, name, self.bias))


def _own_entries(weights: WeightDatabase | None, group: LayerGroup) -> list[str]:
    """Names of entries that belong to single configurations."""
    names = [] if weights is None else [name for owner, name in weights.entries if owner == group.name]
    return [name for name in names if scheme_of(name) != name]


def _weight(
    model: nn.Module,
    group: LayerGroup,
    name: str,
    dense: str,
    dtype: torch.dtype,
    weights: WeightDatabase | None,
) -> GroupWeight:
    bias = stacked_bias(model, group, dtype)
    if name == dense:
        single = group.members[0]
        module: Any = model.get_submodule(single.module)
        if len(group.members) == 1 and not single.transposed:
            return GroupWeight(name, dense=module.weight.detach(), bias=bias)
        return GroupWeight(name, dense=stacked_weight(model, group).to(dtype), bias=bias)
    if weights is None:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
        return random_weight(name, group.out_features, group.in_features, dtype, bias is not None, generator)
    return weights.load(group, name, bias)
