"""What the search sees: per layer group a few options with latency, loss and bytes. Plain numbers, no model, no device.

A genotype is one option index per group. Latency adds up: `rest_us` plus the options' latencies; estimated loss adds up
too, and `evaluate` tells the real loss of a whole genotype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Genotype = tuple[int, ...]


@dataclass(frozen=True)
class Option:
    """One scheme for one group, run by its fastest kernel. Latency is the workload's total, in microseconds."""

    scheme: str
    kernel: str
    latency_us: float
    loss_nats: float  # estimated KL to the dense model if only this group changes
    weight_bytes: int
    estimated: bool = False  # latency from the roofline, not measured


@dataclass(frozen=True)
class GroupOptions:
    name: str
    role: str
    layer: int | None
    options: tuple[Option, ...]  # option 0 is the dense one


@dataclass(frozen=True)
class Problem:
    groups: tuple[GroupOptions, ...]
    rest_us: float  # latency of everything that is not a layer group
    fixed_bytes: int  # weights that no scheme touches
    settled: tuple[tuple[int, int], ...] = ()  # (group, option) that every genotype has but the dense one

    def latency_us(self, genotype: Genotype) -> float:
        return self.rest_us + sum(option.latency_us for option in self.chosen(genotype))

    def loss_nats(self, genotype: Genotype) -> float:
        return sum(option.loss_nats for option in self.chosen(genotype))

    def weight_bytes(self, genotype: Genotype) -> int:
        return self.fixed_bytes + sum(option.weight_bytes for option in self.chosen(genotype))

    def settle(self, genotype: Genotype) -> Genotype:
        """With what is settled; the dense genotype as it is."""
        if genotype == self.dense:
            return genotype
        options = list(genotype)
        for group, option in self.settled:
            options[group] = option
        return tuple(options)

    def chosen(self, genotype: Genotype) -> list[Option]:
        return [group.options[index] for group, index in zip(self.groups, genotype, strict=True)]

    @property
    def dense(self) -> Genotype:
        return (0,) * len(self.groups)

    def uniform(self, scheme: str) -> Genotype:
        """`scheme` wherever a group offers it, dense elsewhere."""
        genotype = []
        for group in self.groups:
            names = [option.scheme for option in group.options]
            genotype.append(names.index(scheme) if scheme in names else 0)
        return tuple(genotype)


@dataclass(frozen=True)
class Budget:
    """What must hold. Loss is the rise of mean negative log-likelihood in nats (perplexity +1% = ln 1.01)."""

    max_loss_nats: float
    max_bytes: int | None = None
    max_latency_us: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Measured loss of a genotype on the search documents, by document: sums over its scored tokens, in nats.

    Only of the first documents, where these already put it far beyond the limit (see `ledger`).

    `kl` and `dnll` come from one forward pass: KL(dense || candidate) and the rise of the negative log-likelihood.
    """

    tokens: tuple[float, ...]  # for encoders: squared norm of the dense output
    kl: tuple[float, ...]
    dnll: tuple[float, ...]

    @property
    def kl_nats(self) -> float:
        return sum(self.kl) / sum(self.tokens)

    @property
    def dnll_nats(self) -> float:
        return sum(self.dnll) / sum(self.tokens)

    def scaled(self, share: float) -> Evaluation:
        """What it would be with a share of the loss: expected then, not measured."""
        kl, dnll = (tuple(share * value for value in values) for values in (self.kl, self.dnll))
        return Evaluation(self.tokens, kl, dnll)


class Evaluate(Protocol):
    def __call__(self, genotype: Genotype, look: int) -> Evaluation:
        """Loss on the first documents of the search set; looks 0, 1, 2 ... see nested prefixes, the last one all."""
        ...


@dataclass(frozen=True)
class Candidate:
    genotype: Genotype
    latency_us: float  # predicted
    weight_bytes: int
    predicted_loss_nats: float
    evaluation: Evaluation
    source: str  # "study 12", "uniform w8a8-int8", "refine 3", ...


@dataclass(frozen=True)
class Trial:
    """One step of the study, for the record: what was proposed and what it decoded to."""

    number: int
    params: dict[str, float | str]
    genotype: Genotype
    latency_us: float
    kl_nats: float
    dnll_nats: float


@dataclass(frozen=True)
class Front:
    """`candidates`: all evaluated in full, by latency. `pareto`: indices of those not dominated in latency, KL."""

    candidates: tuple[Candidate, ...]
    pareto: tuple[int, ...]
    trials: tuple[Trial, ...]
    sampler_seconds: float  # time spent inside Optuna

    def best(self, fits: Sequence[bool]) -> Candidate | None:
        """The fastest candidate with `fits` true."""
        kept = [candidate for candidate, fit in zip(self.candidates, fits, strict=True) if fit]
        return min(kept, key=lambda candidate: candidate.latency_us, default=None)
