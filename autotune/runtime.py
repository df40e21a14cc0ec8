"""Compressed models that run: apply a plan to a model in memory, save it, load it, switch between configurations.

A saved folder holds the model's config and tokenizer, `plan.json`, and `compressed.safetensors`: the parameters no
scheme touches by name, and each layer group's canonical codes (or dense rows) as `GROUP::values`, `::scales`,
`::positions`, `::dense`, `::bias`. Kernels repack at load. It is named so that no other tool takes it for a plain
checkpoint: use `autotune.load`, or `autotune export`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotune.attention import fuse_attention
from autotune.decoder import fuse_decoder_layers
from autotune.decoder_step import fuse_decoders
from autotune.errors import DeviceError, InputError
from autotune.experts import align_routers, split_experts
from autotune.folding import Fold, Site, fold
from autotune.kernels import storage
from autotune.kernels.allocator import keep_large_blocks
from autotune.kernels.cpu import build
from autotune.kernels.linear import FusedGroup, alternatives, install
from autotune.kernels.norm import fuse_norms
from autotune.kernels.reference import dequantize
from autotune.kernels.spec import GroupWeight, kernel
from autotune.kernels.spec import load as load_kernel
from autotune.kv_cache import keep_as
from autotune.place import device_of
from autotune.plan import Plan
from autotune.search_space.schemes import scheme
from autotune.skeleton import skeleton
from autotune.store import digest, new_folder

WEIGHTS = "compressed.safetensors"
_SMOOTH = "smooth"  # exponents, see `folding`
_OF_WEIGHTS = ("configuration", "smoothing", "recompression")  # what a plan says of them
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Text and tables only: tokenizer code, where a folder has it, is never run and stays behind.
_COPIED = (
    *("config.json", "generation_config.json", "tokenizer*.json", "added_tokens.json", "special_tokens_map.json"),
    *("vocab*", "merges.txt", "*.model", "chat_template*"),
)


def apply(model: nn.Module, plan: Plan | Path | str, weights: Path | str | None = None) -> nn.Module:
    """Put a plan's compressed layers into a transformers model, in place, on the kernels that were timed.

    The model moves to the device of those kernels.

    Args:
        model: the model the plan was made for, loaded in the plan's dtype.
        plan: a plan, a plan.json, or a run folder.
        weights: folder written by `autotune tune` (RUN/model); by default found beside the plan.

    Raises:
        InputError: `plan.*`, `apply.weights`, `plan.model_mismatch` when the model's weights are not the plan's.
        DeviceError: `device.missing` when the plan's kernels need a device that is not here.
    """
    folder, loaded = _plan_and_weights(plan, weights)
    split_experts(model)
    _check_same_model(model, loaded)
    tensors = _read(folder / WEIGHTS)
    dtype = _DTYPES[loaded.model.dtype]
    groups = _groups(loaded)
    folds = _folds(loaded, tensors)
    fold(model, folds)
    try:
        for name, group in groups.items():  # all of them before the first is changed
            _check_same_weights(model, group, _group_weight(loaded, name, tensors, model), loaded)
    except InputError:
        fold(model, folds, back=True)
        raise
    model.to(device_of(loaded.kernels.values()))
    for name, group in groups.items():
        _install(model, loaded, name, group, _group_weight(loaded, name, tensors, model), dtype)
    quicken(model)
    keep_as(model, loaded.kv_cache)
    keep_large_blocks()
    return model


def load(folder: Path | str) -> nn.Module:
    """The compressed transformers model saved in a folder; its dense weights are never built.

    Raises:
        InputError: `plan.*`, `apply.weights`.
        DeviceError: `device.missing` when the plan's kernels need a device that is not here.
    """
    path = Path(folder)
    path = path / "model" if not (path / WEIGHTS).is_file() and (path / "model" / WEIGHTS).is_file() else path
    plan = Plan.load(path / "plan.json")
    _check_same_plan(path / WEIGHTS, plan)
    device = device_of(plan.kernels.values())
    if device.type == "cpu":
        build.prepare()
    tensors = _read(path / WEIGHTS)
    dtype = _DTYPES[plan.model.dtype]
    model = _skeleton(path, plan, dtype)
    kept = {name: tensor for name, tensor in tensors.items() if "::" not in name}
    tied = plan.model.tied_embeddings
    groups = _groups(plan)
    for name, group in groups.items():
        if not _is_tied_dense(plan, name):
            _install(model, plan, name, group, _group_weight(plan, name, tensors, model), dtype)
    missing, unexpected = model.load_state_dict(kept, assign=True, strict=False)
    if tied:
        model.tie_weights()  # type: ignore[operator]
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent or unexpected:
        what = f"missing {absent[:3] or missing[:3]}, unexpected {unexpected[:3]}"
        raise InputError("apply.weights", f"{path / WEIGHTS} does not fit its plan: {what}.", "Save the model again.")
    model.to(device)
    for name in [name for name in groups if _is_tied_dense(plan, name)]:
        _install(model, plan, name, groups[name], _group_weight(plan, name, tensors, model), dtype)
    quicken(model)
    keep_as(model, plan.kv_cache)
    keep_large_blocks()
    return model.requires_grad_(False).eval()


def quicken(model: nn.Module) -> None:
    """What is done to any model that runs on a CPU, dense or compressed, besides its layer groups: same results but for
    the order of sums."""
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return
    align_routers(model)
    fuse_norms(model)
    fuse_attention(model)
    if fuse_decoder_layers(model):
        fuse_decoders(model)


def save(
    folder: Path,
    source: Path,
    plan: Plan,
    model: nn.Module,
    weights: Mapping[str, GroupWeight],
    dense: set[str],
    folds: Sequence[Fold] = (),
) -> None:
    """Write a loadable folder, complete or not at all.

    Args:
        source: the original model folder, for its config and tokenizer.
        model: a model whose layer groups are installed; its remaining parameters are the kept ones.
        weights: canonical weights of every group, dense ones included.
        dense: groups whose rows are the tied embedding and need no copy.
        folds: what was folded in `model`; `apply` does it to the user's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = dict(model.state_dict())
    if plan.model.tied_embeddings:
        tensors = _without_shared(tensors)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    for name, weight in weights.items():
        if name in dense:
            continue
        parts = {"dense": weight.dense} if scheme(weight.scheme).is_dense else storage.pack(weight)
        parts |= {"bias": weight.bias} if weight.bias is not None else {}
        tensors |= {f"{name}::{key}": value.cpu().contiguous() for key, value in parts.items() if value is not None}
    for item in folds:
        tensors[f"{item.site.group}::{_SMOOTH}"] = torch.tensor(item.exponents, dtype=torch.int8)
    with new_folder(folder) as temporary:
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, temporary / file.name)
        try:
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "autotune/1", "plan": plan.digest()})
        except SafetensorError as error:  # how the library reports that a write failed
            hint = f"It needs {sum(tensor.nbytes for tensor in tensors.values()):,} bytes; free them and start again."
            raise DeviceError("store.no_space", f"{folder} could not be written: {error}.", hint) from error
        plan.save(temporary / "plan.json")


def _without_shared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One name for each storage: safetensors refuses shared memory, and `tie_weights` restores the other."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            kept[name] = tensor
            seen.add(tensor.data_ptr())
    return kept


def _plan_and_weights(plan: Plan | Path | str, weights: Path | str | None) -> tuple[Path, Plan]:
    if isinstance(plan, Plan):
        loaded, candidates = plan, []
    else:
        path = Path(plan) / "plan.json" if Path(plan).is_dir() else Path(plan)
        loaded, candidates = Plan.load(path), [path.parent, path.parent / "model"]
    if weights is not None:
        candidates = [Path(weights), Path(weights) / "model"]
    for folder in candidates:
        if (folder / WEIGHTS).is_file():
            held = Plan.load(folder / "plan.json")
            if any(getattr(held, name) != getattr(loaded, name) for name in _OF_WEIGHTS):
                hint = "Run `autotune apply RUN` for this plan first."
                raise InputError("apply.weights", f"{folder} holds another plan's weights.", hint)
            return folder, loaded
    hint = "Give weights=RUN/model, the folder that `autotune tune` or `autotune apply RUN` wrote."
    raise InputError("apply.weights", "the plan's compressed weights were not found.", hint)


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise InputError("apply.weights", f"{path} cannot be read: {error}.", "Save the model again.") from error


def _check_same_plan(path: Path, plan: Plan) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get("plan")
    except (SafetensorError, OSError) as error:
        raise InputError("apply.weights", f"{path} cannot be read: {error}.", "Save the model again.") from error
    if stated != plan.digest():
        hint = "Keep the plan.json that was written with the weights, or run `autotune apply RUN` again."
        raise InputError("apply.weights", f"{path} was not made for the plan.json beside it.", hint)


def _groups(plan: Plan) -> dict[str, list[Any]]:
    """Group -> its tensor entries, in the order their rows are stacked."""
    groups: dict[str, list[Any]] = {group.name: [] for group in plan.groups}
    for entry in plan.tensors:
        groups[entry.group].append(entry)
    return groups


def _folds(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> list[Fold]:
    if plan.smoothing is None:
        return []
    folds = []
    for item in plan.smoothing.sites:
        readers = tuple(entry.module for entry in plan.tensors if entry.group == item.group)
        site = Site(item.group, item.source, readers, item.heads, item.repeat)
        folds.append(Fold(site, tuple(tensors[f"{item.group}::{_SMOOTH}"].tolist())))
    if digest([item.exponents for item in folds]) != plan.smoothing.exponents:
        what = "the scales saved with the weights are not those of the plan"
        raise InputError("apply.weights", f"{what}.", "Run `autotune apply RUN` again.")
    return folds


def _is_tied_dense(plan: Plan, name: str) -> bool:
    role = next(group.role for group in plan.groups if group.name == name)
    return role == "lm_head" and plan.model.tied_embeddings and scheme(plan.configuration[name]).is_dense


def _group_weight(plan: Plan, name: str, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> GroupWeight:
    item = scheme(plan.configuration[name])
    prefix = f"{name}::"
    parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    bias = parts.pop("bias", None)
    parts.pop(_SMOOTH, None)
    if _is_tied_dense(plan, name):
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        return GroupWeight(item.name, dense=embedding.detach(), bias=bias)
    if not parts:
        raise InputError("apply.weights", f"the weights of {name} are missing.", "Save the model again.")
    if item.is_dense:
        return GroupWeight(item.name, dense=parts["dense"], bias=bias)
    in_features = _groups(plan)[name][0].shape[1]
    return storage.unpack(item, in_features, parts, bias)


def _install(
    model: nn.Module, plan: Plan, name: str, entries: list[Any], weight: GroupWeight, dtype: torch.dtype
) -> None:
    """One fused group, or one an expert."""
    spec = kernel(plan.kernels[name])
    count = next(group.experts for group in plan.groups if group.name == name)
    size = len(entries) // count
    rows = sum(entry.shape[0] for entry in entries[:size])
    parts = [weight] if count == 1 else [weight.part(slice(n * rows, (n + 1) * rows)) for n in range(count)]
    packs = (load_kernel(spec).pack(part, dtype) for part in parts)
    for number, choice in enumerate(alternatives(spec, weight.scheme, packs, count)):
        own = entries[number * size : (number + 1) * size]
        group = FusedGroup(own[0].shape[1], [entry.shape[0] for entry in own])
        group.add(weight.scheme, choice)
        install(model, [entry.module for entry in own], group)


def _check_same_model(model: nn.Module, plan: Plan) -> None:
    for entry in plan.tensors:
        module: Any = None
        with contextlib.suppress(AttributeError):
            module = model.get_submodule(entry.module)
        shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
        if shape not in (entry.shape, entry.shape[::-1]):
            what = f"{entry.module} is {shape or 'absent'}, the plan says {entry.shape}"
            raise InputError("plan.model_mismatch", f"the plan is for another model: {what}.", "Open the right model.")
        if module.weight.dtype != _DTYPES[plan.model.dtype]:
            hint = f"Load the model with dtype={_DTYPES[plan.model.dtype]}."
            raise InputError("plan.model_mismatch", f"the plan was timed in {plan.model.dtype}.", hint)


def _check_same_weights(model: nn.Module, entries: list[Any], weight: GroupWeight, plan: Plan) -> None:
    """The stored codes must describe these very weights: another checkpoint of equal shape is off by about 1.4."""
    parts = dequantize(weight).split([entry.shape[0] for entry in entries])
    for entry, stored in zip(entries, parts, strict=True):
        module: Any = model.get_submodule(entry.module)
        dense = module.weight.detach().float().to(stored.device)
        dense = dense if dense.shape == stored.shape and not _transposed(model, entry) else dense.t()
        error = float((stored - dense).norm() / dense.norm().clamp_min(1e-12))
        item = scheme(plan.configuration[entry.group])
        bound = 0.9 if item.sparsity != "dense" or item.weight.bits < 4 else 0.35
        if any(made is not None and entry.group in made.groups for made in (plan.recovery, plan.recompression)):
            bound = 1.2  # training, or making up for earlier groups, moves weights further than rounding does
        if not error <= bound:
            what = f"{entry.tensor} differs from the plan's weights by {error:.0%}"
            raise InputError("plan.model_mismatch", f"the plan is for another checkpoint: {what}.", "Search again.")


def _transposed(model: nn.Module, entry: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(model.get_submodule(entry.module), Conv1D)


def _skeleton(folder: Path, plan: Plan, dtype: torch.dtype) -> nn.Module:
    model = skeleton(folder, plan.model.task, dtype)
    generation = folder / "generation_config.json"
    if generation.is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)  # type: ignore[assignment]
    return model
