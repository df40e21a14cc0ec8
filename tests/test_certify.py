"""Certification keeps its word: what it certifies is inside the budget at least 95 times in 100."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch

from autotune import certify as module
from autotune.certify import LOOKS, bound, certify, expected_error
from autotune.errors import InputError

LIMIT = math.log1p(0.01)


class Losses:
    """Stands in for a model: per-document losses are drawn, nothing is run. `select` names the finalist."""

    def __init__(self, losses, tokens):
        self.losses, self.tokens = losses, tokens  # losses: finalist -> per-document sums

    def prepare(self, configurations, documents):
        assert configurations[0] == {}  # the dense model first

    def measure(self, _model, finalists, document, rows):
        index = int(document)
        for configuration, row in zip(finalists, rows, strict=True):
            row.weight.append(float(self.tokens[index]))
            row.loss.append(float(self.losses[configuration["finalist"]][index]))
            row.kl.append(0.0)
            row.dense_nll.append(0.0)
            row.tokens += int(self.tokens[index])


def draw(generator, documents, true_nats, spread=0.05, tokens=(200, 1000)):
    """Per-document sums of a loss of `true_nats` a token; documents differ, long tails included."""
    count = generator.integers(*tokens, documents)
    noise = generator.standard_t(4, documents) * spread / math.sqrt(2)
    return count, (true_nats + noise) * count


def run(monkeypatch, losses, tokens, limit=LIMIT):
    fake = Losses(losses, tokens)
    monkeypatch.setattr(module, "_measure", fake.measure)
    finalists = [{"finalist": name} for name in losses]
    return certify(fake, finalists, [torch.tensor(i) for i in range(len(tokens))], limit, "data")


def test_a_loss_at_the_limit_is_certified_at_most_one_time_in_twenty(monkeypatch):
    """Both looks together, 1,000 experiments; three standard errors of room."""
    generator = np.random.default_rng(0)
    false = 0
    for _ in range(1000):
        tokens, losses = draw(generator, 60, LIMIT)
        false += run(monkeypatch, {"only": losses}, tokens)[0].state == "certified"
    assert false / 1000 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_several_finalists_do_not_add_up_their_chances(monkeypatch):
    """Three lie right at the limit: that any of them is certified stays below one in twenty."""
    generator = np.random.default_rng(1)
    false = 0
    for _ in range(1000):
        tokens, first = draw(generator, 60, LIMIT)
        losses = {"a": first}
        for name in ("b", "c"):
            noise = generator.standard_t(4, 60) * 0.035
            losses[name] = (LIMIT + noise) * tokens
        false += any(item.state == "certified" for item in run(monkeypatch, losses, tokens))
    assert false / 1000 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_a_clear_case_is_certified(monkeypatch):
    generator = np.random.default_rng(2)
    passed = 0
    for _ in range(100):
        tokens, losses = draw(generator, 150, LIMIT / 2, 0.01)
        passed += run(monkeypatch, {"only": losses}, tokens)[0].state == "certified"
    assert passed >= 95


@pytest.mark.parametrize("alpha", [0.02, 0.05])
def test_the_bound_covers_as_often_as_it_says(alpha):
    generator = np.random.default_rng(3)
    inside = 0
    for _ in range(1000):
        tokens, losses = draw(generator, 40, 0.003)
        inside += bound(losses, tokens, alpha, int(tokens.sum())).upper >= 0.003
    assert inside / 1000 >= 1 - alpha - 3 * math.sqrt(alpha * (1 - alpha) / 1000)


def test_the_looks_share_the_error():
    assert sum(alpha for _, alpha in LOOKS) == pytest.approx(0.05)
    assert [share for share, _ in LOOKS] == sorted({share for share, _ in LOOKS})
    assert LOOKS[-1][0] == 1.0


def test_equal_documents_leave_no_doubt_and_the_mean_is_a_ratio():
    result = bound(np.array([1.0, 3.0]), np.array([10.0, 30.0]), 0.05, 40)
    assert (result.mean, result.upper, result.standard_error) == pytest.approx((0.1, 0.1, 0.0))
    assert (result.documents, result.tokens) == (2, 40)


def test_tokens_of_one_document_are_not_independent():
    """The same losses in fewer, longer documents say less."""
    generator = np.random.default_rng(4)
    losses = generator.normal(0.1, 1, 64)
    many = bound(losses, np.ones(64), 0.05, 64)
    few = bound(np.repeat(losses[:16], 4).reshape(16, 4).sum(1), np.full(16, 4.0), 0.05, 64)
    assert few.upper - few.mean > 1.5 * (many.upper - many.mean)


def test_testing_goes_from_the_first_and_stops_at_the_first_failure(monkeypatch):
    tokens = np.full(50, 100.0)
    good, bad = tokens * LIMIT * 0.1, tokens * LIMIT * 3
    found = run(monkeypatch, {"a": good, "b": bad, "c": good}, tokens)
    assert [item.state for item in found] == ["certified", "violated"]


def test_a_clear_case_is_decided_at_the_first_look(monkeypatch):
    tokens = np.full(50, 100.0)
    found = run(monkeypatch, {"a": tokens * LIMIT * 0.1}, tokens)
    assert found[0].loss.documents == round(50 * LOOKS[0][0])


def test_in_between_it_is_neither_and_says_how_much_more_would_do(monkeypatch):
    tokens = np.full(60, 500.0)
    losses = tokens * (LIMIT * 0.9 + np.where(np.arange(60) % 2, 0.02, -0.02))
    found = run(monkeypatch, {"a": losses}, tokens)[0]
    assert found.state == "not_certified"
    assert found.more_tokens > 1000
    assert "more tokens would decide" in found.statement


def test_a_loss_that_is_no_number_is_never_certified(monkeypatch):
    tokens = np.full(20, 100.0)
    found = run(monkeypatch, {"a": tokens * float("nan")}, tokens)
    assert found[0].state == "not_certified"


def test_the_claim_names_its_data(monkeypatch):
    tokens = np.full(50, 100.0)
    statement = run(monkeypatch, {"a": tokens * LIMIT * 0.1}, tokens)[0].statement
    assert statement == "certified on data, 20 documents, 2,000 tokens, 95%"


@pytest.mark.parametrize("count", [0, 1])
def test_one_document_is_not_evidence(monkeypatch, count):
    """Its residual is zero, so it would certify anything below the limit."""
    with pytest.raises(InputError) as error:
        run(monkeypatch, {"a": np.zeros(count)}, np.full(count, 100.0))
    assert error.value.code == "data.too_few"


def test_the_expected_error_falls_with_the_root_of_the_tokens():
    assert expected_error(0.01, 40_000) == pytest.approx(expected_error(0.01, 10_000) / 2)
    assert 1e-4 < expected_error(0.01, 150_000) < 2e-3


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_real_model_against_itself_loses_nothing_and_against_another_what_is_measured(databases, kind):
    from autotune.model import load_model
    from autotune.reference_model import ReferenceModel

    opened, space, database = databases(kind)
    model = ReferenceModel(load_model(opened), opened.spec, database)
    int4 = {entry.group: entry.scheme for entry in space.usable() if entry.scheme == "w4a16-int4-g32"}
    documents = tiny.tokens(6)
    dense, compressed = certify(model, [{}, int4], documents, 1.0, "data")
    assert (dense.loss.mean, dense.kl.mean) == (0.0, 0.0)
    assert compressed.kl.mean > 0
    assert dense.dense_perplexity == dense.perplexity
    if kind == "llama":
        model.select({})
        nll = [
            torch.nn.functional.cross_entropy(model.outputs(item)[:-1], item[1:], reduction="sum") for item in documents
        ]
        seen = compressed.loss.documents
        expected = math.exp(float(sum(nll[:seen])) / (23 * seen))
        assert compressed.dense_perplexity == pytest.approx(expected, rel=1e-5)
