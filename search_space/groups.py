"""What a model is to the search: its layer groups, and every other tensor with the reason it is kept.

A layer group holds the linear layers that read the same input and that engines fuse into one kernel (q/k/v, gate/up).
They get one decision and run as one call, their rows stacked in member order. The experts of a layer get one decision
too, but each of them runs as a call of its own, on the tokens that were sent to it: see `LayerGroup.parts`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from autotune.errors import InputError

Task = Literal["causal-lm", "encoder"]


@dataclass(frozen=True)
class Linear:
    """One linear layer y = x W^T + b. `tensor` is its path in the checkpoint, `module` its path in the loaded model."""

    tensor: str
    module: str
    out_features: int
    in_features: int
    bias: bool
    transposed: bool = False  # stored (in, out), as GPT-2's Conv1D does


@dataclass(frozen=True)
class LayerGroup:
    name: str  # e.g. "model.layers.0.self_attn.qkv"
    role: str  # e.g. "qkv", "o", "gate_up", "down", "lm_head"
    layer: int | None  # index of the block; None outside of blocks
    members: tuple[Linear, ...]
    last_token_only: bool = False  # lm_head: generation asks for the last position's logits only
    experts: int = 1  # of a mixture: members are those of each expert in turn, all of one shape
    experts_per_token: int = 1

    @property
    def in_features(self) -> int:
        return self.members[0].in_features

    @property
    def out_features(self) -> int:
        return sum(member.out_features for member in self.members)

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def weights_per_token(self) -> int:
        """Those that one token is multiplied with."""
        return self.weights * self.experts_per_token // self.experts

    @property
    def bias(self) -> bool:
        return any(member.bias for member in self.members)

    @cached_property
    def parts(self) -> tuple[LayerGroup, ...]:
        """What runs as one kernel call each: the group itself, or its experts as groups named GROUP[0], GROUP[1] ..."""
        if self.experts == 1:
            return (self,)
        size = len(self.members) // self.experts
        members = [self.members[size * number : size * (number + 1)] for number in range(self.experts)]
        return tuple(LayerGroup(f"{self.name}[{n}]", self.role, self.layer, own) for n, own in enumerate(members))

    def rows(self, number: int) -> slice:
        """The stacked rows of one part."""
        size = self.parts[0].out_features
        return slice(size * number, size * (number + 1))


@dataclass(frozen=True)
class KeptTensor:
    """A floating-point parameter that no scheme touches, and why."""

    tensor: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True)
class ModelSpec:
    """A model as the search sees it. `model_hash` is None for a bare config.json (latency only)."""

    name: str
    architecture: str
    task: Task
    dtype: str  # "bf16" or "fp32": what it is run in
    model_hash: str | None
    groups: tuple[LayerGroup, ...]
    kept: tuple[KeptTensor, ...]
    tied_embeddings: bool

    @property
    def kept_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.kept)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all weights, dense; a tied lm_head shares the embedding and adds nothing."""
        width = 2 if self.dtype == "bf16" else 4
        shared = {"lm_head"} if self.tied_embeddings else set()
        return self.kept_bytes + sum(group.weights * width for group in self.groups if group.role not in shared)

    def group(self, name: str) -> LayerGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise InputError("model.group", f"the model has no layer group {name!r}.", "`autotune plan show` lists them.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ModelSpec:
        groups = tuple(
            LayerGroup(**{**group, "members": tuple(Linear(**member) for member in group["members"])})
            for group in value["groups"]
        )
        kept = tuple(KeptTensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in value["kept"])
        return cls(**{**value, "groups": groups, "kept": kept})
