"""Scales folded into the operator before: the model stays the same bit by bit; places where it would not are left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from autotune.folding import Fold, Site, fold, sites
from autotune.model import load_mixed, load_model, open_model

DOCUMENT = tiny.tokens(1, 24)[0]


def found_in(folder, dtype=None):
    opened = open_model(str(folder))
    model = load_model(opened, dtype)
    return opened, model, sites(model, opened.spec.groups, DOCUMENT, opened.spec.tied_embeddings)


def random_folds(model, places, seed=1):
    generator = torch.Generator().manual_seed(seed)
    folds = []
    for site in places:
        source = model.get_submodule(site.source)
        outputs = source.weight.shape[0]
        folds.append(Fold(site, tuple(torch.randint(-4, 5, (outputs,), generator=generator).tolist())))
    return tuple(folds)


@torch.inference_mode()
def outputs(model):
    return model(DOCUMENT.unsqueeze(0))[0]


def test_places_of_a_llama(models):
    _, _, places = found_in(models("llama"))
    names = {(site.group.removeprefix("model."), site.source.removeprefix("model.")) for site in places}
    inside = [
        ("self_attn.qkv", "input_layernorm"),
        ("self_attn.o_proj", "self_attn.v_proj"),
        ("mlp.gate_up", "post_attention_layernorm"),
        ("mlp.down_proj", "mlp.up_proj"),
    ]
    layers = {(f"layers.{n}.{group}", f"layers.{n}.{source}") for n in range(2) for group, source in inside}
    assert names == layers | {("lm_head", "norm")}


def test_a_head_that_shares_the_embedding_is_left(models):
    assert "lm_head" not in {site.group for site in found_in(models("llama-tied"))[2]}


def test_norms_that_others_read_are_left(models):
    """BERT's feed the residual stream, a mixture's the router too; GPT-2's are read by one layer alone."""
    assert found_in(models("bert"))[2] == []
    assert {site.source.rpartition(".")[2] for site in found_in(models("moe"))[2]} == {
        "input_layernorm",
        "norm",
        "v_proj",
    }
    assert {site.source for site in found_in(models("gpt2"))[2]} >= {"transformer.h.0.ln_1", "transformer.h.0.ln_2"}


@pytest.mark.parametrize("name", ["llama", "llama-bf16", "gpt2", "moe"])
def test_the_folded_model_is_the_same_bit_by_bit_and_can_be_unfolded(models, name):
    opened, model, places = found_in(models(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = outputs(model)
    folds = random_folds(model, places)
    fold(model, folds)
    assert torch.equal(outputs(model), expected)
    assert sum(not torch.equal(value, before[key]) for key, value in model.state_dict().items()) >= len(places)
    loaded = load_model(replace(opened, folds=folds))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    fold(model, folds, back=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_it_is_the_same_in_bf16_products_too(models):
    opened, model, places = found_in(models("llama-bf16"))
    folded = replace(opened, folds=random_folds(model, places))
    assert torch.equal(outputs(load_mixed(folded)), outputs(load_mixed(opened)))


def test_value_channels_serve_all_query_heads_of_their_key_head():
    site = Site("o", "v", ("o",), heads=2, repeat=3)
    columns = site.spread(torch.arange(8.0))  # two heads of four channels
    assert columns.tolist() == [0, 1, 2, 3] * 3 + [4, 5, 6, 7] * 3
    assert torch.equal(site.gathered(columns), torch.arange(8.0).expand(3, 8))


def test_folds_have_a_hash(models):
    opened, model, places = found_in(models("llama"))
    assert opened.folded == ""
    one, two = (replace(opened, folds=random_folds(model, places, seed)).folded for seed in (1, 2))
    assert one and two and one != two
