"""Which scales make a group's inputs and weights easier to round: AWQ's and SmoothQuant's, as powers of two.

A group computes W x = (W s)(x / s) for any scale s per input; the division is folded into what makes x (see `folding`).

    AWQ (arXiv 2306.00978)           s_j = mean|x_j|^a
    SmoothQuant (arXiv 2211.10438)   s_j = max|x_j|^a / max_i|w_ij|^(1-a)

both over sqrt(max s * min s), then rounded to a power of two. Of a small grid of a that one is taken whose outputs,
weights and activations rounded to nearest, are nearest the dense ones on tokens that the scales were not made from: the
geometric mean over formats of its squared error over that without scales. One scale serves all schemes of a group.
`auto` takes none unless that mean falls by a clear margin and no format gets worse: on a model without loud inputs what
scales do to weights outweighs what they do for activations (docs/measured.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotune.compress import rounding
from autotune.compress.database import stacked_weight
from autotune.errors import InputError, did_you_mean
from autotune.folding import LIMIT, Fold, Site
from autotune.kernels.products import linear
from autotune.kernels.reference import dequantize, quantize_activations
from autotune.kernels.spec import GroupWeight
from autotune.search_space.groups import LayerGroup
from autotune.search_space.schemes import Scheme

VERSION = "smoothing/1"  # part of the stage's key; change it whenever scales would change
OFF, AUTO = "off", "auto"
MODES = (OFF, "awq", "smoothquant", AUTO)
MARGIN = 0.8  # of the error that may be left, for `auto` to fold anything
WORSE = 1.05  # times its error, that no format may lose by
_AWQ = (0.25, 0.5, 0.75, 1.0)
_SMOOTHQUANT = (0.3, 0.5, 0.7)
_TOKENS = 256  # that errors are measured on
_ROWS = 128  # of a group's weights, spread over all


@dataclass(frozen=True)
class Choice:
    """`left`: the mean share of the error that the fold leaves, on inputs set aside; `worst`: of the format it does
    least for. `kind`: the formula and its a."""

    fold: Fold
    kind: str
    left: float
    worst: float


@dataclass
class _Inputs:
    """What a group's inputs are like: `mean`, `largest` and `moment` (in,) over one half of the documents, and some
    tokens (tokens, in) of the other."""

    mean: torch.Tensor
    largest: torch.Tensor
    moment: torch.Tensor
    tokens: torch.Tensor


def check(mode: str) -> None:
    """Raises InputError `smoothing.unknown`."""
    if mode not in MODES:
        raise InputError("smoothing.unknown", f"there is no smoothing {mode!r}.", did_you_mean(mode, list(MODES)))


def choose(
    model: nn.Module,
    groups: Sequence[LayerGroup],
    places: Sequence[Site],
    schemes: Mapping[str, Sequence[Scheme]],
    documents: Sequence[torch.Tensor],
    mode: str,
) -> list[Choice]:
    """The folds worth making, at most one a place.

    Args:
        model: dense, with nothing folded.
        places: see `folding.sites`.
        schemes: group -> the compressed ones it may get.
        documents: token ids; every other one is set aside to judge by.
    """
    by_name = {group.name: group for group in groups}
    wanted = [place for place in places if _formats(schemes[place.group])]
    seen = _inputs(model, [by_name[place.group] for place in wanted], documents)
    found = []
    for place in wanted:
        best = _best(place, stacked_weight(model, by_name[place.group]), seen[place.group], schemes[place.group], mode)
        if best is not None:
            found.append(best)
    return found


def _best(place: Site, weight: torch.Tensor, inputs: _Inputs, schemes: Sequence[Scheme], mode: str) -> Choice | None:
    rows = weight[:: max(1, len(weight) // _ROWS)]
    formats = _formats(schemes)
    plain = [_error(rows, inputs, torch.ones_like(inputs.mean), item) for item in formats]
    choices = []
    for kind, scale in _candidates(weight, inputs, place, mode):
        exponents = _exponents(scale)
        if not any(exponents):
            continue
        columns = place.spread(torch.exp2(torch.tensor(exponents, dtype=torch.float32, device=weight.device)))
        shares = [_error(rows, inputs, columns, item) / max(e, 1e-30) for item, e in zip(formats, plain, strict=True)]
        left = math.exp(sum(math.log(max(share, 1e-9)) for share in shares) / len(shares))
        choices.append(Choice(Fold(place, exponents), kind, left, max(shares)))
    if mode == AUTO:
        choices = [choice for choice in choices if choice.left < MARGIN and choice.worst < WORSE]
    best = min(choices, key=lambda choice: choice.left, default=None)
    return None if best is None or (mode == "awq" and best.left >= 1) else best  # a = 0 is on AWQ's grid


def _candidates(weight: torch.Tensor, inputs: _Inputs, place: Site, mode: str) -> list[tuple[str, torch.Tensor]]:
    """(name, scale of every output of the place's source)."""
    mean = _floored(place.gathered(inputs.mean).amax(0))
    largest = _floored(place.gathered(inputs.largest).amax(0))
    columns = _floored(place.gathered(weight.abs().amax(0)).amax(0))
    awq = [(f"AWQ {a:g}", mean**a) for a in _AWQ]
    powers = (0.5,) if mode == "smoothquant" else _SMOOTHQUANT
    smoothquant = [(f"SmoothQuant {a:g}", largest**a / columns ** (1 - a)) for a in powers]
    return {"awq": awq, "smoothquant": smoothquant}.get(mode, [*awq, *smoothquant])


def _floored(values: torch.Tensor) -> torch.Tensor:
    """An input that is never used is scaled like the quietest that is."""
    used = values[values > 0]
    return values.clamp_min(float(used.min()) if len(used) else 1.0)


def _exponents(scale: torch.Tensor) -> tuple[int, ...]:
    logs = scale.double().log2()
    middle = (logs.max() + logs.min()) / 2
    return tuple((logs - middle).round().clamp(-LIMIT, LIMIT).int().tolist())


def _formats(schemes: Sequence[Scheme]) -> list[Scheme]:
    """One scheme for every kind of weights and activations that are rounded: of those whose weights differ in the
    size of their groups, the one with the largest."""
    found: dict[Any, Scheme] = {}
    for item in schemes:
        number = item.weight
        if item.sparsity != "dense" or number.bits >= 16:
            continue
        kind = (number.kind, number.bits, number.symmetric, item.activation)
        size = number.group_size or math.inf
        if kind not in found or size > (found[kind].weight.group_size or math.inf):
            found[kind] = item
    return list(found.values())


def _error(weight: torch.Tensor, inputs: _Inputs, scale: torch.Tensor, item: Scheme) -> float:
    """Squared error of the outputs of some rows (rows, in), over their power, with inputs divided by `scale`."""
    moved = weight * scale
    found = rounding.quantize(moved, inputs.moment / scale.square(), item.weight)
    made = dequantize(GroupWeight(item.name, codes=found.codes, scales=found.scales, zeros=found.zeros))
    x = inputs.tokens / scale
    seen = x if item.activation is None else quantize_activations(x, item.activation)
    exact = linear(inputs.tokens, weight)
    return float((linear(seen, made) - exact).square().sum() / exact.square().sum().clamp_min(1e-30))


@torch.inference_mode()
def _inputs(model: nn.Module, groups: Sequence[LayerGroup], documents: Sequence[torch.Tensor]) -> dict[str, _Inputs]:
    device = next(model.parameters()).device
    sums = {group.name: [torch.zeros(group.in_features, device=device) for _ in range(3)] for group in groups}
    kept: dict[str, list[torch.Tensor]] = {group.name: [] for group in groups}
    count, aside = 0, False
    handles = []
    for group in groups:

        def see(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = group.name) -> None:
            x = args[0].flatten(0, -2).float()
            if aside:
                kept[name].append(x)
                return
            mean, largest, moment = sums[name]
            mean += x.abs().sum(0)
            largest.copy_(torch.maximum(largest, x.abs().amax(0)))
            moment += x.square().sum(0)

        handles.append(model.get_submodule(group.members[0].module).register_forward_pre_hook(see))
    try:
        for number, document in enumerate(documents):
            aside = number % 2 == 1 or len(documents) == 1
            count += 0 if aside else len(document)
            model(document.unsqueeze(0))
            if len(documents) == 1:
                aside, count = False, len(document)
                model(document.unsqueeze(0))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, (mean, largest, moment) in sums.items():
        tokens = torch.cat(kept[name])
        step = max(1, len(tokens) // _TOKENS)
        found[name] = _Inputs(mean / count, largest, moment / count, tokens[::step].clone())
    return found
