"""Finds a model's blocks: the modules that its hidden states pass one after the other, and whether they can be visited
one at a time.

They are what the layer groups with a block number lie in. One forward pass on the meta device, which the model's own
code makes, tells whether each is called once, in order, on nothing but what the one before it returned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotune.errors import InputError
from autotune.model import OpenModel, empty_model, run_empty
from autotune.search_space.groups import LayerGroup

STATES = "hidden_states"  # what transformers calls the argument where it is given by name


@dataclass(frozen=True)
class Block:
    """`returned`: how many values it returns, the hidden states first; None: they alone, not in a tuple."""

    path: str
    returned: int | None


@dataclass(frozen=True)
class Blocks:
    """`before`: the groups outside of blocks that the model runs before the first of them."""

    items: tuple[Block, ...]
    before: tuple[LayerGroup, ...]


def find_blocks(opened: OpenModel) -> Blocks:
    """Raises InputError `model.streaming`, saying why the model cannot be visited block by block."""
    model = empty_model(opened)
    paths = _paths(opened, model)
    calls: list[_Call] = []
    seen: set[str] = set()  # layers that ran before the first block
    handles = [
        model.get_submodule(path).register_forward_hook(_recorder(path, calls), with_kwargs=True) for path in paths
    ]
    outside = [group for group in opened.spec.groups if group.layer is None]
    apart = [member.module for group in outside for member in group.members]
    handles += [model.get_submodule(path).register_forward_pre_hook(_before(path, calls, seen)) for path in apart]
    handles.append(model.register_forward_pre_hook(lambda *_: calls.clear()))  # of an attempt that failed
    try:
        run_empty(model)
    finally:
        for handle in handles:
            handle.remove()
    if [call.path for call in calls] != paths:
        raise _refusal(opened, "its blocks are not called once each, in order")
    items = tuple(_checked(opened, call, calls[:number]) for number, call in enumerate(calls))
    return Blocks(items, tuple(group for group in outside if {m.module for m in group.members} <= seen))


def block_of(path: str, items: Mapping[str, int]) -> int | None:
    """The number of the block that a parameter or module lies in; `items`: block paths with their numbers."""
    parts = path.split(".")
    found = (items.get(".".join(parts[:length])) for length in range(1, len(parts) + 1))
    return next((number for number in found if number is not None), None)


@dataclass(frozen=True)
class _Call:
    path: str
    states: Any
    others: tuple[Any, ...]
    output: Any


def _recorder(path: str, calls: list[_Call]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        others = [value for name, value in kwargs.items() if name != STATES]
        states = args[0] if args else kwargs.get(STATES)
        calls.append(_Call(path, states, (*args[1:], *others), output))

    return hook


def _before(path: str, calls: list[_Call], seen: set[str]) -> Any:
    def hook(*_: Any) -> None:
        if not calls:
            seen.add(path)

    return hook


def _paths(opened: OpenModel, model: nn.Module) -> list[str]:
    inside = [group.name for group in opened.spec.groups if group.layer is not None]
    lists = {re.split(r"\.\d+\.", name, maxsplit=1)[0] for name in inside}
    if len(lists) != 1:
        raise _refusal(opened, f"its layers are in {len(lists)} lists of blocks")
    path = lists.pop()
    blocks = model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList):
        raise _refusal(opened, f"{path} is not a list of blocks")
    return [f"{path}.{number}" for number in range(len(blocks))]


def _checked(opened: OpenModel, call: _Call, earlier: list[_Call]) -> Block:
    several = isinstance(call.output, tuple)
    output = call.output[0] if several and call.output else call.output
    if not isinstance(call.states, torch.Tensor) or not isinstance(output, torch.Tensor):
        raise _refusal(opened, f"{call.path} does not take and return hidden states")
    if earlier and call.states is not _first(earlier[-1].output):
        raise _refusal(opened, f"{call.path} does not read what the block before it returned")
    made = {id(value) for item in earlier for value in (item.output if isinstance(item.output, tuple) else ())}
    if made & {id(value) for value in call.others if isinstance(value, torch.Tensor)}:
        raise _refusal(opened, f"{call.path} reads more of earlier blocks than their hidden states")
    return Block(call.path, len(call.output) if several else None)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _refusal(opened: OpenModel, why: str) -> InputError:
    what = f"{opened.spec.architecture} cannot be visited block by block: {why}."
    return InputError("model.streaming", what, "Give streaming=false, and as much memory as its weights need.")
