"""Opens a model: finds its folder, checks it, and describes its layer groups without allocating a weight.

The structure comes from building the architecture on the meta device and tracing one forward pass; shapes and hashes
come from the checkpoint's headers. No code from a checkpoint is ever run: architectures are those of transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from autotune import checkpoint
from autotune.checkpoint import Checkpoint
from autotune.errors import InputError
from autotune.experts import holds_experts, merged_shapes, routers, split_experts, stored_names
from autotune.folding import Fold, fold
from autotune.grouping import group_linears, in_pooler, is_linear, linear_of
from autotune.search_space.groups import KeptTensor, LayerGroup, ModelSpec, Task
from autotune.store import digest

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_ROUTER = "router: it decides which experts a token takes, and has few weights"


@dataclass(frozen=True)
class OpenModel:
    """`checkpoint` is None for a bare config.json: then weights are random and only latency means anything."""

    folder: Path
    spec: ModelSpec
    checkpoint: Checkpoint | None
    vocabulary: int  # token ids are below this
    positions: int  # longest sequence the model takes
    names: Mapping[str, str] = field(default_factory=dict)  # parameter path -> what the checkpoint calls it
    folds: tuple[Fold, ...] = ()  # scales that `load_model` moves; the model computes the same without them

    @property
    def folded(self) -> str:
        """A hash of the folds; empty without any."""
        return digest([asdict(item) for item in self.folds]) if self.folds else ""

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.spec.dtype]


def open_model(
    source: str, dtype: str | None = None, latency_only: bool = False, shapes_only: bool = False
) -> OpenModel:
    """Describe a model from a folder, a config.json, or `org/name@revision`.

    Args:
        dtype: what to run it in, "bf16" or "fp32"; by default bf16 if the checkpoint is, else fp32.
        latency_only: weights are not needed.
        shapes_only: nor looked at where they are; their hash alone takes a while.

    Raises:
        InputError: `model.*`, naming file and tensor.
    """
    folder = _locate(source, latency_only or shapes_only)
    config = _config(folder)
    absent = shapes_only or (latency_only and not _has_weights(folder))
    weights = None if absent else checkpoint.read(folder)
    model = _empty(config, folder)
    task = _task(config)
    dtype = dtype or _default_dtype(config, weights)
    experts = stored_names(model, weights) if weights is not None else {}
    split_experts(model)
    names = _tensor_names(model, weights) | experts
    groups = group_linears(model, names, _trace(model))
    kept = _kept(model, groups, names, 2 if dtype == "bf16" else 4)
    if weights is not None:
        _check_shapes(model, names, weights)
    architecture = type(model).__name__
    tied = bool(getattr(config, "tie_word_embeddings", False)) and any(g.role == "lm_head" for g in groups)
    model_hash = weights.hash() if weights is not None else None
    name = folder.name if Path(source).exists() else source
    spec = ModelSpec(name, architecture, task, dtype, model_hash, groups, kept, tied)
    positions = int(getattr(config, "max_position_embeddings", 2**31))
    return OpenModel(folder, spec, weights, int(getattr(config, "vocab_size", 256)), positions, names)


def load_model(opened: OpenModel, dtype: torch.dtype | None = None) -> nn.Module:
    """The transformers model with its weights, in eval mode; random weights where there is no checkpoint. Experts are
    layers of their own (see `experts`).

    Raises:
        InputError: `model.nonfinite` naming the first tensor that holds NaN or infinity.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it reports tensors it did not need; what is missing, `open_model` has refused
    dtype = dtype or opened.dtype
    auto = _auto_class(opened.spec.task)
    if opened.checkpoint is None:
        torch.manual_seed(0)
        model = auto.from_config(_config(opened.folder), dtype=dtype)
    else:
        model = auto.from_pretrained(
            opened.folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    split_experts(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        check_finite(opened.folder, name, parameter)
    fold(model, opened.folds)
    return model.eval()  # type: ignore[no-any-return]


def check_finite(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Raises InputError `model.nonfinite`."""
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        what = f"{folder}: {name} holds {count} NaN or infinite values."
        raise InputError("model.nonfinite", what, "Retrain or repair it.")


def load_mixed(opened: OpenModel) -> nn.Module:
    """The model with the weights of its layer groups and embeddings in bf16 and all else in fp32, in eval mode.

    Layer groups multiply in bf16; what they read and write, norms and attention are fp32. It takes half the memory of
    fp32, and is nearer to it than a model run in bf16, whose residual stream is rounded too.

    Raises:
        InputError: `model.nonfinite`, as `load_model`.
    """
    model = load_model(opened, torch.bfloat16)
    mix(model, {member.module for group in opened.spec.groups for member in group.members})
    return model


def mix(model: nn.Module, linears: Collection[str]) -> None:
    """Make a bf16 model, in place, what `load_mixed` says; `linears`: paths of what multiplies in bf16."""
    for name, module in model.named_modules():
        if name in linears:
            module.register_forward_pre_hook(lambda _, args: (args[0].to(torch.bfloat16), *args[1:]))
            module.register_forward_hook(lambda _, __, output: output.float())
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _, __, output: output.float())
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, key, buffer.float())


def empty_model(opened: OpenModel) -> nn.Module:
    """The model on the meta device, experts as layers of their own."""
    model = _empty(_config(opened.folder), opened.folder)
    split_experts(model)
    return model


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer, or None where it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _locate(source: str, latency_only: bool) -> Path:
    path = Path(source)
    if path.is_file() and path.name == "config.json":
        return path.parent
    if path.is_dir():
        return path
    repo, _, revision = source.partition("@")
    if path.is_absolute() or source.startswith(".") or repo.count("/") != 1 or not revision:
        hint = "Give a folder, or a hub id with its revision: org/name@revision."
        raise InputError("model.missing", f"{source!r} is neither a folder nor a hub id with a revision.", hint)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "tokenizer*", "*.model", *([] if latency_only else ["*.safetensors"])]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated classes; all mean "not reachable"
        raise InputError("model.hub", f"{source} could not be fetched: {error}.", "Check name and network.") from error


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors*"))


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError("model.missing", f"{folder} holds no config.json.", "Give a transformers model folder.")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        text = (folder / "config.json").read_text(encoding="utf-8", errors="replace")
        if "auto_map" in text:
            hint = "autotune runs no code from a checkpoint; convert the model to an architecture transformers ships."
            raise InputError("model.remote_code", f"{folder} needs its own Python code.", hint) from error
        raise InputError("model.architecture", f"{folder}/config.json: {error}.") from error


def read_config(folder: Path) -> Any:
    """The transformers config of a model folder; for a model of several parts, that of its language model."""
    config = _config(folder)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _task(config: Any) -> Task:
    names = getattr(config, "architectures", None) or [""]
    if "CausalLM" in names[0] or names[0].endswith("LMHeadModel"):
        return "causal-lm"
    from transformers import AutoModelForCausalLM

    encoder = "Model" in names[0] or "MaskedLM" in names[0] or names[0].startswith("Bert")
    if not encoder and type(config) in AutoModelForCausalLM._model_mapping:
        return "causal-lm"
    return "encoder"


def _auto_class(task: Task) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModelForCausalLM if task == "causal-lm" else AutoModel


def _empty(config: Any, folder: Path) -> nn.Module:
    try:
        with torch.device("meta"):
            model = _auto_class(_task(config)).from_config(config)
    except Exception as error:  # sizes that do not fit each other raise whatever the architecture happens to raise
        hint = "It must be a causal language model or an encoder that transformers ships."
        raise InputError("model.architecture", f"{folder}: {error}.", hint) from error
    return model.eval()  # type: ignore[no-any-return]


def _default_dtype(config: Any, weights: Checkpoint | None) -> str:
    if weights is None:
        stated = getattr(config, "dtype", None)
        return "fp32" if stated in (torch.float32, "float32") else "bf16"
    large = max(weights.tensors.values(), key=lambda tensor: tensor.bytes)
    return "bf16" if large.dtype == "BF16" else "fp32"


def _tensor_names(model: nn.Module, weights: Checkpoint | None) -> dict[str, str]:
    """Parameter path -> checkpoint tensor path; a checkpoint may lack or add the base model's prefix.

    An encoder's pooler is left out where the checkpoint (of a masked language model, say) has none: nothing reads it.
    """
    names = {name: name for name, _ in model.named_parameters(remove_duplicate=False)}
    if weights is None:
        return names
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for name in names:
        spellings = (name, name.removeprefix(prefix), prefix + name)
        found[name] = next((spelling for spelling in spellings if spelling in weights.tensors), name)
    if missing := {name for name, stored in found.items() if stored not in weights.tensors}:
        found |= {name: stored for name, stored in _renamed(model, weights).items() if name in missing}
    resolved = _resolve_ties(model, found, weights)
    return {path: name for path, name in resolved.items() if name in weights.tensors or not in_pooler(path)}


def _renamed(model: nn.Module, weights: Checkpoint) -> dict[str, str]:
    """Parameter path -> checkpoint tensor path by transformers' rules for older names (LayerNorm.gamma, embed_out)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(cast(Any, model)) if isinstance(rule, WeightRenaming)]
    prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()
    return {rename_source_key(name, rules, [], prefix, state)[0]: name for name in weights.tensors}


def _resolve_ties(model: nn.Module, names: dict[str, str], weights: Checkpoint) -> dict[str, str]:
    """A tied parameter that the checkpoint leaves out is named by the tensor it shares."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names[name] in weights.tensors:
            owners.setdefault(id(parameter), names[name])
    head = getattr(model, "get_output_embeddings", None)
    output = head() if callable(head) else None
    tied = getattr(model.config, "tie_word_embeddings", False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names[name] in weights.tensors:
            continue
        is_head = output is not None and parameter is getattr(output, "weight", None)
        if id(parameter) in owners:
            names[name] = owners[id(parameter)]
        elif tied and is_head:
            embedding = cast(Any, model).get_input_embeddings()
            names[name] = owners.get(id(embedding.weight), names[name])
    return names


def _trace(model: nn.Module) -> dict[str, int]:
    """Module path -> a number that two linears share exactly when they read the same tensor."""
    seen: list[torch.Tensor] = []  # kept alive so that ids stay distinct
    inputs: dict[str, int] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0])
            inputs.setdefault(name, id(args[0]))

        return hook

    handles = [m.register_forward_pre_hook(record(n)) for n, m in model.named_modules() if is_linear(m)]
    try:
        run_empty(model)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def run_empty(model: nn.Module) -> None:
    """One forward pass of a model on the meta device, for its hooks.

    Raises:
        InputError: `model.architecture`.
    """
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    for module in model.modules():
        if holds_experts(module) and hasattr(module, "config"):  # the default takes no fp32 on the meta device
            cast(Any, module).config._experts_implementation = "batched_mm"
    try:
        with torch.no_grad():
            try:
                model(ids)
            except RuntimeError:  # some look at the values of ids that come without a mask, and others at the mask's
                model(ids, attention_mask=torch.ones_like(ids))
    except Exception as error:  # whatever the architecture raises
        what = f"the forward pass of {type(model).__name__} could not be traced: {error}."
        hint = "It must be a causal language model or an encoder that takes token ids."
        raise InputError("model.architecture", what, hint) from error


def _kept(
    model: nn.Module, groups: tuple[LayerGroup, ...], names: dict[str, str], width: int
) -> tuple[KeptTensor, ...]:
    taken = {f"{member.module}.weight" for group in groups for member in group.members if group.role != "lm_head"}
    taken |= {f"{m.module}.weight" for g in groups for m in g.members if g.role == "lm_head" and not _tied(model)}
    apart = routers(model)
    kept: dict[str, KeptTensor] = {}
    for path, parameter in model.named_parameters():
        if path in taken or path not in names or names[path] in kept:
            continue
        owner = model.get_submodule(path.rpartition(".")[0])
        shape = tuple(parameter.shape)
        reason = _ROUTER if path.rpartition(".")[0] in apart else _reason(path, owner, parameter)
        kept[names[path]] = KeptTensor(names[path], shape, parameter.numel() * width, reason)
    return tuple(kept.values())


def _tied(model: nn.Module) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _reason(path: str, owner: nn.Module, parameter: torch.Tensor) -> str:
    if in_pooler(path):
        return "pooler: not part of the embeddings that are judged"
    if isinstance(owner, nn.Embedding):
        return "embedding: rows are looked up, not multiplied"
    if parameter.ndim < 2:
        return "vector: norm gain or bias"
    if holds_experts(owner):
        return f"experts stored as {type(owner).__name__} has them are not split into layers"
    if linear_of(owner) is not None:
        return "not reached by the forward pass that is measured"
    return f"parameter of {type(owner).__name__}, which is not a linear layer"


def _check_shapes(model: nn.Module, names: dict[str, str], weights: Checkpoint) -> None:
    merged = merged_shapes(model)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if path not in names:
            continue
        stored, _, part = names[path].partition("[")
        expected = merged[path] if part else tuple(parameter.shape)
        info = weights.tensors.get(stored)
        if info is None and (parameter.ndim == 3 or path in merged):
            what = f"{weights.folder}: it is not known what tensors make up {path}, a layer's experts."
            raise InputError("model.architecture", what, "Mixtures of experts stored in this form are not supported.")
        if info is None:
            raise InputError("model.corrupt", f"{weights.folder}: tensor {names[path]!r} is missing.", "Save it again.")
        if info.shape != expected:
            raise InputError(
                "model.corrupt",
                f"{weights.folder / info.shard}: {stored!r} is {info.shape}, config.json says {expected}.",
                "Config and weights belong to different models.",
            )
