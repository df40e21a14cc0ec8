"""What training wins back of the loss: for each kind of scheme a few groups are trained together, all others dense.

A kind is a pattern and the bits of its weights. Its representatives are, of every role, the group in the middle and the
one that loses most, each under the fastest scheme of that kind that no other scheme of the group beats at both time and
loss: the rest would not be chosen for what training does to it. What is left of their KL to the dense model on the
search documents, which training never sees, is the `Factor` of that kind. Schemes of 8 bits and more lose too little to
be worth it; what was not measured has the factor 1.

Representatives are trained together because plans are: groups make up for each other's errors, and gain several times
what one of them gains alone in as many steps (docs/measured.md). Each kind is trained twice, for `SHORT` of the budget
and for a quarter of that: KL falls with a power of the tokens (0.24 on the demo model, from 131
thousand to a million), and the two give its exponent, by which the factor at the whole budget is extrapolated. The
upper end of its interval is not: it supposes that nothing more is gained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from autotune.certify import bound
from autotune.kernels.kv_formats import GROUP
from autotune.recover.distill import Distillation, Recipe
from autotune.recover.measured import Bench
from autotune.recover.quantizer import Master
from autotune.recover.student import Student
from autotune.recover.texts import Sequences
from autotune.result import Result
from autotune.search.problem import GroupOptions, Option, Problem
from autotune.search_space.schemes import scheme
from autotune.store import digest

VERSION = "gains/1"  # part of every key; change it whenever the numbers would change
FEW_BITS = 4  # of a weight: from there down a scheme's loss is worth training, or where it is sparse
SHORT = 1 / 8  # of the budget's steps: what representatives are trained for
EARLIER = 1 / 4  # of that: where the other point of the power law is
STEEPEST = 0.25  # exponent; a steeper start is not taken to go on
_LEAST = 1e-6  # share left that still has a logarithm


@dataclass(frozen=True)
class Probe:
    """Groups that are trained together under schemes of one kind."""

    kind: str
    chosen: tuple[tuple[str, str], ...]  # (group, scheme)


@dataclass(frozen=True)
class Gain:
    """KL to the dense model by search document, summed over its tokens, before `steps` of training and after."""

    probe: Probe
    steps: int
    tokens: float  # of all documents; encoders: squared norm
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class Factor:
    """The share of its one-shot loss that a kind of scheme is left with after `steps`, with the 95% interval paired
    over documents, and the power of the steps by which it falls from there."""

    kind: str
    chosen: tuple[tuple[str, str], ...]
    before_nats: float
    steps: int
    left: float
    low: float
    high: float
    power: float

    def at(self, steps: int) -> tuple[float, float, float]:
        """(share left, low, high) after so many steps, at least those measured."""
        more = (self.steps / max(steps, self.steps)) ** self.power
        return self.left * more, self.low * more, self.high


def kind_of(name: str) -> str:
    """ "2:4, 4 bits": pattern and bits of the weights; empty for a scheme that loses too little to be worth it."""
    item = scheme(name)
    if item.is_dense or (item.sparsity == "dense" and item.weight.bits > FEW_BITS):
        return ""
    return f"{item.sparsity}, {item.weight.bits} bits"


def kinds(names: Iterable[str]) -> tuple[str, ...]:
    """Of schemes, those worth training."""
    return tuple(dict.fromkeys(kind for name in names if (kind := kind_of(name))))


def probes(problem: Problem) -> tuple[Probe, ...]:
    """What is trained, the kind with most groups first."""
    groups = [group for group in problem.groups if group.name != GROUP]
    worth = {group.name: _worth(group) for group in groups}
    made = []
    for kind in kinds(option.scheme for options in worth.values() for option in options.values()):
        having = [group for group in groups if kind in worth[group.name]]
        taken: dict[str, str] = {}
        for role in dict.fromkeys(group.role for group in having):
            own = [group.name for group in having if group.role == role]
            loudest = max(own, key=lambda name: worth[name][kind].loss_nats)
            taken |= {name: worth[name][kind].scheme for name in (own[len(own) // 2], loudest)}
        made.append(Probe(kind, tuple(taken.items())))
    return tuple(sorted(made, key=lambda probe: -len(probe.chosen)))


def _worth(group: GroupOptions) -> dict[str, Option]:
    """Kind -> its fastest option, of those that no option of the group beats at both time and loss."""
    found: dict[str, Option] = {}
    least = math.inf
    for option in sorted(group.options, key=lambda item: (item.latency_us, item.loss_nats)):
        if option.loss_nats < least:
            least = option.loss_nats
            if kind := kind_of(option.scheme):
                found.setdefault(kind, option)
    return found


def factors(gains: Sequence[Gain]) -> tuple[Factor, ...]:
    """One a kind, from its two gains, the shorter training first."""
    made = []
    for probe in dict.fromkeys(gain.probe for gain in gains):
        early, late = (gain for gain in gains if gain.probe == probe)
        (left, low, high), sooner = _left(late), _left(early)[0]
        span = math.log(late.steps / early.steps) if late.steps > early.steps else math.inf
        fall = math.log(max(sooner, _LEAST) / max(left, _LEAST))
        power = min(max(fall / span, 0.0), STEEPEST)
        before = sum(late.before) / late.tokens
        made.append(Factor(probe.kind, probe.chosen, before, late.steps, left, low, high, power))
    return tuple(made)


def _left(gain: Gain) -> tuple[float, float, float]:
    """KL after over before, with its interval."""
    before, after = np.asarray(gain.before), np.asarray(gain.after)
    if not before.sum() > 0:
        return 1.0, 1.0, 1.0
    found = bound(after, before, 0.025, 0)
    return found.mean, max(0.0, found.lower), found.upper


class Probing:
    """Trains probes; what was measured before, by this run or a killed one, is not measured again."""

    def __init__(self, result: Result, sequences: Sequences, recipe: Recipe, device: torch.device) -> None:
        """`result`: with every scheme that has weights; `recipe`: but for its steps."""
        self.result, self.sequences, self.recipe, self.device = result, sequences, recipe, device

    def distillation(self, probe: Probe) -> Distillation:
        """Of the probe's groups, from the database's codes; `Student.release` gives the model back."""
        database, spec = self.result.database, self.result.session.spec
        assert database is not None
        masters = {n: Master(database.load(spec.group(n), item), self.device) for n, item in probe.chosen}
        return Distillation(Student(self.bench.dense, spec, masters), self.sequences, self.recipe)

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.result.session, self.device)

    def measure(self, steps: int, progress: Callable[[int, int, str], None]) -> tuple[Gain, ...]:
        """Every probe trained for a quarter of `steps` and for all of them, each time from the start."""
        wanted = [(probe, n) for probe in self.probes for n in (max(1, round(steps * EARLIER)), steps)]
        memo = self.result.session.folder.memo()
        gains = []
        try:
            for number, (probe, count) in enumerate(wanted):
                progress(number, len(wanted), probe.kind)
                key = self._key(probe, count)
                if (value := memo.get(key)) is None:
                    value = self._train(probe, count)
                    memo.put(key, value)
                gains.append(Gain(probe, count, value["tokens"], tuple(value["before"]), tuple(value["after"])))
            progress(len(wanted), len(wanted), "")
        finally:
            memo.close()
        return tuple(gains)

    @cached_property
    def probes(self) -> tuple[Probe, ...]:
        assert self.result.problem is not None
        return probes(self.result.problem)

    def _key(self, probe: Probe, steps: int) -> str:
        session, database = self.result.session, self.result.database
        assert database is not None
        files = [database.entries[item] for item in probe.chosen]
        settings: list[Any] = [VERSION, repr(replace(self.recipe, steps=steps)), str(self.device)]
        settings += [torch.get_num_threads(), self.sequences.digest, session.spec.model_hash, session.documents.digest]
        return digest([*settings, session.config.search_tokens, session.config.search_length, probe.chosen, files])

    def _train(self, probe: Probe, steps: int) -> dict[str, Any]:
        distillation = self.distillation(probe)
        distillation.recipe = replace(self.recipe, steps=steps)
        try:
            before = self.bench.loss(distillation.student)
            while distillation.done < steps:
                distillation.step()
            after = self.bench.loss(distillation.student)
        finally:
            distillation.student.release()
        return {"tokens": sum(before.tokens), "before": before.kl, "after": after.kl}
