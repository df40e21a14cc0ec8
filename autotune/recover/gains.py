"""What training wins back of the loss: for each kind of scheme, groups as a plan would have them are trained together.

A kind is a pattern and the bits of its weights. Of its options only those count that no other scheme of the group beats
at both time and loss: the rest would not be chosen for what training does to it. How much of a loss is left depends on
which groups are trained and with which others, for they make up for each other's errors: of one group between 75 and
89%, of all together less than of most alone (docs/measured.md). So what is trained is what would be chosen: the fastest
configuration of that kind and dense alone whose losses sum to at most the budget. What is left of its KL to the dense
model on the search documents, which training never sees, is the `Factor` of that kind. The one whose losses sum to
three times the budget is trained too: what two sets of groups differ by, a third may too, to either side, and that,
with the error over documents, is the interval. Schemes of 8 bits and more lose too little to be worth it; what was not
measured has the factor 1.

Sets are trained for `SHORT` of the budget, the larger also for a quarter of that: KL falls with a power of the tokens
(0.24 on the demo model, from 131 thousand to a million), and the two give its exponent, by which the factor at the
whole budget is extrapolated. The interval there is wider: its upper end supposes that nothing more is gained, its lower
that KL goes on to fall as steeply as was ever seen.
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
from autotune.search.knapsack import solve
from autotune.search.problem import GroupOptions, Option, Problem
from autotune.search_space.schemes import scheme
from autotune.store import digest

VERSION = "gains/2"  # part of every key; change it whenever the numbers would change
FEW_BITS = 4  # of a weight: from there down a scheme's loss is worth training, or where it is sparse
SHORT = 1 / 8  # of the budget's steps: what representatives are trained for
EARLIER = 1 / 4  # of that: where the other point of the power law is
STEEPEST = 0.25  # exponent; a steeper start is not taken to go on
SIZES = (3.0, 1.0)  # times the budget, that the sets' losses sum to at most
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
class Share:
    """What a set of groups was left with of its one-shot loss, with the 95% interval paired over documents."""

    probe: Probe
    before_nats: float
    left: float
    low: float
    high: float


@dataclass(frozen=True)
class Factor:
    """The share of its one-shot loss that a kind of scheme is left with after `steps`, with an interval, and the power
    of the steps by which it falls from there."""

    kind: str
    sets: tuple[Share, ...]  # what was measured: the larger set, then that of the budget's size
    steps: int
    left: float
    low: float
    high: float
    power: float

    def at(self, steps: int) -> tuple[float, float, float]:
        """(share left, low, high) after so many steps, at least those measured."""
        part = self.steps / max(steps, self.steps)
        return self.left * part**self.power, self.low * part**STEEPEST, self.high

    def scaled(self, ratio: float, low: float, high: float) -> Factor:
        """Where whole plans were left with so many times what this promised, by candidates' least and most."""
        return replace(self, left=self.left * ratio, low=self.low * min(1.0, low), high=self.high * max(1.0, high))


def kind_of(name: str) -> str:
    """ "2:4, 4 bits": pattern and bits of the weights; empty for a scheme that loses too little to be worth it."""
    item = scheme(name)
    if item.is_dense or (item.sparsity == "dense" and item.weight.bits > FEW_BITS):
        return ""
    return f"{item.sparsity}, {item.weight.bits} bits"


def kinds(names: Iterable[str]) -> tuple[str, ...]:
    """Of schemes, those worth training."""
    return tuple(dict.fromkeys(kind for name in names if (kind := kind_of(name))))


def probes(problem: Problem, limit_nats: float) -> tuple[Probe, ...]:
    """What is trained: of each kind a set or two, the larger first; the kind with most groups comes first.

    Args:
        limit_nats: the loss that a plan may have.
    """
    groups = [group for group in problem.groups if group.name != GROUP]
    worth = {group.name: _worth(group) for group in groups}
    made = []
    for kind in kinds(option.scheme for options in worth.values() for option in options.values()):
        pairs = [(group.options[0], worth[group.name][kind]) for group in groups if kind in worth[group.name]]
        names = [group.name for group in groups if kind in worth[group.name]]
        sets = (_planned(names, pairs, size * limit_nats) for size in SIZES)
        made.append([Probe(kind, chosen) for chosen in dict.fromkeys(sets)])
    made.sort(key=lambda sets: -len(sets[0].chosen))
    return tuple(probe for sets in made for probe in sets)


def _planned(names: Sequence[str], pairs: Sequence[tuple[Option, Option]], limit: float) -> tuple[tuple[str, str], ...]:
    """(group, scheme) of the fastest configuration of (dense, compressed) options within a loss; at least one group."""
    latencies = [[option.latency_us for option in pair] for pair in pairs]
    losses = [[0.0, max(pair[1].loss_nats, 0.0)] for pair in pairs]
    taken = solve(latencies, losses, limit)
    if not any(taken):
        quietest = min(range(len(pairs)), key=lambda place: losses[place][1])
        taken = tuple(int(place == quietest) for place in range(len(pairs)))
    return tuple((name, pair[1].scheme) for name, pair, index in zip(names, pairs, taken, strict=True) if index)


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
    """One a kind, from the gains of its sets; the power is by the set that was also trained for fewer steps."""
    made = []
    for kind in dict.fromkeys(gain.probe.kind for gain in gains):
        own = [gain for gain in gains if gain.probe.kind == kind]
        steps = max(gain.steps for gain in own)
        sets = tuple(_share(gain) for gain in own if gain.steps == steps)
        left = sets[-1].left
        error = (sets[-1].high - left) / max(left, _LEAST)  # over documents
        apart = math.log(max(sets[0].left, _LEAST) / max(left, _LEAST))
        reach = math.exp(math.hypot(error, apart))
        made.append(Factor(kind, sets, steps, left, left / reach, left * reach, _power(own, steps)))
    return tuple(made)


def _power(gains: Sequence[Gain], steps: int) -> float:
    for early in (gain for gain in gains if gain.steps < steps):
        late = next(gain for gain in gains if gain.probe == early.probe and gain.steps == steps)
        fall = math.log(max(_share(early).left, _LEAST) / max(_share(late).left, _LEAST))
        return min(max(fall / math.log(steps / early.steps), 0.0), STEEPEST)
    return 0.0  # too few steps to be trained for a quarter of them


def _share(gain: Gain) -> Share:
    """KL after over before, with its interval."""
    before, after = np.asarray(gain.before), np.asarray(gain.after)
    nats = float(before.sum()) / gain.tokens
    if not before.sum() > 0:
        return Share(gain.probe, nats, 1.0, 1.0, 1.0)
    found = bound(after, before, 0.025, 0)
    return Share(gain.probe, nats, found.mean, max(0.0, found.lower), found.upper)


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
        """Every probe trained for `steps`, the first of each kind also for a quarter of them, each from the start."""
        first = {probe.kind: probe for probe in reversed(self.probes)}
        earlier = max(1, round(steps * EARLIER))
        counts = {probe: (earlier, steps) if first[probe.kind] is probe else (steps,) for probe in self.probes}
        wanted = [(probe, count) for probe in self.probes for count in dict.fromkeys(counts[probe])]
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
        return probes(self.result.problem, self.result.session.search_limit)

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
