"""Sample sizes follow from the parameter count alone, shrink as it grows, and never override what was asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune import samples
from autotune.config import RunConfig
from autotune.model import load_model, open_model
from autotune.samples import FLOORS, FULL, parameters, reduced, resolve, sized
from autotune.search_space.groups import KeptTensor, LayerGroup, Linear, ModelSpec

DEFAULTS = {name: RunConfig.model_fields[name].default for name in FLOORS}
COUNTS = st.integers(1, 10**12)


def config(**values) -> RunConfig:
    return RunConfig.of(model="m", out="o", **values)


def spec(count: int) -> ModelSpec:
    """A model of so many parameters, half of them in a layer group."""
    group = LayerGroup("g", "up", 0, (Linear("t", "m", count // 2, 1, False),))
    kept = KeptTensor("k", (count - count // 2,), 2 * (count - count // 2), "embedding")
    return ModelSpec("m", "A", "causal-lm", "bf16", None, (group,), (kept,), False)


def sizes(settings: RunConfig) -> dict[str, int]:
    return {name: getattr(settings, name) for name in FLOORS}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-bf16", "gpt2", "bert"])
def test_parameters_are_those_of_the_model(models, name):
    opened = open_model(str(models(name)))
    assert parameters(opened.spec) == sum(parameter.numel() for parameter in load_model(opened).parameters())


@pytest.mark.parametrize("count", [1, 13_800_000, FULL])
def test_small_models_keep_every_default(count):
    assert sizes(resolve(config(), spec(count))) == DEFAULTS
    assert reduced(resolve(config(), spec(count)), spec(count)) == ""


@given(COUNTS, COUNTS)
def test_a_larger_model_is_never_measured_more(first, second):
    small, large = sorted((first, second))
    for name, (least, _) in FLOORS.items():
        assert min(least, DEFAULTS[name]) <= sized(name, large) <= sized(name, small) <= DEFAULTS[name]


@given(COUNTS)
def test_every_size_is_one_that_settings_accept(count):
    values = {name: sized(name, count) for name in FLOORS}
    assert sizes(config(**values)) == values


def test_between_the_limits_the_work_stays_about_the_same():
    for name in ("score_tokens", "search_tokens", "certify_tokens"):
        assert sized(name, 2 * FULL) * 2 == pytest.approx(DEFAULTS[name], rel=0.02)


def test_a_large_model_gets_the_floors():
    assert sizes(resolve(config(), spec(600_000_000))) == {name: least for name, (least, _) in FLOORS.items()}


@given(st.dictionaries(st.sampled_from(sorted(set(FLOORS) - {"finalists"})), st.integers(64, 300_000)))
def test_what_was_asked_for_stays(asked):
    found = sizes(resolve(config(**asked), spec(600_000_000)))
    assert {name: found[name] for name in asked} == asked
    assert all(found[name] == FLOORS[name][0] for name in FLOORS if name not in asked)


def test_a_default_that_is_asked_for_stays_too():
    assert resolve(config(search_tokens=DEFAULTS["search_tokens"]), spec(600_000_000)).search_tokens == 8192


def test_resolved_settings_read_back_and_resolve_to_themselves(tmp_path):
    large = spec(600_000_000)
    settings = resolve(config(), large)
    settings.save(tmp_path / "config.yaml")
    again = RunConfig.load(tmp_path / "config.yaml")
    assert again == settings
    assert resolve(again, large) == settings
    assert resolve(again, spec(1000)) == settings  # written numbers are asked for, whatever the model


def test_what_is_reduced_is_said_with_what_it_was():
    large = spec(473_000_000)
    text = reduced(resolve(config(score_tokens=4096), large), large)
    assert "473M parameters" in text
    assert "search_tokens 1,536 (of 8,192)" in text
    assert "certify_tokens 20,000 (of 200,000)" in text
    assert "score_tokens" not in text


def test_what_is_not_used_is_not_said():
    large = spec(600_000_000)
    assert reduced(resolve(config(max_loss=None, latency_only=True), large), large) == ""
    assert "trials" in reduced(resolve(config(), large), large)
    assert "trials" not in reduced(resolve(config(minutes=5.0), large), large)
    assert "trials" not in reduced(resolve(config(fast=True), large), large)


def test_nothing_but_the_count_matters():
    large = spec(600_000_000)
    other = replace(large, name="other", architecture="B", task="encoder", model_hash="x")
    assert resolve(config(), other) == resolve(config(), large)
    assert samples.LARGE > FULL


def test_compression_without_a_hessian_is_for_fast_runs_and_the_quick_one_for_large_models():
    small, large = spec(14_000_000), spec(600_000_000)
    assert resolve(config(), small).compression == "auto"
    assert resolve(config(fast=True), small).compression == "wanda"
    assert resolve(config(fast=True), large).compression == "wanda"
    assert resolve(config(), large).compression == "gptq"
    assert (resolve(config(), small).recompress, resolve(config(), large).recompress) == (True, False)
    assert resolve(config(compression="auto"), large).recompress
    assert resolve(config(fast=True, compression="joint"), large).compression == "joint"
    assert "compression gptq (auto" in reduced(resolve(config(), large), large)
    assert "compression" not in reduced(resolve(config(fast=True), large), large)
    assert "compression" not in reduced(resolve(config(compression="auto"), large), large)
