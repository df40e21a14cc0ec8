"""Second moments E[x_j^2] of every layer group's inputs, from the dense model on the calibration documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from autotune.search_space.groups import ModelSpec


@torch.inference_mode()
def input_moments(model: nn.Module, spec: ModelSpec, documents: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Group name -> (in_features,) fp32 mean of squared inputs over all tokens."""
    sums = {group.name: torch.zeros(group.in_features, dtype=torch.float64) for group in spec.groups}
    rows = dict.fromkeys(sums, 0)

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()  # (tokens, in_features)
            sums[name] += x.square().sum(0)
            rows[name] += len(x)

        return hook

    handles = [
        model.get_submodule(group.members[0].module).register_forward_pre_hook(record(group.name))
        for group in spec.groups
    ]
    try:
        for document in documents:
            model(document.unsqueeze(0))
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / max(1, rows[name])).float() for name, total in sums.items()}
