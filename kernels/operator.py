"""`autotune::linear`: every kernel as one torch operator, for graphs (`torch.compile`, `torch.export`).

A graph holds a layer group as this operator, its packed weights as tensors, and the names of kernel and scheme, so an
exported program is complete: it runs in any process that has imported this module, on the kind of device that its
kernels are for. Modules that run eagerly call their kernels directly, as dispatching costs microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from autotune.errors import InputError
from autotune.kernels.spec import Form, Packed, kernel, load
from autotune.search_space.coverage import KernelSpec


@dataclass(frozen=True)
class Operands:
    """What the operator takes besides activations.

    A first tensor of None is opaque to graphs: what `plain` makes of it is kept in `uncovered` once there is a graph.
    """

    kernel: str
    scheme: str
    weights: tuple[torch.Tensor | None, ...]
    uncovered: list[torch.Tensor] = field(default_factory=list)


def operands(spec: KernelSpec, scheme: str, packed: Packed) -> Operands:
    """Of the same memory as the packed weights."""
    tensors = getattr(load(spec), "tensors", None)
    return Operands(spec.name, scheme, tuple(packed.data if tensors is None else tensors(packed)))


def plain(name: str, packed: Packed) -> torch.Tensor:
    """The copy that a graph gets of the kernel's opaque first tensor.

    Made by another thread: the modes under which graphs are traced belong to a thread, and would record or fake it.
    """
    make: Callable[[Packed], torch.Tensor] = load(kernel(name)).plain  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as other:
        return other.submit(make, packed).result()


def apply(run: Callable[[Packed, torch.Tensor], torch.Tensor], packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """A kernel on any shape of activations: x (..., in) -> (..., out).

    Raises:
        InputError: `kernel.input`.
    """
    if x.dtype != packed.dtype or x.shape[-1] != packed.in_features:
        expected = f"(..., {packed.in_features}) {packed.dtype}"
        raise InputError("kernel.input", f"a group packed for {expected} was given {tuple(x.shape)} {x.dtype}.")
    if x.dim() == 2 and x.is_contiguous():
        return run(packed, x)
    y = run(packed, x.reshape(-1, packed.in_features).contiguous())
    return y.view(*x.shape[:-1], packed.out_features)


@torch.library.custom_op("autotune::linear", mutates_args=())
def linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor | None], kernel_name: str, scheme: str, out_features: int
) -> torch.Tensor:
    """x (..., in) -> (..., out), by a kernel of the table on tensors that it packed.

    Raises:
        InputError: `kernel.unknown`.
        DeviceError: as the kernel does.
    """
    module = load(kernel(kernel_name))
    form = Form(scheme, out_features, x.shape[-1], x.dtype)
    bind = getattr(module, "bind", None)
    return apply(module.run, form.packed(tuple(weights)) if bind is None else bind(weights, form), x)


@linear.register_fake
def _shape(
    x: torch.Tensor, weights: Sequence[torch.Tensor | None], kernel_name: str, scheme: str, out_features: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))
