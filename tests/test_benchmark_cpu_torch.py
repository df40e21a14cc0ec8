"""The table of what replaces torch's first choice: both ways are run, or it says that torch's is left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from autotune.kernels import products
from autotune.kernels.cpu import flash

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import cpu_torch


def test_both_ways_take_turns(monkeypatch, capsys):
    monkeypatch.setattr(cpu_torch, "ATTENTION", ((8, 0, 2, 2, 32), (4, 4, 2, 1, 32)))
    monkeypatch.setattr(cpu_torch, "PRODUCTS", ((8, 16, 24),))
    for module, name in ((flash, "available"), (products, "differs")):
        monkeypatch.setattr(module, name, lambda: True)
    if not flash.build.available("flash") or not hasattr(flash.build.library("flash"), "autotune_flash"):
        pytest.skip("no native attention of prompts on this CPU")
    rows = cpu_torch.run(2)
    assert [row["what"] for row in rows] == ["attention", "attention", "product"]
    assert rows[1]["case"] == "4 tokens on 4 kept, 2 heads on 1 of 32"
    assert all(row["ours_ms"] > 0 and row["torch_ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert "left here" not in capsys.readouterr().out


def test_where_nothing_is_replaced_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(flash, "available", lambda: False)
    monkeypatch.setattr(products, "differs", lambda: False)
    assert cpu_torch.run(1) == []
    assert capsys.readouterr().out.count("torch's is left here") == 2
