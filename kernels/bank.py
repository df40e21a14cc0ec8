"""A layer's experts as rows of one buffer, so that a device can choose among them and the host need not know which.

A kernel is told by the host where its weights are, but which expert a token takes only the device knows. So the chosen
rows are copied, by number, to memory of which the host knows the address, and the kernel runs on the copies. A CUDA
graph can hold that. It costs two more passes over the weights chosen, of which the kernel's own may come from L2.

A row holds the tensors that the kernel packed of one expert, with their strides, each from a multiple of 256 bytes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from autotune.kernels.operator import apply
from autotune.kernels.spec import Form, Packed, load
from autotune.search_space.coverage import KernelSpec

COST = 3  # reading chosen weights, writing the copies, reading those: passes over the weights; not measured
_WORD, _ALIGNED = 8, 32  # bytes of a word; words that places are a multiple of
_Tensors = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class _Place:
    """Where in a row a tensor lies, in words."""

    start: int
    words: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, row: torch.Tensor) -> torch.Tensor:
        return row[self.start : self.start + self.words].view(self.dtype).as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class Bank:
    """`rows` (experts, words) int64. `bind`: from the tensors of a row to what the kernel takes, of the same memory."""

    rows: torch.Tensor
    places: tuple[_Place | None, ...]
    run: Callable[[Packed, torch.Tensor], torch.Tensor]
    bind: Callable[[_Tensors], Packed]

    def expert(self, number: int) -> Packed:
        return self._of(self.rows[number])

    def compute(self, chosen: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x (n, in), row i by the expert of number chosen[i], on the device: (n, out)."""
        copies = self.rows.index_select(0, chosen)
        return torch.cat([apply(self.run, self._of(row), x[i : i + 1]) for i, row in enumerate(copies)])

    def _of(self, row: torch.Tensor) -> Packed:
        return self.bind(tuple(None if place is None else place.view(row) for place in self.places))


def wanted(spec: KernelSpec, experts: int) -> bool:
    """Where passes are recorded as graphs, which cannot wait for the host."""
    return experts > 1 and spec.device == "cuda"


def bank(spec: KernelSpec, scheme: str, packs: Iterable[Packed], count: int) -> Bank:
    """Copies of so many experts' packed weights, all of one shape; `packs` are let go of one by one."""
    module = load(spec)
    tensors_of = getattr(module, "tensors", None)
    made: Bank | None = None
    for number, packed in enumerate(packs):
        tensors: Sequence[torch.Tensor | None] = packed.data if tensors_of is None else tensors_of(packed)
        if made is None:
            made = _empty(spec, scheme, packed, tensors, count)
        for place, tensor in zip(made.places, tensors, strict=True):
            if place is not None and tensor is not None:
                place.view(made.rows[number]).copy_(tensor)
    assert made is not None
    return made


def _empty(spec: KernelSpec, scheme: str, first: Packed, tensors: Sequence[torch.Tensor | None], count: int) -> Bank:
    places, end = list[_Place | None](), 0
    for tensor in tensors:
        if tensor is None:
            places.append(None)
            continue
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        words = -(-span * tensor.element_size() // _WORD)
        places.append(_Place(end, words, tensor.dtype, tuple(tensor.shape), tensor.stride()))
        end += -(-words // _ALIGNED) * _ALIGNED
    device = next(tensor.device for tensor in tensors if tensor is not None)
    rows = torch.zeros(count, end, dtype=torch.int64, device=device)
    module = load(spec)
    own = getattr(module, "bind", None)
    form = Form(scheme, first.out_features, first.in_features, first.dtype)

    def bind(found: _Tensors) -> Packed:
        made: Packed = form.packed(found) if own is None else own(found, form)
        return replace(made, bytes=end * _WORD)

    return Bank(rows, tuple(places), module.run, bind)
