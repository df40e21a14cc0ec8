"""The weight database: every surviving (layer group, scheme) compressed once, as canonical bit-packed codes on disk.

One safetensors file an entry, written atomically and named by what it depends on, so a killed build goes on where it
stopped, and schemes that differ in their activations alone share a file. A candidate configuration is then a list of
pointers into it (the "stitching" of OBC, arXiv 2208.11580). Kernels repack at apply time; nothing here knows their
layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotune.compress import rounding, wanda
from autotune.errors import InputError
from autotune.kernels.packing import compress_24, expand_24, pack_codes, unpack_codes
from autotune.kernels.spec import GroupWeight
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.schemes import Scheme, scheme
from autotune.search_space.space import SearchSpace
from autotune.store import digest, write_bytes

METHOD = "rtn-clip/1"  # part of every entry's name; change it whenever the codes would change


@dataclass(frozen=True)
class WeightDatabase:
    """`entries`: (group, scheme) -> file name; `moments_digest` ties it to the calibration text."""

    folder: Path
    entries: dict[tuple[str, str], str]

    def load(
        self, group: LayerGroup, name: str, bias: torch.Tensor | None = None, rows: slice = slice(None)
    ) -> GroupWeight:
        """Unpacked canonical weights of one entry, or of some of its output rows; only these are read."""
        from safetensors import safe_open

        if (group.name, name) not in self.entries:
            raise InputError("database.missing", f"{group.name} was not compressed as {name}.", "Run compress again.")
        with safe_open(self.folder / self.entries[group.name, name], framework="pt") as file:
            tensors = {key: file.get_slice(key)[rows] for key in file.keys()}  # noqa: SIM118 - not a mapping
        return unpack(scheme(name), group.in_features, tensors, None if bias is None else bias[rows])

    @property
    def bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in set(self.entries.values()))


def build(
    model: nn.Module,
    spec: ModelSpec,
    space: SearchSpace,
    moments: Mapping[str, torch.Tensor],
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> WeightDatabase:
    """Compress every usable entry of the space that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [entry for entry in space.usable() if not scheme(entry.scheme).is_dense]
    entries: dict[tuple[str, str], str] = {}
    masks: dict[str, torch.Tensor] = {}  # of the group at hand: sparse schemes share it
    for number, entry in enumerate(wanted):
        group, item = spec.group(entry.group), scheme(entry.scheme)
        moment = moments[group.name]
        stored = [item.sparsity, asdict(item.weight)]
        key = digest([METHOD, spec.model_hash, group.name, stored, digest(moment.numpy().tobytes())])
        name = f"{key[:32]}.safetensors"
        if not (folder / name).is_file():
            dense = stacked_weight(model, group)
            if item.sparsity == "2:4" and group.name not in masks:
                masks = {group.name: wanda.mask_24(dense, moment)}
            keep = masks[group.name] if item.sparsity == "2:4" else None
            write_bytes(folder / name, _serialize(pack(compress(dense, moment, item, keep))))
        entries[group.name, entry.scheme] = name
        if progress:
            progress(number + 1, len(wanted))
    return WeightDatabase(folder, entries)


def compress(
    weight: torch.Tensor, moment: torch.Tensor | None, item: Scheme, keep: torch.Tensor | None = None
) -> GroupWeight:
    """Round-to-nearest with clipping, after Wanda's mask where the scheme is sparse.

    Args:
        weight: (out_features, in_features) fp32.
        moment: (in_features,) mean squared input.
        keep: (out_features, in_features) bool, that mask where it is known already.
    """
    if item.sparsity == "2:4" and keep is None:
        keep = wanda.mask_24(weight, moment)
    if item.weight.bits >= 16:
        return GroupWeight(item.name, dense=(weight * keep if keep is not None else weight).to(torch.bfloat16))
    codes, scales = rounding.quantize(weight, moment, item.weight, keep)
    return GroupWeight(item.name, codes=codes, scales=scales)


def stacked_weight(model: nn.Module, group: LayerGroup) -> torch.Tensor:
    """(out_features of all members, in_features) fp32, rows in member order."""
    rows = []
    for member in group.members:
        module: Any = model.get_submodule(member.module)
        weight = module.weight.detach().float()
        rows.append(weight.t() if member.transposed else weight)
    return torch.cat(rows).contiguous()


def stacked_bias(model: nn.Module, group: LayerGroup, dtype: torch.dtype) -> torch.Tensor | None:
    """(out_features,) or None; members without a bias get zeros where another one has it."""
    if not group.bias:
        return None
    parts = []
    for member in group.members:
        module: Any = model.get_submodule(member.module)
        bias = module.bias
        parts.append(torch.zeros(member.out_features) if bias is None else bias.detach().float())
    return torch.cat(parts).to(dtype)


def pack(weight: GroupWeight) -> dict[str, torch.Tensor]:
    """Canonical weights as the tensors that are stored; the inverse of `unpack`."""
    item = scheme(weight.scheme)
    tensors: dict[str, torch.Tensor] = {}
    values = weight.dense if weight.codes is None else weight.codes
    assert values is not None
    if item.sparsity == "2:4":
        values, tensors["positions"] = compress_24(values)
    if weight.scales is not None:
        tensors["scales"] = weight.scales.to(torch.bfloat16)  # exact: 8 significant bits
    tensors["values"] = pack_codes(values, item.weight.bits) if values.dtype == torch.int8 else values
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def unpack(
    item: Scheme, in_features: int, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None
) -> GroupWeight:
    """The canonical weights behind stored tensors."""
    stored = in_features // 2 if item.sparsity == "2:4" else in_features
    values = tensors["values"]
    if item.weight.kind == "int":
        values = unpack_codes(values, item.weight.bits, stored)
    if item.sparsity == "2:4":
        values = expand_24(values, tensors["positions"])
    if item.weight.bits >= 16:
        return GroupWeight(item.name, dense=values, bias=bias)
    return GroupWeight(item.name, codes=values, scales=tensors["scales"].float(), bias=bias)


def _serialize(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(tensors)
