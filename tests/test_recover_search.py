"""Recovery as a choice of the search: factors that training gives, prices, candidates that are measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from autotune.config import RunConfig
from autotune.errors import InfeasibleError
from autotune.plan import Plan
from autotune.recover import gains, searched, training
from autotune.recover.gains import Factor, Gain, Probe, Share, factors, kind_of, probes
from autotune.recover.job import SEARCHED, Options
from autotune.recover.outcome import correction
from autotune.recover.prices import TABLE, Prices, prices, promise
from autotune.recover.run import recover
from autotune.report.recovered import redraw
from autotune.score import LossRow, LossTable
from autotune.search.problem import Evaluation, GroupOptions, Option, Problem
from autotune.search_space.schemes import scheme
from autotune.tune import tune

STEPS = 160
SPARSE = "2:4, 4 bits"


def option(name, latency_us, loss_nats):
    return Option(name, "kernel", latency_us, loss_nats, 1)


def group(name, role, layer, *options):
    return GroupOptions(name, role, layer, (option("bf16", 10.0, 0.0), *options))


def test_kinds_are_patterns_and_bits():
    assert kind_of("2:4+w4a8-int4-g64") == kind_of("2:4+w4a16-int4-g128") == SPARSE
    assert kind_of("2:4") == "2:4, 16 bits" and kind_of("w3a16-int3-g64") == "dense, 3 bits"
    assert kind_of("w8a8-int8") == kind_of("bf16") == ""


def test_sets_are_what_would_be_chosen_within_the_budget_and_three_times_it():
    fast, safe, beaten = "2:4+w4a8-int4-g64", "w8a8-int8", "2:4"
    groups = [
        group(f"{n}.qkv", "qkv", n, option(fast, 2.0, loud), option(safe, 5.0, 1e-4), option(beaten, 6.0, 0.1))
        for n, loud in enumerate((0.9, 0.2, 0.3, 0.1))
    ]
    large, small = probes(Problem(tuple(groups), 0.0, 0), 0.25)
    assert large.kind == small.kind == SPARSE  # 8 bits are not worth it, and 2:4 alone is beaten at both
    assert dict(large.chosen) == {f"{n}.qkv": fast for n in (1, 2, 3)}  # 0.6 of 0.75
    assert len(small.chosen) == 1 and {small.chosen[0][0]} <= {"1.qkv", "3.qkv"}  # 0.1 or 0.2 of 0.25
    (all_of_them,) = probes(Problem(tuple(groups), 0.0, 0), 2.0)
    assert len(all_of_them.chosen) == 4
    (quietest,) = probes(Problem(tuple(groups), 0.0, 0), 0.01)  # none of them is within it
    assert dict(quietest.chosen) == {"3.qkv": fast}


LARGE, SMALL = (Probe(SPARSE, tuple((name, "2:4") for name in names)) for names in ("ab", "a"))


def gain(steps, left, probe=LARGE, documents=6):
    before = np.random.default_rng(0).uniform(1.0, 2.0, documents)
    return Gain(probe, steps, 100.0, tuple(before), tuple(before * left))


def test_a_factor_is_the_share_left_and_falls_with_a_power_of_the_steps():
    (factor,) = factors([gain(16, 0.9), gain(64, 0.75)])
    assert factor.left == pytest.approx(0.75) and factor.low == pytest.approx(0.75, abs=1e-6)
    power = np.log(0.9 / 0.75) / np.log(4)
    assert factor.at(512)[0] == pytest.approx(0.75 * 8**-power)
    assert factor.at(64)[0] == factor.at(16)[0] == pytest.approx(0.75)
    assert factor.at(512)[1] == pytest.approx(0.75 * 8**-gains.STEEPEST)  # the lower end falls as steeply as can be
    assert factor.at(512)[2] == factor.high  # the upper end is what was measured
    assert factors([gain(16, 0.5), gain(64, 0.1)])[0].power == gains.STEEPEST
    assert factors([gain(16, 0.9), gain(64, 1.1)])[0].power == 0.0
    assert factors([gain(1, 0.9)])[0].power == 0.0


@pytest.mark.parametrize("larger", [0.9, 0.72])
def test_a_factor_is_of_the_set_of_the_budgets_size_and_reaches_as_far_as_the_other(larger):
    (factor,) = factors([gain(16, 0.95), gain(64, larger), gain(64, 0.8, SMALL)])
    assert [item.left for item in factor.sets] == pytest.approx([larger, 0.8])
    reach = max(larger / 0.8, 0.8 / larger)
    assert (factor.left, factor.low, factor.high) == pytest.approx((0.8, 0.8 / reach, 0.8 * reach), rel=1e-3)


def test_the_interval_is_over_documents():
    late = gain(64, 0.75)
    uneven = replace(late, after=tuple(b * s for b, s in zip(late.before, (0.5, 1.0, 0.6, 0.9, 0.7, 0.8), strict=True)))
    (factor,) = factors([gain(16, 0.9), uneven])
    assert factor.low < 0.72 and factor.high > 0.78


def test_candidates_correct_the_factors():
    found = correction([0.011, 0.012, 0.0105], [0.01, 0.01, 0.01])
    assert (found.low, found.high) == pytest.approx((1.05, 1.2)) and 1.05 < found.ratio < 1.2
    (factor,) = found.of([Factor(SPARSE, (), 64, 0.6, 0.5, 0.7, 0.2)])
    assert (factor.left, factor.low, factor.high) == pytest.approx((0.6 * found.ratio, 0.5, 0.84))
    assert correction([], []).ratio == correction([0.1], [0.0]).ratio == 1.0


def test_a_promise_for_a_plan_weighs_its_rows():
    sparse, dense = "2:4+w4a8-int4-g64", "w8a8-int8"
    rows = (
        LossRow("a", sparse, 0.3, 0.2, 0.4, "fisher"),
        LossRow("b", dense, 0.1, 0.0, 0.2, "fisher"),
        LossRow("b", sparse, 9.0, 8.0, 10.0, "fisher"),  # not chosen
    )
    factor = Factor(SPARSE, (), 64, 0.6, 0.5, 0.8, 0.0)
    found = promise(2.0, {"a": sparse, "b": dense, "c": "bf16"}, LossTable(rows), [factor], 64)
    shares = [(0.3 * left + 0.1) / 0.4 for left in (0.6, 0.5, 0.8)]
    assert (found.nats, found.low, found.high) == pytest.approx(tuple(2.0 * share for share in shares))
    assert promise(2.0, {}, LossTable(rows), [factor], 64).nats == 2.0


def test_a_price_is_the_loss_times_the_factor_and_its_bounds_take_the_factors_in():
    factor = Factor(SPARSE, (Share(SMALL, 1.0, 0.6, 0.5, 0.7),), 64, 0.6, 0.5, 0.7, 0.2)
    rows = (
        LossRow("a", "2:4+w4a8-int4-g64", 0.1, 0.08, 0.12, "fisher"),
        LossRow("a", "w8a8-int8", 0.01, 0.0, 0.02, "fisher"),
    )
    made = prices(LossTable(rows), [factor], 64)
    sparse, dense = made.rows
    found = (sparse.recovered_nats, sparse.recovered_low_nats, sparse.recovered_high_nats)
    assert found == pytest.approx((0.06, 0.04, 0.084))
    assert (dense.recovered_nats, dense.recovered_high_nats) == (0.01, 0.02)
    later = prices(LossTable(rows), [factor], 512).rows[0]
    assert later.recovered_nats == pytest.approx(0.06 * 8**-0.2) and later.recovered_high_nats == pytest.approx(0.084)
    assert Prices.from_csv(made.to_csv()) == made
    assert made.losses.of("a", "2:4+w4a8-int4-g64") == sparse.recovered_nats


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        patch.setattr("autotune.recover.texts.LENGTH", 32)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run whose budget leaves 2:4 out, and text to train on; latencies are arithmetic."""
    folder = tmp_path_factory.mktemp("searched")
    tune(RunConfig.of(**tiny.trainable(folder), schemes=("w8a16-int8", "2:4+w4a8-int4-g64")))
    return folder


def options(home, **changes):
    values = {"tokens": STEPS * 128, "data": home / "more.txt", "point": SEARCHED, "rate": 0.03, "batch_tokens": 128}
    return Options(**(values | changes))


@pytest.fixture(scope="module")
def found(home, _quick):
    return recover(home / "run", options(home))


def sparse_groups(plan):
    return [group for group, name in plan.configuration.items() if scheme(name).sparsity != "dense"]


def files(run):
    """All that a searched recovery leaves and that must not depend on whether it was killed."""
    paths = [run / TABLE, run / "recovered" / "plan.json"]
    return {path: path.read_bytes() for path in (*paths, *sorted((run / "recovered" / "weights").iterdir()))}


def test_the_search_takes_2_4_where_it_is_recovered(found, home):
    run = home / "run"
    plan, trained = Plan.load(run / "plan.json"), Plan.load(run / "recovered" / "plan.json")
    assert len(sparse_groups(trained)) > len(sparse_groups(plan))
    assert found["searched"]["plan_latency_ms"] > next(
        item["latency_ms"] for item in found["searched"]["candidates"] if item["chosen"]
    )


def test_factors_come_from_training(found):
    (sparse,) = (item for item in found["searched"]["factors"] if item["kind"] == SPARSE)
    assert sparse["low"] <= sparse["left"] <= sparse["high"] < 1.0 and sparse["left"] < 0.95
    assert sparse["at_budget"]["left"] <= sparse["left"]
    assert len(sparse["sets"][0]["groups"]) >= len(sparse["sets"][-1]["groups"])
    ratio = found["searched"]["correction"]
    assert sparse["corrected"]["left"] == pytest.approx(sparse["at_budget"]["left"] * ratio["ratio"])
    assert sparse["steps"] == found["searched"]["short_steps"] == STEPS / 8


def test_candidates_are_measured_and_the_final_loss_is_of_the_one_taken(found):
    rows = found["searched"]["candidates"]
    assert 1 <= len(rows) <= searched.TRIED and sum(item["chosen"] for item in rows) == 1
    for row in rows:
        assert row["promised"]["nats"] < row["one_shot_nats"]
        assert row["short_nats"] < row["one_shot_nats"]  # training helped
        left = row["promised"]["nats"] / row["short_promised"]["nats"]
        assert row["expected"]["nats"] == pytest.approx(row["short_nats"] * left)
        assert row["expected"]["low"] <= row["expected"]["nats"] <= row["expected"]["high"] == row["short_nats"]
    ratios = [row["short_nats"] / row["short_promised"]["nats"] for row in rows]
    found_ratio = found["searched"]["correction"]
    assert (found_ratio["low"], found_ratio["high"]) == pytest.approx((min(ratios), max(ratios)))
    (taken,) = (item for item in rows if item["chosen"])
    assert found["search_documents"]["kl_nats_before"] == pytest.approx(taken["one_shot_nats"], rel=1e-3)
    assert found["search_documents"]["kl_nats"] < taken["short_nats"]
    measured, promised = found["search_documents"]["kl_nats"], taken["promised"]
    assert found["promise"] == promised | {"holds": promised["low"] <= measured <= promised["high"]}


def test_the_table_is_corrected_by_what_candidates_were_left_with(found, home):
    (sparse,) = (item for item in found["searched"]["factors"] if item["kind"] == SPARSE)
    rows = [row for row in Prices.from_csv((home / "run" / TABLE).read_text()).rows if kind_of(row.scheme) == SPARSE]
    assert rows
    for row in rows:
        assert row.recovered_nats == pytest.approx(row.loss_nats * sparse["corrected"]["left"])


def test_the_same_again_does_nothing(found, home, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr(gains, "Bench", None)
    assert recover(home / "run", options(home)) == found


def test_killed_and_resumed_it_ends_in_the_same_bytes(found, home, tmp_path, monkeypatch):
    """Killed while groups are tried, while a candidate is trained briefly, and while the one taken is trained."""
    run = shutil.copytree(home / "run", tmp_path / "run")
    wanted = {path.relative_to(home / "run"): data for path, data in files(home / "run").items()}
    shutil.rmtree(run / "recovered")
    for name in ("evaluations.sqlite", TABLE, "recovered_front.json"):
        (run / name).unlink()
    stages = json.loads((run / "stages.json").read_text())
    (run / "stages.json").write_text(json.dumps({k: v for k, v in stages.items() if k != "recovered_front"}))
    monkeypatch.setattr(training, "_SAVE_EVERY_S", 0.05)
    steps = []

    class Killed(Exception):
        pass

    def killed_at(place):
        def report(name, done, total, note=""):
            steps.append((name, done))
            if (name, done) == place:
                raise Killed

        return report

    for place in (("gains", 1), ("short", 15), ("recover", 40)):
        with pytest.raises(Killed):
            recover(run, options(home), killed_at(place))
    assert ("recover", 1) in steps
    steps.clear()
    recover(run, options(home), killed_at(None))
    assert not {("short", 1), ("recover", 1)} & set(steps) and ("recover", 41) in steps
    assert {path.relative_to(run): data for path, data in files(run).items()} == wanted


def test_a_lying_factor_is_overruled(found, home, tmp_path, monkeypatch):
    """Were nothing left of 2:4's loss, the fastest of all would do; measured, it does not."""
    run = shutil.copytree(home / "run", tmp_path / "run")
    (run / "evaluations.sqlite").unlink()
    train = training.train

    def useless_at_first(distillation, folder, *others, **settings):
        return None if folder.name == "checkpoint-short" else train(distillation, folder, *others, **settings)

    monkeypatch.setattr(training, "train", useless_at_first)
    monkeypatch.setattr(gains.Probing, "measure", lambda *_: ())
    monkeypatch.setattr(searched, "factors", lambda _: (Factor(SPARSE, (), 32, 0.01, 0.01, 0.02, 0.0),))
    try:
        rows = recover(run, options(home))["searched"]["candidates"]
    except InfeasibleError as error:
        assert error.code == "recover.no_candidate" and "times the budget" in error.message
        assert json.loads((run / "recovered" / "recovery.json").read_text()) == found  # as it was
        return
    fastest = min(rows, key=lambda item: item["latency_ms"])
    assert fastest["short_nats"] == pytest.approx(100 * fastest["short_promised"]["nats"])
    assert not fastest["chosen"] and any(item["chosen"] for item in rows)


def test_where_no_candidate_fits_the_search_runs_again_at_corrected_prices(found, home, tmp_path, monkeypatch):
    run = shutil.copytree(home / "run", tmp_path / "run")
    shutil.rmtree(run / "recovered")
    once, asked = searched.SearchedRecovery._round, []

    def unfit_at_first(self, wanted):
        asked.append(wanted)
        made = once(self, wanted)
        return replace(made, best=made.tried[0] if wanted.name else None)

    monkeypatch.setattr(searched.SearchedRecovery, "_round", unfit_at_first)
    value = recover(run, options(home))["searched"]
    first, second = asked
    ratio = value["candidates"][0]["short_nats"] / value["candidates"][0]["short_promised"]["nats"]
    before, after = ({item.kind: item.left for item in one.factors}[SPARSE] for one in asked)
    assert first.tried == () and len(second.tried) == len(found["searched"]["candidates"])
    assert after == pytest.approx(before * found["searched"]["correction"]["ratio"])
    assert ratio == pytest.approx(found["searched"]["correction"]["ratio"])
    tried = [tuple(item["schemes"].items()) for item in value["candidates"]]
    assert len(tried) == len(set(tried)) >= len(second.tried)  # nothing is trained twice
    assert (run / "recovered_front_again.json").is_file()


def test_the_report_shows_the_column_and_what_was_tried(found, home):
    run = home / "run"
    redraw(run)
    report = json.loads((run / "report.json").read_text())
    assert report["recovered"]["searched"] == found["searched"]
    shown = [o for group in report["groups"] for o in group["options"] if o["recovered_nats"] is not None]
    assert any(o["recovered_nats"] < o["loss_nats"] for o in shown if kind_of(o["scheme"]) == SPARSE)
    report["recovered"]["noisy"] = "the host was busy"
    from autotune.report.page_recovered import section

    assert "the host was busy" in str(section(report)) and found["noisy"] == ""
    page = (run / "report.html").read_text()
    assert "Trained after compression" in page and "candidate 1" in page and "if trained" in page


def test_a_recovery_of_another_loss_table_is_not_shown(found, home, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    plan = Plan.load(run / "plan.json")
    other = plan.provenance.model_copy(update={"loss_table": "0" * 64})
    plan.model_copy(update={"provenance": other}).save(run / "plan.json")
    redraw(run)
    assert json.loads((run / "report.json").read_text())["recovered"] is None


def test_where_nothing_is_promised_it_says_so_and_writes_nothing(home, found, tmp_path, monkeypatch):
    run = shutil.copytree(home / "run", tmp_path / "run")
    shutil.rmtree(run / "recovered")
    monkeypatch.setattr(searched, "FASTER", 100.0)
    with pytest.raises(InfeasibleError) as error:
        recover(run, options(home))
    assert error.value.code == "recover.no_candidate"
    assert "faster than the plan" in error.value.message and error.value.hint
    assert not (run / "recovered" / "plan.json").exists() and not (run / "recovered" / "model").exists()


def test_minutes_are_turned_into_steps_once_and_the_model_is_given_back(home, found, tmp_path, monkeypatch):
    """So few steps win nothing back; what is timed for them must not stay in the model that is trained next."""
    run = shutil.copytree(home / "run", tmp_path / "run")
    (run / "evaluations.sqlite").unlink()
    monkeypatch.setattr(training, "steps_for_minutes", lambda *_: 8)
    asked = options(home, tokens=None, minutes=0.5)
    for _ in range(2):
        with pytest.raises(InfeasibleError, match="faster than the plan"):
            recover(run, asked)
        assert json.loads((run / "recovered" / "budget.json").read_text())["steps"] == 8
        monkeypatch.setattr(training, "steps_for_minutes", None)


def test_a_stop_before_anything_is_chosen_leaves_what_was_measured(home, found, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    shutil.rmtree(run / "recovered")
    with pytest.raises(KeyboardInterrupt):
        recover(run, options(home), should_stop=lambda: True)
    assert not (run / "recovered").exists() and (run / "evaluations.sqlite").is_file()


def test_a_run_that_met_no_budget_is_helped_too(home, found):
    """No configuration is 7.5 times as fast as dense and within the loss; trained, one is."""
    settings = tiny.settings(home / "model", home / "none", home / "data.jsonl", max_loss=0.5, trials=2)
    with pytest.raises(InfeasibleError, match="no configuration meets the budget"):
        tune(RunConfig.of(**settings, schemes=("w8a16-int8", "2:4+w4a8-int4-g64"), min_speedup=7.5))
    value = recover(home / "none", options(home))
    searched = value["searched"]
    (taken,) = (item for item in searched["candidates"] if item["chosen"])
    assert 7.5 * taken["latency_ms"] <= searched["plan_latency_ms"]  # there is no plan: the dense model's
    assert (home / "none" / "recovered" / "model").is_dir()


def test_evaluations_are_scaled_by_what_is_promised():
    half = Evaluation((10.0,), (4.0,), (2.0,)).scaled(0.5)
    assert (half.kl_nats, half.dnll_nats) == (0.2, 0.1)


def test_a_student_gives_the_model_back(home):
    from autotune.model import load_model, open_model
    from autotune.recover.quantizer import Master
    from autotune.recover.student import Student

    opened = open_model(str(home / "model"))
    model = load_model(opened)
    ids = torch.stack(tiny.tokens(1, 12))
    with torch.no_grad():
        wanted = model(ids).logits
    first = opened.spec.groups[0]
    from autotune.compress.database import stacked_weight

    weight = tiny.rounded(stacked_weight(model, first), None, scheme("2:4+w8a8-int8"))
    student = Student(model, opened.spec, {first.name: Master(weight)})
    with torch.no_grad():
        assert not torch.equal(student.outputs(ids), wanted)
        assert torch.equal(student.release()(ids).logits, wanted)
