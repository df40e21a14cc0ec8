"""Scales of a group's inputs folded into the operator before it, exactly: the model computes what it did.

A group's inputs x are divided by s where they are made (a norm's gain, or the rows of the layer before), and its
weights multiplied by s, column by column: loud channels become quieter, and their weights larger. Scales are powers of
two, so both products are exact in bf16 and fp32 and the folded model gives the same numbers bit by bit; hashes, teacher
and losses hold. What is saved and exported is a model like any other.

Places where that can be done:

    norm -> group    a norm whose output this group alone reads
    up -> down       of a gated MLP: what is multiplied with the gate
    v -> o           a value channel serves several query heads where they share key heads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotune.search_space.groups import LayerGroup, Linear

LIMIT = 60  # exponents beyond would leave bf16's range soon
_READERS = {"up_proj": "down_proj", "v_proj": "o_proj"}


@dataclass(frozen=True)
class Site:
    """Where the inputs of `group` can be scaled: `source` is the norm, or the linear layer, that makes them.

    Args:
        readers: the group's linear layers, by module path.
        heads, repeat: of v -> o, key heads and how many query heads each serves; else 1 and 1.
    """

    group: str
    source: str
    readers: tuple[str, ...]
    heads: int = 1
    repeat: int = 1

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """One number for each of the source's outputs -> one for each of the group's inputs."""
        if self.repeat == 1:
            return values
        return values.view(self.heads, 1, -1).expand(-1, self.repeat, -1).reshape(-1)

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """(inputs,) -> (repeat, outputs of the source): the inputs that share one of its outputs."""
        if self.repeat == 1:
            return values.unsqueeze(0)
        return values.view(self.heads, self.repeat, -1).transpose(0, 1).reshape(self.repeat, -1)


@dataclass(frozen=True)
class Fold:
    """`exponents`: of the scale of every output of the site's source."""

    site: Site
    exponents: tuple[int, ...]


def fold(model: nn.Module, folds: Sequence[Fold], back: bool = False) -> None:
    """Move scales in place; `back` undoes it, exactly."""
    for item in folds:
        exponents = torch.tensor(item.exponents, dtype=torch.float32)
        scale = torch.exp2(-exponents if back else exponents)
        source: Any = model.get_submodule(item.site.source)
        for name, parameter in source.named_parameters(recurse=False):  # a gain or rows, and a bias
            own = scale.to(parameter.device, parameter.dtype)
            along_rows = parameter.ndim == 2 and not _transposed(source)
            parameter.data.div_(own.unsqueeze(1) if along_rows else own)
            assert name in ("weight", "bias")
        columns = item.site.spread(scale)
        for path in item.site.readers:
            reader: Any = model.get_submodule(path)
            own = columns.to(reader.weight.device, reader.weight.dtype)
            reader.weight.data.mul_(own.unsqueeze(1) if _transposed(reader) else own)


def sites(model: nn.Module, groups: Sequence[LayerGroup], document: torch.Tensor, tied_head: bool) -> list[Site]:
    """Every place of a model where random scales leave its output as it is, bit by bit.

    Args:
        groups: those of experts are left alone, and so is a head that shares the embedding.
        document: token ids (positions,) to try on.
    """
    single = [group for group in groups if group.experts == 1 and not (tied_head and group.role == "lm_head")]
    found = [*_norms(model, single, document), *_pairs(model, single)]
    with torch.inference_mode():
        expected = model(document.unsqueeze(0))[0]
        if _unchanged(model, found, document, expected):
            return found
        return [site for site in found if _unchanged(model, [site], document, expected)]


def _unchanged(model: nn.Module, tried: Sequence[Site], document: torch.Tensor, expected: torch.Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    folds = []
    for site in tried:
        source: Any = model.get_submodule(site.source)
        outputs = source.weight.shape[-1 if _transposed(source) else 0]
        exponents = torch.randint(-3, 4, (outputs,), generator=generator)
        folds.append(Fold(site, tuple(exponents.tolist())))
    fold(model, folds)
    try:
        return torch.equal(model(document.unsqueeze(0))[0], expected)
    finally:
        fold(model, folds, back=True)


@torch.inference_mode()
def _norms(model: nn.Module, groups: Sequence[LayerGroup], document: torch.Tensor) -> list[Site]:
    """Norms whose output tensor is what a group reads. That no other group reads it is tried later."""
    made: dict[int, str] = {}
    kept: list[torch.Tensor] = []  # alive, so that addresses stay distinct
    reads: dict[str, int] = {}
    handles = []
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:

            def after(_: nn.Module, __: Any, output: torch.Tensor, path: str = path) -> None:
                kept.append(output)
                made[output.data_ptr()] = path

            handles.append(module.register_forward_hook(after))
    for group in groups:

        def before(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = group.name) -> None:
            kept.append(args[0])
            reads[name] = args[0].data_ptr()  # a head reads a slice of what its norm made

        handles.append(model.get_submodule(group.members[0].module).register_forward_pre_hook(before))
    try:
        model(document.unsqueeze(0))
    finally:
        for handle in handles:
            handle.remove()
    paths = {g.name: tuple(member.module for member in g.members) for g in groups}
    readers = list(reads.values())
    return [Site(n, made[i], paths[n]) for n, i in reads.items() if i in made and readers.count(i) == 1]


def _pairs(model: nn.Module, groups: Sequence[LayerGroup]) -> list[Site]:
    """up -> down and v -> o, by the names that engines fuse."""
    linears = {member.module: (group, member) for group in groups for member in group.members}
    found = []
    for path, (_, source) in linears.items():
        parent, _, name = path.rpartition(".")
        reader = linears.get(f"{parent}.{_READERS.get(name)}")
        if reader is not None and len(reader[0].members) == 1:
            found += _pair(model.get_submodule(parent), source, *reader)
    return found


def _pair(parent: nn.Module, source: Linear, group: LayerGroup, target: Linear) -> list[Site]:
    if source.module.endswith("up_proj"):
        same = source.out_features == target.in_features
        return [Site(group.name, source.module, (target.module,))] if same else []
    head = int(getattr(parent, "head_dim", 0) or 0)
    if not head or source.out_features % head or target.in_features % source.out_features:
        return []
    heads, repeat = source.out_features // head, target.in_features // source.out_features
    return [Site(group.name, source.module, (target.module,), heads, repeat)]


def _transposed(module: nn.Module) -> bool:
    """Stored (in, out)."""
    return type(module).__name__ == "Conv1D"
