"""A native linear kernel as Python and other native code call it: one C function (packed, x, rows, y, threads).

`packed` points to a structure of the kernel's own, whose pointers come first and whose tensors are kept beside it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from autotune.errors import DeviceError
from autotune.kernels.cpu import build
from autotune.kernels.spec import Form, Packed


class NativeLinear:
    """The C function `name` of a library that is built on first use; 0, or 1 when memory ran out.

    Args:
        check: given the library before its first call; raises where this process may not use it.
    """

    def __init__(self, library: str, name: str, check: Callable[[Any], None] | None = None) -> None:
        self._library, self._name, self._check = library, name, check
        self.build: Any = build

    @cached_property
    def function(self) -> Any:
        """Raises: DeviceError as `build.library` and the check do."""
        library = self.build.library(self._library)
        if self._check is not None:
            self._check(library)
        function = getattr(library, self._name)
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
        function.restype = ctypes.c_int
        return function

    def run(self, packed: Packed, x: torch.Tensor) -> torch.Tensor:
        """y = x W^T + b.

        Raises:
            DeviceError: `kernel.device`, `kernel.memory`; what `function` raises.
        """
        if not x.is_cpu:
            message = f"weights that are packed for a CPU were given activations on {x.device}."
            raise DeviceError("kernel.device", message, "Keep the model on the CPU, or tune it for that device.")
        rows = x.shape[0]
        y = x.new_empty(rows, packed.out_features)  # faster than torch.empty by 0.2 us or more
        if self.function(packed.data[0], x.data_ptr(), rows, y.data_ptr(), torch.get_num_threads()):
            message = f"no memory for {rows} rows of {packed.in_features} inputs."
            raise DeviceError("kernel.memory", message, "Fewer rows.")
        return y

    def native(self, packed: Packed) -> tuple[int, int]:
        """Addresses of the C function and of the packed weights' structure, for native code that calls it."""
        address = ctypes.cast(self.function, ctypes.c_void_p).value
        assert address is not None
        return address, packed.data[0]


def described(
    structure: Callable[..., ctypes.Structure], held: Sequence[torch.Tensor | None], form: Form, *rest: int
) -> Packed:
    """Packed weights: a structure of the tensors' addresses, outputs, inputs, and whatever follows in it."""
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in held)
    item = structure(*addresses, form.out_features, form.in_features, *rest)
    total = sum(tensor.nbytes for tensor in held if tensor is not None)
    return form.packed((ctypes.addressof(item), item, tuple(held)), total)


def tensors(packed: Packed) -> tuple[torch.Tensor | None, ...]:
    """What the structure points to."""
    held: tuple[torch.Tensor | None, ...] = packed.data[2]
    return held
