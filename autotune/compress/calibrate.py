"""Second moments of every layer group's inputs, from the dense model on the calibration documents.

Every fourth document is set aside: weights are compressed for the others, and what the compression did is judged on
these, because an error that a method minimised says little about that method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotune.search_space.groups import LayerGroup

_CHECK_EVERY = 4
_PIECE_WEIGHTS = 2**22


@dataclass(frozen=True)
class InputStatistics:
    """`moment` (in_features,): mean squared input. Hessians (in_features, in_features): mean of x x^T over tokens, that
    of the layer's squared error; None where the method does not ask for them."""

    moment: torch.Tensor
    fit: torch.Tensor | None = None
    check: torch.Tensor | None = None  # over documents that weights are not fitted to

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
        return sum(float((part @ self.check).mul_(part).sum(dtype=torch.float64)) for part in rows)


def input_statistics(
    model: nn.Module, groups: Sequence[LayerGroup], documents: Sequence[torch.Tensor], hessians: bool = True
) -> dict[str, InputStatistics]:
    """Group name -> its statistics, from one pass over the documents; with Hessians 8 x in_features^2 bytes a group."""
    if not hessians:
        moments = _means(model, groups, documents, diagonal=True)
        return {name: InputStatistics(moment) for name, moment in moments.items()}
    fit, check = _split(documents)
    fitted = _means(model, groups, fit, diagonal=False)
    checked = _means(model, groups, check, diagonal=False)
    return {name: InputStatistics(total.diagonal(), total, checked[name]) for name, total in fitted.items()}


def _split(documents: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(to fit to, to judge by); the only document is both."""
    if len(documents) < _CHECK_EVERY:
        return list(documents[:-1] or documents), list(documents[-1:])
    check = documents[_CHECK_EVERY - 1 :: _CHECK_EVERY]
    return [item for place, item in enumerate(documents, 1) if place % _CHECK_EVERY], list(check)


@torch.inference_mode()
def _means(
    model: nn.Module, groups: Sequence[LayerGroup], documents: Sequence[torch.Tensor], diagonal: bool
) -> dict[str, torch.Tensor]:
    """Group name -> mean over tokens of x x^T, or of its diagonal."""
    device = next(model.parameters()).device
    shapes = {g.name: (g.in_features,) if diagonal else (g.in_features, g.in_features) for g in groups}
    sums = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    rows = dict.fromkeys(sums, 0)

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()  # (tokens, in_features)
            if diagonal:
                sums[name] += x.square().sum(0)
            else:
                sums[name].addmm_(x.t(), x)
            rows[name] += len(x)

        return hook

    handles = [
        model.get_submodule(group.members[0].module).register_forward_pre_hook(record(group.name)) for group in groups
    ]
    try:
        for document in documents:
            model(document.unsqueeze(0))
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.div_(max(1, rows[name])) for name, total in sums.items()}
