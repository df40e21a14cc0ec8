"""Losses: the reference model, what a teacher measures, and the estimate that stands in for it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from autotune import documents
from autotune.compress import database
from autotune.kernels.reference import quantize_activations
from autotune.model import load_mixed, load_model, load_tokenizer, open_model
from autotune.reference_model import ReferenceModel
from autotune.score import LossTable, Tap, group_sums, one_at_a_time, score
from autotune.search_space.schemes import scheme
from autotune.teacher import Teacher

DEMO = Path(__file__).parent.parent / "examples" / "demo_model"
KINDS = ["llama", "gpt2", "bert"]


@pytest.fixture(scope="module")
def references(databases):
    def get(name):
        opened, space, made = databases(name)
        return ReferenceModel(load_model(opened), opened.spec, made), space

    return get


@pytest.fixture(scope="module")
def wide_and_narrow(databases):
    """A bf16 checkpoint as a small model is measured, in fp32, and as a large one, in bf16 products."""

    def get(name):
        opened, space, made = databases(name)
        loaded = load_model(opened, torch.float32), load_mixed(opened)
        return *(ReferenceModel(model, opened.spec, made) for model in loaded), space

    return get


def uniform(space, name):
    return {entry.group: name for entry in space.usable() if entry.scheme == name}


@pytest.mark.parametrize("name", KINDS)
def test_dense_is_the_model_itself_before_and_after_others(databases, references, name):
    model, space = references(name)
    document = tiny.tokens(1)[0]
    with torch.no_grad():
        output = load_model(databases(name)[0])(document.unsqueeze(0))
    plain = output.last_hidden_state[0] if name == "bert" else output.logits[0]
    assert torch.allclose(model.outputs(document), plain, atol=1e-6)
    before = model.outputs(document)
    model.select(uniform(space, "w4a16-int4-g32"))
    assert not torch.equal(model.outputs(document), before)
    model.select({})
    assert torch.equal(model.outputs(document), before)


def test_a_scheme_is_its_weights_and_its_activations(references):
    model, _ = references("llama")
    group = model.spec.group("lm_head")
    layer = model.layers["lm_head"][0]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    model.select({"lm_head": "w8a8-int8"})
    expected = F.linear(quantize_activations(x, scheme("w8a8-int8").activation), model.weight(group, "w8a8-int8"))
    assert torch.equal(layer(x), expected)
    model.select({"lm_head": "w8a16-int8"})
    assert torch.equal(layer(x), F.linear(x, model.weight(group, "w8a16-int8")))
    change = model.weight(group, "w8a16-int8") - model.dense_weight(group)
    assert torch.allclose(model.change(group, "w8a16-int8"), change)


def test_a_small_cache_changes_nothing(references, monkeypatch):
    model, space = references("llama")
    document = tiny.tokens(1)[0]
    model.select(uniform(space, "w8a16-int8"))
    expected = model.outputs(document)
    monkeypatch.setattr("autotune.reference_model._CACHE_BYTES", 1)
    small, _ = references("llama")
    small.select(uniform(space, "w8a16-int8"))
    assert torch.equal(small.outputs(document), expected)
    assert not small._cache


@pytest.mark.parametrize("name", ["llama-bf16", "gpt2-bf16", "bert-bf16"])
def test_bf16_products_are_near_fp32_and_exact_ones_are_fp32(wide_and_narrow, name):
    wide, narrow, space = wide_and_narrow(name)
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    document = tiny.tokens(1)[0]
    for configuration in ({}, uniform(space, "w8a16-int8"), uniform(space, "w8a8-int8"), {}):
        wide.select(configuration)
        narrow.select(configuration)
        expected, found = wide.outputs(document), narrow.outputs(document)
        assert found.dtype == torch.float32
        assert 0 < (found - expected).norm() < 0.02 * expected.norm()
    with narrow.exact():
        assert torch.allclose(narrow.outputs(document), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(narrow.outputs(document), found)


def test_in_bf16_products_logits_are_not_rounded(wide_and_narrow):
    _, narrow, _ = wide_and_narrow("llama-bf16")
    logits = narrow.outputs(tiny.tokens(1)[0])
    assert not torch.equal(logits, logits.to(torch.bfloat16).float())


def test_the_floor_is_what_arithmetic_alone_costs(tmp_path):
    opened = open_model(str(tiny.make_model("llama", tmp_path, torch.bfloat16, initializer_range=0.2)))
    empty = database.WeightDatabase(tmp_path, {})
    loaded = load_model(opened, torch.float32), load_mixed(opened)
    wide, narrow = (ReferenceModel(model, opened.spec, empty) for model in loaded)
    texts = tiny.tokens(8)
    assert Teacher(wide, texts, (0.25, 1.0)).floor() == 0
    rows = []
    for document in texts[:2]:
        p, q = (model.outputs(document)[:-1].double().log_softmax(-1) for model in (wide, narrow))
        rows.append(float((p.exp() * (p - q)).sum()))
    floor = Teacher(narrow, texts, (0.25, 1.0)).floor()
    assert floor == pytest.approx(sum(rows) / 46, rel=0.1)
    assert 1e-6 < floor < 1e-2


def test_dense_rows_and_changes_come_in_pieces_too(references):
    model, _ = references("llama")
    for group in model.spec.groups:
        whole, change = model.dense_weight(group), model.change(group, "w4a16-int4-g32")
        rows = slice(3, group.out_features - 5)
        assert torch.equal(model.dense_weight(group, rows), whole[rows])
        assert torch.equal(model.change(group, "w4a16-int4-g32", rows), change[rows])


def test_what_the_teacher_measures_is_kl_and_the_rise_of_the_nll(references):
    model, space = references("llama")
    texts = tiny.tokens(3)
    configuration = uniform(space, "w4a16-int4-g32")
    found = Teacher(model, texts, (1.0,)).measure(configuration)
    for index, document in enumerate(texts):
        model.select({})
        p = model.outputs(document)[:-1].double().log_softmax(-1)
        model.select(configuration)
        q = model.outputs(document)[:-1].double().log_softmax(-1)
        labels = document[1:].unsqueeze(1)
        assert found.tokens[index] == 23
        assert found.kl[index] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-6)
        assert found.dnll[index] == pytest.approx(float((p - q).gather(1, labels).sum()), rel=1e-3, abs=1e-5)
    assert found.kl_nats == pytest.approx(sum(found.kl) / 69)


def test_dense_loses_nothing(references):
    model, _ = references("llama")
    found = Teacher(model, tiny.tokens(2), (1.0,)).measure({})
    assert found.kl == found.dnll == (0.0, 0.0)


def test_looks_are_nested_prefixes(references):
    model, space = references("llama")
    teacher = Teacher(model, tiny.tokens(8), (0.25, 1.0))
    first, whole = (teacher.measure(uniform(space, "w8a16-int8"), look) for look in (0, 1))
    assert len(first.kl) == 2
    assert whole.kl[:2] == first.kl
    assert len(whole.kl) == 8


def test_pieces_of_tokens_change_nothing(references, monkeypatch):
    model, space = references("llama")
    configuration = uniform(space, "w4a16-int4-g32")
    whole = Teacher(model, tiny.tokens(2), (1.0,)).measure(configuration)
    monkeypatch.setattr("autotune.teacher.logits_at_a_time", lambda device: 256 * 5)
    monkeypatch.setattr("autotune.teacher._CACHE_BYTES", 0)
    monkeypatch.setattr("autotune.teacher._HELD_BYTES", 0)
    pieces = Teacher(model, tiny.tokens(2), (1.0,)).measure(configuration)
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-5, abs=1e-7)
    assert pieces.dnll == pytest.approx(whole.dnll, rel=1e-5, abs=1e-7)


def test_perplexity_is_of_the_dense_model(references):
    model, space = references("llama")
    texts = tiny.tokens(3)
    teacher = Teacher(model, texts, (1.0,))
    model.select(uniform(space, "w4a16-int4-g32"))
    found = teacher.perplexity()
    model.select({})
    total = sum(float(F.cross_entropy(model.outputs(t)[:-1], t[1:], reduction="sum")) for t in texts)
    assert found == pytest.approx(math.exp(total / 69), rel=1e-5)


def test_an_encoders_loss_is_the_squared_error_of_its_embeddings(references):
    model, space = references("bert")
    document = tiny.tokens(1)[0]
    configuration = uniform(space, "w4a16-int4-g32")
    found = Teacher(model, [document], (1.0,)).measure(configuration)
    model.select({})
    dense = model.outputs(document)
    model.select(configuration)
    error = (model.outputs(document) - dense).double().square().sum() / dense.double().square().sum()
    assert found.kl_nats == pytest.approx(float(error), rel=1e-6)
    assert found.kl == found.dnll


@pytest.mark.parametrize("name", KINDS)
def test_every_compressed_entry_has_a_loss_with_its_interval(references, name):
    model, space = references(name)
    table = score(model, space, tiny.tokens(4), draws=1)
    wanted = {(e.group, e.scheme) for e in space.usable() if e.scheme != space.dense}
    assert {(row.group, row.scheme) for row in table.rows} == wanted
    assert all(0 <= row.low_nats <= row.loss_nats <= row.high_nats for row in table.rows)
    assert all(row.loss_nats > 0 for row in table.rows)


def test_scores_are_the_same_again_and_differ_by_seed(references):
    model, space = references("llama")
    first = score(model, space, tiny.tokens(4), seed=1)
    assert score(model, space, tiny.tokens(4), seed=1) == first
    assert score(model, space, tiny.tokens(4), seed=2) != first


def test_batches_and_caches_change_nothing(references, monkeypatch):
    model, space = references("llama")
    expected = score(model, space, tiny.tokens(5))
    monkeypatch.setattr("autotune.reference_model._CACHE_BYTES", 1)
    monkeypatch.setattr("autotune.score.BATCH_BYTES", 1)
    monkeypatch.setattr(ReferenceModel, "weight_bytes", 1)
    small, _ = references("llama")
    for row, other in zip(expected.rows, score(small, space, tiny.tokens(5)).rows, strict=True):
        assert (other.group, other.scheme) == (row.group, row.scheme)
        assert other.loss_nats == pytest.approx(row.loss_nats, rel=1e-3)


def test_pieces_of_the_weights_change_nothing_but_rounding(references, monkeypatch):
    model, space = references("llama")
    expected = score(model, space, tiny.tokens(3))
    monkeypatch.setattr("autotune.score._PRODUCTS", 64 * 7 * 6)
    for row, other in zip(expected.rows, score(model, space, tiny.tokens(3)).rows, strict=True):
        assert other.loss_nats == pytest.approx(row.loss_nats, rel=1e-3)


def test_what_is_not_cached_is_read_once_a_batch(references, monkeypatch):
    monkeypatch.setattr("autotune.reference_model._CACHE_BYTES", 1)
    model, space = references("llama")
    read = []
    load = type(model.database).load

    def counted(self, group, name, *where, **named):
        read.append((group.name, scheme(name).sparsity, scheme(name).weight))
        return load(self, group, name, *where, **named)

    monkeypatch.setattr(type(model.database), "load", counted)
    table = score(model, space, tiny.tokens(6))
    assert len(read) == len(set(read)) < len(table.rows)
    assert set(read) == {(row.group, scheme(row.scheme).sparsity, scheme(row.scheme).weight) for row in table.rows}


@pytest.mark.parametrize("name", ["w4a16-int4-g32", "w8a8-int8"])
def test_a_score_is_the_squared_effect_of_the_change_on_the_gradient(references, name):
    """The sums against their definition, sum over positions of <g, dY>, with dY of one group made explicitly."""
    model, _ = references("llama")
    group = model.spec.groups[1]
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(2):
        x = torch.randn(9, group.in_features, generator=generator)
        gradients = [torch.randn(9, group.out_features, generator=generator) for _ in range(2)]
        batch.append(Tap({group.name: x}, {group.name: gradients}))
    found = group_sums(model, group, [name], batch)[name]
    form = scheme(name).activation
    for tap, value in zip(batch, found, strict=True):
        x = tap.inputs[group.name].double()
        seen = x if form is None else quantize_activations(tap.inputs[group.name], form).double()
        change = seen @ model.weight(group, name).double().t() - x @ model.dense_weight(group).double().t()
        expected = [float((gradient.double() * change).sum()) ** 2 for gradient in tap.gradients[group.name]]
        assert value == pytest.approx(np.mean(expected), rel=1e-3)


def test_scores_in_bf16_products_are_those_in_fp32(wide_and_narrow):
    wide, narrow, space = wide_and_narrow("llama-bf16")
    texts = tiny.tokens(24)
    expected, found = score(wide, space, texts, draws=4), score(narrow, space, texts, draws=4)
    ratios = [found.of(row.group, row.scheme) / row.loss_nats for row in expected.rows]
    assert 0.9 <= np.median(ratios) <= 1.1
    assert all(0.6 <= ratio <= 1.6 for ratio in ratios)


def test_scoring_leaves_the_model_as_it_was(references):
    model, space = references("llama")
    document = tiny.tokens(1)[0]
    before = model.outputs(document)
    score(model, space, tiny.tokens(2), draws=1)
    assert torch.equal(model.outputs(document), before)
    assert not model.model.get_input_embeddings()._forward_hooks
    assert not any(layer._forward_hooks for layers in model.layers.values() for layer in layers)


def test_fewer_bits_lose_more(references):
    model, space = references("llama")
    table = score(model, space, tiny.tokens(6))
    for group in model.spec.groups:
        assert table.of(group.name, "w4a16-int4-g32") > 5 * table.of(group.name, "w8a16-int8")


def test_a_table_survives_csv_exactly(references):
    model, space = references("llama")
    table = score(model, space, tiny.tokens(2), draws=1)
    assert LossTable.from_csv(table.to_csv()) == table


def test_for_an_encoder_the_estimate_is_the_measured_error(references):
    """No labels are drawn there, so few probes suffice to see the two agree."""
    model, space = references("bert")
    texts = tiny.tokens(8)
    estimated = score(model, space, texts, draws=12)
    measured = one_at_a_time(Teacher(model, texts, (1.0,)), space)
    ratios = [estimated.of(row.group, row.scheme) / row.loss_nats for row in measured.rows]
    assert 0.8 <= np.median(ratios) <= 1.25


@pytest.mark.skipif(not (DEMO / "model.safetensors").is_file(), reason="the demo model has not been trained")
@pytest.mark.slow
def test_the_estimate_agrees_with_what_is_measured_on_a_trained_model(tmp_path):
    """Random weights give flat logits, whose KL says nothing; hence the demo model."""
    opened = open_model(str(DEMO))
    groups = [group for group in opened.spec.groups if group.layer in (1, None)]
    names = ["w8a8-int8", "w8a16-int8", "w4a16-int4-g64"]
    space = tiny.space_of(opened.spec, names)
    entries = [e for e in space.entries if e.group in {g.name for g in groups} or e.scheme == space.dense]
    space = replace(space, entries=tuple(entries))
    texts = documents.read(None, load_tokenizer(DEMO), opened.vocabulary, opened.positions)
    model = load_model(opened, torch.float32)
    calibration = documents.take(texts.calibration, 2000, 256)
    made = database.build(model, opened.spec, space, calibration, tmp_path)
    reference = ReferenceModel(model, opened.spec, made)
    used = documents.take(texts.search, 24 * 128, 128)
    estimated = score(reference, space, used, draws=4)
    measured = one_at_a_time(Teacher(reference, used, (1.0,)), space)
    for name in names:
        ratios = [estimated.of(r.group, r.scheme) / r.loss_nats for r in measured.rows if r.scheme == name]
        assert len(ratios) >= 4
        assert 0.8 <= np.median(ratios) <= 1.25, name
