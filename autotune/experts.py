"""Experts as linear layers: transformers keeps a layer's experts as two 3-D parameters, we keep one module an expert.

`gate_up_proj` (experts, 2 x inner, hidden) and `down_proj` (experts, hidden, inner) become `experts.N.gate_proj`,
`.up_proj` and `.down_proj`, as most checkpoints name them. Their weights are views: nothing is copied, and the model
computes what it did. From here on an expert is like any gated MLP, for calibration, losses and kernels alike; the
router stays as it is. Experts of another form (biases, transposed or interleaved weights, a gating function of their
own) are left alone, and kept dense.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from autotune import routing
from autotune.checkpoint import Checkpoint

_ROUTERS = ("gate", "router", "shared_expert_gate")  # what model classes call what decides beside experts


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)): x (tokens, hidden) -> (tokens, hidden)."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act: nn.Module) -> None:
        """gate_up (2 x inner, hidden), down (hidden, inner)."""
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)
        self.act_fn = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class SplitExperts(nn.ModuleList):
    """Stands in for transformers' experts module, with its arguments.

    `per_token`: experts a token is sent to, known once the module has run. `shown`: experts that for the time being
    also see the tokens that the router sends elsewhere; what they answer to these is dropped.
    """

    def __init__(self, experts: Iterable[Expert]) -> None:
        super().__init__(experts)
        self.per_token = 0
        self.shown: tuple[int, ...] = ()

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden (tokens, hidden), chosen and weights (tokens, experts a token) -> (tokens, hidden)."""
        tokens, self.per_token = chosen.shape
        for number in range(len(self)) if hidden.is_meta else self.shown:  # no routing without values
            self[number](hidden)
        if hidden.is_meta:
            return torch.empty_like(hidden)
        if routing.takes(self, tokens):
            return routing.routed(self, hidden, chosen, weights)
        if tokens == 1:
            parts = [self[number](hidden) for number in chosen[0].tolist()]
            return (torch.cat(parts) * weights.view(-1, 1)).sum(0, keepdim=True).to(hidden.dtype)
        pairs = chosen.reshape(-1)  # (tokens x experts a token)
        order = pairs.argsort(stable=True)  # by expert
        counts = pairs.bincount(minlength=len(self)).tolist()
        rows = hidden[order // self.per_token].split(counts)
        y = torch.cat([expert(x) for expert, x in zip(self, rows, strict=True) if len(x)])
        y = y[order.argsort()] * weights.reshape(-1, 1)
        return y.view(tokens, self.per_token, -1).sum(1).to(hidden.dtype)


def split_experts(model: nn.Module) -> None:
    """Exchange every experts module of the known form, in place; done twice it does nothing more."""
    for path, module in list(model.named_modules()):
        if _is_common(module):
            known = cast(Any, module)
            split = SplitExperts(
                Expert(gate_up, down, known.act_fn)
                for gate_up, down in zip(known.gate_up_proj.detach(), known.down_proj.detach(), strict=True)
            )
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, split.train(module.training))


def stored_names(model: nn.Module, weights: Checkpoint) -> dict[str, str]:
    """Parameter path after `split_experts` -> where the checkpoint has it, for a model that is not split yet.

    A checkpoint stores experts one by one, under names that transformers' rules merge on loading, or as the 3-D tensors
    themselves: then a path is followed by the part that is the expert's, `experts.gate_up_proj[3, :256]`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key

    paths = {path: module for path, module in model.named_modules() if _is_common(module)}
    rules = get_model_conversion_mapping(cast(Any, model)) if paths else []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()
    found: dict[str, str] = {}
    for name in weights.tensors if paths else ():
        merged, pattern = rename_source_key(name, renamings, converters, prefix, state)
        path, _, last = merged.rpartition(".")
        if path not in paths:
            continue
        if pattern is None:
            found |= _slices(path, last, name, paths[path])
        elif number := re.search(pattern.replace(".", r"\.").replace("*", r"(\d+)"), apply_renamings(name, renamings)):
            rule = next(rule for rule in converters if pattern in rule.source_patterns)
            own = _projection(last, pattern, rule)
            found |= {f"{path}.{number[1]}.{own}.weight": name} if own else {}
    return found


def merged_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter path of every split expert -> shape of the 3-D tensor that transformers keeps it in."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, SplitExperts):
            for name, weight in module.named_parameters():
                rows, inputs = weight.shape
                shapes[f"{path}.{name}"] = (len(module), rows if "down_proj" in name else 2 * rows, inputs)
    return shapes


@contextmanager
def shown_all_tokens(model: nn.Module, modules: Iterable[str]) -> Iterator[None]:
    """Meanwhile these experts, each given by the path of one of its layers, see all tokens of their layer."""
    numbers: dict[str, set[int]] = {}
    for module in modules:
        path, number, _ = module.rsplit(".", 2)
        numbers.setdefault(path, set()).add(int(number))
    layers = {path: cast(SplitExperts, model.get_submodule(path)) for path in numbers}
    try:
        for path, layer in layers.items():
            layer.shown = tuple(sorted(numbers[path]))
        yield
    finally:
        for layer in layers.values():
            layer.shown = ()


def routers(model: nn.Module) -> set[str]:
    """Paths of the modules that decide which experts a token takes, and how much of each counts."""
    beside = [path.rpartition(".")[0] for path, module in model.named_modules() if holds_experts(module)]
    modules = dict(model.named_modules())
    return {path for parent in beside for name in _ROUTERS if (path := f"{parent}.{name}") in modules}


def align_routers(model: nn.Module) -> None:
    """Give routers' weights memory of their own: the last bit of a product depends on where in memory a file's tensor
    happens to lie, and which expert a token takes may depend on that bit."""
    for path in routers(model):
        for parameter in model.get_submodule(path).parameters(recurse=False):
            parameter.data = parameter.data.clone()


def holds_experts(module: nn.Module) -> bool:
    """True for a layer's experts, split or not."""
    parameters = dict(module.named_parameters(recurse=False))
    return isinstance(module, SplitExperts) or any(
        name in ("gate_up_proj", "up_proj") and parameter.ndim == 3 for name, parameter in parameters.items()
    )


def _is_common(module: nn.Module) -> bool:
    from transformers.integrations.moe import _default_apply_gate

    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != {"gate_up_proj", "down_proj"} or not isinstance(getattr(module, "act_fn", None), nn.Module):
        return False
    up, down = parameters["gate_up_proj"], parameters["down_proj"]
    flags = [getattr(module, name, None) for name in ("has_gate", "is_concatenated", "is_transposed", "has_bias")]
    return (
        flags == [True, True, False, False]
        and not getattr(module, "has_post_expert_norm", True)
        and getattr(type(module), "_apply_gate", None) is _default_apply_gate
        and up.ndim == down.ndim == 3
        and up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
    )


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _projection(last: str, pattern: str, rule: Any) -> str:
    """Which of an expert's layers a rule makes of the tensors it finds by a pattern; empty where it does more than
    stacking them."""
    if {type(operation).__name__ for operation in rule.operations} - {"MergeModulelist", "Concatenate"}:
        return ""
    names = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    return names[rule.source_patterns.index(pattern)] if len(rule.source_patterns) == len(names) else ""


def _slices(path: str, last: str, name: str, module: nn.Module) -> dict[str, str]:
    """Where each expert's weights are in a checkpoint's 3-D tensor."""
    count, _, inner = cast(torch.Tensor, module.down_proj).shape
    if last == "down_proj":
        return {f"{path}.{number}.down_proj.weight": f"{name}[{number}]" for number in range(count)}
    gates = {f"{path}.{number}.gate_proj.weight": f"{name}[{number}, :{inner}]" for number in range(count)}
    return gates | {f"{path}.{number}.up_proj.weight": f"{name}[{number}, {inner}:]" for number in range(count)}
