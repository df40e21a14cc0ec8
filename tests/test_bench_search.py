"""The search benchmark on real tables: what it reports, what it spends, and that nothing is measured twice."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny

from autotune.config import RunConfig
from autotune.errors import InputError
from autotune.search.synthetic import synthetic
from autotune.teacher import Teacher
from autotune.tune import tune

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCHEMES = ("w8a8-int8", "w8a8-fp8", "2:4", "2:4+w8a8-int8")
METHODS = ("ours", "fast", "nsga2", "tpe", "random", "uniform")
EVALUATIONS = 14
KEYS = {"method", "seed", "target_us", "speedup", "kl_nats", "hypervolume", "evaluations", "seconds"}


def load(name):
    """A script of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    before = dict(sys.modules)
    load("finished_run")
    yield load("search")
    for name in ("finished_run", "search"):
        sys.modules.pop(name)
        if name in before:
            sys.modules[name] = before[name]


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """The tables of a tiny Llama on a device that is not here: nothing is timed."""
    folder = tmp_path_factory.mktemp("bench")
    data = tiny.write_documents(folder / "data.jsonl")
    values = tiny.settings(models("llama-bf16"), folder / "run", data, target="h100", schemes=SCHEMES)
    tune(RunConfig.of(**values), until="score")
    return folder / "run"


@pytest.fixture(scope="module")
def played(bench, run):
    """(stdout, JSON) of a small benchmark of the run."""
    import contextlib
    import io

    file, printed = run.parent / "search.json", io.StringIO()
    arguments = ["--run", str(run), "--json", str(file), "--evaluations", str(EVALUATIONS)]
    with contextlib.redirect_stdout(printed):
        assert bench.main([*arguments, "--seeds", "0,1", "--targets", "3", "--tokens", "128"]) == 0
    return printed.getvalue(), json.loads(file.read_text())


def test_json_says_what_was_measured(played, run):
    _, value = played
    assert (value["target"], value["latency"], value["documents"]) == ("h100", "estimated", "data.jsonl")
    assert set(value["schemes"]) == {"bf16", *SCHEMES}
    assert value["search_tokens"] == 144  # three documents
    assert str(run.parent) not in json.dumps(value)
    assert len(value["rows"]) == len(METHODS) * 2 * 3
    for row in value["rows"]:
        assert set(row) == KEYS
        assert value["fastest_us"] < row["target_us"] < value["dense_us"]
        assert row["speedup"] == pytest.approx(value["dense_us"] / row["target_us"])


def test_every_method_is_read_off_one_front_within_its_evaluations(played):
    rows = played[1]["rows"]
    for method in METHODS:
        for seed in (0, 1):
            mine = sorted((r for r in rows if (r["method"], r["seed"]) == (method, seed)), key=lambda r: r["target_us"])
            losses = [float("inf") if row["kl_nats"] is None else row["kl_nats"] for row in mine]
            assert losses == sorted(losses, reverse=True)  # more time, no more loss
            assert len({row["evaluations"] for row in mine}) == len({row["hypervolume"] for row in mine}) == 1
            if method == "ours":  # races end early
                assert 0.7 * EVALUATIONS < mine[0]["evaluations"] < EVALUATIONS + 0.5
            elif method in ("nsga2", "tpe", "random"):
                assert mine[0]["evaluations"] == pytest.approx(EVALUATIONS)
    for method in ("fast", "uniform"):  # they know no seed
        first, second = ([r["kl_nats"] for r in rows if (r["method"], r["seed"]) == (method, s)] for s in (0, 1))
        assert first == second


def test_table_has_a_line_for_each_method_and_names_its_setting(played):
    printed, value = played
    setting, header, *lines = printed.splitlines()
    assert "target h100" in setting
    assert "latency estimated" in setting
    assert header.count("KL at") == 3
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert f"{value['rows'][0]['target_us']:.4g} us" in header


def test_a_second_benchmark_measures_nothing(bench, run, played, monkeypatch, capsys):
    monkeypatch.setattr(Teacher, "measure", lambda *_: pytest.fail("measured again"))
    file = run.parent / "again.json"
    arguments = ["--run", str(run), "--json", str(file), "--evaluations", str(EVALUATIONS)]
    assert bench.main([*arguments, "--seeds", "0,1", "--targets", "3", "--tokens", "128"]) == 0

    def without_time(value):
        return [{name: item for name, item in row.items() if name != "seconds"} for row in value["rows"]]

    assert without_time(json.loads(file.read_text())) == without_time(played[1])
    assert "anew" not in capsys.readouterr().err  # no stage of the run was computed


def test_a_local_run_is_reloaded_with_its_calibration(bench, models, tmp_path, monkeypatch, capsys):
    data = tiny.write_documents(tmp_path / "data.jsonl")
    settings = tiny.settings(models("llama"), tmp_path / "run", data, schemes=("w8a8-int8", "w8a16-int8"), trials=0)
    with tiny.faked(monkeypatch):
        result = tune(RunConfig.of(**settings), until="search")
        with bench.finished_run(tmp_path / "run", 128) as found:
            assert found.problem == result.problem
            assert found.about["latency"] == "measured"
            assert found.evaluate(found.problem.dense, found.looks - 1).kl_nats == pytest.approx(0, abs=1e-9)
            assert found.evaluate(found.problem.uniform("w8a8-int8"), found.looks - 1).kl_nats > 0
    assert "anew" not in capsys.readouterr().err


def test_an_unfinished_run_is_refused(bench, tmp_path, capsys):
    assert bench.main(["--run", str(tmp_path)]) == InputError.exit_code
    assert "config.missing" in capsys.readouterr().err
    RunConfig.of(model="m", out=str(tmp_path)).save(tmp_path / "config.yaml")
    assert bench.main(["--run", str(tmp_path)]) == InputError.exit_code
    assert "bench.unfinished" in capsys.readouterr().err


def test_one_target_at_a_time_keeps_to_the_target(bench):
    made = synthetic(2, 0)
    rows = bench.compare(made.problem, made.evaluate, made.looks, 12, [0], 1)
    assert [row.method for row in rows] == list(METHODS)
    assert all(row.evaluations <= 12 for row in rows if row.method != "ours")  # ours measures its seeds in any case
    best = min(row.kl_nats for row in rows if row.kl_nats is not None)
    assert next(row for row in rows if row.method == "ours").kl_nats <= 2 * best


def test_table_shows_mean_and_range_over_seeds(bench):
    def row(method, seed, kl):
        return bench.Row(method, seed, 10.0, 1.5, kl, 1.0, 12.0, 0.1)

    rows = [row("a", 0, 1e-4), row("a", 1, 4e-4), row("b", 0, 2e-5), row("b", 1, 2e-5), row("c", 0, None)]
    lines = bench.table(rows).splitlines()
    assert "KL at 10 us, 1.5x" in lines[0]
    assert "2.00 (1.00..4.00)e-04" in lines[1]
    assert "2.00e-05" in lines[2]
    assert "none" in lines[3]
