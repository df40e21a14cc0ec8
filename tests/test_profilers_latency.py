"""Profiling with kernels that are right, wrong, raising, crashing and hanging, in real children; then without any."""

import json
from dataclasses import replace

import pytest

from autotune.errors import DeviceError, InputError
from autotune.profilers import latency
from autotune.profilers.isolate import ChildDied, ChildTimeout
from autotune.profilers.jobs import bucket, kernel_from_json, needed
from autotune.profilers.latency import LatencyTable, estimate, profile
from autotune.profilers.timer import Protocol
from autotune.search_space.coverage import KernelSpec, Limits
from autotune.search_space.groups import LayerGroup, Linear, ModelSpec
from autotune.search_space.space import build
from autotune.search_space.workload import parse
from autotune.store import Memo
from autotune.targets.target import Ceilings, Target

KERNELS = """
import os, signal, time
import torch
from autotune.kernels.reference import reference_linear
from autotune.kernels.spec import Packed

def pack(weight, dtype):
    held = weight.dense if weight.dense is not None else weight.codes
    return Packed(held.shape[0], held.shape[1], dtype, held.nbytes, weight)

def run(packed, x):
    return {body}
"""
RIGHT = "reference_linear(packed.data, x, torch.float32).to(packed.dtype)"
BODIES = {
    "right": RIGHT,
    "wrong": f"{RIGHT} * 1.1",
    "wrong_prefill": f"{RIGHT} * (1.0 if len(x) == 1 else 1.1)",
    "raises": "1 / 0",
    "crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": "time.sleep(1000)",
}
QUICK = Protocol(rounds=4, max_rounds=4, min_rounds=2, warm_s=0.0, sample_s=1e-4)
CEILINGS = Ceilings(((2**25, 100.0), (2**27, 20.0)), {"fp32": 0.3, "bf16": 0.6, "int8": 1.2}, 5.0)
TARGET = Target("cpu-test", "cpu", "test", (), 1, 2**30, 2**25, CEILINGS)
CHAT, PREFILL = parse("1,4,2"), parse("1,4,0")


def linear(name, out_features, in_features=64, bias=False):
    return Linear(f"{name}.weight", name, out_features, in_features, bias)


def model(layers=2):
    groups = []
    for n in range(layers):
        groups.append(LayerGroup(f"{n}.qkv", "qkv", n, (linear("q", 64), linear("k", 32), linear("v", 32))))
        groups.append(LayerGroup(f"{n}.o", "o", n, (linear("o", 64, bias=True),)))
    head = LayerGroup("lm_head", "lm_head", None, (linear("lm", 96),), last_token_only=True)
    return ModelSpec("m", "M", "causal-lm", "fp32", None, (*groups, head), (), True)


def spec_of(name, scheme="fp32", module="autotune.kernels.reference", **more):
    return KernelSpec(name, (scheme,), "cpu", ("fp32",), module, **more)


@pytest.fixture(scope="module")
def bad_kernels(tmp_path_factory):
    """Kernel files outside of the package, as a user's own would be."""
    folder = tmp_path_factory.mktemp("kernels")
    for name, body in BODIES.items():
        (folder / f"fake_{name}.py").write_text(KERNELS.format(body=body))
    schemes = {"right": "fp32", "wrong": "w8a8-int8", "wrong_prefill": "w8a16-int8", "raises": "w4a16-int4-g32"}
    schemes |= {"crashes": "w4a16-int4-g64", "hangs": "w8a16-int8"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield tuple(spec_of(name, scheme, f"fake_{name}") for name, scheme in schemes.items())


@pytest.fixture(scope="module")
def small():
    spec = model(1)
    return replace(spec, groups=spec.groups[:1])  # one shape


@pytest.fixture(scope="module")
def profiled(bad_kernels, small, tmp_path_factory, request):
    memo = Memo(tmp_path_factory.mktemp("memo") / "memo.db")
    request.addfinalizer(memo.close)
    space = build(small, TARGET, bad_kernels, local=True)
    said = []
    table = profile(
        small,
        space,
        TARGET,
        CHAT,
        memo,
        kernels=bad_kernels,
        protocol=QUICK,
        progress=lambda done, total, text: said.append((done, total)),
        step_timeout_s=4.0,
    )
    return table, memo, space, said


def test_every_kernel_gets_its_row_and_the_bad_ones_their_reason(profiled):
    rows = {(row.kernel, row.rows): row for row in profiled[0].rows}
    assert len(rows) == 12  # six kernels in two phases
    for count in (1, 4):
        right = rows["right", count]
        assert right.status == "measured" and 0 < right.low_us <= right.median_us <= right.high_us
        assert right.packed_bytes == 128 * 64 * 4 and right.rounds_timed == QUICK.rounds
        assert rows["wrong", count].status == "failed" and "check failed" in rows["wrong", count].reason
        assert "ZeroDivisionError" in rows["raises", count].reason
        assert "killed by signal 11 while being checked" in rows["crashes", count].reason
        assert "stopped after 4 s without a sign of life while being checked" in rows["hangs", count].reason
        assert rows["hangs", count].status == "failed" and rows["hangs", count].median_us is None
    assert rows["crashes", 4].reason.startswith("not tried, as with 1 rows it was killed")
    assert rows["wrong_prefill", 1].status == "measured"
    assert rows["wrong_prefill", 4].status == "failed"


def test_progress_counts_every_row(profiled):
    assert profiled[3] == [(n + 1, 12) for n in range(12)]


def test_a_second_call_measures_nothing(profiled, bad_kernels, small, monkeypatch):
    table, memo, space, _ = profiled
    monkeypatch.setattr(latency, "stream", None)
    again = profile(small, space, TARGET, CHAT, memo, kernels=bad_kernels, protocol=QUICK, step_timeout_s=4.0)
    assert again == table and again.hash == table.hash


def test_a_kernel_needs_every_phase_to_be_chosen(profiled, small):
    table, group = profiled[0], small.groups[0]
    assert table.best(group, "w8a16-int8", CHAT) is None
    assert any("wrong_prefill: check failed" in text for text in table.failures(group, "w8a16-int8", CHAT))
    best = table.best(group, "fp32", CHAT)
    assert best.kernel == "right" and best.latency_us == pytest.approx(best.phases_us[0] + 2 * best.phases_us[1])


def test_csv_round_trip_is_exact(profiled, tmp_path):
    profiled[0].to_csv(tmp_path / "table.csv")
    assert LatencyTable.from_csv(tmp_path / "table.csv") == profiled[0]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "target,fingerprint,kernel\nx,y,z\n"])
def test_a_damaged_csv_is_refused(tmp_path, text):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(InputError, match=r"latency\.syntax"):
        LatencyTable.from_csv(tmp_path / "table.csv")


# ---- the parent's side alone, with children that only pretend


class FakeChildren:
    """Stands in for `stream`: plays one script after another."""

    def __init__(self, *scripts):
        self.scripts, self.asked = list(scripts), []

    def __call__(self, target, args, *rest):
        args = json.loads(json.dumps(args))
        self.asked.append(args)
        jobs = [job for unit in args["units"] for job in unit["jobs"]]
        for action in self.scripts.pop(0):
            yield from action(jobs)


def measured(median=100.0, noisy=False):
    def play(jobs):
        for job in jobs:
            yield {"event": "start", "ids": [job["id"]], "stage": "time"}
            times = {"times_us": [median, median, median], "rounds": 20, "noisy": noisy, "drift": 0.0}
            yield {"event": "row", "id": job["id"], "packed_bytes": 32768, "note": "", **times}

    return play


def dies(error, stage="time"):
    def play(jobs):
        yield {"event": "start", "ids": [jobs[0]["id"]], "stage": stage}
        raise error

    return play


def silent(error):
    def play(jobs):
        raise error
        yield

    return play


KILLED = ChildDied("killed", "", 9, None)


@pytest.fixture
def run(tmp_path, monkeypatch, small):
    memo = Memo(tmp_path / "memo.db")
    kernels = (spec_of("a"),)
    space = build(small, TARGET, kernels, local=True)
    monkeypatch.setattr(latency.environment, "load", lambda: latency.environment.Load(0.0, 0.0, 0.0))

    def run(*scripts, target=TARGET, workload=PREFILL, **more):
        children = FakeChildren(*scripts)
        monkeypatch.setattr(latency, "stream", children)
        return profile(small, space, target, workload, memo, kernels=kernels, **more), children

    yield run
    memo.close()


def test_killed_for_memory_is_tried_again_with_half(run):
    table, children = run([dies(KILLED)], [measured()])
    assert table.rows[0].status == "measured"
    assert children.asked[1]["memory_bytes"] == children.asked[0]["memory_bytes"] // 2


def test_killed_twice_fails_but_is_not_remembered(run):
    table, _ = run([dies(KILLED)], [dies(KILLED)])
    assert table.rows[0].status == "failed" and "signal 9" in table.rows[0].reason
    table, _ = run([measured()])
    assert table.rows[0].status == "measured"


def test_an_interrupted_run_goes_on_where_it_stopped(run):
    def interrupted(jobs):
        yield from measured(50.0)(jobs[:1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([interrupted], workload=CHAT)
    table, children = run([measured(70.0)], workload=CHAT)
    assert [row.median_us for row in table.rows] == [50.0, 70.0]
    assert len(children.asked[0]["units"][0]["jobs"]) == 1


def test_a_child_that_never_starts_is_an_error(run):
    for error in (ChildTimeout("isolate.timeout", "slow"), KILLED):
        with pytest.raises(DeviceError, match=r"profile\.child"):
            run([silent(error)])
    with pytest.raises(DeviceError, match=r"profile\.child"):
        run([lambda jobs: iter(())])  # ends well, having done nothing


def test_too_good_to_be_true_is_measured_again_and_then_said(run):
    target = replace(TARGET, ceilings=replace(CEILINGS, source="measured"))
    fast = 32768 / 1e3 / 300.0  # 300 GB/s, where 100 is the most
    table, children = run([measured(fast)], [measured(fast)], target=target)
    assert len(children.asked) == 2 and table.rows[0].noisy
    assert "suspicious" in table.rows[0].reason and "300.0 GB/s" in table.rows[0].reason


def test_too_good_once_was_chance(run):
    target = replace(TARGET, ceilings=replace(CEILINGS, source="measured"))
    table, _ = run([measured(0.1)], [measured(50.0)], target=target)
    assert table.rows[0].median_us == 50.0 and not table.rows[0].noisy


def test_noisy_rows_are_measured_again_when_asked(run):
    run([measured(noisy=True)])
    table, _ = run()
    assert table.rows[0].noisy  # kept
    table, _ = run([measured(70.0)], attempts=2)
    assert table.rows[0].median_us == 70.0
    table, _ = run(attempts=2)
    assert table.rows[0].median_us == 70.0


# ---- jobs


def test_equal_layers_share_a_job_and_lm_head_sees_the_last_token():
    spec, kernels = model(3), (spec_of("a"),)
    jobs = needed(spec, build(spec, TARGET, kernels, local=True), TARGET, CHAT, kernels, "runs")
    assert [(job.members, job.bias, job.rows) for job in jobs] == [
        ((64, 32, 32), False, 1),
        ((64, 32, 32), False, 4),
        ((64,), True, 1),
        ((64,), True, 4),
        ((96,), False, 1),
    ]


def test_residency_follows_the_schemes_own_bytes():
    spec, kernels = model(2), (spec_of("a"), spec_of("b", "w8a16-int8"))
    tiny = replace(TARGET, last_cache_bytes=2**14)  # four of them hold the int8 model, not the fp32 one
    jobs = needed(spec, build(spec, tiny, kernels, local=True), tiny, CHAT, kernels, "runs")
    assert {job.resident_bytes for job in jobs if job.scheme == "fp32"} == {None}
    assert {job.resident_bytes for job in jobs if job.scheme == "w8a16-int8"} == {2**15}


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 2**20, 2**20 + 1, 1_500_000, 2_900_000, 7 * 2**30])
def test_buckets_are_near(size):
    assert 0.75 <= bucket(size) / size <= 1.34 or size == 1


def test_a_kernel_survives_json():
    spec = spec_of("a", limits=Limits(8, 4, ("avx2",), 8.0), copies=2.0)
    assert kernel_from_json(json.loads(json.dumps(latency.asdict(spec)))) == spec


# ---- estimates


def test_a_target_elsewhere_is_estimated():
    spec, kernels = model(1), (spec_of("a"), spec_of("b", "w8a16-int8", copies=2.0))
    space = build(spec, TARGET, kernels, local=False)
    table = estimate(spec, space, TARGET, CHAT, kernels)
    assert {row.status for row in table.rows} == {"estimated"}
    dense, int8 = (table.best(spec.groups[0], name, CHAT) for name in ("fp32", "w8a16-int8"))
    assert dense.status == "estimated" and dense.packed_bytes == 128 * 64 * 4
    assert int8.packed_bytes == 2 * 128 * 64 + 2 * 128  # codes twice, scales once
    assert table == estimate(spec, space, TARGET, CHAT, kernels)
    assert profile(spec, space, TARGET, CHAT, None, kernels=kernels) == table
