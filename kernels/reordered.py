"""Copies that a kernel needs of weights it was handed as they are, made once and kept as long as the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_copies: Any = WeakTensorKeyDictionary()


def kept(weight: torch.Tensor | None, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`make(weight)`, made again after the weight was changed in place (as far as torch counts changes).

    The copy must not share the weight's memory, or neither would ever be freed.
    """
    assert weight is not None
    version = 0 if weight.is_inference() else weight._version
    found: tuple[int, torch.Tensor] | None = _copies.get(weight)
    if found is None or found[0] != version:
        found = _copies[weight] = version, make(weight)
    return found[1]
