"""Runs a model one block at a time: from the states at a block's entry to those at its exit.

The model's own forward pass does it, so that masks, positions and whatever else a block is given are right for every
architecture: blocks before are passed through, the block in question is given the state, and what follows never runs.
That costs an embedding and a mask a call. Whether an architecture's blocks do follow one another, and nothing else goes
between them, `faithful` finds out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autotune.search_space.groups import LayerGroup

Watch = Callable[[torch.Tensor], None]


class _Left(Exception):
    """Ends a forward pass where nothing more of it is needed."""

    def __init__(self, value: torch.Tensor | None = None) -> None:
        super().__init__()
        self.value = value


class Walk:
    """`blocks`: in the order they run; `inside[n]`: the groups of block n; `outside`: those that follow the last one.
    Groups come in the order the model calls them once `faithful` has run."""

    def __init__(self, model: nn.Module, groups: Sequence[LayerGroup]) -> None:
        self.model = model
        self.blocks: list[nn.Module] = []
        self.inside: list[list[LayerGroup]] = []
        self.outside = [group for group in groups if group.layer is None]
        self._tuples: list[bool] = []  # blocks that answer with a tuple
        parents = {_parent(group) for group in groups if group.layer is not None}
        if len(parents) == 1:
            self.blocks = list(model.get_submodule(parents.pop()).children())
            self.inside = [[group for group in groups if group.layer == n] for n in range(len(self.blocks))]
            self._tuples = [False] * len(self.blocks)

    @torch.inference_mode()
    def faithful(self, document: torch.Tensor) -> bool:
        """True if going block by block gives what the model gives, bit by bit. Learns the order of the groups."""
        if not self.blocks:
            return False
        order: list[str] = []
        every = [group for groups in (*self.inside, self.outside) for group in groups]
        with self._watching({g.name: (g, lambda _, name=g.name: order.append(name)) for g in every}):  # type: ignore[misc]
            expected = self.model(document.unsqueeze(0))[0]
        if any(group.name not in order for group in every if group.experts == 1):
            return False
        for groups in (*self.inside, self.outside):  # an expert may have got no token; experts come last in a block
            groups.sort(key=lambda group: order.index(group.name) if group.name in order else len(order))
        state = self.enter(document)
        for number in range(len(self.blocks)):
            state = self.through(number, document, state)
        return torch.equal(self.leave(document, state), expected)

    @torch.inference_mode()
    def enter(self, document: torch.Tensor) -> torch.Tensor:
        """(1, positions, hidden): the state at the first block's entry."""

        def stop(state: torch.Tensor, _: Callable[[torch.Tensor], Any]) -> Any:
            raise _Left(state)

        return self._run(document, {0: stop})

    @torch.inference_mode()
    def through(self, number: int, document: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The state at a block's exit, from that at its entry."""

        def only(_: torch.Tensor, block: Callable[[torch.Tensor], Any]) -> Any:
            output = block(state)
            self._tuples[number] = isinstance(output, tuple)
            raise _Left(output[0] if isinstance(output, tuple) else output)

        return self._run(document, {number: only})

    @torch.inference_mode()
    def leave(self, document: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The model's first output from the state at the last block's exit."""
        last = len(self.blocks) - 1
        return self._run(document, {last: lambda _, __: (state,) if self._tuples[last] else state})

    def inputs(
        self, number: int, document: torch.Tensor, state: torch.Tensor, watch: Mapping[str, Watch], full: bool = False
    ) -> torch.Tensor | None:
        """Show the inputs (tokens, in_features) of some groups of a block; `len(self.blocks)` stands for what follows.

        Args:
            watch: group -> what is called with its input.
            full: go on to the block's exit and return the state there, rather than end at the last group watched.
        """
        groups = {g.name: g for g in (self.inside[number] if number < len(self.blocks) else self.outside)}
        waiting = set(watch)

        def seen(name: str) -> Watch:
            def call(x: torch.Tensor) -> None:
                watch[name](x)
                waiting.discard(name)
                if not waiting and not full:
                    raise _Left

            return call

        with self._watching({name: (groups[name], seen(name)) for name in watch}):
            try:
                if number < len(self.blocks):
                    return self.through(number, document, state)
                return self.leave(document, state)
            except _Left:
                return None

    @contextmanager
    def _watching(self, watch: Mapping[str, tuple[LayerGroup, Watch]]) -> Iterator[None]:
        handles = []
        for group, call in watch.values():
            module = self.model.get_submodule(group.members[0].module)

            def hook(_: nn.Module, args: tuple[torch.Tensor, ...], call: Watch = call) -> None:
                call(args[0].flatten(0, -2))

            handles.append(module.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, document: torch.Tensor, instead: Mapping[int, Callable[[torch.Tensor, Any], Any]]) -> torch.Tensor:
        """The model's pass with the last block named doing something else, and those before it nothing."""
        last = max(instead)
        exchanged = self.blocks[: last + 1]
        try:
            for number, block in enumerate(exchanged):
                own = instead.get(number, lambda state, _, n=number: (state,) if self._tuples[n] else state)
                block.forward = _replaced(block.forward, own)
            return self.model(document.unsqueeze(0))[0]  # type: ignore[no-any-return]
        except _Left as left:
            if left.value is None:
                raise
            return left.value
        finally:
            for block in exchanged:
                block.__dict__.pop("forward", None)


def _replaced(forward: Callable[..., Any], own: Callable[[torch.Tensor, Any], Any]) -> Callable[..., Any]:
    """A block's forward that calls `own(state, block)`; `block` runs the real one on a state, all else as given."""

    def call(*args: Any, **options: Any) -> Any:
        if args:
            return own(args[0], lambda state: forward(state, *args[1:], **options))
        rest = {key: value for key, value in options.items() if key != "hidden_states"}
        return own(options["hidden_states"], lambda state: forward(hidden_states=state, **rest))

    return call


def _parent(group: LayerGroup) -> str:
    """The path of the list of blocks that a group is in."""
    found = re.search(r"\.\d+\.", group.members[0].module)
    assert found is not None  # it has a layer number
    return group.members[0].module[: found.start()]
