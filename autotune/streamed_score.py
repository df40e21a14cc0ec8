"""The loss table of a checkpoint larger than memory: what `score.score` computes, one block's weights at a time.

Forward, the hidden states of a batch of documents at the entry of every block are kept on the host. Then from the end
to the front: each part runs again from the states kept at its entry, labels are drawn at the end, and the gradient at a
part's exit gives those of its layers and the one at its entry, for every draw. A batch reads the checkpoint twice and
computes every block's forward pass twice; all that is held are the batch's states and one part's inputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch

from autotune.score import BATCH_BYTES, LossTable, Objective, Sums, Tap, Taps
from autotune.search_space.groups import LayerGroup
from autotune.search_space.space import SearchSpace
from autotune.streamed_reference import StreamedReference
from autotune.streaming import ENTRY, EXIT, Walker

_STATE_BYTES = 2**30  # hidden states and their gradients of a batch of documents, on the host


@dataclass
class _Kept:
    """A document on its way back. `states`: at every block's entry, and after the last; `above`: of each draw the
    gradient at the exit of the part it comes to."""

    walker: Walker
    states: list[torch.Tensor]
    above: list[torch.Tensor]


def score(
    model: StreamedReference,
    space: SearchSpace,
    documents: Sequence[torch.Tensor],
    draws: int = 2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LossTable:
    """As `score.score`; equal but for the rounding of sums, and equal bit by bit where one batch holds all documents
    there and here."""
    model.release()
    model.select({})
    sums = Sums(model, space)
    objective = Objective(model, draws, seed)
    done, parts = 0, 2 * len(model.stream.blocks) + 1 + bool(model.stream.groups(ENTRY))
    while done < len(documents):
        count = _batch(model, documents[done:], draws)

        def step(part: int, at: int = done, size: int = count) -> None:
            if progress:
                progress(at * parts + size * part, len(documents) * parts)

        kept = _forward(model, documents[done : done + count], step)
        _backward(model, kept, objective, sums, step)
        done += count
    return sums.table()


def _batch(model: StreamedReference, documents: Sequence[torch.Tensor], draws: int) -> int:
    """How many documents to take at once."""
    with model.within(ENTRY), torch.no_grad():
        state = model.stream.enter(documents[0]).state
    position = state.nbytes // len(documents[0]) * (len(model.stream.blocks) + 1 + 2 * draws)
    held = count = 0
    for document in documents:
        held += len(document) * position
        if count and held > _STATE_BYTES:
            break
        count += 1
    return count


def _forward(model: StreamedReference, documents: Sequence[torch.Tensor], step: Callable[[int], None]) -> list[_Kept]:
    with torch.no_grad():
        with model.within(ENTRY):
            walkers = [model.stream.enter(document) for document in documents]
        kept = [_Kept(walker, [walker.state.cpu()], []) for walker in walkers]
        for number in range(len(model.stream.blocks)):
            with model.within(number):
                for item in kept:
                    item.states.append(model.stream.step(number, item.walker, item.states[-1]).cpu())
            step(number + 1)
    return kept


def _backward(
    model: StreamedReference,
    kept: Sequence[_Kept],
    objective: Objective,
    sums: Sums,
    step: Callable[[int], None],
) -> None:
    blocks = len(model.stream.blocks)
    entry = model.stream.groups(ENTRY)
    apart = {group.name for group in entry}
    for place, part in enumerate([EXIT, *reversed(range(blocks)), *([ENTRY] if entry else [])]):
        with model.within(part) as groups:
            groups = [group for group in groups if part != EXIT or group.name not in apart]
            _back(model, part, groups, kept, objective, sums)
        step(blocks + 1 + place)


def _back(
    model: StreamedReference,
    part: int,
    groups: Sequence[LayerGroup],
    kept: Sequence[_Kept],
    objective: Objective,
    sums: Sums,
) -> None:
    """One part: gradients of all documents, and what they say of its groups."""
    batch: list[Tap] = []
    with Taps(model, groups, embeddings=part == ENTRY) as taps:
        for item in kept:
            batch.append(_document(model, part, item, taps, objective, sums))
            if sum(tap.bytes for tap in batch) >= BATCH_BYTES:
                sums.add(groups, batch)
                batch.clear()
    if batch:
        sums.add(groups, batch)


def _document(model: StreamedReference, part: int, item: _Kept, taps: Taps, objective: Objective, sums: Sums) -> Tap:
    """One document through one part and back; its gradients are at the part's entry afterwards."""
    stream, ids = model.stream, item.walker.ids
    ends: Iterable[torch.Tensor]
    state = None
    with torch.enable_grad():
        if part == ENTRY:
            ends = repeat(stream.enter(ids).state, objective.draws)
        else:
            state = item.states.pop().to(model.device).requires_grad_()
            output = stream.leave(ids, state) if part == EXIT else stream.step(part, item.walker, state)
            ends = objective.ends(output) if part == EXIT else repeat(output, objective.draws)
        if part == EXIT:
            sums.weights.append(objective.weight(output))
        above = [None] * objective.draws if part == EXIT else [gradient.to(model.device) for gradient in item.above]
        tap, below = taps.backward(ends, above, state)
        item.above = [gradient.cpu() for gradient in below]
    return tap
