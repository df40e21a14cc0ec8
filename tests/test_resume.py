"""Rule 6: the same tables, seed and trials give the same plan bytes, killed and resumed or not."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from autotune.plan import Plan


class Runs:
    """Runs of one configuration, each in its own folder, that can be killed."""

    def __init__(self, home: Path, model: Path) -> None:
        self.home = home
        data = tiny.write_documents(home / "data.jsonl", 16, 40)
        # Weights large enough that compression costs something, and a budget between the extremes: a mixed plan.
        values = tiny.settings(model, home / "unused", data, max_loss=0.04, trials=8)
        (home / "settings.json").write_text(json.dumps(values))
        script = Path(tiny.__file__).with_name("faked_run.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(home / "settings.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self("first")[0] == 0  # what is compiled on first use is compiled now, or the time says nothing
        self.whole, self.seconds = self("whole")
        assert self.whole == 0

    def __call__(self, name: str, kill_after: float | None = None) -> tuple[int, float]:
        self.process.stdin.write(f"{self.home / name} {'-' if kill_after is None else kill_after}\n")
        self.process.stdin.flush()
        status, took = self.process.stdout.readline().split()
        return int(status), float(took)

    def plan(self, name: str) -> bytes:
        return (self.home / name / "plan.json").read_bytes()

    def front(self, name: str) -> dict:
        """Everything the search measured, in its order; only the time it spent may differ."""
        value = json.loads((self.home / name / "front.json").read_text())
        return value | {"sampler_seconds": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("resume")
    made = Runs(home, tiny.make_model("llama", home / "model", initializer_range=0.2, num_hidden_layers=1))
    yield made
    made.process.communicate()


def test_the_plan_is_not_trivial(runs):
    """Else equal bytes would say little."""
    plan = Plan.loads(runs.plan("whole").decode())
    assert len(set(plan.configuration.values())) >= 2
    assert plan.provenance.trials >= 5


def test_a_second_run_gives_the_same_bytes(runs):
    assert runs("second")[0] == 0
    assert runs.plan("second") == runs.plan("whole")
    assert runs.front("second") == runs.front("whole")


def test_a_finished_run_does_nothing_again(runs):
    before = {path: path.stat().st_mtime_ns for path in (runs.home / "whole").rglob("*.*") if path.is_file()}
    assert runs("whole")[0] == 0
    after = {path: path.stat().st_mtime_ns for path in before}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"config.yaml", "plan.json", ".lock", "evaluations.sqlite", "evaluations.sqlite-shm"}


def check_killed(runs, seed):
    moment = random.Random(seed).uniform(0.02, 0.98) * runs.seconds
    name = f"killed-{seed}"
    status, _ = runs(name, moment)
    if status == -9:
        assert not (runs.home / name / "model").exists() or (runs.home / name / "model" / "plan.json").exists()
        assert runs(name)[0] == 0
    assert runs.plan(name) == runs.plan("whole")
    assert runs.front(name) == runs.front("whole")
    assert not [path for path in (runs.home / name).rglob(".*.tmp")]
    return status


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_moment_and_resumed_the_plan_is_the_same(runs, seed):
    check_killed(runs, seed)


@pytest.mark.slow
def test_killed_at_ten_more_moments(runs):
    statuses = [check_killed(runs, seed) for seed in range(3, 13)]
    assert statuses.count(-9) >= 5  # most were really cut short


def test_killed_again_and_again_it_still_gets_there(runs):
    """Every run is killed after a third of the time a whole one takes; what it did is not lost."""
    for _ in range(10):
        status, _ = runs("stubborn", runs.seconds / 3)
        if status == 0:
            break
    else:
        assert runs("stubborn")[0] == 0
    assert runs.plan("stubborn") == runs.plan("whole")
