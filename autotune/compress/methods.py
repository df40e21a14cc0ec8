"""Compression methods by name: how a group's weights become codes. The choices of `--compression`.

A method takes a group's dense weights, what calibration saw of its inputs, and formats, all of them at once because
methods share work between them. Add one: write its file, add a line to `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from autotune.compress import hwpq, rounding, sparse, wanda
from autotune.compress.calibrate import InputStatistics
from autotune.compress.curvature import sweep_factor
from autotune.compress.sweep import Start, sweep
from autotune.errors import InputError, did_you_mean
from autotune.kernels.reference import dequantize
from autotune.kernels.spec import GroupWeight
from autotune.search_space.schemes import NumberFormat, Scheme

Method = Callable[[torch.Tensor, InputStatistics, Sequence[Scheme]], list[GroupWeight]]
Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # weight (out, in), moment (in,) -> (out, in) bool

AUTO = "auto"
FAST = "wanda"  # without a Hessian; HWPQ's metric costs as much and prunes worse (docs/measured.md)
_ROWS_OF_WEIGHTS = 2**23  # rows are compressed in parts of so many weights: memory stays that of a part


@dataclass(frozen=True)
class Compressed:
    """One group under one format, by which method, and its error on documents that no method was fitted to."""

    weight: GroupWeight
    method: str
    layer_error: float | None  # of the group's output, squared and relative; None where no Hessian was taken


def compress(name: str, weight: torch.Tensor, inputs: InputStatistics, schemes: Sequence[Scheme]) -> list[Compressed]:
    """Compress a group's weights (out, in) fp32 by the named method, or by the best for each scheme (`AUTO`)."""
    power = inputs.output_power(weight)

    def judged(method: str) -> list[Compressed]:
        made = METHODS[method](weight, inputs, schemes)
        if power is None:
            return [Compressed(item, method, None) for item in made]
        changes = [inputs.output_power(dequantize(item) - weight) or 0.0 for item in made]
        return [Compressed(item, method, error / (power or 1.0)) for item, error in zip(made, changes, strict=True)]

    candidates = [judged(method) for method in (AUTO_METHODS if name == AUTO else (name,))]
    return [min(found, key=lambda item: item.layer_error or 0.0) for found in zip(*candidates, strict=True)]


def check(name: str) -> None:
    """Raises InputError `compression.unknown`, with the closest known names."""
    if name != AUTO and name not in METHODS:
        what = f"there is no compression method {name!r}."
        raise InputError("compression.unknown", what, did_you_mean(name, [AUTO, *METHODS]))


def takes_hessian(name: str) -> bool:
    return name in (AUTO, "joint")


def joint(weight: torch.Tensor, inputs: InputStatistics, schemes: Sequence[Scheme]) -> list[GroupWeight]:
    """The 2:4 mask and weights of least layer error, then one sweep that rounds every format and makes up for it."""
    factor = sweep_factor(inputs.hessian)
    is_sparse = any(item.sparsity == "2:4" for item in schemes)
    spectrum = sparse.spectrum(inputs.hessian) if is_sparse else None
    parts: list[list[GroupWeight]] = []
    for rows in weight.split(max(1, _ROWS_OF_WEIGHTS // weight.shape[1])):
        keep = None if spectrum is None else sparse.admm_mask(rows, spectrum)
        fitted = None if keep is None else sparse.least_squares(rows, inputs.hessian, keep)
        parts.append([])
        starts = {item.name: _start(item, rows, fitted, keep, inputs) for item in schemes if item.weight.bits < 16}
        codes = dict(zip(starts, sweep(list(starts.values()), factor), strict=True)) if starts else {}
        for item in schemes:
            if item.name in starts:
                made = _typed(codes[item.name], item.weight)
                parts[-1].append(GroupWeight(item.name, codes=made, scales=starts[item.name].scales))
            else:
                assert fitted is not None  # a format of 16 bits is compressed by its sparsity
                parts[-1].append(GroupWeight(item.name, dense=fitted.to(torch.bfloat16)))
    return [_joined(pieces) for pieces in zip(*parts, strict=True)]


def _start(
    item: Scheme,
    weight: torch.Tensor,
    fitted: torch.Tensor | None,
    keep: torch.Tensor | None,
    inputs: InputStatistics,
) -> Start:
    """Scales belong to the weights that survive: those of the fitted mask where the scheme is sparse."""
    if item.sparsity == "dense":
        fitted, keep = weight, None
    assert fitted is not None
    _, scales = rounding.quantize(fitted, inputs.moment, item.weight, keep)
    return Start(item.weight, fitted, scales, keep)


def _typed(codes: torch.Tensor, number: NumberFormat) -> torch.Tensor:
    return codes.to(torch.int8 if number.kind == "int" else torch.float8_e4m3fn)


def _joined(pieces: Sequence[GroupWeight]) -> GroupWeight:
    """Parts of a group's rows as one."""

    def cat(name: str) -> torch.Tensor | None:
        tensors = [getattr(piece, name) for piece in pieces]
        if tensors[0] is None or len(tensors) == 1:
            return tensors[0]  # type: ignore[no-any-return]
        if tensors[0].dtype == torch.float8_e4m3fn:  # torch cannot concatenate these
            return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(torch.float8_e4m3fn)
        return torch.cat(tensors)

    return GroupWeight(pieces[0].scheme, dense=cat("dense"), codes=cat("codes"), scales=cat("scales"))


def rounded(mask: Mask) -> Method:
    """Round to nearest with clipped scales, after a mask where the scheme is sparse; no weight is moved."""

    def method(weight: torch.Tensor, inputs: InputStatistics, schemes: Sequence[Scheme]) -> list[GroupWeight]:
        keep = mask(weight, inputs.moment) if any(item.sparsity == "2:4" for item in schemes) else None
        made = []
        for item in schemes:
            kept = keep if item.sparsity == "2:4" else None
            if item.weight.bits >= 16:
                dense = weight if kept is None else weight * kept
                made.append(GroupWeight(item.name, dense=dense.to(torch.bfloat16)))
            else:
                codes, scales = rounding.quantize(weight, inputs.moment, item.weight, kept)
                made.append(GroupWeight(item.name, codes=codes, scales=scales))
        return made

    return method


METHODS: dict[str, Method] = {
    "joint": joint,
    "wanda": rounded(wanda.mask_24),
    "hwpq": rounded(hwpq.mask_24),
    "magnitude": rounded(lambda weight, _: wanda.mask_24(weight, None)),
}
AUTO_METHODS = ("joint", "wanda")
