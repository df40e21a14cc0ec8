"""Measured loss of a configuration against the dense model, document by document.

Causal language models: KL(dense || candidate) and the rise of the negative log-likelihood of the text itself, both from
one forward pass, summed over the scored tokens, in nats. Encoders: squared error of the output embeddings against their
squared norm, in both columns; its "tokens" are that norm, so sums divide to the relative squared error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from autotune.place import logits_at_a_time
from autotune.reference_model import ReferenceModel
from autotune.search.problem import Evaluation

_CACHE_BYTES = 3 * 2**29  # dense outputs that are kept: 2,048 tokens of a vocabulary of 150,000 fit
_HELD_BYTES = 2**28  # of those that are not, made at a time: switching to the dense model and back costs too


class Teacher:
    """The dense model's outputs on fixed documents, and candidates measured against them."""

    def __init__(self, model: ReferenceModel, documents: Sequence[torch.Tensor], looks: Sequence[float]) -> None:
        """`looks`: the shares of the documents that each look sees, growing; the last is 1."""
        self.model = model
        self.documents = list(documents)
        self.looks = tuple(max(1, round(share * len(documents))) for share in looks)  # counts
        self.encoder = model.spec.task == "encoder"
        self._outputs: dict[int, torch.Tensor] = {}
        self._cached_bytes = 0
        self._latest: tuple[dict[str, str], list[tuple[float, float, float]]] = ({}, [])

    def measure(self, configuration: Mapping[str, str], look: int = -1) -> Evaluation:
        """Loss of group name -> scheme name (groups not named stay dense) on the documents of a look."""
        if self._latest[0] != dict(configuration):
            self._latest = dict(configuration), []
        rows = self._latest[1]  # a second look goes on where the first ended
        self.model.prepare([{}, configuration], self.documents[len(rows) : self.looks[look]])
        while len(rows) < self.looks[look]:
            dense = self._some_dense(len(rows), self.looks[look])
            self.model.select(configuration)
            for output in dense:
                document = self.documents[len(rows)]
                rows.append(self._compare(output, self.model.outputs(document).float(), document))
        tokens, kl, dnll = zip(*rows[: self.looks[look]], strict=True)
        return Evaluation(tokens, kl, dnll)

    def floor(self) -> float:
        """KL, in nats a token, of the dense model from itself computed exactly, on the first look's documents."""
        self.model.select({})
        self.model.prepare([{}], self.documents[: self.looks[0]])
        with self.model.exact():
            self.model.prepare([{}], self.documents[: self.looks[0]])
        rows = []
        for index in range(self.looks[0]):
            with self.model.exact():
                exact = self.model.outputs(self.documents[index]).float()
            rows.append(self._compare(exact, self._dense(index), self.documents[index]))
        return sum(row[1] for row in rows) / sum(row[0] for row in rows)

    def perplexity(self) -> float:
        """The dense model's, on all documents; for an encoder this is not defined and 0 is returned."""
        if self.encoder:
            return 0.0
        self.model.prepare([{}], self.documents)
        total = sum(float(_nll(self._dense(i), document).sum()) for i, document in enumerate(self.documents))
        tokens = sum(len(document) - 1 for document in self.documents)
        return math.exp(min(total / tokens, 700.0))

    def _some_dense(self, start: int, stop: int) -> list[torch.Tensor]:
        """The dense outputs of documents from `start` on: up to `stop`, or as many as are worth holding."""
        outputs: list[torch.Tensor] = []
        held = 0
        while start + len(outputs) < stop and held <= _HELD_BYTES:
            output = self._dense(start + len(outputs))
            held += 0 if start + len(outputs) in self._outputs else output.nbytes
            outputs.append(output)
        return outputs

    def _dense(self, index: int) -> torch.Tensor:
        if index in self._outputs:
            return self._outputs[index]
        self.model.select({})
        output = self.model.outputs(self.documents[index]).float()
        if self._cached_bytes + output.nbytes <= _CACHE_BYTES:
            self._outputs[index] = output
            self._cached_bytes += output.nbytes
        return output

    def _compare(self, dense: torch.Tensor, other: torch.Tensor, ids: torch.Tensor) -> tuple[float, float, float]:
        """(tokens, KL, rise of the NLL) of one document."""
        return (self._compare_embeddings if self.encoder else self._compare_logits)(dense, other, ids)

    def _compare_logits(
        self, dense: torch.Tensor, other: torch.Tensor, ids: torch.Tensor
    ) -> tuple[float, float, float]:
        kl = dnll = 0.0
        step = max(1, logits_at_a_time(dense.device) // dense.shape[1])
        scored = len(ids) - 1
        for start in range(0, scored, step):
            rows = slice(start, min(start + step, scored))
            p, q = F.log_softmax(dense[rows], -1), F.log_softmax(other[rows], -1)
            label = ids[1:][rows].unsqueeze(1)
            dnll += float((p.gather(1, label) - q.gather(1, label)).double().sum())
            kl += float(F.kl_div(q, p, reduction="sum", log_target=True))
        return float(scored), kl, dnll

    def _compare_embeddings(
        self, dense: torch.Tensor, other: torch.Tensor, ids: torch.Tensor
    ) -> tuple[float, float, float]:
        error = float((other - dense).double().square().sum())
        return float(dense.double().square().sum()), error, error


def _nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")
