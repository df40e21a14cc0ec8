"""Roofline, bytes, environment and the probe's plan, by hand-computed numbers."""

import os
from dataclasses import replace

import pytest

from autotune.errors import InputError
from autotune.profilers import environment, memory, probe
from autotune.profilers.jobs import Job
from autotune.profilers.roofline import activation_bytes, estimate, least_us, too_good
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.groups import KeptTensor, LayerGroup, Linear, ModelSpec
from autotune.search_space.schemes import scheme
from autotune.store import Memo
from autotune.targets import target as targets

H100 = targets.load("h100").ceilings


def job(scheme_name="bf16", rows=1, out=4096, inputs=4096, resident=None, bias=False, **kernel):
    spec = KernelSpec("k", (scheme_name,), "cuda", ("bf16",), "none", **kernel)
    return Job(spec, scheme_name, (out,), inputs, bias, "bf16", rows, resident)


def test_decode_is_bytes_over_bandwidth():
    read = 2 * 4096 * 4096 + 2 * 2 * 4096
    assert least_us(job(), H100) == pytest.approx(read / 3350e3 + 5.0)


def test_prefill_is_operations_over_rate():
    assert least_us(job(rows=8192), H100) == pytest.approx(2 * 8192 * 4096**2 / 989e6 + 5.0)


def test_sparse_tensor_cores_double_the_rate():
    dense = least_us(job(rows=8192), H100) - 5.0
    assert least_us(job("2:4", rows=8192, sparse_compute=True), H100) - 5.0 == pytest.approx(dense / 2)


def test_a_cached_model_reads_faster():
    assert least_us(job(resident=2**24), H100) < least_us(job(), H100)


def test_quantizing_activations_is_traffic():
    assert activation_bytes(job("w8a8-int8", rows=3)) == 3 * (4096 * (2 + 2) + 4096 * 2)
    assert activation_bytes(job("w4a16-int4-g128", rows=3)) == 3 * 4 * 4096


def test_a_second_copy_is_stored_but_not_read():
    once, twice = (estimate(job("w4a16-int4-g128", copies=n), H100) for n in (1.0, 2.0))
    assert once.median_us == twice.median_us and twice.packed_bytes == 2 * once.packed_bytes


def test_a_format_without_a_rate_is_an_error():
    with pytest.raises(InputError, match=r"target\.ceiling"):
        estimate(job(compute_format="int4"), H100)


def test_too_good_only_against_measured_ceilings():
    measured = replace(H100, source="measured")
    size = 2 * 4096 * 4096
    assert too_good(job(), size / 3350e3 / 1.2, size, H100) == ""
    assert "GB/s" in too_good(job(), size / 3350e3 / 1.2, size, measured)
    assert too_good(job(), size / 3350e3 / 1.2, size, replace(measured, busy=True)) == ""
    assert too_good(job(), size / 3350e3 / 1.04, size, measured) == ""
    assert too_good(job(copies=2.0), size / 3350e3 / 1.2, size, measured) == ""  # it reads one of two
    assert "tera-operations" in too_good(job(rows=8192), 100.0, size, measured)
    assert too_good(job(resident=2**26), size / 5000e3, size, measured) == ""  # between two points: the faster one


# ---- bytes


def test_weight_bytes_by_scheme():
    group = LayerGroup("g", "qkv", 0, (Linear("q", "q", 256, 128, True), Linear("k", "k", 256, 128, False)))
    weights, bias = 512 * 128, 2 * 512

    def size(name):
        return memory.weight_bytes(scheme(name), group, "bf16") - bias

    assert size("bf16") == 2 * weights
    assert size("w8a8-int8") == weights + 2 * 512
    assert size("w4a16-int4-g32") == weights // 2 + 2 * weights // 32
    assert size("2:4") == weights * 9 // 8
    assert size("2:4+w4a16-int4-g128") == weights * 3 // 8 + 2 * weights // 128


def test_a_tied_head_is_free_only_while_dense():
    head = LayerGroup("lm_head", "lm_head", None, (Linear("e", "lm_head", 1000, 64, False),))
    kept = (KeptTensor("e", (1000, 64), 128_000, "embedding"),)
    spec = ModelSpec("m", "M", "causal-lm", "bf16", None, (head,), kept, True)
    assert memory.model_bytes(spec, {"lm_head": "bf16"}) == 128_000 == spec.dense_bytes
    assert memory.model_bytes(spec, {"lm_head": "w8a16-int8"}) == 128_000 + 64_000 + 2000
    assert memory.uniform_bytes(spec, scheme("bf16")) == 128_000


def test_the_peak_is_at_least_what_was_held():
    before = memory.peak_process_bytes()
    held = bytearray(os.urandom(1) * (32 * 2**20))
    assert memory.peak_process_bytes() >= len(held)
    assert memory.peak_process_bytes() >= before


# ---- environment


def test_the_fingerprint_follows_what_matters(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    first = environment.fingerprint(2)
    assert {"cpu", "features", "cores", "threads", "torch", "onednn", "os", "allocator", "env"} <= set(first)
    assert environment.fingerprint(2) == first
    assert environment.short_hash(first) != environment.short_hash(environment.fingerprint(1))
    assert environment.fingerprint(2, {"UNRELATED": "1"}) == first
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert environment.short_hash(environment.fingerprint(2)) != environment.short_hash(first)


def test_one_cpu_of_each_core(tmp_path):
    for cpu in range(4):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert environment.one_cpu_per_core([0, 1, 2, 3], tmp_path) == [0, 1]
    assert environment.one_cpu_per_core([2, 3], tmp_path) == [2, 3]


@pytest.mark.parametrize(("idle", "stolen", "busy"), [(100, 0, False), (60, 0, True), (95, 5, True)])
def test_load_sees_neighbours_and_stolen_time(tmp_path, idle, stolen, busy):
    stat, cpus = tmp_path / "proc/stat", sorted(os.sched_getaffinity(0))
    stat.parent.mkdir()

    def write(user, idle, stolen):
        lines = [f"cpu{cpu} {user} 0 0 {idle} 0 0 0 {stolen} 0 0" for cpu in cpus]
        stat.write_text("\n".join(["cpu 9 9 9 9 9 9 9 9 9 9", *lines, "intr 1 2 3"]))

    write(0, 0, 0)
    found = environment.load(sleep=lambda seconds: write(100 - idle - stolen, idle, stolen), root=tmp_path)
    assert found.busy is busy and found.stolen == stolen / 100
    assert found.others == pytest.approx((100 - idle - stolen) / 100)


# ---- probe


def test_working_sets_span_the_cache_and_stay_in_memory():
    sizes = probe.working_sets(2**25, 2**34)
    assert sizes[0] == 2**18 and sizes[-1] == 2**27 and 2**25 in sizes and sizes == sorted(set(sizes))
    assert probe.working_sets(480 * 2**20, 2**36)[-1] == 2**30
    assert probe.working_sets(480 * 2**20, 2**32)[-1] == 2**28
    assert probe.working_sets(0, 2**34)[-1] == 64 * 2**18


def test_a_probe_is_kept_unless_the_machine_was_busy(tmp_path, monkeypatch):
    calls, memo = [], Memo(tmp_path / "memo.db")
    target = targets.load("x86-generic")

    def fake_call(name, args, *rest):
        calls.append(args)
        return {"read_gb_per_s": [[2**18, 50.0]], "tera_ops": {"fp32": 1.0}, "launch_us": 2.0, "source": "measured"}

    load = environment.Load(0.5, 0.0, 1.0)
    monkeypatch.setattr(probe, "call", fake_call)
    monkeypatch.setattr(environment, "load", lambda: load)
    assert probe.probe(target, memo).ceilings.busy
    load = environment.Load(0.0, 0.0, 0.0)
    quiet = probe.probe(target, memo)
    assert not quiet.ceilings.busy and quiet.ceilings.source == "measured" and len(calls) == 2
    assert probe.probe(target, memo) == quiet and len(calls) == 2
    memo.close()
