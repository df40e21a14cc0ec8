"""A model that is its own teacher: every compressed group holds its dense weights and those that are trained.

Products are in the dtype of the model's weights, all else in fp32 (`model.load_mixed`). The weights that the forward
pass multiplies with are leaves of their own, written from the masters once an optimizer step; their gradients are added
up in fp32 over the parts of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune.kernels.products import linear
from autotune.kernels.reference import quantize_activations
from autotune.recover.quantizer import Master
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.schemes import NumberFormat


class StraightThrough(torch.autograd.Function):
    """Fake quantization of activations whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, number: NumberFormat, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = x.dtype
        return quantize_activations(x, number).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.to(ctx.dtype), None, None


class TrainedGroup:
    """A layer group's master and the leaves its members multiply with."""

    def __init__(self, master: Master, sizes: list[int], dtype: torch.dtype) -> None:
        self.master = master
        self.teaching = False
        self._all = torch.empty(master.weight.shape, dtype=dtype, device=master.weight.device)
        self.leaves = [part.detach().requires_grad_() for part in self._all.split(sizes)]
        self.gradient = torch.zeros_like(master.weight)
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Write what the masters round to into the leaves."""
        with torch.no_grad():
            self.master.quantized(self._all)

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """x as the members multiply it: quantized as the scheme says, once for all of them."""
        if self._last is None or self._last[0] is not x:
            number = self.master.scheme.activation
            dtype = self._all.dtype
            self._last = (x, x.to(dtype) if number is None else StraightThrough.apply(x, number, dtype))
        return self._last[1]

    def collect(self) -> None:
        """Add the leaves' gradients up, and forget them and what the pass kept."""
        self._last = None
        with torch.no_grad():
            start = 0
            for leaf in self.leaves:
                if leaf.grad is not None:
                    self.gradient[start : start + len(leaf)] += leaf.grad
                    leaf.grad = None
                start += len(leaf)


class TrainedLinear(nn.Module):
    """y = x W^T + b with a member's trained weights, or its dense ones while it teaches; y is fp32."""

    def __init__(self, dense: torch.Tensor, bias: torch.Tensor | None, group: TrainedGroup, index: int) -> None:
        super().__init__()
        self.dense = dense  # (out, in)
        self.bias = bias
        self.group = group
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.group.teaching:
            y = linear(x.to(self.dense.dtype), self.dense)
        else:
            y = linear(self.group.inputs(x), self.group.leaves[self.index])
        return y.to(x.dtype) if self.bias is None else y.to(x.dtype) + self.bias


class Student:
    """Owns the model it is given; groups without a master stay dense and are not trained."""

    def __init__(self, model: nn.Module, spec: ModelSpec, masters: Mapping[str, Master]) -> None:
        self.model = model
        self.spec = spec
        self.groups: dict[str, TrainedGroup] = {}
        self._replaced: list[tuple[str, nn.Module]] = []
        for group in spec.groups:
            if group.name in masters:
                self._replaced += [(member.module, model.get_submodule(member.module)) for member in group.members]
                self.groups[group.name] = _replace(model, group, masters[group.name])

    def release(self) -> nn.Module:
        """The dense model as it was given; the student is not used any more."""
        for path, module in self._replaced:
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, module)
        return self.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Meanwhile the model is the dense one, without gradients."""
        self._teach(True)
        try:
            with torch.no_grad():
                yield
        finally:
            self._teach(False)

    def _teach(self, value: bool) -> None:
        for group in self.groups.values():
            group.teaching = value

    def outputs(self, ids: torch.Tensor) -> torch.Tensor:
        """Sequences (count, positions) to logits, or an encoder's last hidden states: (count, positions, width)."""
        with _attention(ids.device):
            if self.spec.task == "encoder":
                return self.model(ids).last_hidden_state  # type: ignore[no-any-return]
            return self.model(ids, use_cache=False).logits  # type: ignore[no-any-return]

    def refresh(self) -> None:
        for group in self.groups.values():
            group.refresh()

    def collect(self) -> None:
        for group in self.groups.values():
            group.collect()


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """On a CUDA device the plain kernels: fast ones add gradients up in any order, and sequences here are short."""
    return nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)


def _replace(model: nn.Module, group: LayerGroup, master: Master) -> TrainedGroup:
    sizes = [member.out_features for member in group.members]
    first: Any = model.get_submodule(group.members[0].module)
    trained = TrainedGroup(master, sizes, first.weight.dtype)
    for index, member in enumerate(group.members):
        module: Any = model.get_submodule(member.module)
        weight = module.weight.detach()
        layer = TrainedLinear(weight.t() if member.transposed else weight, module.bias, trained, index)
        parent, _, name = member.module.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return trained
