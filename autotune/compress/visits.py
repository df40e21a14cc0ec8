"""Where compression finds weights and the inputs they see: in a model held whole, or block by block in another."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.streaming import ENTRY, EXIT, Streamed, Walker


@dataclass(frozen=True)
class Visit:
    """Meanwhile the weights of `groups` are in `model`; `run` shows them one of the documents."""

    model: nn.Module
    groups: tuple[LayerGroup, ...]
    documents: Sequence[Any]
    run: Callable[[Any], object]


def visits(model: nn.Module | Streamed, spec: ModelSpec, documents: Sequence[torch.Tensor]) -> Generator[Visit]:
    """All groups at once, or the model's blocks in order and then what is outside of them.

    What is made of a visit has to be made before the next is asked for: then its weights are let go of.
    """
    if isinstance(model, Streamed):
        yield from _by_block(model, documents)
    else:
        yield Visit(model, spec.groups, documents, lambda document: model(document.unsqueeze(0)))


def _by_block(model: Streamed, documents: Sequence[torch.Tensor]) -> Generator[Visit]:
    with model.loaded(ENTRY), torch.no_grad():
        walkers = [model.enter(document) for document in documents]
    for walker in walkers:
        walker.state = walker.state.cpu()
    for part in model.parts:
        with model.loaded(part):
            steps = _Steps(model, part)
            yield Visit(model.model, tuple(model.groups(part)), walkers, steps.run)
            if part != EXIT:
                steps.advance(walkers)


class _Steps:
    """One part's passes; what a document became in the last one is kept, so that going on costs nothing more."""

    def __init__(self, model: Streamed, part: int) -> None:
        self.model, self.part = model, part
        self._after: dict[int, torch.Tensor] = {}  # id of a walker -> its states after the block, on the host

    def run(self, walker: Walker) -> None:
        if self.part == EXIT:
            self.model.leave(walker.ids, walker.state)
        else:
            self._after[id(walker)] = self.model.step(self.part, walker, walker.state).cpu()

    @torch.inference_mode()
    def advance(self, walkers: Sequence[Walker]) -> None:
        for walker in walkers:
            if id(walker) not in self._after:
                self.run(walker)
            walker.state = self._after.pop(id(walker))
