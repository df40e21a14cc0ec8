"""What a dry run says of sizes and costs: arithmetic only, nothing is measured and no weight is needed."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from autotune.config import RunConfig
from autotune.dry_run import print_dry_run

SHAPE = Path(__file__).parent.parent / "benchmarks" / "shapes" / "qwen3-0.6b-vocab32k"


@pytest.fixture
def said(monkeypatch, tmp_path):
    """What is printed for a config.json, of which weights are never read here."""
    monkeypatch.setattr("autotune.session.resolve_target", lambda name: (tiny.here(), True))
    monkeypatch.setattr("autotune.model._has_weights", lambda folder: False)
    monkeypatch.setattr("autotune.model.checkpoint.read", lambda folder: None)

    def run(**values) -> str:
        text = io.StringIO()
        config = RunConfig.of(model=str(SHAPE), out=str(tmp_path / "run"), **values)
        print_dry_run(config, Console(file=text, width=400))
        assert not (tmp_path / "run").exists()
        return text.getvalue()

    return run


def expected(text: str) -> tuple[float, float, float]:
    """Minutes, GiB, MiB."""
    found = re.search(r"about (\d+) min, ([\d.]+) GiB of memory, (\d+) MiB of disk", text)
    assert found
    return tuple(map(float, found.groups()))


def test_a_large_model_is_measured_on_less_which_is_said(said):
    text = said()
    assert "score 2,048 in documents of 128, search 1,536, certification 20,000 tokens; 6 trials, 2 finalists" in text
    assert "losses in bf16" in text
    assert "reduced for the size of the model, 473M parameters" in text
    minutes, memory, disk = expected(text)
    assert 5 <= minutes <= 15
    assert 2 <= memory <= 8
    assert 1000 <= disk <= 6000


def test_what_is_asked_for_is_what_is_said_and_costed(said):
    text = said(score_tokens=16_384, search_tokens=8_192, trials=40, certify_tokens=200_000)
    assert "score 16,384" in text
    assert "score_tokens" not in text
    assert expected(text)[0] > 3 * expected(said())[0]


def test_latency_alone_takes_no_samples(said):
    text = said(max_loss=None, latency_only=True)
    assert "finalists" not in text
    assert "reduced" not in text
    assert expected(text)[0] < expected(said())[0]
