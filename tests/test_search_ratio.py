"""The loss bound: what the ratio of dNLL to KL is taken to be, and how often the truth lies below the bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from autotune.search.problem import Evaluation
from autotune.search.ratio import FLOOR, LEAST_SPREAD, PRIOR, REGIME, dnll_upper_nats, loss_ratio

LIMIT = 0.01
# Mean KL of what a search evaluates: uniform schemes, mixes around the budget, nearly lossless and broken ones.
KLS = (0.0114, 0.0085, 0.0101, 8e-5, 3e-5, *np.geomspace(5e-4, 0.012, 12), 0.05, 0.3)


def search(random, ratio, spread=LEAST_SPREAD, shared=0.5, documents=32, tokens=8160):
    """[(true dNLL, evaluation)]: `shared` of the noise's variance is common to all, as they see the same documents."""
    lengths = random.integers(150, 350, documents).astype(float)
    lengths *= tokens / lengths.sum()
    hardness = np.exp(0.4 * random.normal(size=documents))
    hardness /= (hardness * lengths).sum() / lengths.sum()
    common = random.normal(size=documents)
    made = []
    for mean in KLS:
        own = ratio + spread * random.normal()
        kl = mean * lengths * hardness
        noise = math.sqrt(shared) * common + math.sqrt(1 - shared) * random.normal(size=documents)
        dnll = own * kl + 2.0 * np.sqrt(kl) * noise
        made.append((own * mean, Evaluation(tuple(lengths), tuple(kl), tuple(dnll))))
    return made


def judged(ratio, searches=150, **options):
    """(share of the candidates around the budget whose truth is below the bound, mean bound over KL)."""
    random = np.random.default_rng(0)
    below, bounds = [], []
    for _ in range(searches):
        made = search(random, random.normal(1.0, PRIOR.spread) if ratio is None else ratio, **options)
        pooled = loss_ratio([evaluation for _, evaluation in made], LIMIT)
        for truth, evaluation in made:
            if 1e-3 < evaluation.kl_nats < 0.02:
                bound = dnll_upper_nats(evaluation, pooled)
                below.append(truth <= bound)
                bounds.append(bound / evaluation.kl_nats)
    return np.mean(below), np.mean(bounds)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0, None])
@pytest.mark.parametrize("documents", [8, 32])
def test_the_truth_is_below_the_bound_as_often_as_is_said(ratio, shared, documents):
    """`None`: ratios as the prior has them, anywhere around one."""
    assert judged(ratio, shared=shared, documents=documents)[0] >= 0.79


@pytest.mark.parametrize("ratio", [1.3, 2.0])
def test_ratios_above_one_are_found_too(ratio):
    """The prior alone bounds them at 1.21. Where candidates share much of their noise they are found less surely."""
    assert judged(ratio, shared=0.2)[0] >= 0.75
    assert judged(ratio, shared=0.9)[0] >= 0.65


def test_low_ratios_make_the_bound_sharper_than_the_prior_alone():
    random = np.random.default_rng(1)
    near = [e for _ in range(50) for _, e in search(random, 0.5) if 1e-3 < e.kl_nats < 0.02]
    alone = np.mean([dnll_upper_nats(e) / e.kl_nats for e in near])
    assert judged(0.5)[1] < alone - 0.04
    assert judged(0.5, shared=0.0)[1] < alone - 0.2


def test_a_wider_spread_between_configurations_is_seen():
    random = np.random.default_rng(2)
    wide = [loss_ratio([e for _, e in search(random, 1.0, 0.6, shared=0.0)], LIMIT).spread for _ in range(20)]
    narrow = [loss_ratio([e for _, e in search(random, 1.0, 0.0, shared=0.0)], LIMIT).spread for _ in range(20)]
    assert 0.4 < np.mean(wide) < 0.8
    assert np.mean(narrow) < 0.25
    assert min(narrow) == LEAST_SPREAD


def test_many_alike_candidates_make_the_pool_no_surer():
    """The same configuration measured again and again on the same documents is one piece of evidence."""
    random = np.random.default_rng(3)
    _, one = search(random, 0.6)[0]
    single, many = loss_ratio([one], LIMIT), loss_ratio([one] * 50, LIMIT)
    assert many.error == pytest.approx(single.error)
    assert many.mean == pytest.approx(single.mean)


def test_more_documents_make_the_pool_surer():
    random = np.random.default_rng(4)
    errors = [loss_ratio([e for _, e in search(random, 0.7, tokens=n)], LIMIT).error for n in (500, 8000, 128_000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < PRIOR.spread
    assert errors[-1] < 0.1


def test_broken_and_lossless_configurations_do_not_speak():
    random = np.random.default_rng(5)
    made = [evaluation for _, evaluation in search(random, 0.7)]
    broken = Evaluation(made[0].tokens, (1e6,) * 32, (9e6,) * 32)
    lossless = Evaluation(made[0].tokens, (0.0,) * 32, (0.0,) * 32)
    assert broken.kl_nats > REGIME * LIMIT
    assert loss_ratio([broken, *made, lossless], LIMIT) == loss_ratio(made, LIMIT)


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_nothing_to_pool_leaves_the_prior(limit):
    made = [evaluation for _, evaluation in search(np.random.default_rng(6), 0.5)]
    assert loss_ratio(made, limit) == PRIOR
    assert loss_ratio([], LIMIT) == PRIOR
    assert loss_ratio([Evaluation((100.0,), (1.0,), (0.5,))], LIMIT) == PRIOR


def test_the_order_of_evaluations_does_not_matter():
    made = [evaluation for _, evaluation in search(np.random.default_rng(7), 0.8)]
    one, other = loss_ratio(made, LIMIT), loss_ratio(made[::-1], LIMIT)
    assert [one.mean, one.error, one.spread] == pytest.approx([other.mean, other.error, other.spread])
    assert loss_ratio(made, LIMIT) == one


def test_no_ratio_is_taken_to_be_below_the_floor():
    tokens = (100.0,) * 400
    helps = Evaluation(tokens, (1.0,) * 400, tuple(-0.5 + 1e-3 * (n % 2) for n in range(400)))
    assert dnll_upper_nats(helps, loss_ratio([helps], LIMIT)) >= FLOOR * 0.01


def test_an_encoder_is_judged_by_its_error_with_a_margin():
    """Its two losses are the same number, so the ratio is one, known as well as the mean is."""
    random = np.random.default_rng(8)
    squares = tuple(random.lognormal(0, 0.3, 32))
    value = Evaluation((100.0,) * 32, squares, squares)
    assert 1.0 < dnll_upper_nats(value, loss_ratio([value], 0.1)) / value.kl_nats < 1.1


def evaluation(kl):
    return Evaluation((100,) * len(kl), tuple(100 * value for value in kl), tuple(100 * value for value in kl))


def test_the_loss_bound_lies_above_the_mean():
    values = evaluation([0.01, 0.02, 0.03])
    assert dnll_upper_nats(values) > values.dnll_nats
    assert dnll_upper_nats(values, confidence=0.99) > dnll_upper_nats(values, confidence=0.8)
    assert dnll_upper_nats(evaluation([0.0, 0.0])) == 0


def test_by_the_prior_alone_the_bound_weighs_both_by_their_precision():
    _, value = search(np.random.default_rng(9), 0.8)[0]
    tokens, dnll = np.array(value.tokens), np.array(value.dnll)
    residual = dnll - value.dnll_nats * tokens
    error = math.sqrt(32 / 31 * float(residual @ residual)) / tokens.sum()
    spread = 0.25 * value.kl_nats
    weight = spread**2 / (spread**2 + error**2)
    mean = weight * value.dnll_nats + (1 - weight) * value.kl_nats
    deviation = spread * error / math.hypot(spread, error)
    assert dnll_upper_nats(value) == pytest.approx(mean + norm.ppf(0.8) * deviation)
    assert dnll_upper_nats(value, replace(PRIOR, noise=(0.0,) * 32)) == dnll_upper_nats(value)


def test_one_document_alone_is_judged_by_its_kl():
    alone = Evaluation((100.0,), (1.0,), (5.0,))
    assert 0.01 < dnll_upper_nats(alone) < 0.0125


def test_many_documents_speak_for_themselves_and_few_lean_on_the_kl():
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.01, 4000)

    def bound(documents):
        kl = (1.0,) * documents
        dnll = tuple(100 * (0.008 + noise[:documents] - noise[:documents].mean()))
        return dnll_upper_nats(Evaluation((100.0,) * documents, kl, dnll))

    assert bound(4000) == pytest.approx(0.008, rel=0.05)
    assert 0.009 < bound(8) < 0.0125
