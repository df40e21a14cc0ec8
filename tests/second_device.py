"""A second device for tests: the CPU's memory under another name, which nothing but torch's operators reaches.

`install()` gives torch a device "second" for the rest of the process. Its tensors hold an inner tensor of the CPU;
every operator unwraps them, runs on the CPU and wraps what comes out, so numbers are the CPU's bit for bit. It is as
strict as a CUDA device about what lies where:

- operands of two devices are refused. As there, a number (0-dim) of the CPU may go into an elementwise operator,
  indices may be the CPU's, and copies go anywhere;
- `numpy()` is refused, and so is a native call: what `data_ptr` gives can be compared, but is no number;
- a generator belongs to one device;
- products of integers are refused, as CUDA has none.

It counts in `WAITS` what a CUDA device would wait for: numbers read, copies to the CPU, masks as indices. What it
cannot show: which operators a CUDA device lacks (but for those), another order of addition, memory, streams, time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as _setup
except ImportError:  # torch before 2.9
    _setup = None

NAME = "second"
WAITS: Counter[str] = Counter()
_ATEN = torch.ops.aten
_COPIES = {_ATEN.copy_.default}
_INDEXED = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default, _ATEN._index_put_impl_.default}
_PRODUCTS = {_ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.addmm_, _ATEN.baddbmm, _ATEN.mv, _ATEN.addmv, _ATEN.dot}
_WAITING = {_ATEN._local_scalar_dense, _ATEN.nonzero, _ATEN.masked_select, _ATEN.equal, _ATEN.bincount, _ATEN._unique2}
# Operators that torch else makes of others: of empty tensors that grow, or by a formula that CPUs and cards do not use.
_WHOLE = (_ATEN.arange.default, _ATEN.arange.start, _ATEN.arange.start_step, _ATEN.randperm.default)
_WHOLE += (_ATEN.silu_backward.default,)
_generators: dict[int, Any] = {}
_kept: list[Any] = []  # libraries, which take back what they registered when they go


def available() -> str:
    """Why there is no second device with this torch, or ""."""
    return "" if _setup is not None else f"torch {torch.__version__} takes no device that is written in Python"


def install() -> torch.device:
    """Once a process."""
    _setup(NAME)
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")
    aten.impl("_copy_from", _copy_from, "PrivateUse1")
    for op in _WHOLE:
        aten.impl(op._name, partial(_run, op), "PrivateUse1")
    _kept.extend((every, aten))
    torch.Generator = Generator  # type: ignore[misc]
    return torch.device(NAME, 0)


@dataclass(frozen=True)
class Address:
    """Of a tensor on the device: equal for equal ones, and nothing that a native function takes."""

    number: int


class SecondTensor(torch.Tensor):
    """Its `inner` tensor is the CPU's."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> SecondTensor:
        sizes = inner.size(), inner.stride(), inner.storage_offset()
        with torch.inference_mode(inner.is_inference()):  # a view of a tensor made outside of it is none of its tensors
            outer = torch.Tensor._make_wrapper_subclass(cls, *sizes, dtype=inner.dtype, device=torch.device(NAME, 0))
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _WHOLE and func._can_decompose():  # in inference mode torch has not done it
            return func.decompose(*args, **(kwargs or {}))
        return _run(func, *args, **(kwargs or {}))

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: SecondTensor) -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inner = other.inner

    def data_ptr(self) -> Address:  # type: ignore[override]
        return Address(self.inner.data_ptr())

    def storage(self) -> Any:
        raise NotImplementedError("no storage")  # as of `meta`: then nothing asks for its address

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{NAME}({self.inner})"


class Generator(torch._C.Generator):
    """Stands in for torch's: one of the second device draws what the CPU's draws from the same seed."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        second = torch.device(device).type == NAME
        found = super().__new__(cls, "cpu" if second else device)
        if second:
            _generators[found._cdata] = found  # kept: operators are given another object for the same generator
        return found

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, 0) if self._cdata in _generators else super().device


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator on the CPU, its operands unwrapped and its results wrapped."""
    operands = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    outer = {id(x.inner): x for x in operands if isinstance(x, SecondTensor)}
    stated = kwargs.get("device")
    here = bool(outer) if stated is None else torch.device(stated).type == NAME
    if outer:
        _check(func, args, operands)
    _check_generators(func, args, kwargs, bool(outer) or here)
    _count(func, args, outer, here)
    found = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    for x in outer.values():
        assert x.inner.shape == x.shape, f"{func} changes a tensor's shape in place, which is not followed here"

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, SecondTensor):
            return x
        return outer.get(id(x)) if id(x) in outer else SecondTensor(x) if here and _is_new(x, operands) else x

    return tree_map(wrapped, found)


def _inside(x: Any) -> Any:
    if isinstance(x, SecondTensor):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def _is_new(x: torch.Tensor, operands: Sequence[torch.Tensor]) -> bool:
    """Not an operand that was written to."""
    return all(x is not other for other in operands)


def _check(func: Any, args: Any, operands: Sequence[torch.Tensor]) -> None:
    """Refuse what a CUDA device refuses."""
    others = [x for x in operands if not isinstance(x, SecondTensor)]
    if func in _INDEXED and isinstance(args[0], SecondTensor):
        others = [x for x in others if all(x is not index for index in args[1])]
    written = args and func._schema.arguments and func._schema.arguments[0].is_write and args[0]
    numbers = torch.Tag.pointwise in func.tags or func in _INDEXED
    others = [x for x in others if not (numbers and x.dim() == 0 and x is not written)]
    if others and func not in _COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {NAME}:0 and cpu.")
    if func.overloadpacket in _PRODUCTS and not operands[0].is_floating_point():
        raise RuntimeError(f"{func} is not implemented for {operands[0].dtype} on a CUDA device.")


def _check_generators(func: Any, args: Any, kwargs: Any, here: bool) -> None:
    for generator in (x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch._C.Generator)):
        if (generator._cdata in _generators) is not here:
            raise RuntimeError(f"Expected a generator of the tensors' device, but {func} got another.")


def _count(func: Any, args: Any, outer: dict[int, SecondTensor], here: bool) -> None:
    packet = func.overloadpacket
    masks = func in _INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
    leaves = not here if packet is _ATEN._to_copy else packet is _ATEN.copy_ and not isinstance(args[0], SecondTensor)
    if outer and (packet in _WAITING or masks or leaves):
        WAITS[str(packet)] += 1


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What copies come to where torch passes wrappers by."""
    _inside(target).copy_(_inside(source))
    return target


def waits(call: Callable[[], object]) -> Counter[str]:
    """What a call waits for."""
    before = Counter(WAITS)
    call()
    return WAITS - before
