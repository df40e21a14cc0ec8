"""Experts are trained like other groups, each on the tokens that routing sends it."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_experts import send_away

import autotune
from autotune.compress.database import stacked_weight
from autotune.config import RunConfig
from autotune.model import load_model, open_model
from autotune.plan import Plan
from autotune.recover.distill import Distillation, Recipe
from autotune.recover.job import Options
from autotune.recover.quantizer import Master
from autotune.recover.run import recover
from autotune.recover.student import Student
from autotune.recover.texts import Sequences
from autotune.search_space.schemes import scheme
from autotune.tune import tune

NAME = "2:4+w8a8-int8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_model("moe", tmp_path_factory.mktemp("moe"), initializer_range=0.2)


def distillation(folder, away=None, **changes):
    opened = open_model(str(folder))
    model = load_model(opened)
    if away is not None:
        send_away(model.model.layers[0].mlp, away)
    masters = {g.name: Master(tiny.rounded(stacked_weight(model, g), None, scheme(NAME))) for g in opened.spec.groups}
    ids = torch.stack(tiny.tokens(24, 32, 0))
    recipe = Recipe(**({"steps": 20, "batch_tokens": 256, "rate": 0.03} | changes))
    return Distillation(Student(model, opened.spec, masters), Sequences("made up", "0", ids[4:], ids[:4]), recipe)


def test_the_loss_falls(folder):
    item = distillation(folder)
    before = item.check()
    for _ in range(20):
        item.step()
    assert item.check() < 0.9 * before


def test_an_expert_that_gets_no_token_stays_as_it_is(folder):
    item = distillation(folder, away=3, steps=4)
    group = item.student.spec.group("model.layers.0.mlp.experts.gate_up")
    before = item.student.groups[group.name].master.weight.clone()
    for _ in range(4):
        item.step()
    after = item.student.groups[group.name].master.weight
    moved = [not torch.equal(after[group.rows(n)], before[group.rows(n)]) for n in range(group.experts)]
    assert moved == [True, True, True, False]


@pytest.mark.slow
def test_a_run_of_a_mixture_is_recovered_saved_and_loaded(tmp_path, monkeypatch):
    source = tiny.make_model("moe", tmp_path / "model", num_hidden_layers=1, initializer_range=0.2)
    data = tiny.write_documents(tmp_path / "texts.jsonl", count=32, length=80)
    schemes = ("w8a16-int8", NAME)
    monkeypatch.setattr("autotune.recover.texts.LENGTH", 32)
    with tiny.faked(monkeypatch):
        tune(RunConfig.of(**tiny.settings(source, tmp_path / "run", data, trials=2, schemes=schemes)))
        asked = Options(tokens=16 * 128, point=f"uniform {NAME}", rate=0.03, batch_tokens=128)
        value = recover(tmp_path / "run", asked)
    assert value["search_documents"]["kl_nats"] < value["search_documents"]["kl_nats_before"]
    plan = Plan.load(tmp_path / "run" / "recovered" / "plan.json")
    assert "model.layers.0.mlp.experts.gate_up" in plan.recovery.groups
    ids = torch.randint(97, 123, (8, 60), generator=torch.Generator().manual_seed(0))  # letters, as the texts have
    with torch.no_grad():
        found = autotune.load(tmp_path / "run" / "recovered")(ids).logits.log_softmax(-1)
        wanted = load_model(open_model(str(source)))(ids).logits.log_softmax(-1)
    kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert kl < value["search_documents"]["kl_nats_before"]
