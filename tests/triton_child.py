"""Runs in a process of its own with TRITON_INTERPRET=1: Triton reads it when kernels are defined. Prints JSON."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import torch
import triton.runtime.interpreter as interpreter

from autotune.errors import AutotuneError
from autotune.kernels import reference
from autotune.kernels.checks import gate
from autotune.kernels.spec import kernel
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.schemes import scheme


def allow_new_numpy() -> None:
    """Triton 3.6 calls int() on arrays of one element, which numpy refuses from 2.4 on."""
    original = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def here(spec: KernelSpec) -> KernelSpec:
    return KernelSpec(spec.name, spec.schemes, "cpu", spec.dtypes, spec.module, spec.limits)


def exact_groups(x, number):
    from autotune.kernels.torch.cuda_activations import quantize_groups_torch

    codes, scales = quantize_groups_torch(x, number)
    return codes, scales.t()


def check(name: str, shapes: list[list[int]], splits: bool) -> list[dict[str, object]]:
    spec = here(kernel(name))
    module = import_module(spec.module)
    if splits:
        from autotune.kernels.triton.launch import Config

        module.ONE_ROW = (Config(32, 4, 3),)
        module.FEW_ROWS = (Config(32, 16, 2),)
    if hasattr(module, "quantize_groups"):  # that is tested by itself: the interpreter converts to fp8 in its own way
        module.quantize_groups = exact_groups
    found = []
    for item in spec.schemes[-1:] if splits else spec.schemes:
        for outputs, inputs, *rows in shapes:
            for bias in (True, False):
                generator = torch.Generator().manual_seed(outputs)
                weight = reference.random_weight(item, outputs, inputs, torch.bfloat16, bias, generator)
                packed = module.pack(weight, torch.bfloat16)
                for count in rows if bias else rows[:1]:
                    case = {"scheme": item, "shape": [outputs, inputs], "rows": count, "bias": bias}
                    try:
                        result = gate(spec, weight, packed, count)
                        found.append({**case, "rms": result.rms_error, "bits": 8 * packed.bytes / outputs / inputs})
                    except AutotuneError as error:
                        found.append({**case, "error": str(error)})
    return found


def near_codes(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The same code, or its neighbour."""
    return (found.float() - expected.float()).abs() <= 0.126 * expected.float().abs()


def activations() -> dict[str, object]:
    from autotune.kernels.torch.cuda_activations import (
        FP8,
        FP8_GROUPS,
        INT8,
        quantize,
        quantize_groups,
        quantize_groups_torch,
        quantize_torch,
        rescale,
        rescale_torch,
    )

    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(5, 300, generator=generator) * 3).to(torch.bfloat16)
    x[2] = 0.0
    x[3, 7] = 1e4
    codes, scales = quantize(x, INT8, 8)
    expected, expected_scales = reference.activation_codes(x, scheme("w8a8-int8").activation)
    coarse, coarse_scales = quantize(x, FP8)
    fine = quantize_torch(x, FP8)
    wide = torch.cat([x, x[:, :84]], 1)  # three groups of 128, one of zeros
    grouped, group_scales = quantize_groups(wide, FP8_GROUPS, 8)
    exact, exact_scales = quantize_groups_torch(wide, FP8_GROUPS, 8)
    sums = torch.randint(-(2**20), 2**20, (8, 300), dtype=torch.int32, generator=generator)
    channels, bias = torch.rand(300, generator=generator), torch.randn(300, generator=generator).to(torch.bfloat16)
    fused, plain = rescale(sums, scales, channels, bias), rescale_torch(sums, scales, channels, bias)
    near = near_codes(coarse, fine[0])
    expected_grouped, expanded = reference.activation_codes(wide, scheme("w8a8-fp8-128x128").activation)
    return {
        "codes": torch.equal(codes[:5].float(), expected),
        "scales": torch.equal(scales, expected_scales),
        "padding": codes.shape[0] == 8 and not bool(codes[5:].any()),
        "fp8_scales": torch.equal(coarse_scales, fine[1]),
        "fp8_near": float(near.float().mean()),
        "grouped_scales": torch.equal(group_scales, exact_scales) and group_scales.stride() == (1, 8),
        "grouped_near": float(near_codes(grouped, exact).float().mean()),
        "grouped_exact": torch.equal(exact[:5].float(), expected_grouped)
        and torch.equal(exact_scales[:5], expanded[:, ::128]),
        "grouped_padding": not bool(grouped[5:].float().any()),
        "rescaled_away": float(((fused.float() - plain.float()).abs() / plain.float().abs().clamp_min(1.0)).max()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    allow_new_numpy()
    asked = json.loads(sys.argv[1])  # [kernel, shapes, splits] ..., in one process: imports cost more than most kernels
    answers = {name: check(name, shapes, splits) for name, shapes, splits in asked}
    print(json.dumps({"activations": activations(), "kernels": answers}))
