"""Runs in a process of its own with TRITON_INTERPRET=1: Triton reads it when kernels are defined. Prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from autotune.errors import AutotuneError
from autotune.kernels import reference
from autotune.kernels.checks import gate
from autotune.kernels.spec import GroupWeight, Packed, kernel
from autotune.kernels.triton import launch
from autotune.kernels.triton.launch import Config
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.schemes import scheme


def allow_new_numpy() -> None:
    """Triton 3.6 calls int() on arrays of one element, which numpy refuses from 2.4 on."""
    original = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def convert_as_devices_do() -> None:
    """Triton 3.6 cuts bf16 off and loses the carry of what rounds up to a power of two; devices round to nearest even,
    as torch does, which is faster too."""
    original, kinds = interpreter._convert_float, {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16}
    kinds[tl.float8e4nv] = torch.float8_e4m3fn
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}

    def convert(values: np.ndarray, source: tl.dtype, goal: tl.dtype, rounding: object) -> np.ndarray:
        if source not in kinds or goal not in kinds:
            return original(values, source, goal, rounding)
        given = torch.frombuffer(bytearray(values.tobytes()), dtype=kinds[source]).to(kinds[goal])
        held = given.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[given.itemsize]).numpy()
        return held.view(bits[given.itemsize]).reshape(values.shape)

    interpreter._convert_float = convert


def here(spec: KernelSpec) -> KernelSpec:
    return KernelSpec(spec.name, spec.schemes, "cpu", spec.dtypes, spec.module, spec.limits)


FIRST = launch.pick  # in the interpreter it takes the first


class Turns:
    """Stands in for `launch.pick`: all configurations that a call may take, one after the other."""

    def __init__(self) -> None:
        self.number, self.offered = 0, 1

    def pick(self, key: object, configs: Sequence[Config], call: object) -> Config:
        self.offered = len(configs)
        return configs[self.number]

    def __iter__(self) -> Iterator[int]:
        self.number, self.offered = 0, 1
        while self.number < self.offered:
            yield self.number
            self.number += 1


def check(name: str, shapes: list[list[int]], configs: str) -> list[dict[str, object]]:
    """`configs`: each kernel's "first", "every" one (that the interpreter would pass over), or two with "splits"."""
    spec = here(kernel(name))
    module = import_module(spec.module)
    if configs == "splits":
        module.ONE_ROW = (Config(32, 4, 3),)
        module.FEW_ROWS = (Config(32, 16, 2),)
    turns = Turns() if configs == "every" else None
    launch.pick = FIRST if turns is None else turns.pick
    found = []
    for item in spec.schemes[-1:] if configs == "splits" else spec.schemes:
        for outputs, inputs, *rows in shapes:
            for bias in (True, False):
                generator = torch.Generator().manual_seed(outputs)
                weight = reference.random_weight(item, outputs, inputs, torch.bfloat16, bias, generator)
                packed = module.pack(weight, torch.bfloat16)
                for count in rows if bias else rows[:1]:
                    case = {"scheme": item, "shape": [outputs, inputs], "rows": count, "bias": bias}
                    tried = ({"config": number, **judged(spec, weight, packed, count)} for number in turns or (0,))
                    found.extend({**case, **result} for result in tried)
    return found


def judged(spec: KernelSpec, weight: GroupWeight, packed: Packed, rows: int) -> dict[str, object]:
    """What the gate says."""
    try:
        result = gate(spec, weight, packed, rows)
    except AutotuneError as error:
        return {"error": str(error)}
    return {"rms": result.rms_error, "bits": 8 * packed.bytes / packed.out_features / packed.in_features}


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
    expected_grouped, expanded = reference.activation_codes(wide, scheme("w8a8-fp8-128x128").activation)
    return {
        "codes": torch.equal(codes[:5].float(), expected),
        "scales": torch.equal(scales, expected_scales),
        "padding": codes.shape[0] == 8 and not bool(codes[5:].any()),
        "fp8_codes": torch.equal(coarse.float(), fine[0].float()),
        "fp8_scales": torch.equal(coarse_scales, fine[1]),
        "grouped_codes": torch.equal(grouped.float(), exact.float()),
        "grouped_scales": torch.equal(group_scales, exact_scales) and group_scales.stride() == (1, 8),
        "grouped_exact": torch.equal(exact[:5].float(), expected_grouped)
        and torch.equal(exact_scales[:5], expanded[:, ::128]),
        "grouped_padding": not bool(grouped[5:].float().any()),
        "rescaled_away": float(((fused.float() - plain.float()).abs() / plain.float().abs().clamp_min(1.0)).max()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    allow_new_numpy()
    convert_as_devices_do()
    asked = json.loads(
        sys.argv[1]
    )  # [kernel, shapes, configs] ..., in one process: imports cost more than most kernels
    answers = [check(name, shapes, configs) for name, shapes, configs in asked]
    print(json.dumps({"activations": activations(), "kernels": answers}))
