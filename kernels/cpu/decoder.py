"""New tokens through decoder layers as one native call: the structures and functions of `decoder.cpp`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from autotune.errors import DeviceError
from autotune.kernels.cpu import build

_pointer, _size = ctypes.c_void_p, ctypes.c_int64
Callback = ctypes.CFUNCTYPE(ctypes.c_int, _pointer, _pointer, _size, _pointer, ctypes.c_int)
CALLBACK_FAILED = 2


class Product(ctypes.Structure):
    """`Product` of decoder.cpp: a kernel's C function (packed, x, rows, y, threads), and what it gets as `packed`."""

    _fields_ = (("run", _pointer), ("packed", _pointer), ("outputs", _size))


class Layer(ctypes.Structure):
    """`Layer` of decoder.cpp."""

    _fields_ = (
        *((name, Product) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _pointer) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, ctypes.c_float) for name in ("input_eps", "post_eps", "q_eps", "k_eps", "scaling")),
        ("bf16", ctypes.c_int32),
        *((name, _size) for name in ("hidden", "heads", "key_heads", "width", "inner")),
        *((name, _pointer) for name in ("normed", "projected", "attended", "gated")),
        ("rows", _size),
    )


class Place(ctypes.Structure):
    """`Place` of decoder.cpp."""

    _fields_ = (
        *((name, _pointer) for name in ("keys", "values")),
        *((name, _size) for name in ("capacity", "position")),
        ("kept", ctypes.c_int32),
    )


class Tokens(ctypes.Structure):
    """`Tokens` of decoder.cpp."""

    _fields_ = (
        *((name, _pointer) for name in ("x", "cosines", "sines", "y")),
        *((name, _size) for name in ("count", "rotary", "rotary_stride")),
    )


class Stack:
    """Layers one behind the other, and the places of their keys and values: they live as long as this."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.number = len(layers)
        self.places = (Place * self.number)()
        self.items = list(self.places)  # indexing the array makes an object each time
        self._layers = tuple(layers)
        self._addresses = (_pointer * self.number)(*map(ctypes.addressof, layers))


def native_product(addresses: tuple[int, int], outputs: int) -> Product:
    """A product by a kernel's own C function; `addresses` as its module's `native` gives them."""
    return Product(*addresses, outputs)


def zeros_product(outputs: int, row_bytes: ctypes.c_int64) -> Product:
    """Zeros instead of a product; `row_bytes` (of a row of outputs) must live as long."""
    run = ctypes.cast(build.library("decoder").autotune_zeros, _pointer).value
    return Product(run, ctypes.addressof(row_bytes), outputs)


def python_product(call: Callable[[int], None], outputs: int) -> tuple[Product, Any, list[BaseException]]:
    """A product that Python computes: `call(rows)` reads and writes tensors that both sides know.

    Returns the product, what must live as long, and where an exception of `call` is left.
    """
    failed: list[BaseException] = []

    def back(_packed: int, _x: int, rows: int, _y: int, _threads: int) -> int:
        try:
            call(rows)
        except BaseException as error:
            failed.append(error)
            return CALLBACK_FAILED
        return 0

    function = Callback(back)
    return Product(ctypes.cast(function, _pointer).value, None, outputs), function, failed


def layer(products: Mapping[str, Product], room: Mapping[str, torch.Tensor], **fields: Any) -> Layer:
    """`room`: tensors to work in; `fields`: all others of `Layer`."""
    return Layer(**products, **{name: tensor.data_ptr() for name, tensor in room.items()}, **fields)


def step(stack: Stack, tokens: Tokens, threads: int) -> int:
    """Run the layers; 0, or `CALLBACK_FAILED`.

    Raises:
        DeviceError: `kernel.memory`.
    """
    call = _function("autotune_decoder_layers", _pointer, _pointer, _size, _pointer)
    code: int = call(stack._addresses, stack.places, stack.number, ctypes.byref(tokens), threads)
    if code not in (0, CALLBACK_FAILED):
        raise DeviceError("kernel.memory", f"no memory for {tokens.count} tokens of a decoder layer.", "Fewer at once.")
    return code


def attend(item: Layer, place: Place, tokens: Tokens, threads: int) -> None:
    """Attention alone, of the rows in `projected`; its output is in `attended`.

    Raises:
        DeviceError: `kernel.memory`.
    """
    call = _function("autotune_decoder_attention", _pointer, _pointer, _pointer)
    if call(ctypes.byref(item), ctypes.byref(place), ctypes.byref(tokens), threads):
        raise DeviceError("kernel.memory", f"no memory for attention of {tokens.count} tokens.", "Fewer at once.")


def multiply(products: Sequence[Product], x: torch.Tensor, y: torch.Tensor, threads: int) -> Callable[[], None]:
    """A call that multiplies `x` (rows, inputs) by every product, all into `y` (rows, outputs); for timing.

    Raises (the call): DeviceError: `kernel.memory`.
    """
    listed, rows = (Product * len(products))(*products), x.shape[0]
    call = _function("autotune_products", _pointer, _size, _pointer, _size, _pointer)
    arguments = (ctypes.addressof(listed), len(listed), x.data_ptr(), rows, y.data_ptr(), threads)

    def run(_alive: object = (listed, x, y)) -> None:
        if call(*arguments):
            raise DeviceError("kernel.memory", f"no memory for {rows} rows of {x.shape[1]} inputs.", "Fewer rows.")

    return run


def available() -> bool:
    """Whether the library can be built and loaded here."""
    return build.available("decoder")


@cache
def _function(name: str, *types: Any) -> Any:
    call = getattr(build.library("decoder"), name)
    call.argtypes = (*types, ctypes.c_int)
    call.restype = ctypes.c_int
    return call
