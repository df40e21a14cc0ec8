"""The weight database: every surviving (layer group, scheme) compressed once, as canonical bit-packed codes on disk.

One safetensors file an entry, written atomically and named by what it depends on, so a killed build goes on where it
stopped, and schemes that differ in their activations alone share a file. A candidate configuration is then a list of
pointers into it (the "stitching" of OBC, arXiv 2208.11580). Kernels repack at apply time; nothing here knows their
layouts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotune.compress import methods
from autotune.compress.calibrate import InputStatistics, input_statistics
from autotune.compress.visits import visits
from autotune.errors import InputError
from autotune.kernels.spec import GroupWeight
from autotune.kernels.storage import pack, stored_rows, unpack
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.schemes import Scheme, scheme
from autotune.search_space.space import SearchSpace
from autotune.store import digest, write_bytes
from autotune.streaming import Streamed

METHOD = "joint/3"  # part of every entry's name; change it whenever the codes would change
_STATISTICS_BYTES = 2**30  # of calibration held at a time


@dataclass(frozen=True)
class WeightDatabase:
    """`entries`: (group, scheme) -> file name; beside them (group, `own_name`) where a configuration has its own."""

    folder: Path
    entries: dict[tuple[str, str], str]

    def load(
        self,
        group: LayerGroup,
        name: str,
        bias: torch.Tensor | None = None,
        rows: slice = slice(None),
        device: torch.device | str = "cpu",
    ) -> GroupWeight:
        """Unpacked canonical weights of one entry, or of some of its output rows; only these are read. They go to the
        device as they are stored, and are unpacked there."""
        from safetensors import safe_open

        if (group.name, name) not in self.entries:
            raise InputError("database.missing", f"{group.name} was not compressed as {name}.", "Run compress again.")
        item = scheme(scheme_of(name))
        with safe_open(self.folder / self.entries[group.name, name], framework="pt") as file:
            start, stop, _ = rows.indices(group.out_features)
            wanted = {key: stored_rows(item, key, start, stop) for key in file.keys()}  # noqa: SIM118 - not a mapping
            tensors = {key: file.get_slice(key)[part].to(device) for key, part in wanted.items()}
        within = start % item.weight.rows if item.weight.rows else 0
        return unpack(item, group.in_features, tensors, None if bias is None else bias[rows], within)

    def origin(self, group: str, name: str) -> tuple[str, float | None]:
        """(method, error of the group's output: squared, relative, on calibration documents set aside) of an entry;
        no error where the method took no Hessian."""
        from safetensors import safe_open

        with safe_open(self.folder / self.entries[group, name], framework="pt") as file:
            about = json.loads(file.metadata()["origin"])
        return about["method"], about["layer_error"]

    def notes(self, group: str, name: str) -> dict[int, str]:
        """Expert -> what had to be done because calibration hardly reached it."""
        from safetensors import safe_open

        with safe_open(self.folder / self.entries[group, name], framework="pt") as file:
            about = json.loads(file.metadata()["origin"])
        return {int(number): note for number, note in about.get("experts", {}).items()}

    @property
    def bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in set(self.entries.values()))


def own_name(scheme: str, file: str) -> str:
    """What an entry is called that belongs to one configuration: SCHEME@ and the start of its file's name, a hash."""
    return f"{scheme}@{file[:12]}"


def scheme_of(name: str) -> str:
    """The scheme of an entry, its own or one for all."""
    return name.partition("@")[0]


def build(
    model: nn.Module | Streamed,
    spec: ModelSpec,
    space: SearchSpace,
    documents: Sequence[torch.Tensor],
    folder: Path,
    method: str = methods.AUTO,
    progress: Callable[[int, int], None] | None = None,
    folded: str = "",
) -> WeightDatabase:
    """Compress every usable entry of the space that is not there yet, group by group.

    Args:
        model: held whole, or streamed: then at most a block's weights and statistics are in memory at a time, and the
            entries are the same.
        documents: token ids to calibrate on, each (positions,); some are kept to judge methods by.
        method: one of `methods.METHODS`, or `methods.AUTO`.
        folded: a hash of the scales that were moved in the model, empty where none were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    calibration = digest([document.tolist() for document in documents])
    calibration = digest([calibration, folded]) if folded else calibration
    entries: dict[tuple[str, str], str] = {}
    missing: dict[str, dict[str, Scheme]] = {}  # group -> file -> what to store there
    for entry in space.usable():
        item = scheme(entry.scheme)
        if item.is_dense:
            continue
        stored = [item.sparsity, asdict(item.weight)]
        key = digest([METHOD, method, spec.model_hash, entry.group, stored, calibration])
        name = entries[entry.group, entry.scheme] = f"{key[:32]}.safetensors"
        if not (folder / name).is_file():
            missing.setdefault(entry.group, {}).setdefault(name, item)
    if missing:
        _fill(model, spec, documents, missing, folder, method, progress)
    return WeightDatabase(folder, entries)


def _fill(
    model: nn.Module | Streamed,
    spec: ModelSpec,
    documents: Sequence[torch.Tensor],
    missing: Mapping[str, Mapping[str, Scheme]],
    folder: Path,
    method: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    done = 0
    with closing(visits(model, spec, documents)) as found:
        for visit in found:
            for wave in _waves([group for group in visit.groups if group.name in missing]):
                hessians = methods.takes_hessian(method)
                statistics = input_statistics(visit.model, wave, visit.documents, hessians, visit.run)
                for group in wave:
                    inputs = [statistics.pop(part.name) for part in group.parts]
                    _compress_group(visit.model, group, inputs, missing[group.name], folder, method)
                    done += 1
                    if progress:
                        progress(done, len(missing))
            if done == len(missing):
                return


def _waves(groups: Sequence[LayerGroup]) -> Iterator[list[LayerGroup]]:
    """Groups whose statistics are held at one time: each wave costs a pass over the calibration documents."""
    wave: list[LayerGroup] = []
    held = 0
    for group in groups:
        size = 8 * group.in_features**2 * group.experts
        if wave and held + size > _STATISTICS_BYTES:
            yield wave
            wave, held = [], 0
        wave.append(group)
        held += size
    if wave:
        yield wave


def _compress_group(
    model: nn.Module,
    group: LayerGroup,
    inputs: Sequence[InputStatistics],
    wanted: Mapping[str, Scheme],
    folder: Path,
    method: str,
) -> None:
    """`inputs`: of each part of the group."""
    made, powers = [], []
    for part, seen in zip(group.parts, inputs, strict=True):
        dense = stacked_weight(model, part)
        powers.append(seen.tokens * (seen.output_power(dense) or 0.0) if group.experts > 1 else 1.0)
        made.append(methods.compress(method, dense, seen, list(wanted.values())))
    notes = {str(number): seen.note for number, seen in enumerate(inputs) if seen.note}
    for name, experts in zip(wanted, zip(*made, strict=True), strict=True):
        found = experts[0] if len(experts) == 1 else methods.join(experts, powers)
        write_bytes(folder / name, serialized(found.weight, found.method, found.layer_error, notes))


def serialized(
    weight: GroupWeight, method: str, layer_error: float | None, notes: Mapping[str, Any] | None = None
) -> bytes:
    """One entry as its file holds it; equal weights give equal bytes. `notes`: of single experts."""
    from safetensors.torch import save

    origin: dict[str, Any] = {"method": method, "layer_error": layer_error}
    origin |= {"experts": notes} if notes else {}
    return save(pack(weight), {"origin": json.dumps(origin)})  # one key: the order of several is not fixed


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
        parts.append(module.weight.new_zeros(member.out_features).float() if bias is None else bias.detach().float())
    return torch.cat(parts).to(dtype)
