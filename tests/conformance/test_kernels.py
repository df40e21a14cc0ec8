"""Every kernel of the table that runs here, against the float64 reference; and broken kernels the gate must catch.

Adding a kernel needs no change here: cases come from the table and its limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from autotune.errors import DeviceError, InputError
from autotune.kernels import formats, reference
from autotune.kernels.checks import GateResult, gate
from autotune.kernels.spec import KERNELS, GroupWeight, KernelModule, Packed, kernel, kernel_hash, load
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.rules import lacking
from autotune.search_space.schemes import scheme
from autotune.targets.detect import detect_cpu, detect_gpu

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FEATURES, GPU = detect_cpu().features, detect_gpu()
ROWS = (1, 2, 3, 7, 16, 17, 33, 130)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost far more than they save on small shapes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _missing(spec: KernelSpec) -> str:
    """Why a kernel cannot run here; empty when it can."""
    if spec.device == "cuda" and (GPU is None or not torch.cuda.is_available()):
        return "no CUDA device"
    here = FEATURES if spec.device == "cpu" else GPU.features
    missing = lacking(spec.limits.features, here)
    if missing:
        return f"this {spec.device} device lacks {', '.join(missing)}"
    least = spec.limits.min_compute_capability
    return f"needs compute capability {least}" if least and GPU and GPU.compute_capability < least else ""


def _cases() -> list[object]:
    cases = []
    for spec in KERNELS:
        marks = [pytest.mark.skipif(bool(_missing(spec)), reason=_missing(spec))]
        marks += [pytest.mark.gpu] if spec.device == "cuda" else []
        for name in spec.schemes:
            cases += [
                pytest.param(spec, name, DTYPES[dtype], id=f"{spec.name}-{name}-{dtype}", marks=marks)
                for dtype in spec.dtypes
            ]
    return cases


def _shapes(spec: KernelSpec, name: str) -> list[tuple[int, int]]:
    """(out, in): the smallest legal, an odd multiple of it, and one of ordinary size that is no power of two."""
    inputs = math.lcm(spec.limits.in_multiple, scheme(name).weight.group_size or 1)
    inputs = math.lcm(inputs, scheme(name).block or 2)
    outputs = spec.limits.out_multiple
    return [(outputs, inputs), (3 * outputs, 5 * inputs), (-(-200 // outputs) * outputs, -(-360 // inputs) * inputs)]


def _weight(name: str, outputs: int, inputs: int, dtype: torch.dtype, bias: bool = True, seed: int = 0) -> GroupWeight:
    return reference.random_weight(name, outputs, inputs, dtype, bias, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("spec", "name", "dtype"), _cases())
def test_matches_the_reference(spec, name, dtype):
    for outputs, inputs in _shapes(spec, name):
        for bias in (True, False):
            weight = _weight(name, outputs, inputs, dtype, bias)
            packed = load(spec).pack(weight, dtype)
            assert (packed.out_features, packed.in_features, packed.dtype) == (outputs, inputs, dtype)
            for rows in ROWS if bias and not spec.memory_only else (1, 17):  # those multiply as torch does
                gate(spec, weight, packed, rows)


@pytest.mark.parametrize(("spec", "name", "dtype"), _cases())
def test_zero_rows_and_large_numbers(spec, name, dtype):
    outputs, inputs = _shapes(spec, name)[1]
    weight = _weight(name, outputs, inputs, dtype)
    packed = load(spec).pack(weight, dtype)
    for rows in (1, 33):
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).to(spec.device, dtype) * 1e4
        x[-1] = 0.0
        y = load(spec).run(packed, x).cpu().double()
        expected = reference.reference_linear(weight, x.cpu(), torch.float64)
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2 * 1e4 if rows > 1 else 0.0)
        assert torch.equal(y[-1], weight.bias.double())


@pytest.mark.parametrize(("spec", "name", "dtype"), _cases())
def test_bytes_are_those_of_the_scheme(spec, name, dtype):
    """Packed bytes may exceed the scheme's own by `copies`, padding and wide scales, never fall short of them."""
    outputs, inputs = 256, 1024
    packed = load(spec).pack(_weight(name, outputs, inputs, dtype, bias=False), dtype)
    own = scheme(name).bits_per_weight * outputs * inputs / 8
    assert 0.9 * own * spec.copies <= packed.bytes <= 1.4 * own * spec.copies


@pytest.mark.parametrize("spec", [spec for spec in KERNELS if not _missing(spec)], ids=lambda spec: spec.name)
def test_threads_do_not_change_the_answer(spec):
    torch.set_num_threads(2)
    dtype = DTYPES[spec.dtypes[0]]
    weight = _weight(spec.schemes[-1], 192, 768, dtype)
    gate(spec, weight, load(spec).pack(weight, dtype), 70)


@pytest.mark.parametrize("spec", [spec for spec in KERNELS if not _missing(spec)], ids=lambda spec: spec.name)
def test_runs_under_inference_mode_and_after_it(spec):
    dtype = DTYPES[spec.dtypes[0]]
    weight = _weight(spec.schemes[0], 64, 256, dtype)
    packed = load(spec).pack(weight, dtype)
    x = torch.ones(100, 256, dtype=dtype, device=spec.device)
    with torch.inference_mode():
        inside = load(spec).run(packed, x)
    assert torch.equal(inside, load(spec).run(packed, x))


def test_int8_activations_are_exact():
    """w8a8 is integer arithmetic: in fp32 only the last scaling rounds."""
    spec = kernel("onednn.w8a8")
    if reason := _missing(spec):
        pytest.skip(reason)
    weight = _weight("w8a8-int8", 192, 4096, torch.float32)
    packed = load(spec).pack(weight, torch.float32)
    for rows in (1, 33):
        assert gate(spec, weight, packed, rows).max_relative_error < 1e-6


def test_too_many_inputs_for_32_bit_sums():
    weight = GroupWeight("w8a8-int8", codes=torch.zeros(1, 2**16 + 4, dtype=torch.int8), scales=torch.ones(1, 1))
    with pytest.raises(InputError, match=r"kernel\.limit"):
        load(kernel("onednn.w8a8")).pack(weight, torch.bfloat16)


def test_hash_is_stable_and_differs_between_kernels():
    hashes = [kernel_hash(spec) for spec in KERNELS]
    assert hashes == [kernel_hash(spec) for spec in KERNELS]
    assert len(set(hashes)) == len(KERNELS)


# Broken kernels. Each is right but for one classic mistake.


def _honest(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    return reference.reference_linear(packed.data, x.float()).to(x.dtype)


def _altered(change: str, weight: GroupWeight) -> GroupWeight:
    """The weight as a kernel with this mistake would read it."""
    codes, scales = weight.codes.clone(), weight.scales.clone()
    if change == "wrong group's scale":
        scales = scales.roll(1, dims=1)
    if change == "one wrong scale":
        scales[5, 1] = scales[5, 2] * 2
    if change == "swapped nibbles":
        codes = codes.view(codes.shape[0], -1, 2).flip(-1).reshape(codes.shape)
    if change == "missing inputs at the end":
        codes[:, -4:] = 0
    if change == "offset not subtracted":
        codes = codes + 1
    if change == "last output skipped":
        codes[-1] = 0
    if change == "int4 codes wrap":
        codes = torch.where(codes == 7, -8, codes)
    return GroupWeight(weight.scheme, codes=codes, scales=scales, bias=None if change == "bias" else weight.bias)


CHANGES = (
    "wrong group's scale",
    "one wrong scale",
    "swapped nibbles",
    "missing inputs at the end",
    "offset not subtracted",
    "last output skipped",
    "int4 codes wrap",
    "bias",
)


class _Stale:
    """Returns the output of the call before."""

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None

    def run(self, packed: Packed, x: torch.Tensor) -> torch.Tensor:
        now = _honest(packed, x)
        before, self.last = self.last, now
        return now if before is None else before


def _masked_store(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """An off-by-one mask leaves the last column as the allocator gave it."""
    y = torch.empty(x.shape[0], packed.out_features, dtype=x.dtype)
    y[:, :-1] = _honest(packed, x)[:, :-1]
    return y


def _unwritten(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape[0], packed.out_features, dtype=x.dtype)


def _overflow(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """Sums of products kept in 16 bits."""
    codes, scales = reference.activation_codes(x, scheme("w8a8-int8").activation)
    sums = (codes @ packed.data.codes.float().T).to(torch.int32).to(torch.int16).float()
    return (sums * scales * packed.data.scales.T + packed.data.bias.float()).to(x.dtype)


def _first_row_scale(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """One activation scale for all tokens, the first's."""
    codes, scales = reference.activation_codes(x, scheme("w8a8-int8").activation)
    sums = codes @ packed.data.codes.float().T
    return (sums * scales[0] * packed.data.scales.T + packed.data.bias.float()).to(x.dtype)


def _changes_input(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    y = _honest(packed, x)
    x.mul_(2.0)
    return y


FUNCTIONS = {
    "stale output": _Stale().run,
    "off-by-one mask": _masked_store,
    "uninitialized output": _unwritten,
    "16-bit sums": _overflow,
    "one scale for all tokens": _first_row_scale,
    "changes its input": _changes_input,
    "wrong dtype": lambda packed, x: _honest(packed, x).half(),
    "transposed output": lambda packed, x: _honest(packed, x).T,
}


def _gate(name: str, run, seen: GroupWeight, true: GroupWeight) -> GateResult:
    spec = next(spec for spec in KERNELS if name in spec.schemes and spec.device == "cpu")
    packed = Packed(true.codes.shape[0], true.codes.shape[1], torch.bfloat16, 0, seen)
    module: KernelModule = SimpleNamespace(pack=None, run=run)
    return gate(spec, true, packed, 17, module)


def test_the_gate_lets_an_honest_kernel_pass():
    weight = _weight("w4a16-int4-g128", 512, 1024, torch.bfloat16)
    assert _gate("w4a16-int4-g128", _honest, weight, weight).max_relative_error < 5e-3


@pytest.mark.parametrize("change", CHANGES)
def test_the_gate_catches_misread_weights(change):
    weight = _weight("w4a16-int4-g128", 512, 1024, torch.bfloat16)
    with pytest.raises(DeviceError, match=r"kernel\.wrong"):
        _gate("w4a16-int4-g128", _honest, _altered(change, weight), weight)


@pytest.mark.parametrize("mistake", FUNCTIONS)
def test_the_gate_catches_broken_code(mistake):
    weight = _weight("w8a8-int8", 512, 1024, torch.bfloat16)
    with pytest.raises(DeviceError, match=r"kernel\.wrong"):
        _gate("w8a8-int8", FUNCTIONS[mistake], weight, weight)


def test_the_gate_names_a_kernel_that_raises():
    def fail(packed: Packed, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unsupported layout")

    weight = _weight("w8a8-int8", 32, 64, torch.bfloat16)
    with pytest.raises(DeviceError, match=r"kernel\.failed.*unsupported layout"):
        _gate("w8a8-int8", fail, weight, weight)


def test_the_gate_forgives_one_tie_and_no_more():
    """A kernel that rounds one activation code the other way passes; two steps on every code do not."""
    weight = _weight("w8a8-int8", 256, 64, torch.float32)
    spec = kernel("onednn.w8a8")
    packed = Packed(256, 64, torch.float32, 0, weight)

    def moved(steps: float, places: int):
        def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
            codes, scales = reference.activation_codes(x, scheme("w8a8-int8").activation)
            codes[:, :places] += steps
            return codes * scales @ reference.dequantize(weight).T + weight.bias

        return SimpleNamespace(pack=None, run=run)

    gate(spec, weight, packed, 5, moved(1.0, 1))
    with pytest.raises(DeviceError, match=r"kernel\.wrong"):
        gate(spec, weight, packed, 5, moved(2.0, 64))


def test_random_weights_are_canonical():
    for name in ("w8a8-int8", "w4a16-int4-g32", "w8a8-fp8", "2:4+w8a8-int8", "2:4+w8a8-fp8", "2:4+w4a16-int4-g128"):
        weight = _weight(name, 48, 256, torch.bfloat16)
        scales, codes = weight.scales, weight.codes.float()
        assert torch.equal(scales.half().float(), scales)
        assert torch.equal(scales.bfloat16().float(), scales)
        assert float(codes.abs().max()) <= scheme(name).weight.qmax
        if scheme(name).sparsity == "2:4":
            assert int((codes.view(48, 64, 4) != 0).sum(-1).max()) <= 2
            assert not bool(torch.signbit(codes[codes == 0]).any()) or codes.dtype == torch.int8


def test_scales_round_to_what_both_half_formats_hold():
    scales = formats.round_scale(torch.logspace(-8, 8, 400))
    assert torch.equal(scales.half().float(), scales)
    assert torch.equal(scales.bfloat16().float(), scales)
    assert float(scales.min()) == 2.0**-14


def test_activation_codes_follow_the_exported_semantics():
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-127.5, 2.5, 3.5, 127.5]])
    codes, scales = reference.activation_codes(x, scheme("w8a8-int8").activation)
    assert codes.tolist() == [[0.0, 0.0, 0.0, 0.0], [-128.0, 2.0, 4.0, 127.0]]
    assert float(scales[1]) == 1.0
    assert torch.equal(reference.quantize_activations(x, scheme("w8a8-fp8").activation)[0], x[0])
