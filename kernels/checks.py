"""The numerics gate: a kernel's time counts only after its output, on the very shape timed, matches the reference.

The reference is summed in float64, on the kernel's device, for up to eight rows and every output. What is compared is
|y - reference| over max(|reference|, magnitude of the row): its largest value, and its RMS over the worst row. The
magnitude is the RMS of the reference's row, or |x| |W| / sqrt(in out) where few outputs happen to cancel. Tolerances
allow for a few roundings of the output to bf16, or for fp32 sums. A kernel that quantizes activations may round a tie
the other way than the reference: one code step of one input, times the largest weight of that output, is forgiven.

Against luck: a decoy input runs first (catches a stale output), memory is filled with NaN before each run (catches
outputs that are not written), and the input runs twice. What it is not: proof for inputs unlike the normal ones drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from autotune.errors import DeviceError
from autotune.kernels.reference import activation_codes, canonical, dequantize, reference_linear
from autotune.kernels.scratch import poison_scratch
from autotune.kernels.spec import GroupWeight, KernelModule, Packed, load
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.schemes import scheme

MOST_ROWS_COMPARED = 8
_TOLERANCES = {torch.bfloat16: (2e-2, 4e-3), torch.float32: (1e-4, 1e-5)}  # (largest, RMS) relative error
_CHUNK_WEIGHTS = 2**20  # outputs are compared in pieces of this many weights: 8 MB in float64, cached and reused


@dataclass(frozen=True)
class GateResult:
    max_relative_error: float
    rms_error: float


def gate(
    spec: KernelSpec, weight: GroupWeight, packed: Packed, rows: int, module: KernelModule | None = None
) -> GateResult:
    """Compare a kernel with the reference on `rows` random rows; `module` stands in for the table's (tests use it).

    Raises:
        DeviceError: `kernel.wrong` with what differed, or `kernel.failed` when the kernel itself raised.
    """
    kernel = module or load(spec)
    where = f"{spec.name} as {weight.scheme}, {rows} x {packed.in_features} -> {packed.out_features}"
    generator = torch.Generator().manual_seed(rows)
    device = torch.device(spec.device)
    decoy, x = (torch.randn(rows, packed.in_features, generator=generator).to(device, packed.dtype) for _ in range(2))
    original = x.clone()
    chosen = _rows_compared(rows)
    _output(kernel, packed, decoy, where, chosen)
    outputs = [_output(kernel, packed, x, where, chosen) for _ in range(2)]
    if not torch.equal(x, original):
        raise _wrong(where, "it changed its input")
    raw, judged = _compare(weight, x[chosen.to(device)], outputs)
    largest, rms = _TOLERANCES[packed.dtype]
    rms *= 1.0 + 4.0 / packed.out_features**0.5  # the RMS of a few outputs scatters
    if judged.max_relative_error > largest or judged.rms_error > rms:
        found = f"largest relative error {judged.max_relative_error:.2e} (allowed {largest:.0e}), "
        raise _wrong(where, f"{found}RMS {judged.rms_error:.2e} (allowed {rms:.1e})")
    return raw


def _rows_compared(rows: int) -> torch.Tensor:
    """Up to eight, spread over all; every place in a group of eight is among them, because kernels unroll by that."""
    count = min(rows, MOST_ROWS_COMPARED)
    places = torch.linspace(0, rows - 1, count).long() // count * count + torch.arange(count)
    chosen: torch.Tensor = places.clamp(max=rows - 1).unique()
    return chosen


def _output(kernel: KernelModule, packed: Packed, x: torch.Tensor, where: str, chosen: torch.Tensor) -> torch.Tensor:
    """The chosen rows of the output, copied: a kernel may reuse its buffer."""
    expected = (x.shape[0], packed.out_features)
    poison_scratch()
    torch.full(expected, float("nan"), dtype=packed.dtype, device=x.device)  # freed: likely the next output's place
    try:
        with _empty_is_nan(x.device):
            y = kernel.run(packed, x)
    except (RuntimeError, ValueError) as error:
        hint = "Leave this kernel out, or report the shape."
        raise DeviceError("kernel.failed", f"{where}: {error}.", hint) from error
    if tuple(y.shape) != expected or y.dtype != packed.dtype:
        raise _wrong(where, f"returned {tuple(y.shape)} {y.dtype}, not {expected} {packed.dtype}")
    if not bool(torch.isfinite(y).all()):
        raise _wrong(where, "the output holds NaN or infinity")
    return y[chosen.to(y.device)]


@contextmanager
def _empty_is_nan(device: torch.device) -> Iterator[None]:
    """Make `torch.empty` return NaN on the CPU, as torch's deterministic mode does.

    CUDA is left alone: that mode changes algorithms there, and its caching allocator reuses the block just poisoned.
    The public `use_deterministic_algorithms` would import Inductor, which takes seconds.
    """
    if device.type != "cpu":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(enabled, warn_only=warn_only)


def _compare(weight: GroupWeight, x: torch.Tensor, outputs: list[torch.Tensor]) -> tuple[GateResult, GateResult]:
    """The worst of all outputs, as it is and with ties forgiven; x (rows, in) and outputs (rows, out)."""
    pieces = _split(_at(weight, x.device), max(1, _CHUNK_WEIGHTS // x.shape[1]))
    expected = torch.cat([reference_linear(piece, x, torch.float64) for piece in pieces], 1)  # (rows, out)
    error = torch.stack([(y.double() - expected).abs() for y in outputs]).amax(0)
    forgiven = (error - _tie_slack(pieces, x)).clamp_min_(0.0)
    weight_norm = sum(float(dequantize(piece).norm()) ** 2 for piece in pieces) ** 0.5
    typical = x.double().norm(dim=1, keepdim=True) * weight_norm / (x.shape[1] * expected.shape[1]) ** 0.5
    magnitude = torch.maximum(expected.square().mean(1, keepdim=True).sqrt(), typical).clamp_min_(1e-30)  # (rows, 1)
    return _relative(error, expected, magnitude), _relative(forgiven, expected, magnitude)


def _relative(error: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> GateResult:
    largest = (error / torch.maximum(expected.abs(), magnitude)).max()
    worst_row = (error.square().mean(1, keepdim=True).sqrt() / magnitude).max()
    return GateResult(float(largest), float(worst_row))


def _tie_slack(pieces: list[GroupWeight], x: torch.Tensor) -> torch.Tensor:
    """(rows, out): what one activation code, moved by one step, can change; 0 where activations are not quantized."""
    activation = scheme(pieces[0].scheme).activation
    if activation is None or activation.kind != "int":
        return torch.zeros(1, 1, dtype=torch.float64, device=x.device)
    _, scales = activation_codes(x, activation)  # (rows, 1)
    largest = torch.cat([dequantize(piece).abs().amax(1) for piece in pieces])  # (out,)
    return scales.double() * largest.double()


def _at(weight: GroupWeight, device: torch.device) -> GroupWeight:
    moved = {name: getattr(weight, name) for name in ("dense", "codes", "scales", "bias", "zeros")}
    parts = {name: tensor.to(device) for name, tensor in moved.items() if tensor is not None}
    return replace(weight, **parts)


def _split(weight: GroupWeight, outputs: int) -> list[GroupWeight]:
    """The same weight in pieces of at most so many outputs."""
    if weight.dense is not None:
        denses = weight.dense.split(outputs)
        biases = _optional_split(weight.bias, outputs, len(denses))
        return [GroupWeight(weight.scheme, dense=d, bias=b) for d, b in zip(denses, biases, strict=True)]
    codes, scales = (part.split(outputs) for part in canonical(weight))
    biases, zeros = (_optional_split(part, outputs, len(codes)) for part in (weight.bias, weight.zeros))
    parts = zip(codes, scales, biases, zeros, strict=True)
    return [GroupWeight(weight.scheme, codes=c, scales=s, bias=b, zeros=z) for c, s, b, z in parts]


def _optional_split(part: torch.Tensor | None, outputs: int, pieces: int) -> list[torch.Tensor | None]:
    return [None] * pieces if part is None else list(part.split(outputs))


def _wrong(where: str, what: str) -> DeviceError:
    hint = "Its times are not used. Report it with the device and the torch version."
    return DeviceError("kernel.wrong", f"{where}: {what}.", hint)
