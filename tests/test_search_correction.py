"""The correction recovers what was distorted, and leaves the table alone when told nothing."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.search.correction import features, fit, scheme_class
from autotune.search.front import hypervolume, pareto
from autotune.search.study import MAX_PARAMETERS
from autotune.search.synthetic import synthetic


def random_genotypes(problem, count, seed=0):
    random = np.random.default_rng(seed)
    return [tuple(int(random.integers(len(group.options))) for group in problem.groups) for _ in range(count)]


def test_neutral_parameters_leave_the_table_as_it_is():
    table = features(synthetic(6, 0).problem)
    assert np.array_equal(table.corrected(np.zeros(len(table.names)), 1.0), table.loss)
    assert np.array_equal(fit(table, [], []).losses, table.loss)


def test_parameters_fit_the_study_for_many_layers():
    table = features(synthetic(32, 0).problem)
    assert len(table.names) + 2 <= MAX_PARAMETERS
    assert {name.split()[0] for name in table.names} == {"role", "depth", "class"}


def test_few_layers_justify_no_depth_knots():
    assert not [name for name in features(synthetic(2, 0).problem).names if name.startswith("depth")]


def test_scheme_classes():
    assert scheme_class("bf16") == ""
    assert scheme_class("2:4+w8a8-int8") == "2:4 w8a8"
    assert scheme_class("w4a16-int4-g128") == scheme_class("w4a16-int4-g32") == "w4"


def test_a_role_factor_is_recovered():
    problem = synthetic(6, 1).problem
    table = features(problem)
    factor = np.where([group.role == "down" for group in problem.groups], 2.0, 1.0)
    truth = table.loss * factor[:, None]
    rows = np.arange(len(factor))
    seen = random_genotypes(problem, 60)
    fitted = fit(table, seen, [float(truth[rows, genotype].sum()) for genotype in seen])
    fresh = random_genotypes(problem, 20, seed=1)
    for genotype in fresh:
        assert fitted.kl_nats(genotype) == pytest.approx(float(truth[rows, genotype].sum()), rel=0.1)
    before = np.abs(np.log([table.loss[rows, g].sum() / truth[rows, g].sum() for g in fresh])).mean()
    after = np.abs(np.log([fitted.kl_nats(g) / truth[rows, g].sum() for g in fresh])).mean()
    assert after < before / 5


def test_draws_are_reproducible_and_narrow_with_measurements():
    made = synthetic(6, 2)
    table = features(made.problem)
    seen = random_genotypes(made.problem, 40)
    fitted = fit(table, seen, [made.true_kl_nats(genotype) for genotype in seen])
    assert np.array_equal(fitted.draw(np.random.default_rng(3)), fitted.draw(np.random.default_rng(3)))
    genotype = np.array(seen[0])
    rows = np.arange(len(genotype))

    def spread(one):
        random = np.random.default_rng(0)
        return np.std([np.log(one.draw(random)[rows, genotype].sum()) for _ in range(50)])

    assert spread(fitted) < spread(fit(table, [], []))


def test_the_dense_genotype_says_nothing():
    problem = synthetic(3, 0).problem
    fitted = fit(features(problem), [problem.dense], [0.0])
    assert fitted.kl_nats(problem.dense) == 0
    assert np.array_equal(fitted.losses, features(problem).loss)


def test_pareto_and_hypervolume():
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 3.0), (2.0, 2.0), (1.0, 3.0)]
    assert pareto(points) == (1, 3, 0)
    assert hypervolume(points, (4.0, 4.0)) == pytest.approx(1 + 2 + 3)
