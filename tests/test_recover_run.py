"""`autotune recover` on a finished run of a tiny model: what it writes, refuses and survives."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from rich.console import Console
from safetensors.torch import load_file

import autotune
from autotune import cli, place, recover_command
from autotune.cleaning import clean
from autotune.config import RunConfig
from autotune.errors import AutotuneError, InputError, UsageError, VerificationError
from autotune.finalists import OwnWeights
from autotune.model import load_model, open_model
from autotune.plan import Plan
from autotune.recover import run as recover_module
from autotune.recover import training
from autotune.recover.job import Options
from autotune.recover.run import recover
from autotune.session import Session
from autotune.tune import tune

TRAINED = "uniform 2:4+w8a8-int8"


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        patch.setattr("autotune.recover.texts.LENGTH", 32)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run, and text to train on; latencies are arithmetic."""
    folder = tmp_path_factory.mktemp("recover")
    tune(RunConfig.of(**tiny.trainable(folder)))
    return folder


def options(home, **changes):
    values = {"tokens": 24 * 256, "data": home / "more.txt", "point": TRAINED, "rate": 0.03, "batch_tokens": 256}
    return Options(**(values | changes))


@pytest.fixture(scope="module")
def recovered(home, _quick):
    return recover(home / "run", options(home))


def outputs(model):
    return model(torch.arange(97, 117).view(1, -1)).logits


def test_it_loses_less_than_before_on_documents_it_never_saw(recovered):
    search = recovered["search_documents"]
    assert search["kl_nats"] < 0.9 * search["kl_nats_before"]
    assert recovered["curve"][0]["tokens"] == 0
    assert recovered["curve"][-1]["tokens"] == recovered["recovery"]["tokens"] == 24 * 256
    assert recovered["curve"][-1]["check_nats"] < recovered["curve"][0]["check_nats"]


def test_what_cannot_fit_is_refused_before_anything_is_loaded(home, monkeypatch):
    monkeypatch.setattr(place, "available_memory", lambda: 1000)
    monkeypatch.setattr(Session, "reference", lambda _: pytest.fail("loaded"))
    with pytest.raises(InputError, match=r"recover\.memory.*takes 0\.0 GiB and more") as caught:
        recover(home / "run", options(home, seed=5))
    assert "--point" in caught.value.hint


def test_the_plan_says_what_was_trained(recovered, home):
    plan = Plan.load(home / "run" / "recovered" / "plan.json")
    about = plan.recovery
    assert about.model_dump(mode="json") == recovered["recovery"]
    assert set(about.groups) == {group for group, scheme in plan.configuration.items() if scheme != "fp32"}
    assert (about.steps, about.seed, about.data) == (24, 0, "more.txt")
    assert all(group.predicted_loss_nats is None for group in plan.groups if group.name in about.groups)
    assert all("trained" in entry.reason for entry in plan.tensors if entry.group in about.groups)


def test_the_runs_own_plan_is_left_alone(recovered, home):
    plan = Plan.load(home / "run" / "plan.json")
    assert plan.recovery is None
    assert "recovery" not in json.loads((home / "run" / "plan.json").read_text())["plan"]


def test_the_recovered_model_loads_applies_and_is_what_was_measured(recovered, home):
    folder = home / "run" / "recovered"
    loaded = autotune.load(folder)
    applied = autotune.apply(load_model(open_model(str(home / "model"))), folder)
    assert torch.equal(outputs(loaded), outputs(applied))
    dense = load_model(open_model(str(home / "model")))
    wanted, found = outputs(dense).log_softmax(-1), outputs(loaded).log_softmax(-1)
    kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert kl < recovered["search_documents"]["kl_nats_before"]


def test_a_model_of_other_weights_is_still_refused(recovered, home, tmp_path):
    other = tiny.make_model("llama", tmp_path / "other", seed=1, initializer_range=0.2, num_hidden_layers=1)
    with pytest.raises(InputError) as error:
        autotune.apply(load_model(open_model(str(other))), home / "run" / "recovered")
    assert error.value.code == "plan.model_mismatch"


def test_it_exports_like_any_other(recovered, home, tmp_path):
    pytest.importorskip("compressed_tensors")
    from autotune.export import exporters

    exporter = exporters.load(exporters.exporter("compressed-tensors"))
    exporter.write(home / "run" / "recovered", tmp_path / "out", home / "model", False)
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_the_same_again_does_nothing(recovered, home, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    assert recover(home / "run", options(home)) == recovered


def test_killed_and_resumed_it_ends_in_the_same_bytes(recovered, home, monkeypatch):
    folder = home / "run" / "recovered"
    plan, codes, told = folder / "plan.json", folder / "weights", folder / "recovery.json"
    wanted, said = {path: path.read_bytes() for path in (plan, *codes.iterdir())}, told.read_bytes()
    tensors = load_file(folder / "model" / "compressed.safetensors")
    told.unlink()
    monkeypatch.setattr(training, "_SAVE_EVERY_S", -1.0)

    class Killed(Exception):
        pass

    def kill(stage, done, total, note=""):
        if (stage, done) == ("recover", 11):
            raise Killed

    with pytest.raises(Killed):
        recover(home / "run", options(home), kill)
    steps = []
    recover(home / "run", options(home), lambda stage, done, *_: steps.append(done) if stage == "recover" else None)
    assert steps[0] == 12  # not from the start
    assert {path: path.read_bytes() for path in (plan, *codes.iterdir())} == wanted
    again = load_file(folder / "model" / "compressed.safetensors")  # its header has no fixed order
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in again)
    told.write_bytes(said)


def test_stopping_early_saves_the_best_so_far_and_goes_on_later(home, recovered):
    steps = iter(range(100))
    value = recover(home / "run", options(home, seed=5), should_stop=lambda: next(steps) >= 20)
    assert value["stopped"] and 0 < value["recovery"]["steps"] <= 20
    assert Plan.load(home / "run/recovered/plan.json").recovery.steps == value["recovery"]["steps"]
    whole = recover(home / "run", options(home, seed=5))
    assert not whole["stopped"] and whole["recovery"]["steps"] == 24


def test_minutes_are_turned_into_steps_once(home, recovered, monkeypatch):
    monkeypatch.setattr(training, "steps_for_minutes", lambda *_: 20)
    asked = options(home, tokens=None, minutes=0.5)
    assert recover(home / "run", asked)["curve"][-1]["steps"] == 20
    monkeypatch.setattr(training, "steps_for_minutes", None)
    (home / "run" / "recovered" / "recovery.json").unlink()
    assert recover(home / "run", asked)["curve"][-1]["steps"] == 20


def test_a_finalist_starts_from_its_own_codes(home, monkeypatch):
    """Where the run compressed a finalist again, these are what is trained."""
    from autotune.finished import reload
    from autotune.recover import candidates

    result = reload(home / "run")
    plain = result.database
    points = candidates._points(result)
    point = next(point for point in points if point.finalist)
    chosen = candidates.configuration(result.problem, point.candidate.genotype)
    files = {group: f"{number}.safetensors" for number, group in enumerate(chosen) if chosen[group] != "fp32"}
    own = OwnWeights(files, replace(point.candidate.evaluation, kl=(9.0,) * 8), point.candidate.evaluation)
    points = tuple(replace(item, own=own) if item is point else item for item in points)
    monkeypatch.setattr(candidates, "_points", lambda _: points)
    name, found, database = candidates.find(result, home / "run", point.name.removeprefix("point "))
    assert (name, found) == (point.name, chosen)
    assert {group: database.entries[group, chosen[group]] for group in files} == files
    other = next(item for item in points if not item.files).name.removeprefix("point ")
    assert candidates.find(result, home / "run", other)[2].entries == plain.entries


def test_without_data_the_calibration_documents_are_used(home):
    value = recover(home / "run", options(home, data=None))
    assert value["recovery"]["data"] == "data.jsonl, calibration documents"
    assert value["unique_tokens"] < 4 * 200


@pytest.mark.parametrize(
    ("changes", "kind", "code"),
    [
        ({"minutes": 1.0}, UsageError, "recover.budget"),
        ({"device": "abacus"}, UsageError, "recover.device"),
        ({"point": "77"}, InputError, "plan.point"),
        ({"point": "uniform fp32"}, InputError, "recover.nothing"),
        ({"data": "absent.txt"}, InputError, "data.missing"),
        ({"data": "few.txt"}, InputError, "recover.too_few"),
        ({"rate": 50.0}, AutotuneError, "recover.no_gain"),
    ],
)
def test_what_cannot_be_done_has_a_code(home, changes, kind, code):
    (home / "few.txt").write_text("too few")
    if isinstance(changes.get("data"), str):
        changes = {"data": home / changes["data"]}
    with pytest.raises(kind) as error:
        recover(home / "run", options(home, **changes))
    assert error.value.code == code
    assert error.value.hint


def test_text_of_search_and_certification_is_never_trained_on(home):
    """The run's own documents as --data: only those of calibration are left."""
    value = recover(home / "run", options(home, data=home / "data.jsonl"))
    assert value["left_out_documents"] == 12


def test_a_folder_that_is_no_run_is_refused_and_stays_empty(tmp_path):
    with pytest.raises(InputError) as error:
        recover(tmp_path / "nowhere", Options())
    assert error.value.code == "config.missing"
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def call(monkeypatch, capsys):
    monkeypatch.setattr(cli, "console", Console(highlight=False, width=200))
    monkeypatch.setattr(recover_command, "console", Console(highlight=False, width=200))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["autotune", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return run


def test_the_command_prints_what_it_did(call, home):
    command = ["recover", home / "run", "--tokens", 8192, "--data", home / "more.txt", "--point", TRAINED]
    code, out, err = call(*command)
    assert code in (0, 6), err  # the budget may still be missed; the plan is there
    assert "trained on more.txt" in out and "KL to dense" in out and "tokens/s" in out
    if code == 6:
        assert "certify." in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--minutes", "0"], 2),
        (["--tokens", "-4"], 2),
        (["--minutes", "1", "--tokens", "9"], 2),
        (["--point", "99"], 3),
        (["--point", "searched", "--device", "abacus"], 2),
    ],
)
def test_the_command_refuses_with_exit_codes(call, home, arguments, code):
    status, _, err = call("recover", home / "run", *arguments)
    assert status == code
    assert "error" in err


def test_tune_goes_on_to_a_searched_recovery(call, home, monkeypatch):
    """Also where the plan was not certified; the price is said first, and a budget of no minutes is refused first."""
    asked = []
    monkeypatch.setattr(recover_module, "recover", lambda run, options, *_: asked.append(options) or {})
    monkeypatch.setattr(recover_command, "_print", lambda run, value: None)
    monkeypatch.setattr(recover_command, "_check_certificate", lambda run, value: None)

    def finish(result):
        raise VerificationError("certify.not_certified", "not certified.", "")

    monkeypatch.setattr(cli, "_finish", finish)
    monkeypatch.setattr(cli, "_run", lambda config, until: None)
    command = ["tune", home / "model", "--out", home / "run", "--recover"]
    code, out, err = call(*command, "10")
    assert code == 0, err
    assert "certify.not_certified" in out and "25 min of training in all" in out
    assert [(item.point, item.minutes) for item in asked] == [("searched", 10.0)]
    assert call(*command, "0")[0] == 2 and len(asked) == 1


def test_the_price_is_in_the_dry_run(call, home):
    code, out, err = call("tune", home / "model", "--dry-run", "--recover", "8", "--out", home / "dry")
    assert code == 0, err
    assert "8 min of training for the plan, up to " in out


def test_cleaning_removes_codes_and_checkpoints_and_keeps_plan_and_model(home, recovered, tmp_path):
    import shutil

    run = shutil.copytree(home / "run", tmp_path / "run")
    clean(run, measurements=False)
    assert not (run / "recovered" / "weights").exists()
    assert (run / "recovered" / "plan.json").is_file()
    autotune.load(run / "recovered")
    assert recover_module.METHOD
