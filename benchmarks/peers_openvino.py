"""OpenVINO as an engine (see `peers.py`): MatMul on weights kept as int4 or int8, with scales, on the CPU device.

`a16` leaves activations alone and runs in the precision the device prefers (bf16 where the CPU has it), `a16.f32` in
fp32; `a8` quantizes activations dynamically, in groups. Inputs and outputs are fp32. A compiled model holds as many
copies as `Case.graphs` says, whose outputs share one buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset15 as op
from peers import Case, Failures, Loaded, made_input, made_weight, relative_error

from autotune.kernels.spec import GroupWeight
from autotune.search_space.schemes import scheme

MOST_ERROR = {True: 0.03, False: 0.02}  # relative RMS; True: activations are quantized


@dataclass(frozen=True)
class _Format:
    name: str
    scheme: str
    weight: str  # the scheme whose random weight is taken
    dynamic_group: int  # of activations; 0: not quantized
    precision: str | None = None  # None: what the device prefers


FORMATS = (
    _Format("int4-g32.a16", "w4a16-int4-g32", "w4a16-int4-g32", 0),
    _Format("int4-g32.a16.f32", "w4a16-int4-g32", "w4a16-int4-g32", 0, "f32"),
    _Format("int4-g32.a8", "w4a8-int4-g32", "w4a16-int4-g32", 32, "f32"),
    _Format("int4-g128.a16", "w4a16-int4-g128", "w4a16-int4-g128", 0),
    _Format("int4-g128.a16.f32", "w4a16-int4-g128", "w4a16-int4-g128", 0, "f32"),
    _Format("int4-g128.a8", "w4a8-int4-g128", "w4a16-int4-g128", 128, "f32"),
    _Format("int8.a16", "w8a16-int8", "w8a16-int8", 0),
    _Format("int8.a16.f32", "w8a16-int8", "w8a16-int8", 0, "f32"),
    _Format("int8.a8", "w8a8-int8", "w8a16-int8", 128, "f32"),
)


class Engine:
    package = "openvino"

    def __init__(self, threads: int) -> None:
        self.version = openvino.__version__
        torch.set_num_threads(1)  # no second pool beside the one that is timed
        self._core = openvino.Core()
        self._threads = threads
        self._shape: tuple[int, int, bool] | None = None  # of what is kept
        self._weights: dict[str, GroupWeight] = {}
        self._compiled: dict[tuple[_Format, int, int], list[Any]] = {}

    def running(self) -> AbstractContextManager[object]:
        return nullcontext()

    def load(self, case: Case, at: Callable[[str], None], failed: Failures) -> list[Loaded]:
        if self._shape != (case.n, case.k, case.cold):
            self._shape = (case.n, case.k, case.cold)
            self._weights.clear()
            self._compiled.clear()
        loaded = []
        for item in FORMATS:
            name = f"openvino.{item.name}"
            group = scheme(item.weight).weight.group_size or 1
            if not case.wants(name, item.scheme) or case.k % group:
                continue
            at(f"{name} {item.scheme}")
            try:
                loaded.append(self._loaded(item, name, case))
            except Exception as error:  # the package raises classes of its own
                failed.add(name, item.scheme, error)
        return loaded

    def _loaded(self, item: _Format, name: str, case: Case) -> Loaded:
        if item.weight not in self._weights:
            self._weights[item.weight] = made_weight(item.weight, case)
        weight = self._weights[item.weight]
        codes, scales = weight.codes, weight.scales  # (n, k) int8, (n, groups) fp32
        assert codes is not None and scales is not None
        size = codes.numel() * scheme(item.weight).weight.bits // 8 + 2 * scales.numel()
        graphs = case.graphs(size)
        key = (item, len(graphs), len(graphs[0]))
        if key not in self._compiled:
            self._compiled = {kept: value for kept, value in self._compiled.items() if kept[0] != item}
            self._compiled[key] = [self._compile(item, codes.numpy(), scales.numpy(), copies) for copies in graphs]
        x, y = made_input(case), np.zeros((case.m, case.n), np.float32)
        requests = [_request(compiled, x.numpy(), y) for compiled in self._compiled[key]]
        own = self._compiled[key][0].create_infer_request()  # outputs of its own: the first copy's is compared
        first = own.infer({0: x.numpy()})[0]
        error = relative_error(weight, x, torch.from_numpy(np.array(first)))
        if error > MOST_ERROR[bool(item.dynamic_group)]:
            raise ValueError(f"wrong: relative RMS error {error:.3f}")
        calls = [partial(_run, request, (x, y)) for request in requests]
        return Loaded(name, item.scheme, size, calls, len(graphs[0]), f"relative RMS error {error:.4f}")

    def _compile(self, item: _Format, codes: np.ndarray, scales: np.ndarray, copies: range) -> Any:
        """A graph that multiplies one input by every copy; copies differ by the order of their outputs."""
        x = op.parameter([-1, codes.shape[1]], np.float32, name="x")
        outputs = []
        for shift in copies:
            dense = _dense(np.roll(codes, shift, 0), np.roll(scales, shift, 0), scheme(item.weight).weight.bits == 4)
            outputs.append(op.matmul(x, dense, False, True))
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self._threads,
            "ENABLE_CPU_PINNING": False,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": item.dynamic_group,
        }
        if item.precision:
            settings["INFERENCE_PRECISION_HINT"] = item.precision
        return self._core.compile_model(openvino.Model(outputs, [x], "copies"), "CPU", settings)


def _dense(codes: np.ndarray, scales: np.ndarray, four_bits: bool) -> Any:
    """The weight as the compiler recognises a compressed one: convert, multiply by scales, reshape."""
    n, k = codes.shape
    groups = scales.shape[1]
    shape = [n, groups, k // groups]
    if four_bits:
        nibbles = codes.view(np.uint8) & 15
        packed = np.ascontiguousarray(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).reshape(-1)
        constant = op.constant(openvino.Tensor(packed, shape, openvino.Type.i4), shared_memory=False)
    else:
        constant = op.constant(codes.reshape(shape))
    scale = op.constant(scales.astype(np.float16).reshape(n, groups, 1))
    product = op.multiply(op.convert(constant, np.float16), scale)
    return op.convert(op.reshape(product, op.constant(np.array([n, k])), False), np.float32)


def _request(compiled: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """All outputs go to one buffer: nodes run one after the other."""
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
    output = openvino.Tensor(y, shared_memory=True)
    for number in range(len(compiled.outputs)):
        request.set_output_tensor(number, output)
    return request


def _run(request: Any, kept: object) -> None:
    """`kept`: what the request reads and writes, which it does not keep alive itself."""
    request.start_async()
    request.wait()
