"""compressed-tensors checkpoints: what transformers, vLLM and SGLang load with their default arguments.

Our codes and scales are carried exactly. Every layer is a target by its exact name (readers disagree about the order of
overlapping patterns) and every group of layers names its own format, so mixed plans need no further argument. Only 8-,
4- and 2-bit integers and fp8 are written: the layout of other widths changed between versions 0.17 and 0.20 of the
format's library, and what we write is read alike by all of them. There is no 2:4 layout any more: such weights keep
their exact zeros as ordinary values, and the report says that they bring no speed there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autotune.errors import InputError
from autotune.export.exporters import ExportReport
from autotune.export.output import finish, output_folder, save_weights, write_side_files
from autotune.export.saved import SavedGroup, SavedModel, open_saved
from autotune.grouping import FUSION
from autotune.kernels.packing import pack_codes
from autotune.kernels.spec import GroupWeight
from autotune.search_space.schemes import NumberFormat, Scheme
from autotune.store import read_json

NAME = "compressed-tensors"
LAYOUT_VERSION = "0.17.0"  # the oldest compressed-tensors library that reads these files
PACKABLE_BITS = (2, 4, 8)
_DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
_SIGN_BITS = {2: 0xAA, 4: 0x88, 8: 0x80}  # flipping them turns packed two's complement into offset binary


def write(folder: Path, out: Path, source: Path | None = None, force: bool = False) -> ExportReport:
    """See `exporters.ExporterModule`."""
    saved = open_saved(folder, source)
    check(saved)
    config, notes = _config(saved)
    tensors = dict(saved.kept)
    for group in saved.groups:
        for member in group.members:
            if member.weight is not None:
                parts = _tensors(member.weight, group.scheme, saved.dtype)
                tensors |= {f"{member.module}.{key}": value for key, value in parts.items()}
    schemes = {group.name: group.scheme.name for group in saved.groups}
    report = ExportReport(NAME, out, saved.plan.digest(), 0, schemes, notes)
    with output_folder(out, force, (saved.folder, saved.source)) as temporary:
        save_weights(tensors, temporary / "model.safetensors")
        write_side_files(saved, config, temporary)
        return finish(report, temporary)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """See `exporters.ExporterModule`; needs the package compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    stated = read_json(folder / "config.json", "export").get("quantization_config")
    groups = QuantizationConfig.model_validate(stated).config_groups if stated else {}
    weights = {name.removesuffix(".weight"): value for name, value in tensors.items() if name.endswith(".weight")}
    for item in groups.values():
        compressor = BaseCompressor.get_value_from_registry(item.format)
        for module in item.targets:
            names = [name for name in tensors if name.rpartition(".")[0] == module]
            state = {name.rpartition(".")[2]: tensors[name] for name in names}
            weights[module] = compressor.decompress(state, item)["weight"]
    return weights


def check(saved: SavedModel) -> None:
    """Refuse what the format cannot hold, before anything is written.

    Raises:
        InputError: `export.unsupported`, naming the group.
    """
    for group in saved.groups:
        if layout(group.scheme) is None and not is_plain(group.scheme):
            hint = (
                "What is written holds symmetric 2-, 4- and 8-bit integers and fp8; exclude the scheme with --schemes."
            )
            what = f"{group.name}: {NAME} cannot hold {group.scheme.name}."
            raise InputError("export.unsupported", what, hint)
    _check_fused(saved.groups)


def _check_fused(groups: tuple[SavedGroup, ...]) -> None:
    """Layers that engines fuse by name must agree: vLLM takes the first one's scheme for all without a word."""
    schemes = {member.module: group for group in groups for member in group.members}
    for module, group in schemes.items():
        parent, _, last = module.rpartition(".")
        for _, names in FUSION:
            others = [schemes.get(f"{parent}.{name}") for name in names] if last in names else []
            for other in others:
                if other is not None and other.scheme != group.scheme:
                    what = f"{group.name} is {group.scheme.name} but {other.name}, fused with it, {other.scheme.name}."
                    raise InputError("export.unsupported", what, "Let both have one scheme.")


def is_plain(item: Scheme) -> bool:
    """True for weights written as ordinary floating-point numbers: dense ones, and 2:4 of the model's own numbers."""
    return item.weight.kind == "float" and item.weight.bits >= 16 and item.activation is None


def layout(item: Scheme) -> str | None:
    """The layout of a quantized scheme, None where there is none."""
    weight, activation = item.weight, item.activation
    if weight.kind == "int" and weight.symmetric and activation is None and weight.bits in PACKABLE_BITS:
        return "pack-quantized"
    if weight.bits != 8 or weight.group_size or activation != NumberFormat(weight.kind, 8):
        return None
    return "int-quantized" if weight.kind == "int" else "float-quantized"


def _tensors(weight: GroupWeight, item: Scheme, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A layer's tensors by their names in the format. Scales are in the model's dtype, which holds them exactly."""
    tensors = {} if weight.bias is None else {"bias": weight.bias.to(dtype)}
    form = layout(item)
    if form is None:
        assert weight.dense is not None
        return tensors | {"weight": weight.dense.to(dtype)}
    assert weight.codes is not None and weight.scales is not None
    tensors["weight_scale"] = weight.scales.to(dtype)
    if form != "pack-quantized":
        return tensors | {"weight": weight.codes}
    shape = torch.tensor(weight.codes.shape, dtype=torch.int64)
    return tensors | {"weight_packed": pack_int32(weight.codes, item.weight.bits), "weight_shape": shape}


def pack_int32(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes (out, in) as offset binary, least significant first, int32 (out, ceil(in * bits / 32))."""
    packed = pack_codes(codes, bits).bitwise_xor_(_SIGN_BITS[bits])
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return words.contiguous().view(torch.int32)


def _config(saved: SavedModel) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The original config.json with what the export changes, and a note for each change people should know of."""
    config = read_json(saved.source / "config.json", "export")
    if "quantization_config" in config:
        raise InputError("export.unsupported", "the original model is quantized already.")
    notes = [_note_sparse(saved), _note_cache(saved)]
    dtype = _DTYPE_NAMES[saved.plan.model.dtype]
    if config.get("dtype", config.get("torch_dtype")) != dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        notes.append(f"config.json now says dtype {dtype}, in which the plan was made.")
    if config.get("architectures") != [saved.plan.model.architecture]:
        config["architectures"] = [saved.plan.model.architecture]
        notes.append(f"config.json now names {saved.plan.model.architecture}, which is what the plan covers.")
    if saved.plan.model.tied_embeddings and _is_untied(saved):
        config["tie_word_embeddings"] = False
        notes.append("lm_head no longer shares the embedding's numbers: both are stored.")
    if quantization := _quantization_config(saved.groups):
        config["quantization_config"] = quantization
    return config, tuple(note for note in notes if note)


def _is_untied(saved: SavedModel) -> bool:
    roles = {group.name: group.role for group in saved.plan.groups}
    return any(roles[g.name] == "lm_head" and g.members[0].weight is not None for g in saved.groups)


def _note_cache(saved: SavedModel) -> str:
    """Engines that read `kv_cache_scheme` take fp8 with one scale a tensor only, which is another arithmetic."""
    kept = saved.plan.kv_cache
    if kept is None:
        return ""
    return (
        f"The plan keeps keys and values in {kept} with a scale for each head of each token, for which the format has "
        "no field that engines read: it is not carried, and the certificate does not hold for theirs."
    )


def _note_sparse(saved: SavedModel) -> str:
    sparse = sum(group.scheme.sparsity != "dense" for group in saved.groups)
    if not sparse:
        return ""
    where = f"{sparse} of {len(saved.groups)} groups"
    return f"The zeros of {where}' patterns are stored as ordinary values: no speed-up from sparsity in these runtimes."


def _quantization_config(groups: tuple[SavedGroup, ...]) -> dict[str, Any] | None:
    """None where nothing is quantized."""
    settings: dict[str, dict[str, Any]] = {}  # keyed by their text: 2:4 and dense codes of one width are one group
    ignore = []
    for group in groups:
        modules = [member.module for member in group.members]
        form = layout(group.scheme)
        if form is None:
            ignore += modules
            continue
        entry = settings.setdefault(
            f"{form} {group.scheme.weight} {group.scheme.activation}", _settings(group.scheme, form)
        )
        entry["targets"] += modules
    if not settings:
        return None
    layouts = sorted({entry["format"] for entry in settings.values()})
    return {
        "quant_method": NAME,
        "version": LAYOUT_VERSION,
        "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "ignore": ignore,
        "config_groups": {f"group_{index}": settings[key] for index, key in enumerate(sorted(settings))},
    }


def _settings(item: Scheme, form: str) -> dict[str, Any]:
    weights: dict[str, Any] = _numbers(item.weight, "group" if item.weight.group_size else "channel", dynamic=False)
    if item.weight.group_size:
        weights["group_size"] = item.weight.group_size
    inputs = None if item.activation is None else _numbers(item.activation, "token", dynamic=True)
    return {
        "format": form,
        "targets": [],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def _numbers(number: NumberFormat, strategy: str, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": number.bits,
        "type": number.kind,
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
    }
