"""The whole search: deterministic, replayable, stoppable, within limits, and better than what peers would choose."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from autotune.errors import UsageError
from autotune.search.baselines import BASELINES, seeds
from autotune.search.correction import loss_table
from autotune.search.front import fits
from autotune.search.ledger import HOPELESS
from autotune.search.problem import Budget, Evaluation
from autotune.search.race import clearly_worse, moves
from autotune.search.run import ALONG, search, trials_for_minutes
from autotune.search.synthetic import SCHEMES, synthetic

BUDGET = Budget(0.01)
SEARCHED = ("study", "fitted", "refine")


def best_us(front, budget=BUDGET, sources=None):
    kept = [c for c in front.candidates if fits(c, budget) and (sources is None or c.source.startswith(sources))]
    return min(candidate.latency_us for candidate in kept)


def run(made, *, budget=BUDGET, seed=0, trials=30, evaluate=None, **options):
    return search(made.problem, budget, seed, trials, evaluate or made.evaluate, looks=made.looks, **options)


def contents(front):
    return repr(replace(front, sampler_seconds=0.0))


@pytest.fixture(scope="module")
def made():
    return synthetic(6, 0)


@pytest.fixture(scope="module")
def found(made):
    return run(made)


def test_same_inputs_same_bytes(made, found):
    assert contents(run(made)) == contents(found)
    assert contents(run(made, seed=1)) != contents(found)


def test_the_number_of_threads_changes_nothing(made, found):
    """BLAS results differ in their last bits with the number of threads; a search must not."""
    code = (
        "from dataclasses import replace; from autotune.search.problem import Budget;"
        "from autotune.search.run import search; from autotune.search.synthetic import synthetic;"
        "made = synthetic(6, 0);"
        "front = search(made.problem, Budget(0.01), 0, 30, made.evaluate, looks=3);"
        "print(repr(replace(front, sampler_seconds=0.0)))"
    )
    for threads in ("1", "2"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == contents(found)


def test_never_worse_than_any_baseline(made, found):
    measured = {candidate.genotype: candidate for candidate in found.candidates}
    for genotype in seeds(made.problem, BUDGET.max_loss_nats, ()).values():
        candidate = measured[genotype]
        assert any(
            c.latency_us <= candidate.latency_us and c.evaluation.kl_nats <= candidate.evaluation.kl_nats
            for c in (found.candidates[index] for index in found.pareto)
        )
        assert not fits(candidate, BUDGET) or best_us(found) <= candidate.latency_us


def test_front_is_sorted_and_not_dominated(found):
    latencies = [candidate.latency_us for candidate in found.candidates]
    assert latencies == sorted(latencies)
    points = [(found.candidates[i].latency_us, found.candidates[i].evaluation.kl_nats) for i in found.pareto]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))
    assert len({candidate.genotype for candidate in found.candidates}) == len(found.candidates)
    assert [trial.number for trial in found.trials] == list(range(len(found.trials)))


class Memo:
    """What the caller keeps on disk: it dies after `alive` real evaluations."""

    def __init__(self, evaluate, alive=10**9):
        self.evaluate, self.alive, self.kept, self.asked = evaluate, alive, {}, []

    def __call__(self, genotype, look):
        self.asked.append((genotype, look))
        if (genotype, look) not in self.kept:
            if self.alive == 0:
                raise RuntimeError("killed")
            self.alive -= 1
            self.kept[genotype, look] = self.evaluate(genotype, look)
        return self.kept[genotype, look]


@pytest.mark.parametrize("alive", [3, 17, 29])
def test_a_killed_search_replays_to_the_same_result(made, found, alive):
    memo = Memo(made.evaluate, alive)
    with pytest.raises(RuntimeError, match="killed"):
        run(made, evaluate=memo)
    first = list(memo.asked)
    memo.alive, memo.asked = 10**9, []
    assert contents(run(made, evaluate=memo)) == contents(found)
    assert memo.asked[: len(first)] == first
    assert len(memo.kept) == len(set(memo.asked))


def test_the_number_of_evaluations_is_kept(made):
    whole = sum(made.tokens)
    cost: dict[tuple[int, ...], float] = {}

    def evaluate(genotype, look):
        evaluation = made.evaluate(genotype, look)
        cost[genotype] = max(cost.get(genotype, 0), sum(evaluation.tokens) / whole)
        return evaluation

    front = run(made, evaluate=evaluate, trials=20)
    before = [c.genotype for c in front.candidates if not c.source.startswith(SEARCHED)]
    assert len(before) == len(seeds(made.problem, BUDGET.max_loss_nats, ())) + ALONG
    assert 17 <= sum(cost.values()) - sum(cost[genotype] for genotype in before) <= 22


def test_what_the_first_documents_rule_out_is_not_measured_further(made):
    """Uniform 2:4 loses a hundred times this limit: a quarter of the documents says so."""
    budget = Budget(2e-4)
    front = run(made, budget=budget)
    documents = {candidate: len(candidate.evaluation.tokens) for candidate in front.candidates}
    first = len(made.evaluate(made.problem.dense, 0).tokens)
    assert set(documents.values()) == {first, len(made.tokens)}
    for candidate, count in documents.items():
        assert (count == first) == (made.evaluate(candidate.genotype, 0).kl_nats > HOPELESS * budget.max_loss_nats)
    assert all(documents[candidate] == len(made.tokens) for candidate in front.candidates if fits(candidate, budget))
    everything = run(made, budget=Budget(math.inf))
    assert {len(candidate.evaluation.tokens) for candidate in everything.candidates} == {len(made.tokens)}


def test_ctrl_c_and_should_stop_keep_the_front(made):
    calls = itertools.count()

    def interrupted(genotype, look):
        if next(calls) == 20:
            raise KeyboardInterrupt
        return made.evaluate(genotype, look)

    everything = Budget(math.inf)  # one look each
    front = run(made, budget=everything, evaluate=interrupted)
    assert len(front.candidates) == 20
    assert front.pareto
    calls = itertools.count()
    assert len(run(made, budget=everything, should_stop=lambda: next(calls) >= 15).candidates) == 15
    assert run(made, should_stop=lambda: True).candidates == ()


def test_progress_counts_up_and_the_best_only_improves(made):
    told = []
    run(made, trials=10, progress=lambda *row: told.append(row))
    assert [number for number, _, _ in told] == list(range(1, len(told) + 1))
    assert all(number <= total for number, total, _ in told)
    best = [latency for _, _, latency in told if latency is not None]
    assert best == sorted(best, reverse=True)


def test_fast_measures_a_handful(made):
    front = run(made, fast=True)
    assert len(front.candidates) <= 6
    assert front.trials == ()
    assert best_us(front) < made.problem.latency_us(made.problem.dense)


def test_trials_for_minutes():
    assert trials_for_minutes(2, 3.0) == 40
    assert trials_for_minutes(2, 3.0, seeds=10) == 30
    assert trials_for_minutes(0.01, 60.0) == 1


def test_optuna_takes_a_small_share(made):
    front = run(made, trials=54)  # 40 in the study
    assert len(front.trials) >= 40
    assert front.sampler_seconds < 2.0


def test_search_beats_the_uncorrected_table():
    """Mean over problems: the search is faster at the budget than the uncorrected knapsack and than every peer."""
    ours, fast, peers = [], [], []
    for seed in range(4):
        made = synthetic(6, seed)
        dense = made.problem.latency_us(made.problem.dense)
        front = run(made, trials=40)
        ours.append(best_us(front) / dense)
        fast.append(best_us(run(made, fast=True)) / dense)
        peers.append(
            min(c.latency_us for c in front.candidates if fits(c, BUDGET) and not c.source.startswith(SEARCHED)) / dense
        )
    assert np.mean(ours) < np.mean(fast) - 0.02
    assert np.mean(ours) < np.mean(peers) - 0.02


def test_near_the_optimum_of_a_small_problem():
    made = synthetic(2, 3, ("bf16", "w8a8-int8", "w4a16-int4-g128", "2:4"))
    budget = Budget(0.004)
    everything = itertools.product(range(4), repeat=len(made.problem.groups))
    losses = {genotype: made.true_kl_nats(genotype) for genotype in everything}
    front = run(made, budget=budget, trials=40)
    best = front.best([fits(candidate, budget) for candidate in front.candidates])
    limit = made.true_kl_nats(best.genotype)
    optimum = min(made.problem.latency_us(genotype) for genotype, loss in losses.items() if loss <= limit)
    assert best.latency_us <= 1.02 * optimum


def test_memory_and_latency_limits(made):
    free = run(made, trials=20)
    room = round(0.9 * free.best([fits(c, BUDGET) for c in free.candidates]).weight_bytes)
    budget = Budget(0.02, max_bytes=room)
    front = run(made, budget=budget, trials=20)
    best = front.best([fits(candidate, budget) for candidate in front.candidates])
    assert best is not None and best.weight_bytes <= room
    limit = made.problem.latency_us(made.problem.dense) * 0.6
    budget = Budget(math.inf, max_latency_us=limit)
    front = run(made, budget=budget, trials=20)
    assert any(fits(candidate, budget) for candidate in front.candidates)
    assert all(c.latency_us <= limit * (1 + 1e-9) for c in front.candidates if c.source.startswith(SEARCHED))


@pytest.mark.parametrize("budget", [Budget(0.0), Budget(-1.0), Budget(1e-3, max_bytes=1), Budget(1e-9)])
def test_nothing_feasible_returns_the_front(made, budget):
    front = run(made, budget=budget, trials=12)
    assert front.pareto


def test_one_group_and_one_option():
    made = synthetic(1, 0, ("bf16",))
    front = run(made, trials=5)
    assert [candidate.source for candidate in front.candidates] == ["dense"]


def test_outer_choices_restrict_the_schemes():
    schemes = ("bf16", "w8a8-int8", "w4a16-int4-g128", "2:4")
    made = synthetic(4, 0, schemes)
    outer = {"family": (("w8a8-int8", "2:4"), ("w4a16-int4-g128",))}
    front = run(made, trials=24, outer=outer)
    taken = set()
    by_genotype = {trial.genotype: trial for trial in front.trials if "family" in trial.params}
    for trial in by_genotype.values():
        used = {option.scheme for option in made.problem.chosen(trial.genotype)} - {"bf16"}
        assert used <= set(str(trial.params["family"]).split(" | "))
        taken.add(trial.params["family"])
    assert len(taken) == 2


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"trials": -1}, "search.trials"),
        ({"outer": {"family": (("nothing",),)}}, "search.outer"),
        ({"outer": {str(n): (("2:4",), ("w8a8-int8",)) for n in range(20)}}, "search.parameters"),
        ({"scores": {"peer": [[0.0]]}}, "search.scores"),
    ],
)
def test_what_makes_no_sense_is_refused(made, options, code):
    with pytest.raises(UsageError) as caught:
        run(made, **options)
    assert caught.value.code == code


def test_scores_of_peers_become_seeds(made):
    table = loss_table(made.problem) ** 0.5
    named = seeds(made.problem, 0.01, (4000.0,), {"peer": table})
    assert {"dense", "greedy to the budget", "peer latency 4000 us"} <= set(named)
    assert len(set(named.values())) == len(named)
    assert set(BASELINES) == {"uniform", "greedy", "bits"}
    assert any(c.source.startswith("peer") for c in run(made, trials=4, scores={"peer": table}).candidates)


@pytest.mark.parametrize(("price", "share"), [(0.0, "everywhere"), (1.0, "somewhere"), (1e4, "nowhere")])
def test_sparsity_is_taken_where_it_pays(price, share):
    """2:4 at half the time of int8, with its loss free, fair or dear."""
    made = synthetic(6, 0, ("bf16", "w8a8-int8", "2:4"))
    sparse = 2
    truth = made.truth.copy()
    truth[:, sparse] *= price

    def priced(group):
        dense, int8, half = group.options
        cheap = replace(half, latency_us=int8.latency_us / 2, loss_nats=half.loss_nats * price)
        return replace(group, options=(dense, int8, cheap))

    problem = replace(made.problem, groups=tuple(priced(group) for group in made.problem.groups))
    changed = replace(made, problem=problem, truth=truth)
    front = run(changed, trials=20)
    best = front.best([fits(candidate, BUDGET) for candidate in front.candidates])
    count = sum(option == sparse for option in best.genotype)
    assert {"everywhere": count == 24, "somewhere": 0 < count < 24, "nowhere": count == 0}[share], count
    assert SCHEMES["2:4"]


def test_moves_are_never_slower_and_improve_the_table(made):
    losses = loss_table(made.problem)
    latency = np.array([[option.latency_us for option in group.options] for group in made.problem.groups])
    start = made.problem.uniform("w8a8-int8")
    for genotype in moves(losses, latency, start)[:20]:
        assert made.problem.latency_us(genotype) <= made.problem.latency_us(start) + 1e-6
        assert made.problem.loss_nats(genotype) < made.problem.loss_nats(start)
        assert 1 <= sum(a != b for a, b in zip(genotype, start, strict=True)) <= 2


def evaluation(kl):
    return Evaluation((100,) * len(kl), tuple(100 * value for value in kl), tuple(100 * value for value in kl))


def test_the_paired_test_sees_small_steady_differences_and_forgives_noise():
    random = np.random.default_rng(0)
    base = random.lognormal(-5, 1, 40)
    assert clearly_worse(evaluation(base * 1.05), evaluation(base))
    assert not clearly_worse(evaluation(base), evaluation(base * 1.05))
    assert not clearly_worse(evaluation(random.permutation(base)), evaluation(base))
    assert clearly_worse(evaluation([0.02, 0.02]), evaluation([0.01, 0.01]))
    assert not clearly_worse(evaluation([0.02]), evaluation([0.01]))
