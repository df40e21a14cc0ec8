"""ONNX Runtime as an engine (see `peers.py`): `MatMulNBits` and `DynamicQuantizeMatMul` on the CPU provider.

`acc0` computes in fp32, `acc4` quantizes activations to int8 per block. 8 bits with acc0 is left out: it takes 50 times
as long as a dense layer. Activations are fp32, the only float this provider multiplies. A session runs a graph of as
many copies as `Case.graphs` says, whose outputs share one buffer, so that the cost of a run is spread as in a model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from peers import Case, Failures, Loaded, made_input, made_weight, relative_error

from autotune.kernels.spec import GroupWeight

MOST_ERROR = {True: 0.03, False: 0.01}  # relative RMS; True: activations are quantized


@dataclass(frozen=True)
class _Format:
    name: str
    scheme: str
    weight: str  # the scheme whose random weight is taken
    bits: int
    block: int = 0
    level: int = 0


FORMATS = (
    _Format("int4-b32.acc0", "w4a16-int4-g32", "w4a16-int4-g32", 4, 32, 0),
    _Format("int4-b32.acc4", "w4a8-int4-g32", "w4a16-int4-g32", 4, 32, 4),
    _Format("int4-b128.acc0", "w4a16-int4-g128", "w4a16-int4-g128", 4, 128, 0),
    _Format("int4-b128.acc4", "w4a8-int4-g128", "w4a16-int4-g128", 4, 128, 4),
    _Format("int8-b32.acc4", "w8a8-int8", "w8a16-int8", 8, 32, 4),
    _Format("int8-b128.acc4", "w8a8-int8", "w8a16-int8", 8, 128, 4),
    _Format("int8.dynamic", "w8a8-int8", "w8a16-int8", 8),
)


class Engine:
    package = "onnxruntime"

    def __init__(self, threads: int) -> None:
        self.version = onnxruntime.__version__
        torch.set_num_threads(1)  # no second pool beside the one that is timed
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        self._shape: tuple[int, int, bool] | None = None  # of what is kept
        self._weights: dict[str, GroupWeight] = {}
        self._sessions: dict[tuple[_Format, int, int], list[Any]] = {}

    def running(self) -> AbstractContextManager[object]:
        return nullcontext()

    def load(self, case: Case, at: Callable[[str], None], failed: Failures) -> list[Loaded]:
        if self._shape != (case.n, case.k, case.cold):
            self._shape = (case.n, case.k, case.cold)
            self._weights.clear()
            self._sessions.clear()
        loaded = []
        for item in FORMATS:
            name = f"onnxruntime.{item.name}"
            if not case.wants(name, item.scheme) or case.k % (item.block or 1):
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
        size = case.n * case.k * item.bits // 8 + 4 * case.n * (case.k // item.block if item.block else 1)
        graphs = case.graphs(size)
        key = (item, len(graphs), len(graphs[0]))
        if key not in self._sessions:
            self._sessions = {kept: value for kept, value in self._sessions.items() if kept[0] != item}
            codes, scales = _packed(item, weight)
            self._sessions[key] = [_session(item, case, codes, scales, copies) for copies in graphs]
        x = made_input(case)
        given = onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())
        y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((case.m, case.n), np.float32))
        calls = [partial(session.run_with_iobinding, _bound(session, given, y)) for session in self._sessions[key]]
        first = self._sessions[key][0].run(["y0"], {"x": x.numpy()})[0]
        error = relative_error(weight, x, torch.from_numpy(first))
        if error > MOST_ERROR["a8" in item.scheme]:
            raise ValueError(f"wrong: relative RMS error {error:.3f}")
        return Loaded(name, item.scheme, size, calls, len(graphs[0]), f"relative RMS error {error:.4f}")


def _packed(item: _Format, weight: GroupWeight) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) as the operator takes them, outputs first."""
    assert weight.codes is not None and weight.scales is not None
    codes, scales = weight.codes.numpy(), weight.scales.numpy()  # (n, k) int8, (n, groups) fp32
    if not item.block:
        return codes, scales[:, 0]
    blocks = codes.shape[1] // item.block
    unsigned = (codes.astype(np.int16) + 2 ** (item.bits - 1)).astype(np.uint8).reshape(len(codes), blocks, item.block)
    if item.bits == 4:
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return unsigned, np.repeat(scales, blocks // scales.shape[1], axis=1)


def _session(item: _Format, case: Case, codes: np.ndarray, scales: np.ndarray, copies: range) -> Any:
    """A graph that multiplies one input by every copy; copies differ by the order of their outputs."""
    nodes, constants, outputs = [], [], []
    for number, shift in enumerate(copies):
        names = [f"{part}{number}" for part in ("codes", "scales", "y")]
        rolled = np.roll(codes, shift, 0)
        if item.block:
            settings = {"K": case.k, "N": case.n, "bits": item.bits, "block_size": item.block}
            settings["accuracy_level"] = item.level
            node = helper.make_node("MatMulNBits", ["x", *names[:2]], names[2:], domain="com.microsoft", **settings)
            constants.append(_constant(names[0], TensorProto.UINT8, rolled))
        else:
            inputs = ["x", *names[:2]]
            node = helper.make_node("DynamicQuantizeMatMul", inputs, names[2:], domain="com.microsoft")
            constants.append(_constant(names[0], TensorProto.INT8, rolled.T))
        nodes.append(node)
        constants.append(_constant(names[1], TensorProto.FLOAT, np.roll(scales, shift, 0)))
        outputs.append(helper.make_tensor_value_info(names[2], TensorProto.FLOAT, ["m", case.n]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", case.k])]
    graph = helper.make_graph(nodes, "copies", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    data = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _constant(name: str, kind: int, values: np.ndarray) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, values.shape, np.ascontiguousarray(values).tobytes(), raw=True)


def _bound(session: Any, x: Any, y: Any) -> Any:
    """All outputs go to one buffer: nodes run one after the other."""
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x)
    for output in session.get_outputs():
        binding.bind_ortvalue_output(output.name, y)
    return binding
