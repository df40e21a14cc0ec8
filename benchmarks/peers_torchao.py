"""torchao as an engine (see `peers.py`): int8 weights, with and without int8 activations, compiled and frozen.

Its int4 kernels need extensions that are not in the package for x86. Eager tensors would be slow: `torch.compile` with
frozen weights is how it is meant to run. One compiled module multiplies its input by every copy.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from peers import Case, Failures, Loaded, made_input, made_weight, relative_error
from torchao import quantization

from autotune.kernels.reference import dequantize
from autotune.kernels.spec import GroupWeight
from autotune.profilers import environment

MOST_ERROR = 0.03  # relative RMS; it rounds the weights again
MOST_COPIES = 64  # more would compile for minutes
FORMATS = (
    ("torchao.int8.a16", "w8a16-int8", quantization.Int8WeightOnlyConfig),
    ("torchao.int8.a8", "w8a8-int8", quantization.Int8DynamicActivationInt8WeightConfig),
)


class _Copies(torch.nn.Module):
    def __init__(self, weight: torch.Tensor, count: int) -> None:
        super().__init__()
        n, k = weight.shape
        layers = [torch.nn.Linear(k, n, bias=False, device="meta") for _ in range(count)]
        for shift, layer in enumerate(layers):  # copies differ by the order of their outputs
            layer.weight = torch.nn.Parameter(weight.roll(shift, 0).bfloat16(), requires_grad=False)
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


class Engine:
    package = "torchao"

    def __init__(self, threads: int) -> None:
        environment.pin(threads)
        self.version = version("torchao")
        torch._inductor.config.freezing = True
        torch._inductor.config.compile_threads = 1

    def running(self) -> AbstractContextManager[object]:
        return torch.no_grad()

    def load(self, case: Case, at: Callable[[str], None], failed: Failures) -> list[Loaded]:
        wanted = [item for item in FORMATS if case.wants(item[0], item[1])]
        if not wanted:
            return []
        loaded, weight = [], made_weight("w8a16-int8", case)
        torch._dynamo.reset()
        for name, scheme, config in wanted:
            at(f"{name} {scheme}")
            try:
                loaded.append(self._loaded(name, scheme, config(), case, weight))
            except Exception as error:  # the compiler raises classes of its own
                failed.add(name, scheme, error)
        return loaded

    def _loaded(self, name: str, scheme: str, config: Any, case: Case, weight: GroupWeight) -> Loaded:
        size = case.n * case.k + 4 * case.n
        count = min(MOST_COPIES, case.copies(size))
        module = _Copies(dequantize(weight), count).eval()
        quantization.quantize_(module, config)
        compiled = torch.compile(module, dynamic=False)
        x = made_input(case)
        error = relative_error(weight, x, compiled(x.bfloat16())[0].float())
        if error > MOST_ERROR:
            raise ValueError(f"wrong: relative RMS error {error:.3f}")
        calls = [partial(compiled, x.bfloat16())]
        return Loaded(name, scheme, size, calls, count, f"relative RMS error {error:.4f}")
