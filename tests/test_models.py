"""Models are loaded on first use; of a large one only that is kept which the next stage needs."""

from __future__ import annotations

import os

import pytest
import tiny
import yaml

from autotune import samples
from autotune.config import RunConfig
from autotune.models import Models
from autotune.place import available_memory
from autotune.run import RunFolder, silent
from autotune.session import open_session
from autotune.tune import tune

LOADED = ("dense", "reference", "teacher", "runnable")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("models")
    changes = {"initializer_range": 0.2, "num_hidden_layers": 1}
    tiny.make_model("llama", folder / "model", torch.bfloat16, **changes)
    tiny.write_documents(folder / "data.jsonl", 16, 40)
    return folder


@pytest.fixture(autouse=True)
def _faked(monkeypatch):
    with tiny.faked(monkeypatch):
        yield


def config_of(home, out):
    return RunConfig.of(**tiny.settings(home / "model", out, home / "data.jsonl", max_loss=0.02, trials=4))


def session_of(home, out):
    return open_session(RunFolder(out), config_of(home, out), silent)


@pytest.mark.parametrize("large", [False, True])
def test_room_is_made_of_large_models_only(home, tmp_path, monkeypatch, large):
    monkeypatch.setattr(samples, "LARGE", 0 if large else 10**9)
    session = session_of(home, tmp_path)
    models = Models(session, None, None)
    before = models.dense
    models.done_with_losses()
    assert (models.dense is before) is not large
    assert session.arithmetic == ("bf16" if large else "fp32")


def test_a_large_model_run_in_fp32_is_measured_in_fp32(models, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "LARGE", 0)
    config = RunConfig.of(**tiny.settings(models("llama"), tmp_path, tmp_path / "unused"))
    session = open_session(RunFolder(tmp_path), config, silent)
    assert session.large
    assert session.arithmetic == "fp32"


@pytest.mark.parametrize("plenty", [False, True])
def test_the_loop_holds_two_large_models_only_where_memory_is_plenty(home, tmp_path, monkeypatch, plenty):
    monkeypatch.setattr(samples, "LARGE", 0)
    monkeypatch.setattr("autotune.place.available_memory", lambda: 2**40 if plenty else 0)
    held, made = [], []
    init = Models.__init__

    def remember(self, *args):
        init(self, *args)
        made.append(self)

    def reporter(stage, done, total, note=""):
        held.append({name for models in made for name in LOADED if name in models.__dict__})

    monkeypatch.setattr(Models, "__init__", remember)
    result = tune(config_of(home, tmp_path / "run"), reporter)
    assert {"runnable"} in held
    assert any("reference" in names for names in held)
    both = any("runnable" in names and len(names) > 1 for names in held)
    assert both is plenty
    assert result.floor_nats > 0
    assert result.report["data"]["arithmetic"] == "bf16"
    assert any("bf16 products" in warning for warning in result.report["warnings"])
    assert set(result.plan.configuration.values()) != {"bf16"}


def test_a_run_writes_the_sizes_it_resolved_and_says_what_it_reduced(home, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "FULL", 1)
    values = config_of(home, tmp_path / "run").model_dump(exclude_unset=True)
    for name in ("search_tokens", "trials"):
        del values[name]
    result = tune(RunConfig.of(**values))
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["search_tokens"], written["trials"]) == (1536, 6)
    assert written["score_tokens"] == 200
    assert "search_tokens 1,536 (of 8,192)" in result.report["data"]["reduced"]
    assert result.report["data"]["reduced"] in result.report["warnings"]


def test_available_memory_is_some_of_what_there_is():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory() <= pages
