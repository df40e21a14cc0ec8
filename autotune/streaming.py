"""A model larger than memory: one block's weights at a time, read from the checkpoint and let go of again.

Documents are on their way through it together: all of them pass a block while its weights are there, and what they
leave behind is the hidden states at the entry of the next one, kept on the host. Everything around the blocks (masks,
rotary tables, embeddings, the last norm, the head) is the model's own code, run once with blocks that let hidden states
through, so that nothing here knows an architecture. Weights, order of arithmetic and results are those of the model
loaded whole (`model.load_model`, `model.load_mixed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from autotune.blocks import STATES, block_of, find_blocks
from autotune.checkpoint import Checkpoint
from autotune.experts import merged_shapes
from autotune.model import OpenModel, check_finite, mix
from autotune.search_space.groups import LayerGroup
from autotune.skeleton import skeleton

ENTRY = -1  # in place of a block's number: what runs before the first block,
EXIT = -2  # and all that is not in a block
_NARROW = (torch.bfloat16, torch.float16)
StandIn = Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor]


@dataclass
class Walker:
    """A document on its way. `state` (1, positions, hidden): at the entry of the block it comes to, on the host;
    `calls`: what else each block is called with (masks, rotary tables)."""

    ids: torch.Tensor  # (positions,)
    state: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class _Entered(Exception):
    """All blocks were called: what comes after them is not wanted."""


class Streamed:
    """A checkpoint as a model whose weights are there only within `loaded`."""

    def __init__(
        self, opened: OpenModel, dtype: torch.dtype, mixed: bool = False, device: torch.device | None = None
    ) -> None:
        """`dtype`: of the weights; `mixed`: bf16 weights with all else in fp32, as `model.load_mixed` has them.

        Raises:
            InputError: `model.streaming` when the model cannot be visited block by block.
        """
        assert opened.checkpoint is not None
        found = find_blocks(opened)
        self.opened, self.device = opened, device or torch.device("cpu")
        self.model = skeleton(opened.folder, opened.spec.task, dtype).eval()
        cast(Any, self.model).config.use_cache = False  # keys and values of all blocks would be kept
        if mixed:
            mix(self.model, {member.module for group in opened.spec.groups for member in group.members})
        self.blocks = [self.model.get_submodule(block.path) for block in found.items]
        self._returned = [block.returned for block in found.items]
        self._dtype = dtype
        self._before = found.before
        self._numbers = {block.path: number for number, block in enumerate(found.items)}
        self._owners = {path: _owner(self.model, path) for path, _ in self.model.named_parameters()}
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        self._head = {path for path, (module, _) in self._owners.items() if module is head}
        # What the model loaded whole merges lies in memory of its own there, and the last bits of a product depend on
        # where in memory a matrix lies: then it does here too.
        self._merged = {path for path in merged_shapes(self.model) if "[" not in opened.names[path]}
        self._place_buffers()

    @property
    def parts(self) -> list[int]:
        """The blocks' numbers in order, then EXIT."""
        return [*range(len(self.blocks)), EXIT]

    def groups(self, part: int) -> list[LayerGroup]:
        """Layer groups whose weights a part has: ENTRY has some of EXIT's."""
        if part == ENTRY:
            return list(self._before)
        wanted = None if part == EXIT else part
        return [g for g in self.opened.spec.groups if block_of(g.members[0].module, self._numbers) == wanted]

    @contextmanager
    def loaded(self, part: int) -> Iterator[None]:
        """Meanwhile the weights of a block, or of what is outside of them, are there.

        Raises:
            InputError: `model.nonfinite` naming the first tensor that holds NaN or infinity.
        """
        kept = {path: self._owners[path] for path in self._paths(part)}
        before = {path: module._parameters[name] for path, (module, name) in kept.items()}
        handles: list[Any] = []
        try:
            self._fill(kept, handles)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for path, (module, name) in kept.items():
                module._parameters[name] = before[path]

    def enter(self, ids: torch.Tensor) -> Walker:
        """A document at the entry of the first block; within `loaded(ENTRY)`."""
        walker = Walker(ids, torch.empty(0))

        def let_through(number: int, state: torch.Tensor, *call: Any) -> torch.Tensor:
            walker.calls.append((call[0], call[1]))
            if number == 0:
                walker.state = state
            if number + 1 == len(self.blocks):
                raise _Entered
            return state

        with self._standing_in(let_through):
            try:
                self.model(ids.unsqueeze(0))
            except _Entered:
                return walker
        raise AssertionError("the last block was not reached")

    def step(self, number: int, walker: Walker, state: torch.Tensor) -> torch.Tensor:
        """(1, positions, hidden) after a block, on its device; within `loaded(number)`."""
        args, kwargs = walker.calls[number]
        named = {STATES: state.to(self.device)}
        rest = (args, kwargs | named) if STATES in kwargs else ((named[STATES], *args), kwargs)
        output = self.blocks[number](*rest[0], **rest[1])
        return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)

    def leave(self, ids: torch.Tensor, state: torch.Tensor) -> Any:
        """What the model returns for a document whose states have passed all blocks; within `loaded(EXIT)`."""
        last = len(self.blocks) - 1
        with self._standing_in(lambda number, given, *_: state.to(self.device) if number == last else given):
            return self.model(ids.unsqueeze(0))

    @contextmanager
    def _standing_in(self, stand_in: StandIn) -> Iterator[None]:
        """Meanwhile a call of a block is a call of `stand_in`."""
        try:
            for number, block in enumerate(self.blocks):
                block.__dict__["forward"] = self._forward(number, stand_in)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)

    def _forward(self, number: int, stand_in: StandIn) -> Callable[..., Any]:
        returned = self._returned[number]

        def forward(*args: Any, **kwargs: Any) -> Any:
            state, rest = (args[0], args[1:]) if args else (kwargs[STATES], ())
            made = stand_in(number, state, rest, kwargs)
            return made if returned is None else (made, *[None] * (returned - 1))

        return forward

    def _paths(self, part: int) -> list[str]:
        wanted = part if part >= 0 else None
        paths = [path for path in self._owners if block_of(path, self._numbers) == wanted]
        return [path for path in paths if path not in self._head] if part == ENTRY else paths

    def _fill(self, wanted: dict[str, tuple[nn.Module, str]], handles: list[Any]) -> None:
        names, weights = self.opened.names, self.opened.checkpoint
        assert weights is not None
        stored = _read(weights, {names[path] for path in wanted if path in names})
        made: dict[tuple[str, torch.dtype], torch.Tensor] = {}  # tied parameters are one tensor
        for path, (module, name) in wanted.items():
            empty = module._parameters[name]
            assert empty is not None
            if path not in names:  # an encoder's pooler that the checkpoint lacks: nothing reads what it makes
                module._parameters[name] = _frozen(torch.zeros(empty.shape, dtype=empty.dtype, device=self.device))
                continue
            tensor, dtype = stored[names[path]], empty.dtype
            if type(module) is nn.Embedding and self._dtype == torch.float32 and tensor.dtype in _NARROW:
                # Rows are looked up as they are stored, and only what is looked up is made wider: the same numbers.
                handles.append(module.register_forward_hook(lambda _, __, output: output.float()))
                dtype = tensor.dtype
            key = (names[path], dtype)
            if key not in made:
                rounded = tensor if dtype == tensor.dtype else tensor.to(self._dtype)
                made[key] = rounded.to(self.device, dtype, copy=path in self._merged)
                check_finite(self.opened.folder, path, made[key])
            module._parameters[name] = _frozen(made[key])

    def _place_buffers(self) -> None:
        """Buffers that the checkpoint has (a router's bias) get its values; all go to the device."""
        weights = self.opened.checkpoint
        assert weights is not None
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        for path, buffer in list(self.model.named_buffers()):
            names = [name for name in (path, path.removeprefix(prefix), prefix + path) if name in weights.tensors]
            value = _read(weights, names[:1])[names[0]].to(buffer.dtype) if names else buffer
            module, name = _owner(self.model, path)
            module._buffers[name] = value.to(self.device)


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _read(weights: Checkpoint, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Name -> tensor as stored. A part of one is named as `experts.stored_names` does: `experts.down_proj[3]`."""
    shards: dict[str, list[str]] = {}
    for name in names:
        shards.setdefault(weights.tensors[name.partition("[")[0]].shard, []).append(name)
    found = {}
    for shard, own in shards.items():
        with safe_open(weights.folder / shard, framework="pt") as file:
            for name in own:
                whole, _, part = name.partition("[")
                found[name] = file.get_tensor(whole)[_index(part) if part else ...]
    return found


def _index(part: str) -> tuple[int | slice, ...]:
    """ "3, :256]" -> (3, slice(None, 256))."""
    items: list[int | slice] = []
    for text in part.rstrip("]").split(","):
        first, colon, last = text.strip().partition(":")
        items.append(slice(int(first) if first else None, int(last) if last else None) if colon else int(first))
    return tuple(items)
