"""Certification: is the loss inside the budget, with 95% confidence, on documents never used to search?

The unit is the document (tokens of one document are not independent): ratio estimator sum(dNLL)/sum(tokens), one-sided
t bound with G-1 degrees of freedom. Candidates are tested from safest to fastest and testing stops at the first failure
("Learn then Test" fixed sequence, arXiv 2110.01052), so the whole statement holds at 95% without correction. Two looks
at the data share the 5%: a clear case is decided on the first 40% of the documents.

What runs is the real compressed model on the kernels that were timed, against the dense model on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from scipy.special import stdtrit
from torch.nn import functional as F

from autotune.errors import InputError
from autotune.place import logits_at_a_time
from autotune.search_space.groups import ModelSpec

State = Literal["certified", "not_certified", "violated", "not_applicable"]
LOOKS = ((0.4, 0.02), (1.0, 0.03))  # (share of the documents seen, error probability spent)


@dataclass(frozen=True)
class Bound:
    """Mean loss over tokens with one-sided 95% bounds, over documents."""

    mean: float
    lower: float
    upper: float
    standard_error: float
    documents: int
    tokens: int


@dataclass(frozen=True)
class Certificate:
    """`loss` is the rise of the mean negative log-likelihood in nats (encoders: relative squared error)."""

    state: State
    data: str
    limit: float
    loss: Bound
    kl: Bound
    dense_perplexity: float
    perplexity: float
    more_tokens: int | None  # about how many more would certify it; None: more would not help, or none are needed

    @property
    def statement(self) -> str:
        where = f"{self.data}, {self.loss.documents} documents, {self.loss.tokens:,} tokens, 95%"
        if self.state == "certified":
            return f"certified on {where}"
        if self.state == "violated":
            return f"violated on {where}"
        if self.state == "not_applicable":
            return "certification not applicable"
        more = f"about {self.more_tokens:,} more tokens would decide" if self.more_tokens else "more data may not help"
        return f"not certified on {where} ({more})"


def bound(loss: np.ndarray, weight: np.ndarray, alpha: float, tokens: int) -> Bound:
    """One-sided (1 - alpha) bounds of sum(loss)/sum(weight) by the ratio estimator over documents."""
    count = len(loss)
    mean = float(loss.sum() / weight.sum())
    residual = loss - mean * weight
    error = math.sqrt(float((residual**2).sum()) * count / max(1, count - 1)) / float(weight.sum())
    reach = float(stdtrit(max(1, count - 1), 1 - alpha)) * error
    return Bound(mean, mean - reach, mean + reach, error, count, tokens)


def expected_error(kl_nats: float, tokens: float, design_effect: float = 3.0) -> float:
    """Standard error of paired dNLL expected from `tokens` at a KL: 1.15 sqrt(2 KL / n), clustered by document."""
    return 1.15 * math.sqrt(2 * kl_nats * design_effect / tokens)


class Judged(Protocol):
    """A model that can be any configuration: `SwitchableModel` on real kernels, or `ReferenceModel`."""

    @property
    def spec(self) -> ModelSpec: ...

    def select(self, configuration: Mapping[str, str]) -> None: ...

    def prepare(self, configurations: Sequence[Mapping[str, str]], documents: Sequence[torch.Tensor]) -> None:
        """Say whose outputs will be asked for."""
        ...

    def outputs(self, document: torch.Tensor) -> torch.Tensor:
        """Logits (positions, vocabulary), or an encoder's last hidden state (positions, hidden)."""
        ...


def certify(
    model: Judged,
    finalists: Sequence[Mapping[str, str]],
    documents: Sequence[torch.Tensor],
    limit: float,
    data: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[Certificate]:
    """Test configurations in the order given (safest first); returns one certificate each, up to the first failure.

    Args:
        limit: loss allowed: ln(1 + max_loss) nats for language models, max_loss for encoders.

    Raises:
        InputError: `data.too_few`.
    """
    if len(documents) < 2:
        hint = "One document says nothing about others: raise certify_tokens, or give more documents."
        raise InputError("data.too_few", f"{data}: {len(documents)} documents to certify on.", hint)
    sums = [_Sums() for _ in finalists]
    passed: list[Certificate] = []
    last: list[Certificate] = []
    seen = 0
    for share, alpha in LOOKS:
        until = max(2, round(len(documents) * share))
        undecided = range(len(passed), len(finalists))
        model.prepare([{}, *(finalists[i] for i in undecided)], documents[seen:until])
        for index in range(seen, until):
            _measure(model, [finalists[i] for i in undecided], documents[index], [sums[i] for i in undecided])
            if progress:
                progress(index + 1, len(documents))
        seen = until
        last = [_certificate(sums[i], limit, alpha, data) for i in undecided]
        while last and last[0].state == "certified":
            passed.append(last.pop(0))
        if not last or last[0].state == "violated":  # nothing after the first failure counts
            break
    return passed + last[:1]


class _Sums:
    """Per-document sums of one finalist."""

    def __init__(self) -> None:
        self.weight: list[float] = []
        self.loss: list[float] = []
        self.kl: list[float] = []
        self.dense_nll: list[float] = []
        self.tokens = 0


def _certificate(row: _Sums, limit: float, alpha: float, data: str) -> Certificate:
    weight = np.asarray(row.weight)
    loss = bound(np.asarray(row.loss), weight, alpha, row.tokens)
    kl = bound(np.asarray(row.kl), weight, alpha, row.tokens)
    state: State = "certified" if loss.upper <= limit else "violated" if loss.lower > limit else "not_certified"
    nll = float(np.sum(row.dense_nll) / weight.sum())
    more = None
    if state == "not_certified" and loss.mean < limit:
        needed = loss.tokens * ((loss.upper - loss.mean) / (limit - loss.mean)) ** 2
        more = max(1000, math.ceil((needed - loss.tokens) / 1000) * 1000)
    return Certificate(state, data, limit, loss, kl, _exp(nll), _exp(nll + loss.mean), more)


def _exp(nats: float) -> float:
    """A perplexity; a broken model's is large, not an overflow."""
    return math.exp(min(nats, 700.0))


@torch.inference_mode()
def _measure(
    model: Judged, finalists: Sequence[Mapping[str, str]], document: torch.Tensor, rows: Sequence[_Sums]
) -> None:
    """One document through the dense model and every finalist."""
    model.select({})
    dense = model.outputs(document)
    for configuration, row in zip(finalists, rows, strict=True):
        model.select(configuration)
        weight, loss, kl, nll = _compare(dense, model.outputs(document), document, model.spec.task == "encoder")
        row.weight.append(weight)
        row.loss.append(loss)
        row.kl.append(kl)
        row.dense_nll.append(nll)
        row.tokens += len(document) - 1


def _compare(
    dense: torch.Tensor, other: torch.Tensor, ids: torch.Tensor, encoder: bool
) -> tuple[float, float, float, float]:
    """(weight, loss, KL, dense NLL) of one document."""
    if encoder:
        error = float((other.double() - dense.double()).square().sum())
        return float(dense.double().square().sum()), error, error, 0.0
    nll = loss = kl = 0.0
    scored = len(ids) - 1
    step = max(1, logits_at_a_time(dense.device) // dense.shape[1])
    for start in range(0, scored, step):
        rows = slice(start, min(start + step, scored))
        p, q = F.log_softmax(dense[rows].float(), -1), F.log_softmax(other[rows].float(), -1)
        label = ids[1:][rows].unsqueeze(1)
        nll -= float(p.gather(1, label).double().sum())
        loss += float((p.gather(1, label) - q.gather(1, label)).double().sum())
        kl += float(F.kl_div(q, p, reduction="sum", log_target=True))
    return float(scored), loss, kl, nll
