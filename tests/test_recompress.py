"""Finalists compressed again in the whole loop: the better weights are certified, saved, reported and found again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch

import autotune
from autotune import recompress
from autotune.choosing import choose_point
from autotune.compress import methods
from autotune.compress.database import own_name
from autotune.config import RunConfig
from autotune.decide import configuration
from autotune.finalists import OwnWeights, Point
from autotune.model import load_model, open_model
from autotune.plan import Plan
from autotune.search.problem import Candidate, Evaluation
from autotune.tune import tune


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recompress")
    tiny.make_model("llama", folder / "model", initializer_range=0.15)
    tiny.write_documents(folder / "data.jsonl", 24, 60)
    return folder


def config_of(home, out, **changes):
    values = {"max_loss": 0.5, "trials": 4, "calibration_tokens": 600, "schemes": ("w4a16-int4-g64", "w8a16-int8")}
    return RunConfig.of(**tiny.settings(home / "model", out, home / "data.jsonl", **(values | changes)))


@pytest.fixture(autouse=True)
def _faked(monkeypatch):
    with tiny.faked(monkeypatch):
        yield


@pytest.fixture(scope="module")
def finished(home):
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        return tune(config_of(home, home / "run"))


def test_every_finalist_was_compressed_again_and_the_better_one_is_taken(finished):
    finalists = [point for point in finished.points if point.finalist]
    rows = finished.report["recompression"]["finalists"]
    assert [row["name"] for row in rows] == [point.name for point in finalists]
    for point, row in zip(finalists, rows, strict=True):
        assert row["taken"] == (row["kl_nats_after"] < row["kl_nats_before"])
        assert point.candidate.evaluation.kl_nats == min(row["kl_nats_before"], row["kl_nats_after"])
    assert finished.chosen.own.better  # else the tests below say nothing


def test_the_plan_says_so(finished):
    about = finished.plan.recompression
    assert set(about.groups) == set(finished.chosen.files)
    for entry in finished.plan.tensors:
        assert entry.reason.endswith("compressed again for the inputs it gets in this plan") == (
            entry.group in about.groups
        )
    assert finished.plan.prediction.search_kl_nats == finished.chosen.own.after.kl_nats


def test_what_is_saved_is_what_was_measured(finished, home):
    """The saved weights are the finalist's own, and applying them to the model gives the same."""
    loaded = autotune.load(home / "run")
    applied = autotune.apply(load_model(open_model(str(home / "model"))), home / "run")
    ids = torch.arange(10).view(1, 10)
    assert torch.equal(loaded(ids).logits, applied(ids).logits)
    session = finished.session
    from autotune.reference_model import ReferenceModel

    chosen = finished.plan.configuration
    outputs = {}
    for name, weights in (("own", finished.chosen.weights(finished.database, chosen)), ("all", finished.database)):
        model = ReferenceModel(session.reference(), session.spec, weights)
        model.select(chosen)
        outputs[name] = model.outputs(ids[0])
    apart = {name: float((loaded(ids).logits[0] - y).norm() / y.norm()) for name, y in outputs.items()}
    assert apart["own"] < 0.02
    assert apart["all"] > 2 * apart["own"]


def test_certification_was_of_these_weights(finished):
    """Its loss is that of the finalist's own weights on the certification documents."""
    from autotune.compress.database import WeightDatabase
    from autotune.reference_model import ReferenceModel
    from autotune.teacher import Teacher

    session, database = finished.session, finished.database
    chosen = finished.plan.configuration
    weights = WeightDatabase(database.folder, dict(database.entries))
    weights.entries.update({(g, own_name(chosen[g], f)): f for g, f in finished.chosen.files.items()})
    kl = finished.certificates[finished.chosen.name].kl
    documents = session.certification_documents[: kl.documents]  # it may be sure after the first look
    teacher = Teacher(ReferenceModel(session.reference(), session.spec, weights), documents, (1,))
    own, shared = teacher.measure(finished.chosen.entries(chosen)).kl_nats, teacher.measure(chosen).kl_nats
    assert kl.mean == pytest.approx(own, rel=0.01)
    assert kl.mean != pytest.approx(shared, rel=0.02)


def test_a_run_that_goes_on_finds_it(finished, home, tmp_path, monkeypatch):
    out = shutil.copytree(home / "run", tmp_path / "run")
    monkeypatch.setattr(methods, "compress", lambda *_: pytest.fail("compressed again"))
    again = tune(config_of(home, out))
    assert again.plan == finished.plan
    assert (out / "plan.json").read_bytes() == (home / "run" / "plan.json").read_bytes()


def test_lost_weights_are_made_again_and_are_the_same(finished, home, tmp_path):
    out = shutil.copytree(home / "run", tmp_path / "run")
    for name in finished.chosen.files.values():
        (out / "database" / name).unlink()
    assert tune(config_of(home, out), until="apply").plan == finished.plan


def test_another_point_has_its_own_weights_too(finished, home):
    number = finished.chosen.name.removeprefix("point ")
    path, _ = choose_point(home / "run", None, number, None)
    assert Plan.load(path).recompression == finished.plan.recompression
    other = next(point for point in finished.points if not point.finalist)
    path, _ = choose_point(home / "run", None, other.name.removeprefix("point "), None)
    assert Plan.load(path).recompression is None


def test_weights_of_another_compression_are_refused(finished, home, tmp_path):
    plan = finished.plan.model_copy(update={"recompression": None})
    plan.save(tmp_path / "plan.json")
    model = load_model(open_model(str(home / "model")))
    with pytest.raises(autotune.errors.InputError) as error:
        autotune.apply(model, tmp_path / "plan.json", home / "run")
    assert error.value.code == "apply.weights"


def test_it_can_be_switched_off(finished, home, tmp_path):
    out = shutil.copytree(home / "run", tmp_path / "run")
    result = tune(config_of(home, out, recompress=False))
    assert result.report["recompression"] is None
    assert result.plan.recompression is None
    assert all(point.own is None for point in result.points)


def test_without_a_hessian_it_is_off_unless_asked_for(home, tmp_path):
    fast = tune(config_of(home, tmp_path / "fast", compression="wanda", trials=0), until="verify")
    assert fast.session.config.recompress is False
    assert fast.plan.recompression is None
    asked = {"compression": "wanda", "trials": 0, "recompress": True}
    result = tune(config_of(home, tmp_path / "fast", **asked), until="verify")
    own = [point.own for point in result.points if point.finalist]
    assert any(item.better for item in own)  # the sweep, where the database has rounding to nearest


def test_the_worse_one_is_not_taken():
    before, after = (Evaluation((10.0,), (kl,), (kl,)) for kl in (0.1, 0.2))
    candidate = Candidate((0,), 1.0, 1, 0.1, before, "test")
    point = Point("point 0", candidate, True)
    worse = recompress._with(point, OwnWeights({"g": "f" * 32}, before, after))
    assert (worse.candidate, worse.files, worse.entries({"g": "2:4"})) == (candidate, {}, {"g": "2:4"})
    better = recompress._with(point, OwnWeights({"g": "f" * 32}, after, before))
    assert better.candidate.evaluation is before
    assert better.entries({"g": "2:4"}) == {"g": "2:4@" + "f" * 12}
    other = replace(point, finalist=False)
    assert recompress._with(other, OwnWeights({}, after, before)) is other


def test_the_file_is_plain(finished, home):
    value = json.loads((home / "run" / "recompress.json").read_text())
    chosen = configuration(finished.problem, finished.chosen.candidate.genotype)
    row = value["configurations"][recompress._name(chosen)]
    assert row["files"] == finished.chosen.files
