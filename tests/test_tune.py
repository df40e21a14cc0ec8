"""The whole loop on a tiny model with latencies by arithmetic: what it writes, what stops it, what it survives."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
import tiny
import torch

import autotune
from autotune.cache_choice import cache_bytes
from autotune.choosing import choose_point
from autotune.config import RunConfig
from autotune.errors import AutotuneError, DeviceError, InfeasibleError, InputError, UsageError
from autotune.model import load_model, open_model
from autotune.plan import Plan
from autotune.profilers import latency
from autotune.tune import tune


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    tiny.make_model("llama", folder / "model", initializer_range=0.2, num_hidden_layers=1)
    tiny.write_documents(folder / "data.jsonl", 16, 40)
    return folder


def config_of(home, out, **changes):
    values = {"max_loss": 0.02, "trials": 6} | changes
    return RunConfig.of(**tiny.settings(home / "model", out, home / "data.jsonl", **values))


@pytest.fixture(autouse=True)
def _faked(monkeypatch):
    with tiny.faked(monkeypatch):
        yield


@pytest.fixture(scope="module")
def finished(home):
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        return tune(config_of(home, home / "run"))


def names(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_a_run_leaves_everything_that_a_reader_needs(finished, home):
    assert {"config.yaml", "latency.csv", "loss.csv", "plan.json", "report.json", "report.html", "model"} <= names(
        home / "run"
    )
    assert not [path for path in (home / "run").rglob(".*.tmp")]
    assert finished.plan == Plan.load(home / "run" / "plan.json")


def test_the_plan_lists_every_tensor_with_its_reason(finished):
    plan, spec = finished.plan, finished.session.spec
    listed = {entry.tensor for entry in plan.tensors} | {entry.tensor for entry in plan.kept}
    assert listed == set(finished.session.opened.checkpoint.tensors)
    assert all(entry.reason for entry in (*plan.tensors, *plan.kept))
    assert {group.name for group in plan.groups} == {group.name for group in spec.groups}
    plan.check_model(spec.model_hash, {e.tensor: e.shape for e in plan.tensors})


def test_the_plan_is_what_was_chosen_and_certified(finished):
    assert finished.certificates[finished.chosen.name].state == "certified"
    assert finished.plan.configuration == {
        group.name: option.scheme
        for group, option in zip(
            finished.problem.groups, finished.problem.chosen(finished.chosen.candidate.genotype), strict=True
        )
    }
    assert set(finished.plan.configuration.values()) != {"fp32"}


def test_the_report_says_why_this_point_and_how_loss_was_judged(finished):
    report = finished.report
    assert report["plan"]["why"].startswith(finished.chosen.name)
    assert set(report["budget"]["loss_ratio"]) == {"mean", "error", "spread"}
    assert set(report["calibration"]["rest_ms"]) == {"prefill", "decode"}
    assert all(set(factors) == {"prefill", "decode"} for factors in report["calibration"]["factors"].values())


def test_the_report_says_what_compressed_each_group(finished):
    for row in finished.report["groups"]:
        if row["scheme"] == "fp32":
            assert row["compression"] is None
        else:
            own = row["name"] in finished.chosen.files
            assert row["compression"]["method"].removesuffix(", sequential") in ("joint", "wanda")
            assert row["compression"]["method"].endswith(", sequential") is own
            assert 0 <= row["compression"]["layer_error"] < 1


def test_the_saved_model_is_the_certified_one(finished, home):
    loaded = autotune.load(home / "run")
    ids = torch.arange(10).view(1, 10)
    applied = autotune.apply(load_model(open_model(str(home / "model"))), home / "run")
    assert torch.equal(loaded(ids).logits, applied(ids).logits)


def test_a_plan_says_nothing_of_when_or_how_fast_it_was(finished):
    text = json.dumps(finished.plan.model_dump(mode="json"))
    assert "20" + "26-" not in text
    assert not {"created", "measured_ms", "seconds"} & set(finished.plan.model_dump())


@pytest.mark.parametrize("change", [{"seed": 1}, {"trials": 0}, {"fast": True, "compression": "auto"}])
def test_other_settings_search_again_but_measure_nothing_twice(finished, home, tmp_path, change, monkeypatch):
    shutil.copytree(home / "run", tmp_path / "run")

    def refuse(*_args, **_options):
        raise AssertionError("compressed again")

    monkeypatch.setattr("autotune.compress.methods.compress", refuse)
    assert tune(config_of(home, tmp_path / "run", **change), until="search").front.candidates


@pytest.mark.parametrize(
    "limits", [{"max_memory_bytes": 1000}, {"min_speedup": 100.0}, {"max_memory_bytes": 1, "min_speedup": 50.0}]
)
def test_an_unreachable_budget_names_the_nearest_point_and_writes_no_plan(home, tmp_path, limits):
    with pytest.raises(InfeasibleError, match="nearest is") as error:
        tune(config_of(home, tmp_path / "run", **limits))
    assert (error.value.code, error.value.exit_code) == ("search.infeasible", 4)
    if "max_memory_bytes" in limits:  # known before anything is measured
        assert "MiB" in error.value.message and "No scheme is small enough" in error.value.hint
        assert "latency.csv" not in names(tmp_path / "run")
    else:
        assert all(word in error.value.message for word in ("x dense", "MiB", "loss"))
        assert "Relax" in error.value.hint
    assert "plan.json" not in names(tmp_path / "run")


def test_a_kernel_that_fails_is_illegal_with_its_reason_and_the_run_goes_on(home, tmp_path, monkeypatch):
    why = {"w4a16-int4-g32": "killed by signal 11 while being timed", "w4a16-int4-g64": "wrong: off by 10%"}

    def broken(*args, **options):
        table = tiny.fake_profile(*args, **options)
        failed = {"median_us": None, "low_us": None, "high_us": None, "status": "failed"}
        rows = [replace(r, reason=why[r.scheme], **failed) if r.scheme in why else r for r in table.rows]
        return replace(table, rows=tuple(rows))

    monkeypatch.setattr(latency, "profile", broken)
    result = tune(config_of(home, tmp_path / "run", max_loss=0.5, trials=0), until="verify")
    assert not set(why) & set(result.plan.configuration.values())
    for entry in result.space.entries:
        if entry.scheme in why:
            assert entry.legality.status == "illegal"
            assert why[entry.scheme] in entry.legality.reason


def test_dimensions_that_no_group_divides_are_kept_dense_with_the_reason(home, tmp_path):
    folder = tiny.make_model("llama", tmp_path / "odd", intermediate_size=72, num_hidden_layers=1)
    config = RunConfig.of(**tiny.settings(folder, tmp_path / "run", home / "data.jsonl"))
    space = tune(config, until="profile").space
    odd = {e.scheme: e.legality for e in space.entries if e.group.endswith("down_proj")}
    for name in ("w4a16-int4-g32", "w4a16-int4-g64", "w4a16-int4-g128"):
        assert odd[name].status == "illegal"
        assert "72 inputs" in odd[name].reason
    assert odd["fp32"].usable


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("number", [1, 3, 6, 10, 14])
def test_a_full_disk_stops_with_one_message_and_the_next_run_goes_on(
    finished, home, tmp_path, monkeypatch, code, number
):
    """The n-th fsync fails; what was finished stays, and resumed the plan is the same."""
    out = tmp_path / "run"
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == number:
            raise OSError(code, os.strerror(code))
        return real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DeviceError) as error:
            tune(config_of(home, out), until="apply")
    assert error.value.code in ("store.no_space", "store.write")
    assert not [path for path in out.rglob(".*.tmp")]
    assert tune(config_of(home, out), until="apply").plan.model_dump_json() == finished.plan.model_dump_json()


BAD = {
    "model": ({"model": "no/where/at/all"}, "model.missing"),
    "target": ({"target": "h1000"}, "target.unknown"),
    "scheme": ({"schemes": ("w8a8-int",)}, "scheme.unknown"),
    "workload": ({"workload": "chatt"}, "workload.unknown"),
    "data": ({"data": "gone.jsonl"}, "data.missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_leaves_a_finished_run_as_it_was(home, tmp_path, finished, name, monkeypatch):
    """Neither its settings nor its plan are replaced by ones that cannot be used."""
    from autotune import session
    from autotune.targets import target

    def resolve(wanted):
        return (tiny.here(), True) if wanted == "auto" else (target.load(wanted), False)

    monkeypatch.setattr(session, "resolve_target", resolve)
    changes, code = BAD[name]
    out = tmp_path / "run"
    tune(config_of(home, out, trials=0), until="profile")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != ".lock"}
    config = config_of(home, out, trials=0).model_copy(update=changes)
    with pytest.raises(AutotuneError) as error:
        tune(config, until="score")
    assert error.value.code == code
    assert error.value.hint
    if name in ("model", "target", "workload"):
        assert {k: v for k, v in before.items() if (out / k).read_bytes() != v} == {}


def test_certification_on_too_little_leaves_a_plan_that_is_not_called_certified(home, tmp_path):
    result = tune(config_of(home, tmp_path / "run", certify_tokens=64, max_loss=0.02), until="report")
    assert result.report["plan"]["certified"] == "not_certified"
    assert "not certified" in result.report["plan"]["statement"]


def test_latency_only_needs_no_weights_and_claims_no_loss(home, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((home / "model" / "config.json").read_text())
    config = config_of(home, tmp_path / "run", max_loss=None, latency_only=True)
    result = tune(config.model_copy(update={"model": str(tmp_path / "bare")}), until="verify")
    assert result.plan.model.sha256 is None
    assert result.plan.prediction.loss_nats is None
    assert result.certificates == {}


# Another point of a finished search.


def test_another_point_is_a_plan_of_its_own(finished, home):
    other = next(point for point in finished.points if point.name.startswith("point "))
    number = int(other.name.removeprefix("point "))
    path, statement = choose_point(home / "run", None, number, None)
    plan = Plan.load(path)
    assert path != home / "run" / "plan.json"
    assert other.name in statement
    genotype = other.candidate.genotype
    chosen = {g.name: o.scheme for g, o in zip(finished.problem.groups, finished.problem.chosen(genotype), strict=True)}
    assert plan.configuration == chosen


def test_another_budget_is_stated_in_its_plan(finished, home):
    path, _ = choose_point(home / "run", 0.5, None, None)
    assert Plan.load(path).budget.max_loss == 0.5
    size = finished.plan.prediction.weight_bytes
    cache = cache_bytes(finished.session)[None]
    path, _ = choose_point(home / "run", None, None, size + cache)
    assert Plan.load(path).budget.max_memory_bytes == size + cache
    assert Plan.load(path).prediction.weight_bytes <= size
    with pytest.raises(InfeasibleError, match=f"{cache:,} of them the KV cache"):
        choose_point(home / "run", None, None, cache + 1)


def test_a_certificate_of_a_wider_budget_is_not_claimed_for_a_tighter_one(finished, home, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    number = next(p.name.removeprefix("point ") for p in finished.points if p.finalist and p.name.startswith("point "))
    found = json.loads((run / "certificates.json").read_text())
    for item in found:
        item["loss"]["upper"] = 0.015  # within the 2% that were asked for
    (run / "certificates.json").write_text(json.dumps(found))
    _, wide = choose_point(run, None, int(number), None)
    _, tight = choose_point(run, 0.01, int(number), None)
    assert "certified on" in wide
    assert "certified on" not in tight
    assert "not certified" in tight


def test_choosing_says_what_is_wrong(finished, home):
    with pytest.raises(UsageError) as usage:
        choose_point(home / "run", None, None, None)
    assert usage.value.code == "plan.choose"
    with pytest.raises(InputError, match="no point 99") as unknown:
        choose_point(home / "run", None, 99, None)
    assert unknown.value.code == "plan.point"
    with pytest.raises(InfeasibleError) as infeasible:
        choose_point(home / "run", None, None, 10)
    assert infeasible.value.code == "search.infeasible"
    with pytest.raises(InputError) as missing:
        choose_point(home / "nothing", 0.1, None, None)
    assert missing.value.code == "config.missing"
    assert not (home / "nothing").exists()
