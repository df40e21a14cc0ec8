"""What measured losses rule out before the search."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from autotune import tables
from autotune.score import LossRow, LossTable
from autotune.search_space.rules import Legality
from autotune.search_space.space import Entry, SearchSpace

# scheme -> latency in us, packed bytes, loss with its interval in nats
MEASURED = {
    "w8a8-int8": (50.0, 800, 1e-4, 9e-5, 1.1e-4),
    "w4a8-int4-g128": (30.0, 400, 2e-3, 1.8e-3, 2.2e-3),
    "w4a16-int4-g128": (35.0, 410, 1.9e-3, 1.7e-3, 2.1e-3),
    "2:4": (60.0, 900, 4e-3, 3e-3, 5e-3),
    "2:4+w8a8-int8": (25.0, 500, 0.03, 0.021, 0.04),
}


def _left(status: str = "measured", memory: int | None = None) -> dict[str, str]:
    """Scheme -> "" where it stays, else the reason."""
    names = ("bf16", *MEASURED)
    space = SearchSpace("cpu", "bf16", "bf16", tuple(Entry("a", name, Legality("runs", "here")) for name in names))
    rows = tuple(LossRow("a", name, *values[2:], "fisher") for name, values in MEASURED.items())
    group = SimpleNamespace(name="a")
    config = SimpleNamespace(max_memory_bytes=memory)
    session = SimpleNamespace(limit=0.01, spec=SimpleNamespace(groups=[group]), workload=None, config=config)

    def best(_, name, __):
        return SimpleNamespace(latency_us=MEASURED[name][0], packed_bytes=MEASURED[name][1], status=status)

    after = tables.prune_losses(session, space, SimpleNamespace(best=best), LossTable(rows))
    return {e.scheme: "" if e.legality.usable else e.legality.reason for e in after.entries}


def test_what_breaks_the_budget_alone_leaves_with_its_price():
    reason = _left()["2:4+w8a8-int8"]
    assert "0.03 nats" in reason and "budget is 0.01" in reason


def test_what_another_beats_in_speed_and_loss_leaves():
    left = _left()
    assert "w8a8-int8 is at least as fast here and loses less" in left["2:4"]
    assert not left["w4a16-int4-g128"], "the intervals of the losses touch"
    assert not left["bf16"] and not left["w8a8-int8"] and not left["w4a8-int4-g128"]


def test_estimated_times_rule_nothing_out():
    assert not _left(status="estimated")["2:4"]


@pytest.mark.parametrize(("memory", "stays"), [(None, False), (10_000, False)])
def test_under_a_memory_budget_the_better_one_must_not_be_larger(memory, stays, monkeypatch):
    assert bool(_left(memory=memory)["2:4"]) is not stays
    monkeypatch.setitem(MEASURED, "2:4", (60.0, 100, 4e-3, 3e-3, 5e-3))
    monkeypatch.setitem(MEASURED, "w4a8-int4-g128", (70.0, 400, 2e-3, 1.8e-3, 2.2e-3))
    monkeypatch.setitem(MEASURED, "w4a16-int4-g128", (70.0, 410, 1.9e-3, 1.7e-3, 2.1e-3))
    assert bool(_left(memory=memory)["2:4"]) is (memory is None)
