"""The two survivors of every four inputs and where they were, on whatever device the weight is."""

from __future__ import annotations

import torch

from autotune.errors import InputError


def survivors(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) with at most two non-zeros in every four inputs to values and positions (uint8), each (out, in/4, 2).

    Positions ascend. Where fewer than two are non-zero, zeros at the lowest free places fill up.

    Raises:
        InputError: `packing.pattern`.
    """
    quads = values.view(values.shape[0], -1, 4)
    live = quads != 0
    if bool((live.sum(-1) > 2).any()):
        raise InputError("packing.pattern", "some groups of four inputs have more than two non-zeros.", "Prune first.")
    # Non-zeros first, then lowest place: the two smallest keys, put back in order of place.
    keys = torch.arange(4, device=values.device, dtype=torch.uint8) + 4 * (~live).to(torch.uint8)
    places = keys.topk(2, -1, largest=False).values.remainder(4).sort(-1).values
    return quads.gather(-1, places.long()), places
