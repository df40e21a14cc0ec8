"""Second moments of every layer group's inputs, from the dense model on the calibration documents.

Every fourth document is set aside: weights are compressed for the others, and what the compression did is judged on
these, because an error that a method minimised says little about that method.

Experts have statistics of their own, from the tokens the router sends them. One that it sends too few is shown every
token of its layer in a second pass: many inputs that are not quite its own tell more than few that are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autotune.experts import shown_all_tokens
from autotune.kernels.products import accumulate, matmul
from autotune.search_space.groups import LayerGroup

_CHECK_EVERY = 4
# An expert hardly reached got fewer tokens than this times its inputs, for a Hessian (docs/measured.md), or for a mean.
_FEW = {True: 2.0, False: 0.125}
_PIECE_WEIGHTS = 2**22
Run = Callable[[Any], object]  # shows the model one of the documents


@dataclass(frozen=True)
class InputStatistics:
    """`moment` (in_features,): mean squared input. Hessians (in_features, in_features): mean of x x^T over tokens, that
    of the layer's squared error; None where the method does not ask for them. `tokens`: that reached the layer, on the
    documents set aside where there are such; `note`: of an expert that too few reached, what was done."""

    moment: torch.Tensor
    fit: torch.Tensor | None = None
    check: torch.Tensor | None = None  # over documents that weights are not fitted to
    tokens: int = 0
    note: str = ""

    @property
    def hessian(self) -> torch.Tensor:
        assert self.fit is not None
        return self.fit

    def output_power(self, weight: torch.Tensor) -> float | None:
        """Mean squared norm of the outputs that a weight (out, in) gives on the documents set aside; None without a
        Hessian. Of a change of the weights: the error it makes."""
        if self.check is None:
            return None
        rows = weight.split(max(1, _PIECE_WEIGHTS // weight.shape[1]))
        return sum(float(matmul(part, self.check).mul_(part).sum(dtype=torch.float64)) for part in rows)


def input_statistics(
    model: nn.Module,
    groups: Sequence[LayerGroup],
    documents: Sequence[Any],
    hessians: bool = True,
    run: Run | None = None,
) -> dict[str, InputStatistics]:
    """Part of a group (see `LayerGroup.parts`) -> its statistics, from one pass over the documents, two where an expert
    is hardly reached; with Hessians 8 x in_features^2 bytes a part.

    Args:
        documents: token ids, each (positions,), or whatever `run` takes in their place.
        run: shows one of them to the groups; by default a call of the model.
    """
    run = run or (lambda document: model(document.unsqueeze(0)))
    parts = [part for group in groups for part in group.parts]
    experts = {part.name for group in groups for part in group.parts if group.experts > 1}
    found, fitted = _statistics(model, parts, documents, hessians, run)
    few = [
        part
        for part in parts
        if part.name in experts
        and (fitted[part.name] < _FEW[hessians] * part.in_features or not found[part.name].tokens)
    ]
    if not few:
        return found
    with shown_all_tokens(model, [part.members[0].module for part in few]):
        shown, _ = _statistics(model, few, documents, hessians, run)
    for name, statistics in shown.items():
        note = f"the router sent it {fitted[name]} of the calibration tokens: compressed for all tokens of its layer"
        found[name] = replace(statistics, tokens=found[name].tokens, note=note)
    return found


def _statistics(
    model: nn.Module, parts: Sequence[LayerGroup], documents: Sequence[Any], hessians: bool, run: Run
) -> tuple[dict[str, InputStatistics], dict[str, int]]:
    """Also the tokens that weights are fitted to."""
    if not hessians:
        moments, rows = _means(model, parts, documents, run, diagonal=True)
        return {name: InputStatistics(moment, tokens=rows[name]) for name, moment in moments.items()}, rows
    fit, check = _split(documents)
    totals, rows = _means(model, parts, fit, run, diagonal=False)
    checked, aside = _means(model, parts, check, run, diagonal=False)
    found = {
        name: InputStatistics(total.diagonal(), total, checked[name], aside[name]) for name, total in totals.items()
    }
    return found, rows


def _split(documents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(to fit to, to judge by); the only document is both."""
    if len(documents) < _CHECK_EVERY:
        return list(documents[:-1] or documents), list(documents[-1:])
    check = documents[_CHECK_EVERY - 1 :: _CHECK_EVERY]
    return [item for place, item in enumerate(documents, 1) if place % _CHECK_EVERY], list(check)


@torch.inference_mode()
def _means(
    model: nn.Module, groups: Sequence[LayerGroup], documents: Sequence[Any], run: Run, diagonal: bool
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Group name -> mean over tokens of x x^T, or of its diagonal; and group name -> these tokens."""
    first: Any = model.get_submodule(groups[0].members[0].module)
    device = first.weight.device  # what is outside of these groups may not be loaded
    shapes = {g.name: (g.in_features,) if diagonal else (g.in_features, g.in_features) for g in groups}
    sums = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    rows = dict.fromkeys(sums, 0)

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()  # (tokens, in_features)
            if diagonal:
                sums[name] += x.square().sum(0)
            else:
                accumulate(sums[name], x, x)
            rows[name] += len(x)

        return hook

    handles = [
        model.get_submodule(group.members[0].module).register_forward_pre_hook(record(group.name)) for group in groups
    ]
    try:
        for document in documents:
            run(document)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.div_(max(1, rows[name])) for name, total in sums.items()}, rows
