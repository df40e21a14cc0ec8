"""The reference model of a checkpoint larger than memory: the same losses, one block's weights at a time.

`prepare` takes documents through all blocks together, each block read once for all of them and for all configurations
that are to be measured; what is kept of a document is its last hidden states. `outputs` goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from autotune.compress.database import WeightDatabase
from autotune.reference_model import ReferenceModel
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.streaming import ENTRY, EXIT, Streamed, Walker

_Key = tuple[bool, tuple[tuple[str, str], ...]]  # multiplied exactly; (group, scheme) of what is not dense in blocks


class StreamedReference(ReferenceModel):
    """`layers` have weights only `within` the part they lie in."""

    def __init__(self, stream: Streamed, spec: ModelSpec, database: WeightDatabase) -> None:
        self.stream = stream
        self._sources: dict[str, list[Any]] = {
            group.name: [stream.model.get_submodule(member.module) for member in group.members] for group in spec.groups
        }
        super().__init__(stream.model, spec, database)
        self._wanted: dict[str, str] = {}
        self._exact = False
        self._finals: dict[_Key, dict[bytes, torch.Tensor]] = {}  # ids -> (1, positions, hidden), on the host
        self._exit = ExitStack()  # holds what comes after the blocks while outputs are asked for
        self._open = False
        self._outside = {group.name for group in stream.groups(EXIT)} - {group.name for group in stream.groups(ENTRY)}

    @property
    def device(self) -> torch.device:
        return self.stream.device

    def select(self, configuration: Mapping[str, str]) -> None:
        """What `outputs` and parts loaded from now on run as."""
        self._wanted = dict(configuration)

    @contextmanager
    def within(self, part: int) -> Iterator[list[LayerGroup]]:
        """Meanwhile the groups of a part have their dense weights."""
        groups = self.stream.groups(part)
        try:
            with self.stream.loaded(part):
                self._attach(groups)
                yield groups
        finally:
            self._attach(groups)  # nothing is left in them

    def prepare(self, configurations: Sequence[Mapping[str, str]], documents: Sequence[torch.Tensor]) -> None:
        """Take documents through all blocks as each configuration, so that their outputs cost what follows alone."""
        before = self._wanted
        wanted = {self._key(configuration): dict(configuration) for configuration in configurations}
        self._finals = {key: kept for key, kept in self._finals.items() if not key[1] or key in wanted}
        missing = {key: [ids for ids in documents if _name(ids) not in self._finals.get(key, {})] for key in wanted}
        missing = {key: found for key, found in missing.items() if found}
        if missing:
            self.release()
            self._pass({key: wanted[key] for key in missing}, missing)
        self._wanted = before

    @torch.inference_mode()
    def outputs(self, document: torch.Tensor) -> torch.Tensor:
        """Causal LM: logits (positions, vocabulary); encoder: last hidden state (positions, hidden)."""
        key, name = self._key(self._wanted), _name(document)
        if name not in self._finals.get(key, {}):
            self.prepare([self._wanted], [document])
        if not self._open:
            self._exit.enter_context(self.within(EXIT))
            self._open = True
        self._choose(self.stream.groups(EXIT))
        output = self.stream.leave(document, self._finals[key][name])
        states: torch.Tensor = output.last_hidden_state if self.spec.task == "encoder" else output.logits
        return states[0]

    def release(self) -> None:
        """Let go of what comes after the blocks."""
        self._exit.close()
        self._open = False

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Meanwhile every layer multiplies in fp32; slow where the weights are bf16."""
        with super().exact():
            try:
                self._exact = True
                yield
            finally:
                self._exact = False

    @torch.inference_mode()
    def _pass(
        self, configurations: Mapping[_Key, dict[str, str]], documents: Mapping[_Key, Sequence[torch.Tensor]]
    ) -> None:
        walkers: dict[_Key, list[Walker]] = {}
        with self.within(ENTRY) as groups:
            for key, wanted in configurations.items():
                self._wanted = wanted
                self._choose(groups)
                walkers[key] = [self.stream.enter(ids) for ids in documents[key]]
        for number in range(len(self.stream.blocks)):
            with self.within(number) as groups:
                for key, wanted in configurations.items():
                    self._wanted = wanted
                    self._choose(groups)
                    for walker in walkers[key]:
                        walker.state = self.stream.step(number, walker, walker.state).cpu()
        for key, found in walkers.items():
            self._finals.setdefault(key, {}).update({_name(walker.ids): walker.state for walker in found})

    def _key(self, configuration: Mapping[str, str]) -> _Key:
        inside = [
            (name, scheme)
            for name, scheme in configuration.items()
            if scheme != self.spec.dtype and name not in self._outside
        ]
        return self._exact, tuple(sorted(inside))

    def _attach(self, groups: Sequence[LayerGroup]) -> None:
        for group in groups:
            for layer, member, source in zip(
                self.layers[group.name], group.members, self._sources[group.name], strict=True
            ):
                weight = source.weight.detach()
                layer.dense = layer.weight = weight.t() if member.transposed else weight
                layer.bias, layer.activation = source.bias, None
            self._current[group.name] = self.spec.dtype

    def _choose(self, groups: Sequence[LayerGroup]) -> None:
        for group in groups:
            name = self._wanted.get(group.name, self.spec.dtype)
            if self._current[group.name] != name:
                self._set(group, name)
                self._current[group.name] = name


def reference_of(model: nn.Module | Streamed, spec: ModelSpec, database: WeightDatabase) -> ReferenceModel:
    """Of a model held whole, or streamed."""
    if isinstance(model, Streamed):
        return StreamedReference(model, spec, database)
    return ReferenceModel(model, spec, database)


def _name(ids: torch.Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()
