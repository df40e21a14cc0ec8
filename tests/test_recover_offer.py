"""What `tune` offers when a budget is missed: of which configuration, at what price."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny

from autotune.config import RunConfig
from autotune.errors import InfeasibleError
from autotune.recover import offer as module
from autotune.recover.offer import offer, offers
from autotune.score import LossRow, LossTable
from autotune.tune import tune

MEASURE = module._tokens_per_second  # before tests put a constant in its place


@pytest.fixture(autouse=True)
def _faked(monkeypatch):
    with tiny.faked(monkeypatch):
        monkeypatch.setattr(module, "_tokens_per_second", lambda models: 1000.0)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offer")
    tiny.make_model("llama", folder / "model", initializer_range=0.2, num_hidden_layers=1)
    tiny.write_documents(folder / "data.jsonl", 16, 40)
    return folder


@pytest.fixture(scope="module")
def finished(home):
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        patch.setattr(module, "_tokens_per_second", lambda models: 1000.0)
        settings = tiny.settings(home / "model", home / "run", home / "data.jsonl", max_loss=0.02, trials=6)
        return tune(RunConfig.of(**settings))


def with_certificate(result, state, upper):
    """The finished run, had its plan been judged otherwise."""
    certificate = result.certificates[result.chosen.name]
    loss = replace(certificate.loss, upper=upper * certificate.limit)
    certificates = {**result.certificates, result.chosen.name: replace(certificate, state=state, loss=loss)}
    return replace(result, certificates=certificates)


@pytest.mark.parametrize(("state", "upper"), [("violated", 2.0), ("not_certified", 1.1)])
def test_a_plan_that_misses_by_little_is_offered_training(finished, state, upper):
    found = offer(with_certificate(finished, state, upper), None)
    assert found is not None and found.point is None and found.over == pytest.approx(upper)
    assert found.command == f"autotune recover {finished.session.folder.path} --data TEXT"
    assert found.minutes == pytest.approx(found.tokens / 1000 / 60)
    assert found.command in found.sentence and "min at 1,000 tokens/s" in found.sentence


def test_a_plan_that_misses_by_far_is_not(finished):
    judged = with_certificate(finished, "violated", 3.5)
    assert offer(replace(judged, points=()), None) is None


def test_a_faster_point_over_the_budget_is_offered(finished):
    result = replace(finished, certificates=finished.certificates)
    limit = finished.session.search_limit
    candidate = finished.chosen.candidate

    def point(name, faster, over):
        value = replace(candidate, latency_us=candidate.latency_us / faster)
        value = replace(value, evaluation=replace(value.evaluation, dnll=(), kl=(over,), tokens=(1.0,)))
        return SimpleNamespace(name=name, candidate=value)

    result.points = (point("point 1", 1.5, 4.0), point("point 2", 1.2, 2.0), point("point 3", 1.01, 2.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dnll_upper_nats", lambda evaluation, ratio: evaluation.kl[0] * limit)
        found = offer(result, None)
    assert (found.point, found.name, found.over) == ("searched", "point 2", pytest.approx(2.0))
    assert found.faster == pytest.approx(1.2)
    assert "--point searched " in found.command and "Point 2 would be 1.20x faster" in found.sentence
    assert found.tokens > 1.5 * module.TOKENS  # finding it is a part of the price


def test_a_run_whose_plan_is_fast_and_certified_says_nothing_false(finished):
    assert "recovery" in finished.report
    found = finished.report["recovery"]
    assert found is None or 1 < found["over"] <= module.REACH


def infeasible(home, name, **settings):
    """What `tune` says where nothing meets the budget; a speed is asked for, since dense loses nothing."""
    values = tiny.settings(home / "model", home / name, home / "data.jsonl", trials=4)
    with pytest.raises(InfeasibleError) as error:
        tune(RunConfig.of(**(values | settings)))
    assert error.value.code == "search.infeasible"
    return error.value


SPARSE = ("w8a16-int8", "2:4+w4a8-int4-g64")


def test_where_nothing_meets_the_budget_the_error_names_both_ways_out(home):
    error = infeasible(home, "tight", schemes=SPARSE, min_speedup=7.5, max_loss=0.6)
    nearest, searched = error.hint.split(" Or: ")[1:]
    assert "--point nearest " in nearest and f"({module.TOKENS:,} tokens" in nearest
    assert "--point searched " in searched and f"({round(module.price(module.TOKENS, 1)):,} tokens" in searched
    assert "The nearest that training helps loses" in searched and "tokens/s" in searched


def test_a_search_is_offered_where_the_nearest_is_too_slow(home):
    error = infeasible(home, "slow", schemes=SPARSE, min_speedup=7.5, max_loss=0.5)
    (searched,) = error.hint.split(" Or: ")[1:]
    assert "--point searched" in searched


def test_schemes_that_left_for_their_loss_are_offered_a_search(finished):
    limit = finished.session.search_limit
    dense = next(c for c in finished.front.candidates if c.genotype == finished.problem.dense)
    front = replace(finished.front, candidates=(dense,), pareto=(0,))
    rows = [LossRow("a", "2:4", n * limit, 0.0, n * limit, "fisher") for n in (0.5, 5.0, 2.0, 2.5)]
    result = replace(finished, chosen=None, front=front, losses=LossTable(tuple(rows)))
    (found,) = offers(result, None)
    assert (found.point, found.name, found.over) == ("searched", "2:4 in a alone", pytest.approx(2.0))
    assert offers(replace(result, losses=LossTable(tuple(rows[:2]))), None) == ()


def test_where_training_helps_nothing_no_search_is_offered(home, monkeypatch):
    monkeypatch.setattr(module, "REACH", 1e9)
    error = infeasible(home, "eight", schemes=("w8a16-int8",), min_speedup=7.5, max_loss=0.5)
    assert "--point searched" not in error.hint


@pytest.mark.parametrize("certified", [True, False])
def test_tune_with_recovery_that_finds_nothing_better_keeps_a_certified_plan(certified, tmp_path, monkeypatch, capsys):
    from autotune import recover_command

    def tuned():
        (tmp_path / "front.json").touch()
        if not certified:
            raise InfeasibleError("search.infeasible", "no configuration meets the budget.")

    def nothing(*_, **__):
        raise InfeasibleError("recover.no_candidate", "training promises nothing.", "Give more.")

    monkeypatch.setattr(recover_command, "recover", nothing)
    if certified:
        recover_command.then_recover(tmp_path, 1.0, tuned)
        assert "The plan stands." in capsys.readouterr().out
    else:
        with pytest.raises(InfeasibleError, match="training promises nothing"):
            recover_command.then_recover(tmp_path, 1.0, tuned)


def test_the_price_is_measured():
    documents = tiny.tokens(2, 24)
    calls = []
    reference = SimpleNamespace(select=lambda _: None, outputs=lambda document: calls.append(len(document)))
    models = SimpleNamespace(reference=reference, session=SimpleNamespace(search_documents=documents))
    assert MEASURE(models) > 0
    assert calls == [24] * 4  # one that is not timed
