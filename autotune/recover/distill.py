"""The training itself: block by block on hidden states first, then end to end on the dense model's distribution.

Adam on the masters of all compressed groups, a step relative to the root mean square of a group's weights, so that one
rate fits groups of any scale; warm-up, then a cosine to zero. Everything else of the model stays as it is: plan and
exports carry nothing but codes.

Block by block every block learns from its own error alone: it reads what the compressed blocks before it make, and is
pulled towards what the dense model's block puts out. Its gradient is taken as soon as it has run, so one block's
activations are held at a time. End to end the model is pulled towards the dense one's distribution, and its blocks,
together, still towards their hidden states: they say more about a position than its next token does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotune.recover.losses import distance, divergence
from autotune.recover.student import Student
from autotune.recover.texts import Sequences

BATCH_TOKENS = 512  # of an optimizer step
PART_ELEMENTS = 2**22  # of the logits of a part of it, whose activations are held at a time
RATE = 0.007  # of a step, relative to the root mean square of a group's weights
BLOCK_SHARE = 0.1  # of the steps
WARM_UP = 0.05
TEMPERATURES = (1.0, 2.0)
_BETAS = (0.9, 0.95)
_FOLLOWED = 10  # times in a run scales follow, the last well before its end: weights settle on what they will have


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides weights and sequences."""

    steps: int
    seed: int = 0
    batch_tokens: int = BATCH_TOKENS
    rate: float = RATE
    block_share: float = BLOCK_SHARE

    def rate_at(self, step: int) -> float:
        """Relative to a group's weights: linear warm-up, then a cosine to zero."""
        warm_up = max(1, round(WARM_UP * self.steps))
        if step < warm_up:
            return self.rate * (step + 1) / warm_up
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, self.steps - warm_up)))

    def by_block(self, step: int) -> bool:
        return step < round(self.block_share * self.steps)

    def scales_follow(self, step: int) -> bool:
        """Whether scales follow the weights after this step."""
        every = max(1, self.steps // (_FOLLOWED + 1))
        return (step + 1) % every == 0 and step + 1 <= every * _FOLLOWED


class Distillation:
    """A student on its way: `step` moves it on, `tensors` and `restore` are what a checkpoint holds."""

    def __init__(self, student: Student, sequences: Sequences, recipe: Recipe) -> None:
        self.student = student
        self.sequences = sequences
        self.recipe = recipe
        self.done = 0  # steps
        self.count = max(1, recipe.batch_tokens // sequences.train.shape[1])  # sequences of a step
        self._typical = {name: group.master.typical() for name, group in student.groups.items()}
        self._adam = _adam(student)
        self._blocks = _blocks(student)

    @property
    def tokens(self) -> int:
        """Seen so far."""
        return self.done * self.count * self.sequences.train.shape[1]

    def step(self) -> float:
        """One optimizer step; returns the batch's loss before it: nats a token, or by block a relative error."""
        ids = self.sequences.batch(self.done * self.count, self.count, self.recipe.seed).to(self.student.device)
        by_block = self.recipe.by_block(self.done)
        total = torch.zeros((), dtype=torch.float64, device=ids.device)  # read at the end: a device goes on until then
        for part in ids.split(self._part(ids)):
            total += (self._part_by_block if by_block else self._part_end_to_end)(part, len(part) / len(ids))
            self.student.collect()
        self._move(self.recipe.rate_at(self.done))
        if self.recipe.scales_follow(self.done):
            for group in self.student.groups.values():
                group.master.follow()
        self.student.refresh()
        self.done += 1
        return float(total)

    @torch.no_grad()
    def check(self) -> float:
        """The loss on the sequences set aside, end to end: nats a token (encoders: relative squared error)."""
        total = 0.0
        ids = self.sequences.check.to(self.student.device)
        for part in ids.split(self._part(ids)):
            with self.student.teaching():
                wanted = self.student.outputs(part)
            total += float(self._loss(self.student.outputs(part), wanted)) * len(part) / len(ids)
            self.student.collect()
        return total

    def masters(self) -> dict[str, torch.Tensor]:
        """Weights and scales of every group."""
        groups = self.student.groups.items()
        return {f"{name}::{key}": value for name, group in groups for key, value in group.master.tensors().items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole state but for `done`."""
        moments: dict[str, torch.Tensor] = {}
        for name, group in self.student.groups.items():
            state = self._adam.state[group.master.weight]
            moments |= {f"{name}::mean": state["exp_avg"], f"{name}::square": state["exp_avg_sq"]}
        return self.masters() | moments

    def restore_masters(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, group in self.student.groups.items():
            prefix = f"{name}::"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            group.master.restore(own)
        self.student.refresh()

    def restore(self, tensors: Mapping[str, torch.Tensor], done: int) -> None:
        for name, group in self.student.groups.items():
            state = self._adam.state[group.master.weight]
            state["exp_avg"].copy_(tensors[f"{name}::mean"])
            state["exp_avg_sq"].copy_(tensors[f"{name}::square"])
            state["step"].fill_(done)
        self.restore_masters(tensors)
        self.done = done

    def _part(self, ids: torch.Tensor) -> int:
        """Sequences whose activations are held at a time."""
        width = int(getattr(self.student.model.config, "vocab_size", 1))
        return max(1, PART_ELEMENTS // (width * ids.shape[1]))

    def _loss(
        self, outputs: torch.Tensor, wanted: torch.Tensor, temperatures: tuple[float, ...] = (1.0,)
    ) -> torch.Tensor:
        if self.student.spec.task == "encoder":
            return distance(outputs, wanted)
        return divergence(outputs, wanted, temperatures)

    def _part_end_to_end(self, ids: torch.Tensor, share: float) -> torch.Tensor:
        """Its loss is that of the outputs; hidden states pull too, each by its relative error."""
        states: list[torch.Tensor] = []
        apart: list[torch.Tensor] = []
        with self.student.teaching(), _hooked(self._blocks, lambda _, output: states.append(output)):
            wanted = self.student.outputs(ids)
        with _hooked(self._blocks, lambda index, output: apart.append(distance(output, states[index]))):
            loss = self._loss(self.student.outputs(ids), wanted, TEMPERATURES) * share
        pull = torch.stack(apart).sum() * share if apart else loss.new_zeros(())
        (loss + pull).backward()
        return loss.detach()

    def _part_by_block(self, ids: torch.Tensor, share: float) -> torch.Tensor:
        """Every block pulled towards the dense one's output, and what comes after the last towards the logits."""
        states: list[torch.Tensor] = []
        with self.student.teaching(), _hooked(self._blocks, lambda _, output: states.append(output)):
            wanted = self.student.outputs(ids)
        losses: list[torch.Tensor] = []

        def learn(index: int, output: torch.Tensor) -> torch.Tensor:
            loss = distance(output, states[index]) * share
            if loss.requires_grad:
                loss.backward()
            losses.append(loss.detach())
            return output.detach()

        with _hooked(self._blocks, learn):
            loss = self._loss(self.student.outputs(ids), wanted) * share
        if loss.requires_grad:
            loss.backward()
        return torch.stack(losses).mean() if losses else loss.detach()

    @torch.no_grad()
    def _move(self, rate: float) -> None:
        """One step of every master that learns, which takes up its gradient."""
        for (name, group), own in zip(self.student.groups.items(), self._adam.param_groups, strict=True):
            if group.master.keep is not None:
                group.gradient.mul_(group.master.keep)
            own["lr"] = rate * self._typical[name]
            group.master.weight.grad = group.gradient
        self._adam.step()
        for group in self.student.groups.values():
            group.gradient.zero_()


def _adam(student: Student) -> torch.optim.Adam:
    """Adam (arXiv 1412.6980), a parameter group for each layer group; its state is there from the start."""
    weights = [group.master.weight for group in student.groups.values()]
    adam = torch.optim.Adam([{"params": [weight]} for weight in weights], 0.0, _BETAS, 1e-12, fused=True)
    for weight in weights:
        state = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        adam.state[weight] = {"step": torch.zeros((), device=weight.device), **state}
    return adam


def _blocks(student: Student) -> list[nn.Module]:
    """The model's blocks in order: the modules that hold all layer groups of one index."""
    paths: dict[int, str] = {}
    for group in student.spec.groups:
        if group.layer is not None:
            parts = group.members[0].module.split(".")
            paths.setdefault(group.layer, ".".join(parts[: parts.index(str(group.layer)) + 1]))
    return [student.model.get_submodule(paths[layer]) for layer in sorted(paths)]


@contextmanager
def _hooked(blocks: list[nn.Module], take: Any) -> Iterator[None]:
    """Meanwhile `take(index, hidden states)` sees what each block puts out, and may put something else in its place."""

    def hook(index: int) -> Any:
        def after(_: nn.Module, __: Any, output: Any) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            other = take(index, state)
            if other is None:
                return None
            return (other, *output[1:]) if isinstance(output, tuple) else other

        return after

    handles = [block.register_forward_hook(hook(index)) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
