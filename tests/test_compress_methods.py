"""Methods by name: what each gives is what a scheme promises, and `auto` takes what loses least on other documents."""

from __future__ import annotations

import pytest
import torch
from test_compress_sweep import correlated, weights

from autotune.compress import methods
from autotune.compress.calibrate import InputStatistics
from autotune.errors import InputError
from autotune.kernels.formats import code_type, round_scale
from autotune.kernels.reference import dequantize
from autotune.search_space.schemes import MORE, SCHEMES, survivors

COMPRESSED = [item for item in (*SCHEMES, *MORE) if not item.is_dense]


def statistics(seed=0):
    return InputStatistics(correlated(seed=seed).diagonal(), correlated(seed=seed), correlated(seed=seed, tokens=4000))


@pytest.mark.parametrize("name", methods.METHODS)
def test_weights_are_what_their_scheme_says(name):
    weight = weights()
    for item, found in zip(COMPRESSED, methods.METHODS[name](weight, statistics(), COMPRESSED), strict=True):
        assert found.scheme == item.name
        if item.sparsity != "dense":
            block = item.block or 128
            kept = (dequantize(found).view(24, -1, block) != 0).sum(-1)
            assert int(kept.max()) <= survivors(item.sparsity, block)
        if item.weight.bits >= 16:
            assert found.dense.dtype == torch.bfloat16
            continue
        assert found.codes.dtype == code_type(item.weight)
        assert (found.zeros is None) == item.weight.symmetric
        levels = dequantize(found) / found.scales.repeat_interleave(item.weight.group_size or 128, 1)
        assert float(levels.abs().max()) <= item.weight.qmax * (1.0 if item.weight.symmetric else 2.01) + 1e-6
        assert found.scales.shape == (24, 128 // (item.weight.group_size or 128))
        assert torch.equal(found.scales, round_scale(found.scales))


@pytest.mark.parametrize("name", methods.METHODS)
def test_schemes_taken_together_get_what_they_get_alone(name):
    weight, inputs = weights(), statistics()
    for item, found in zip(COMPRESSED, methods.METHODS[name](weight, inputs, COMPRESSED), strict=True):
        assert torch.equal(dequantize(found), dequantize(methods.METHODS[name](weight, inputs, [item])[0]))


def test_parts_of_rows_make_the_whole(monkeypatch):
    whole = methods.joint(weights(), statistics(), COMPRESSED)
    monkeypatch.setattr(methods, "_ROWS_OF_WEIGHTS", 7 * 128)
    for a, b in zip(methods.joint(weights(), statistics(), COMPRESSED), whole, strict=True):
        assert float((dequantize(a) - dequantize(b)).norm() / dequantize(b).norm()) < 1e-3


def test_methods_in_order_of_what_they_lose():
    """Where inputs depend on each other; magnitude and HWPQ are near each other by construction."""
    weight, inputs = weights(), statistics()
    power = inputs.output_power(weight)

    def lost(made):
        return inputs.output_power(dequantize(made) - weight) / power

    by_method = {
        name: {made.scheme: lost(made) for made in method(weight, inputs, COMPRESSED)}
        for name, method in methods.METHODS.items()
    }
    assert methods.compress("joint", weight, inputs, COMPRESSED[:1])[0].layer_error == by_method["joint"]["w8a8-int8"]
    for item in COMPRESSED:
        loss = {name: errors[item.name] for name, errors in by_method.items()}
        assert loss["joint"] < loss["wanda"]
        assert loss["signround"] <= loss["wanda"]
        if item.weight.kind == "int" and item.sparsity == "dense":
            assert loss["joint"] < loss["signround"] < 0.8 * loss["wanda"]
        if item.sparsity != "dense":
            assert loss["joint"] < loss["gptq"] < 0.9 * loss["wanda"]
            assert loss["joint"] < 0.6 * loss["wanda"]
            assert loss["wanda"] < min(loss["hwpq"], loss["magnitude"])
        else:
            assert loss["joint"] == loss["gptq"]
            assert loss["wanda"] == loss["hwpq"] == loss["magnitude"]


def test_auto_takes_what_loses_least_on_the_documents_set_aside(monkeypatch):
    weight, fair = weights(), statistics()
    assert {found.method for found in methods.compress("auto", weight, fair, COMPRESSED)} == {"joint"}
    misled = InputStatistics(fair.moment, fair.fit, correlated(seed=7))  # other inputs than it was fitted to
    chosen = methods.compress("auto", weight, misled, COMPRESSED)
    for name in methods.AUTO_METHODS:
        for item, best in zip(methods.compress(name, weight, misled, COMPRESSED), chosen, strict=True):
            assert best.layer_error <= item.layer_error
    assert "wanda" in {found.method for found in chosen}


def test_without_a_hessian_no_error_is_stated():
    inputs = InputStatistics(correlated().diagonal())
    found = methods.compress("wanda", weights(), inputs, COMPRESSED)
    assert {item.layer_error for item in found} == {None}
    assert not methods.takes_hessian("wanda")
    assert methods.takes_hessian("auto")


def test_silent_inputs_have_no_error():
    silent = InputStatistics(torch.zeros(128), torch.zeros(128, 128), torch.zeros(128, 128))
    assert {item.layer_error for item in methods.compress("auto", weights(), silent, COMPRESSED)} == {0.0}


def test_an_unknown_method_names_the_nearest():
    methods.check("auto")
    with pytest.raises(InputError, match="wamda") as error:
        methods.check("wamda")
    assert error.value.code == "compression.unknown"
    assert "wanda" in error.value.hint
