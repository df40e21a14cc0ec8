"""The KV cache as a choice of the loop: searched, named, refused, counted; in the plan, and in what is loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch

import autotune
from autotune import cache_choice
from autotune.choosing import choose_point
from autotune.config import RunConfig
from autotune.decide import outer_choices
from autotune.errors import InfeasibleError, InputError, UsageError
from autotune.export import exporters
from autotune.kernels.kv_formats import GROUP
from autotune.kv_cache import coded_format
from autotune.model import load_model, open_model
from autotune.plan import Plan
from autotune.tune import tune
from autotune.verify import Interval

POSITIONS, ROWS = 8 + 4, 2 * 2 * 1  # of the workload; keys and values, key heads, layers


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    tiny.make_model("llama", folder / "model", initializer_range=0.2, num_hidden_layers=1)
    tiny.make_model("bert", folder / "bert")
    tiny.write_documents(folder / "data.jsonl", 16, 40)
    return folder


@pytest.fixture(autouse=True)
def _faked(monkeypatch):
    with tiny.faked(monkeypatch):
        yield


def config_of(home, out, kind="model", **changes):
    values = {"max_loss": 0.02, "trials": 6, "schemes": ("w8a16-int8", "w8a8-int8")} | changes
    return RunConfig.of(**tiny.settings(home / kind, out, home / "data.jsonl", **values))


@pytest.fixture(scope="module")
def searched(home):
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        return tune(config_of(home, home / "auto", kv_cache="auto"))


def test_what_saves_time_and_costs_next_to_nothing_is_taken(searched, home):
    plan = searched.plan
    assert plan.kv_cache == "int8" and plan.cache.formats == ("int8",)  # fp8 loses more and saves less
    assert plan.cache.cache_bytes == POSITIONS * ROWS * (16 + 4)
    assert plan.cache.dense_cache_bytes == POSITIONS * ROWS * 16 * 4
    assert 0 < plan.cache.loss_nats < 1e-3
    assert searched.certificates[searched.chosen.name].state == "certified"
    assert plan == Plan.load(home / "auto" / "plan.json")
    assert GROUP not in plan.configuration and GROUP not in plan.kernels


def test_the_report_says_what_was_weighed(searched, home):
    said = searched.report["kv_cache"]
    assert said["chosen"] == "int8" and said["dropped"]["fp8"].startswith("int8 is as small")
    assert said["formats"][1]["saving_ms"]["median"] == pytest.approx(tiny.CACHE_SAVES_MS["int8"])
    assert len(searched.report["groups"]) == len(searched.session.spec.groups)
    assert said["why"] in (home / "auto" / "report.html").read_text()
    saved = searched.problem.latency_us(searched.problem.dense) - searched.chosen.candidate.latency_us
    assert saved > 1e3 * tiny.CACHE_SAVES_MS["int8"]  # the format's and the groups'


def test_what_is_loaded_keeps_its_cache_so(searched, home):
    loaded = autotune.load(home / "auto")
    applied = autotune.apply(load_model(open_model(str(home / "model"))), home / "auto")
    ids = torch.arange(10).view(1, 10)
    outputs = [model(ids, use_cache=True) for model in (loaded, applied)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        assert [coded_format(layer) for layer in output.past_key_values.layers] == ["int8"]


def test_the_search_may_leave_it_out_everywhere(searched):
    formats = outer_choices(searched.problem)[GROUP]
    assert [("kv-int8" in subset) for subset in formats] == [True, False]
    assert all(
        "kv-int8" in subset for name, s in outer_choices(searched.problem).items() if name != GROUP for subset in s
    )
    measured = {candidate.genotype[-1] for candidate in searched.front.candidates}
    assert measured == {0, 1}


def test_a_finished_run_is_read_again_and_its_export_says_what_is_not_carried(searched, home, tmp_path):
    plan, _ = choose_point(home / "auto", 0.02, None, None)
    assert Plan.load(plan).kv_cache == "int8"
    pytest.importorskip("compressed_tensors")
    item = exporters.load(exporters.exporter("compressed-tensors"))
    done = item.write(home / "auto", tmp_path / "out")
    assert any("int8" in note and "not carried" in note for note in done.notes)


def test_by_default_nothing_is_asked_and_nothing_written(home, tmp_path):
    result = tune(config_of(home, tmp_path / "run"))
    assert result.cache is None and result.plan.kv_cache is None and result.report["kv_cache"] is None
    assert "cache" not in json.loads((tmp_path / "run" / "plan.json").read_text())["plan"]
    assert not list((tmp_path / "run").glob("cache*.json"))


def test_a_named_format_is_taken_whatever_it_saves(home, tmp_path):
    result = tune(config_of(home, tmp_path / "run", kv_cache="fp8"))
    assert result.plan.kv_cache == "fp8" and result.plan.cache.reason.endswith("asked for")
    dense = result.problem.dense
    assert all(c.genotype[-1] == 1 for c in result.front.candidates if c.genotype != dense)
    assert dense in {c.genotype for c in result.front.candidates}  # what speed-ups are quoted over


def test_what_cannot_be_kept_is_said_before_anything_is_measured(home, tmp_path):
    with pytest.raises(UsageError, match="an encoder keeps no keys") as error:
        tune(config_of(home, tmp_path / "run", "bert", kv_cache="int8"))
    assert error.value.code == "kv_cache.unsupported"
    assert not (tmp_path / "run" / "latency.csv").exists()
    with pytest.raises(InputError, match="kv_cache"):
        config_of(home, tmp_path / "run", kv_cache="int4")


def test_auto_says_why_an_encoder_has_no_choice(home, tmp_path):
    result = tune(config_of(home, tmp_path / "run", "bert", kv_cache="auto"))
    assert result.plan.kv_cache is None
    assert "encoder" in result.plan.cache.reason


def test_memory_counts_the_cache(searched, home, tmp_path):
    """Room for the weights but not for the cache as the model is run: the coded one is taken, and it fits."""
    sizes = cache_choice.cache_bytes(searched.session)
    weights = searched.plan.prediction.weight_bytes
    limits = {"max_memory_bytes": weights + sizes["int8"] + 8}
    shutil.copytree(home / "auto", tmp_path / "run")
    result = tune(config_of(home, tmp_path / "run", kv_cache="auto", **limits))
    assert result.plan.kv_cache is not None
    assert result.plan.prediction.weight_bytes + result.plan.cache.cache_bytes <= limits["max_memory_bytes"]
    assert result.chosen.candidate.weight_bytes <= limits["max_memory_bytes"]
    with pytest.raises(InfeasibleError):
        tune(config_of(home, tmp_path / "dense", max_memory_bytes=weights + sizes["int8"] + 8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"saving_ms": Interval(0.1, -0.1, 0.3)}, "nothing that the run can tell"),
        ({"loss_nats": 1.0}, "nats alone"),
        ({}, ""),
    ],
)
def test_why_a_format_is_not_searched(searched, change, words):
    item = replace(searched.cache.of("int8"), **change)
    said = cache_choice._unwanted(searched.session, item, [searched.cache.of(None)])
    assert words in said and bool(said) == bool(words)
