"""What measured losses rule out before the search."""

from __future__ import annotations

from types import SimpleNamespace

from autotune import tables
from autotune.score import LossRow, LossTable
from autotune.search_space.rules import Legality
from autotune.search_space.space import Entry, SearchSpace


def test_what_breaks_the_budget_alone_leaves_with_its_price():
    names = ("bf16", "w8a8-int8", "2:4", "2:4+w8a8-int8")
    space = SearchSpace("cpu", "bf16", "bf16", tuple(Entry("a", name, Legality("runs", "here")) for name in names))
    losses = {"w8a8-int8": (1e-4, 9e-5), "2:4": (0.03, 0.021), "2:4+w8a8-int8": (0.025, 0.019)}
    table = LossTable(tuple(LossRow("a", name, *values, 0.04, "fisher") for name, values in losses.items()))
    left = tables.prune_losses(SimpleNamespace(limit=0.01), space, table)
    assert [entry.scheme for entry in left.usable()] == ["bf16", "w8a8-int8", "2:4+w8a8-int8"]
    reason = next(entry.legality.reason for entry in left.entries if entry.scheme == "2:4")
    assert "0.03 nats" in reason and "budget is 0.01" in reason
