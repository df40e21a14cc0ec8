"""Layer groups as modules: q/k/v run as one kernel call inside model classes that call three layers.

A `FusedGroup` owns the packed weights; one `GroupSlice` per member takes the place of the model's linear layer (or of
GPT-2's Conv1D, which computes the same y = x W^T + b). The first slice registers the group as a submodule, the others
only refer to it. The first member called on a new input computes all outputs; each member takes its slice once, and the
last one clears input and output. An input is recognised by identity and by its version counter; inference-mode tensors
have no counter, so there an in-place change of the input *between* two members of one group would be missed.

A group holds alternatives under names and switches between them in place (`select`), so that configurations can be
timed interleaved; the alternative `zeros` is always there and computes nothing. Packed weights are not part of the
state dict. Under `torch.compile` and `torch.export` a group is one operator on them (`operator`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from autotune.errors import InputError, did_you_mean
from autotune.kernels import bank, changes
from autotune.kernels.operator import Operands, apply, operands, plain
from autotune.kernels.spec import Packed, load
from autotune.search_space.coverage import KernelSpec

ZEROS = "zeros"


@dataclass(frozen=True)
class Alternative:
    """One way to compute a group: a kernel's `run` on its packed weights.

    `native`: addresses of its C function (packed, x, rows, y, threads) and of its `packed`; None where it has none.
    `operands`: what a graph needs for the same; None where none will be made.
    `bank`: all experts of the layer, where the device chooses among them; this is one of its rows.
    """

    run: Callable[[Packed, torch.Tensor], torch.Tensor]
    packed: Packed
    native: tuple[int, int] | None = None
    operands: Operands | None = None
    bank: bank.Bank | None = None


def alternative(spec: KernelSpec, scheme: str, packed: Packed) -> Alternative:
    module = load(spec)
    native = getattr(module, "native", None)
    return Alternative(module.run, packed, native(packed) if native else None, operands(spec, scheme, packed))


def alternatives(spec: KernelSpec, scheme: str, packs: Iterable[Packed], count: int) -> list[Alternative]:
    """Of the `count` parts of a layer group; experts on a CUDA device share a bank."""
    if not bank.wanted(spec, count):
        return [alternative(spec, scheme, packed) for packed in packs]
    shared = bank.bank(spec, scheme, packs, count)
    return [replace(alternative(spec, scheme, shared.expert(number)), bank=shared) for number in range(count)]


class FusedGroup(nn.Module):
    """The members' outputs, computed together; `sizes` are their numbers of outputs, in the order rows are stacked."""

    def __init__(self, in_features: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.in_features = in_features
        self.sizes = tuple(sizes)
        self.out_features = sum(self.sizes)
        self.active = ZEROS
        self._alternatives: dict[str, Alternative] = {}
        self._pending = _Pending()

    def add(self, name: str, choice: Alternative) -> None:
        """Keep packed weights under a name; the first one added becomes active.

        Raises:
            InputError: `kernel.weight` when they are not of this group's shape, or the name is taken by `zeros`.
        """
        shape = (choice.packed.out_features, choice.packed.in_features)
        if shape != (self.out_features, self.in_features) or name == ZEROS:
            expected = f"({self.out_features}, {self.in_features})"
            raise InputError("kernel.weight", f"{name!r} of shape {shape} cannot serve a group of shape {expected}.")
        first = not self._alternatives
        self._alternatives[name] = choice
        changes.note()
        if first:
            self.select(name)

    def select(self, name: str) -> None:
        """Switch to other packed weights, in place.

        Raises:
            InputError: `kernel.alternative` when there are none of that name.
        """
        if name != ZEROS and name not in self._alternatives:
            hint = did_you_mean(name, [*self._alternatives, ZEROS])
            raise InputError("kernel.alternative", f"the group holds no weights named {name!r}.", hint)
        self.active = name
        self._pending.clear()
        changes.note()

    def holds(self, name: str) -> bool:
        """True where there are packed weights under that name."""
        return name in self._alternatives

    @property
    def banked(self) -> bool:
        """Whether the device can choose among this group and those of the layer's other experts."""
        return any(choice.bank is not None for choice in self._alternatives.values())

    def remove(self, name: str) -> None:
        """Let go of packed weights that are not active."""
        if name == self.active:
            raise InputError("kernel.alternative", f"{name!r} is active.", "Select another one first.")
        self._alternatives.pop(name, None)

    @property
    def choice(self) -> Alternative | None:
        """What is active; None: `zeros`."""
        return self._alternatives.get(self.active)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the active packed weights."""
        return 0 if self.active == ZEROS else self._alternatives[self.active].packed.bytes

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """All outputs: x (..., in) -> (..., out)."""
        if self.active == ZEROS:
            return x.new_zeros((*x.shape[:-1], self.out_features))
        choice = self._alternatives[self.active]
        if torch.compiler.is_compiling():
            return self._as_operator(choice.operands, x)
        return apply(choice.run, choice.packed, x)

    def member(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The outputs of one member: x (..., in) -> (..., sizes[index])."""
        if len(self.sizes) == 1:
            return self.compute(x)
        pending = self._pending
        if pending.input is not x or not pending.waiting >> index & 1 or pending.version != _version(x):
            pending.outputs = self.compute(x).split(self.sizes, -1)
            pending.input, pending.version = x, _version(x)
            pending.waiting = (1 << len(self.sizes)) - 1
        y = pending.outputs[index]
        pending.waiting ^= 1 << index
        if not pending.waiting:
            pending.clear()
        return y

    def slices(self) -> tuple[GroupSlice, ...]:
        """One module per member, to be put where the model's layers are."""
        return tuple(GroupSlice(self, index) for index in range(len(self.sizes)))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, sizes={self.sizes}, active={self.active!r}"

    def _as_operator(self, of: Operands | None, x: torch.Tensor) -> torch.Tensor:
        if of is None:
            raise InputError("kernel.operator", f"{self.active!r} is not for graphs.", "Make it with `alternative`.")
        weights = of.weights
        if weights[0] is None and self._uncover():
            weights = (of.uncovered[0], *weights[1:])
        y: torch.Tensor = torch.ops.autotune.linear(x, weights, of.kernel, of.scheme, self.out_features)
        return y

    def _uncover(self) -> bool:
        """Keep a copy of the active kernel's opaque tensor that a graph can hold; never traced itself."""
        choice = self._alternatives[self.active]
        if choice.operands is not None and not choice.operands.uncovered:
            choice.operands.uncovered.append(plain(choice.operands.kernel, choice.packed))
        return True

    # What torch.compiler.assume_constant_result does; calling it would import the compiler, a second of every start.
    _uncover._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Pending:
    """An input whose outputs not all members have taken. Not part of the module: assigning to a module is slow."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.input: torch.Tensor | None = None
        self.version = 0
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.waiting = 0  # bit i: member i has not taken its slice


class GroupSlice(nn.Module):
    """Stands in for one linear layer of a group."""

    def __init__(self, group: FusedGroup, index: int) -> None:
        super().__init__()
        self.in_features = group.in_features
        self.out_features = group.sizes[index]
        self.index = index
        self._member = group.member
        if index == 0:
            self.group = group
        else:
            object.__setattr__(self, "group", group)  # a plain reference: owned, moved and listed once, by the first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._member(self.index, x)


def install(model: nn.Module, modules: Sequence[str], group: FusedGroup) -> None:
    """Put a group's slices at the module paths of its members, in their order."""
    for path, piece in zip(modules, group.slices(), strict=True):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, piece)


def _version(x: torch.Tensor) -> int:
    """The tensor's count of in-place changes; 0 where torch keeps none."""
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version
