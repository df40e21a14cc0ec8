"""A saved compressed model as exporters see it: canonical weights of linear layers, every other tensor by name.

Everything is checked here, once, against the architecture built without weights: each parameter of the model is there
with its shape, and nothing else is. Exporters only translate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotune.config import RunConfig
from autotune.errors import InputError
from autotune.kernels import storage
from autotune.kernels.spec import GroupWeight
from autotune.plan import Plan, SchemeSpec, TensorEntry
from autotune.runtime import WEIGHTS
from autotune.search_space.schemes import Scheme, scheme

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class SavedLinear:
    """One linear layer. `weight` None: it is the tied embedding."""

    module: str
    weight: GroupWeight | None


@dataclass(frozen=True)
class SavedGroup:
    name: str
    scheme: Scheme
    members: tuple[SavedLinear, ...]


@dataclass(frozen=True)
class SavedModel:
    """`kept`: state-dict name -> tensor, of all that no scheme touches. `source` holds config and tokenizer."""

    plan: Plan
    folder: Path
    source: Path
    dtype: torch.dtype
    groups: tuple[SavedGroup, ...]
    kept: dict[str, torch.Tensor]


def open_saved(folder: Path, source: Path | None = None) -> SavedModel:
    """Read what `autotune tune` or `autotune apply` saved.

    Args:
        folder: a run folder, or the model folder in it.
        source: the original model folder; default: the one the run names, else the copies in the model folder.

    Raises:
        InputError: `plan.*`, `export.weights`, `export.source`, `export.unsupported` naming the group.
    """
    path = _model_folder(folder)
    plan = Plan.load(path / "plan.json")
    _check_same_plan(folder, path, plan)
    if mixed := [group.name for group in plan.groups if group.experts > 1]:
        hint = "Such a model runs with `autotune.load`."
        raise InputError("export.unsupported", f"{mixed[0]}: experts cannot be exported yet.", hint)
    tensors = _read(path / WEIGHTS, plan)
    origin = _source(folder, path, source)
    empty = _empty(path, plan)
    groups = tuple(_group(plan, group.name, tensors, empty) for group in plan.groups)
    kept = {name: tensor for name, tensor in tensors.items() if "::" not in name}
    _check_kept(plan, kept, empty)
    return SavedModel(plan, path, origin, _DTYPES[plan.model.dtype], groups, kept)


def _model_folder(folder: Path) -> Path:
    for path in (folder, folder / "model"):
        if (path / WEIGHTS).is_file():
            return path
    hint = "Give a run folder of `autotune tune`; `autotune apply RUN` writes the weights again."
    raise InputError("export.weights", f"{folder} holds no compressed model ({WEIGHTS}).", hint)


def _check_same_plan(folder: Path, path: Path, plan: Plan) -> None:
    other = folder / "plan.json"
    if folder != path and other.is_file() and Plan.load(other).configuration != plan.configuration:
        raise InputError(
            "export.weights", f"{path} holds another plan's weights than {other}.", "Run `autotune apply RUN` first."
        )


def _read(path: Path, plan: Plan) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            written_for = (file.metadata() or {}).get("plan")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise InputError("export.weights", f"{path} cannot be read: {error}.", "Run `autotune apply RUN`.") from error
    if written_for != plan.digest():
        raise InputError("export.weights", f"{path} was written for another plan.", "Run `autotune apply RUN`.")
    return tensors


def _source(folder: Path, path: Path, source: Path | None) -> Path:
    """The original model's folder; its config must be the one the plan was made with."""
    config = folder / "config.yaml"
    if source is None and config.is_file() and (Path(RunConfig.load(config).model) / "config.json").is_file():
        source = Path(RunConfig.load(config).model)
    if source is None:
        return path
    if not (source / "config.json").is_file():
        raise InputError("export.source", f"{source} holds no config.json.", "Give the original model's folder.")
    if (source / "config.json").read_bytes() != (path / "config.json").read_bytes():
        what = f"{source}/config.json is not the one the plan was made with."
        raise InputError("export.source", what, "Give the original model's folder, unchanged.")
    return source


def _empty(folder: Path, plan: Plan) -> nn.Module:
    """The architecture without weights."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    auto = AutoModelForCausalLM if plan.model.task == "causal-lm" else AutoModel
    with torch.device("meta"):
        return auto.from_config(config)  # type: ignore[no-any-return]


def _group(plan: Plan, name: str, tensors: Mapping[str, torch.Tensor], empty: nn.Module) -> SavedGroup:
    entries = [entry for entry in plan.tensors if entry.group == name]
    item = _scheme(plan, name)
    _check_modules(name, entries, empty)
    prefix = f"{name}::"
    parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    parts.pop("smooth", None)  # the tensors are those of the model with its scales moved, and need nothing
    if not parts and _tied(plan, name) and item.is_dense:
        return SavedGroup(name, item, tuple(SavedLinear(entry.module, None) for entry in entries))
    weight = _weight(item, name, entries, parts)
    linears, start = [], 0
    for entry in entries:
        stop = start + entry.shape[0]
        linears.append(SavedLinear(entry.module, _rows(weight, start, stop, _has_bias(empty, entry))))
        start = stop
    return SavedGroup(name, item, tuple(linears))


def _scheme(plan: Plan, group: str) -> Scheme:
    """The group's scheme, provided that this version means by its name what the plan means."""
    name = plan.configuration[group]
    try:
        item, same = scheme(name), plan.schemes.get(name, SchemeSpec.of(name)) == SchemeSpec.of(name)
    except InputError as error:
        raise InputError("export.unsupported", f"{group}: {error.message}", error.hint) from error
    if not same:
        raise InputError("export.unsupported", f"{group}: the plan means something else by {name!r}.")
    return item


def _check_modules(group: str, entries: list[TensorEntry], empty: nn.Module) -> None:
    for entry in entries:
        try:
            module: Any = empty.get_submodule(entry.module)
        except AttributeError as error:
            raise InputError("export.weights", f"{group}: the model has no layer {entry.module}.") from error
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            hint = "Export reaches layers of class Linear only; such a model runs with `autotune.load`."
            raise InputError("export.unsupported", f"{group}: {entry.module} is a {kind}, not a Linear.", hint)
        if tuple(module.weight.shape) != entry.shape:
            raise _unfit(f"{entry.module} is {tuple(module.weight.shape)}, the plan says {entry.shape}")


def _weight(item: Scheme, name: str, entries: list[TensorEntry], parts: dict[str, torch.Tensor]) -> GroupWeight:
    """The canonical weights of a whole group, rows of all members stacked."""
    bias = parts.pop("bias", None)
    shape = (sum(entry.shape[0] for entry in entries), entries[0].shape[1])
    try:
        if item.is_dense:
            weight = GroupWeight(item.name, dense=parts["dense"], bias=bias)
        else:
            weight = storage.unpack(item, shape[1], parts, bias)
    except KeyError as error:
        raise _unfit(f"{name} lacks its {error.args[0]}") from error
    values = weight.dense if weight.codes is None else weight.codes
    if values is None or tuple(values.shape) != shape:
        raise _unfit(f"{name} is not of shape {shape}")
    return weight


def _rows(weight: GroupWeight, start: int, stop: int, bias: bool) -> GroupWeight:
    def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[start:stop].contiguous()

    if bias and weight.bias is None:
        raise _unfit("a bias is missing")
    return GroupWeight(
        weight.scheme,
        cut(weight.dense),
        cut(weight.codes),
        cut(weight.scales),
        cut(weight.bias) if bias else None,
        cut(weight.zeros),
    )


def _has_bias(empty: nn.Module, entry: TensorEntry) -> bool:
    module: Any = empty.get_submodule(entry.module)
    return module.bias is not None


def _tied(plan: Plan, group: str) -> bool:
    return plan.model.tied_embeddings and any(g.name == group and g.role == "lm_head" for g in plan.groups)


def _check_kept(plan: Plan, kept: Mapping[str, torch.Tensor], empty: nn.Module) -> None:
    """The kept tensors are exactly the model's parameters and stored buffers outside of the plan's layers."""
    ours = {f"{entry.module}.{part}" for entry in plan.tensors for part in ("weight", "bias")}
    expected = {name: tuple(t.shape) for name, t in empty.state_dict().items() if name not in ours}
    for name, shape in expected.items():
        if name not in kept or tuple(kept[name].shape) != shape:
            raise _unfit(f"{name} of shape {shape} is missing")
    extra = sorted(set(kept) - set(expected))
    if extra:
        raise _unfit(f"{extra[0]} is no parameter of the model")


def _unfit(what: str) -> InputError:
    return InputError("export.weights", f"the saved weights do not fit the plan: {what}.", "Run `autotune apply RUN`.")
