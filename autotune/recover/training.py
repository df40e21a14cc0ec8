"""A recovery from its first step to its best state: a budget in tokens or minutes, marks, checkpoints, an early end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from autotune.recover import checkpoints
from autotune.recover.checkpoints import Checkpoint, Mark
from autotune.recover.distill import Distillation
from autotune.store import digest

MARKS = 10  # of a run, besides the start
_PROBE_STEPS = 3  # timed to turn minutes into steps, after one that is not
_SAVE_EVERY_S = 60.0
_OVERHEAD = 0.08  # of the minutes asked for: marks and checkpoints


@dataclass(frozen=True)
class Trained:
    """`marks`: the curve, its first before training; `best`: which of them is kept. `stopped`: before its end."""

    marks: tuple[Mark, ...]
    best: Mark
    stopped: bool

    @property
    def seconds(self) -> float:
        return self.marks[-1].seconds


def steps_for_minutes(distillation: Distillation, minutes: float) -> int:
    """How many steps fit, by the clock: the state is put back afterwards, so that nothing else depends on it."""
    before = {name: tensor.clone() for name, tensor in distillation.tensors().items()}
    recipe = distillation.recipe
    distillation.recipe = replace(recipe, steps=10**6, block_share=0.0)
    distillation.step()
    start = time.monotonic()
    for _ in range(_PROBE_STEPS):
        distillation.step()
    seconds = (time.monotonic() - start) / _PROBE_STEPS
    distillation.recipe = recipe
    distillation.restore(before, 0)
    return max(1, int(60 * minutes * (1 - _OVERHEAD) / seconds))


def train(
    distillation: Distillation,
    folder: Path,
    inputs: object,
    progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool] = lambda: False,
    mark_every: int | None = None,
    keep_best: bool = True,
) -> Trained:
    """Run the recipe's steps, or go on where a killed run was.

    Args:
        folder: where checkpoints go.
        inputs: what a checkpoint must have been made from, besides the recipe.
        mark_every: steps between points of the curve.
        keep_best: leave the distillation in its best state, which may be the first; else in its last.
    """
    recipe = distillation.recipe
    key = digest([inputs, repr(recipe), distillation.sequences.digest, torch.get_num_threads()])
    run = _Run(distillation, folder, key)
    every = mark_every or max(1, recipe.steps // MARKS)
    while distillation.done < recipe.steps and not should_stop():
        run.step()
        if distillation.done % every == 0 or distillation.done == recipe.steps:
            run.mark()
        run.save_now_and_then()
        progress(distillation.done, recipe.steps, run.note)
    stopped = distillation.done < recipe.steps
    if stopped and run.marks[-1].steps < distillation.done:
        run.mark()
    run.save()
    if keep_best:
        distillation.restore_masters(run.best)
    return Trained(tuple(run.marks), min(run.marks, key=lambda mark: mark.check_nats), stopped)


class _Run:
    """What grows while training goes on."""

    def __init__(self, distillation: Distillation, folder: Path, key: str) -> None:
        self.distillation = distillation
        self.folder = folder
        self.key = key
        self.seconds = 0.0
        self.marks: list[Mark] = []
        self._losses: list[float] = []
        self._saved = time.monotonic()
        found = checkpoints.load(folder, key)
        if found is None:
            self.best = self._masters()
            self.mark()
        else:
            self.best, self.seconds, self.marks = found.best, found.seconds, list(found.marks)
            distillation.restore(found.state, found.steps)

    @property
    def note(self) -> str:
        first, last = self.marks[0].check_nats, self.marks[-1].check_nats
        rate = self.distillation.tokens / self.seconds if self.seconds else 0.0
        return f"loss {last:.4f} of {first:.4f} nats, {rate:,.0f} tokens/s"

    def step(self) -> None:
        start = time.monotonic()
        by_block = self.distillation.recipe.by_block(self.distillation.done)
        loss = self.distillation.step()
        if not by_block:  # there it is a relative error
            self._losses.append(loss)
        self.seconds += time.monotonic() - start

    def mark(self) -> None:
        """A point of the curve; the state is kept if none was better."""
        done, tokens = self.distillation.done, self.distillation.tokens
        mean = sum(self._losses) / len(self._losses) if self._losses else None
        mark = Mark(done, tokens, round(self.seconds, 3), self.distillation.check(), mean)
        if all(mark.check_nats < other.check_nats for other in self.marks):
            self.best = self._masters()
        self.marks.append(mark)
        self._losses.clear()

    def save_now_and_then(self) -> None:
        if time.monotonic() - self._saved > _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        done = self.distillation.done
        state = self.distillation.tensors()
        checkpoints.save(self.folder, self.key, Checkpoint(done, self.seconds, tuple(self.marks), state, self.best))
        self._saved = time.monotonic()

    def _masters(self) -> dict[str, torch.Tensor]:
        """A copy on the host: a device has better use for its memory."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.distillation.masters().items()}
