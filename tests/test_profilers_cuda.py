"""The CUDA path of the profiler without a card: graphs and events are played, everything else is real."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass, replace

import pytest
import torch

from autotune.errors import DeviceError
from autotune.kernels.spec import Packed
from autotune.profilers import cuda_environment, cuda_timer, environment, probe, worker
from autotune.profilers.latency import profile
from autotune.profilers.timer import Protocol, measure, timing
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.groups import LayerGroup, Linear, ModelSpec
from autotune.search_space.space import build
from autotune.search_space.workload import parse
from autotune.store import Memo
from autotune.targets import cuda_driver, detect
from autotune.targets.cuda_driver import CudaDevice, CudaState
from autotune.targets.target import Ceilings, Target

H100 = CudaDevice("NVIDIA H100 80GB HBM3", 9.0, 132, 85 * 10**9, 50 * 2**20, 1980, 2619, 5120, "580.159.04")
QUICK = Protocol(rounds=4, max_rounds=4, min_rounds=2, warm_s=0.0, sample_s=1e-4)


@dataclass(frozen=True)
class GroupLike:
    tensor: torch.Tensor


class Card:
    """A device on which every call takes a stated time; nothing runs on it but what is recorded."""

    def __init__(self) -> None:
        self.passed_s, self.captures = 0.0, 0

    def takes(self, seconds):
        def call():
            self.passed_s += seconds

        return call

    def record(self, call):
        self.captures += 1

        class Graph:
            replay = staticmethod(call)

        return Graph()

    def elapsed(self, call):
        before = self.passed_s
        call()
        return self.passed_s - before


def test_a_graph_lasts_a_millisecond_over_all_copies():
    card = Card()
    graphed = cuda_timer.capture([card.takes(2e-6)] * 5, card.elapsed, card.record)
    assert graphed.calls == 500 and card.captures == 2
    assert card.elapsed(graphed.graph.replay) == pytest.approx(1e-3)
    assert cuda_timer.capture([card.takes(3e-3)] * 4, card.elapsed, card.record).calls == 4
    assert cuda_timer.capture([card.takes(1e-9)] * 3, card.elapsed, card.record).calls <= cuda_timer.MOST_NODES


def test_only_the_devices_time_counts():
    card = Card()
    clock = cuda_timer.DeviceClock(card.elapsed)
    graphs = {
        name: cuda_timer.capture([card.takes(time_s)], card.elapsed, card.record)
        for name, time_s in (("fast", 1e-5), ("slow", 3e-5))
    }
    timings = measure({name: clock.timed(item) for name, item in graphs.items()}, QUICK, clock=clock)
    found = {name: cuda_timer.per_call(timings[name], graphs[name].calls) for name in graphs}
    assert found["fast"].median_us == pytest.approx(10.0) and found["slow"].median_us == pytest.approx(30.0)
    assert found["slow"].samples_us[0] == pytest.approx(30.0) and not found["slow"].noisy


def test_one_call_of_a_replay():
    whole = timing([100.0, 110.0, 120.0], QUICK)
    one = cuda_timer.per_call(whole, 10)
    assert (one.median_us, one.low_us, one.high_us) == (11.0, whole.low_us / 10, whole.high_us / 10)
    assert one.rounds == 3 and one.drift == whole.drift


def test_copies_have_memory_and_strides_of_their_own():
    codes = torch.arange(12, dtype=torch.int8).view(3, 4).t()
    data = (codes, None, {"scale": torch.ones(3)}, GroupLike(torch.zeros(2)), "int")
    first, second = cuda_timer.copies_of(Packed(3, 4, torch.bfloat16, 12, data), 2)
    assert first.data[0] is codes and second.data[0].data_ptr() != codes.data_ptr()
    assert second.data[0].stride() == codes.stride() and torch.equal(second.data[0], codes)
    assert second.data[2]["scale"].data_ptr() != data[2]["scale"].data_ptr()
    assert second.data[3].tensor.data_ptr() != data[3].tensor.data_ptr() and second.data[4] == "int"


def test_the_watch_tells_clocks_and_what_slows_the_card():
    states = iter([CudaState(1980, 2619, 40, 300.0, ()), CudaState(1600, 2619, 60, 690.5, ("power cap",))])
    watch = cuda_timer.Watch(lambda: next(states, None))
    for _ in range(3):
        watch._last_s = -1.0
        watch.look()
    assert str(watch) == "SM 1980 MHz (1600 to 1980), 690 W, slowed by power cap"
    assert str(cuda_timer.Watch(lambda: None)) == ""


@pytest.mark.parametrize(
    ("text", "sticky"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul", False),
    ],
)
def test_errors_that_need_a_new_process(text, sticky):
    assert cuda_timer.is_sticky(RuntimeError(text)) is sticky
    assert cuda_timer.is_sticky(DeviceError("kernel.failed", f"cuda.int8, 2 x 4: {text}.")) is sticky


# ---- the worker's CUDA branch on a CPU kernel

FAKE = """
import torch
from autotune.kernels.reference import reference_linear
from autotune.kernels.spec import Packed

calls = 0

def pack(weight, dtype):
    return Packed(weight.dense.shape[0], weight.dense.shape[1], dtype, weight.dense.nbytes, weight)

def run(packed, x):
    global calls
    calls += 1
    {body}
    return reference_linear(packed.data, x, torch.float32).to(packed.dtype)
"""
BODIES = {
    "right": "pass",
    "sticky": "raise RuntimeError('CUDA error: an illegal memory access was encountered')",
    "late": "if calls > 8: raise RuntimeError('the second capture fails')",
    "rots": "if calls > 40: x = x * 1.1",  # right when checked, wrong once timed
}
CEILINGS = Ceilings(((2**20, 100.0), (2**22, 20.0)), {"fp32": 0.3, "bf16": 0.6, "int8": 1.2}, 5.0)
TARGET = Target("cpu-test", "cpu", "test", (), 1, 2**30, 2**20, CEILINGS)


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    count = itertools.count()

    def made(*bodies, scheme="fp32"):
        specs = []
        for body in bodies:
            module = f"fake_cuda_{body}_{next(count)}"
            (tmp_path / f"{module}.py").write_text(FAKE.format(body=BODIES[body]))
            specs.append(KernelSpec(body, (scheme,), "cpu", ("fp32",), module))
        return specs

    return made


@pytest.fixture
def played(monkeypatch):
    """Graphs replay by calling; events read the host's clock."""
    card = Card()
    monkeypatch.setattr(cuda_timer, "recorder", lambda: card.record)
    monkeypatch.setattr(cuda_timer, "event_s", host_event_s)
    monkeypatch.setattr(worker.cuda_timer.Watch, "look", lambda self: None)
    return card


def host_event_s(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _events(specs, monkeypatch):
    """What the worker says of one unit, its kernels timed as on a CUDA device."""
    monkeypatch.setattr(worker, "_time_rows", worker._time_rows_on_cuda)
    jobs = [
        {"id": n, "kernel": asdict(spec), "scheme": "fp32", "rows": 3, "rotate_bytes": 40_000, "resident": False}
        for n, spec in enumerate(specs)
    ]
    unit = {"members": [32], "in_features": 64, "bias": False, "dtype": "fp32", "jobs": jobs}
    events = []
    with torch.inference_mode():
        worker._time_unit(worker._Unit.of(unit), events.append, QUICK, 2**30)
    return events


def test_graphs_are_timed_and_checked_again(fakes, played, monkeypatch):
    events = _events(fakes("right"), monkeypatch)
    (row,) = [event for event in events if event["event"] == "row"]
    low, middle, high = row["times_us"][1], row["times_us"][0], row["times_us"][2]
    assert 1.0 < low <= middle <= high < 5e3 and played.captures >= 1
    assert events[-2]["stage"] == "check"  # after it was timed


def test_what_fails_inside_a_graph_leaves_and_the_others_stay(fakes, played, monkeypatch):
    events = _events(fakes("late", "right"), monkeypatch)
    failed = [event for event in events if event["event"] == "failed"]
    assert [event["ids"] for event in failed] == [[0]] and "second capture" in failed[0]["reason"]
    assert [event["id"] for event in events if event["event"] == "row"] == [1]


def test_wrong_after_it_was_timed_is_no_time(fakes, played, monkeypatch):
    events = _events(fakes("rots"), monkeypatch)
    assert not [event for event in events if event["event"] == "row"]
    (failed,) = [event for event in events if event["event"] == "failed"]
    assert failed["reason"].startswith("check failed")


def test_a_sticky_error_costs_one_kernel_and_a_new_process(fakes, tmp_path):
    linear = Linear("q", "q", 32, 64, False)
    spec = ModelSpec("m", "llama", "causal-lm", "fp32", None, (LayerGroup("q", "q", 0, (linear,)),), (), False)
    kernels = fakes("sticky", "right")
    memo = Memo(tmp_path / "memo.db")
    table = profile(
        spec, build(spec, TARGET, kernels, local=True), TARGET, parse("1,4,0"), memo, kernels=kernels, protocol=QUICK
    )
    memo.close()
    rows = {row.kernel: row for row in table.rows}
    assert rows["sticky"].status == "failed" and "illegal memory access" in rows["sticky"].reason
    assert rows["right"].status == "measured"


# ---- device, fingerprint, probe


def test_a_known_card_has_its_profiles_ceilings():
    found = detect.cuda_target(H100)
    assert found.name == "cuda-nvidia-h100-80gb-hbm3" and found.device == "cuda" and found.cores == 132
    assert found.ceilings.tera_ops["fp8"] == 1979.0 and {"fp8", "sparse24"} <= set(found.features)
    assert found.last_cache_bytes == 50 * 2**20 and Target.from_json(found.to_json()) == found


def test_an_unknown_card_has_those_of_its_clocks():
    found = detect.cuda_target(replace(H100, name="NVIDIA Something"))
    assert found.ceilings.bandwidth(2**40) == pytest.approx(3352, rel=0.01)  # 2619 MHz x 2 x 5120 bits
    assert found.ceilings.tera_ops["bf16"] == pytest.approx(1070, rel=0.01)
    turing = detect.cuda_target(replace(H100, name="NVIDIA Old", compute_capability=7.5))
    assert not {"bf16", "sparse24", "fp8"} & set(turing.features) and "fp8" not in turing.ceilings.tera_ops


def test_the_card_comes_before_the_cpu_and_none_leaves_the_cpu(monkeypatch):
    monkeypatch.setattr(cuda_driver, "first_device", lambda: H100)
    assert detect.detect().device == "cuda"
    monkeypatch.setattr(cuda_driver, "first_device", lambda: replace(H100, compute_capability=6.1))
    assert detect.detect().device == "cpu"
    monkeypatch.setattr(cuda_driver, "first_device", lambda: None)
    assert detect.detect().device == "cpu"


def test_no_driver_is_no_device(monkeypatch):
    for function in (cuda_driver._cuda, cuda_driver._nvml, cuda_driver._nvml_handle):
        function.cache_clear()
    monkeypatch.setattr(cuda_driver, "_open", lambda name: None)
    assert cuda_driver.first_device() is None and cuda_driver.state() is None
    assert cuda_driver.driver_version() == "unknown"
    for function in (cuda_driver._cuda, cuda_driver._nvml, cuda_driver._nvml_handle):
        function.cache_clear()


def test_the_driver_is_part_of_the_fingerprint(monkeypatch):
    monkeypatch.setattr(cuda_driver, "first_device", lambda: H100)
    first = environment.fingerprint(1, device="cuda")
    assert first["cuda"]["driver"] == "580.159.04" and first["cuda"]["torch"] == torch.__version__
    monkeypatch.setattr(cuda_driver, "first_device", lambda: replace(H100, driver="590.1"))
    assert environment.short_hash(environment.fingerprint(1, device="cuda")) != environment.short_hash(first)
    assert "cuda" not in environment.fingerprint(1)
    assert set(cuda_environment.libraries()) == {"torch", "cuda", "triton", "cublas", "cusparselt"}


def test_a_card_is_probed_by_its_own_probe(tmp_path, monkeypatch):
    asked = []

    def child(name, args, *rest):
        asked.append(name)
        return {"read_gb_per_s": [[2**20, 5000.0]], "tera_ops": {"bf16": 700.0}, "launch_us": 4.0, "source": "measured"}

    monkeypatch.setattr(probe, "call", child)
    monkeypatch.setattr(probe.environment, "load", lambda: environment.Load(0.0, 0.0, 0.0))
    memo = Memo(tmp_path / "memo.db")
    found = probe.probe(detect.cuda_target(H100), memo)
    again = probe.probe(detect.cuda_target(H100), memo)
    memo.close()
    assert asked == ["autotune.profilers.cuda_probe:measure"] and again == found
    assert found.ceilings.source == "measured" and found.ceilings.tera_ops == {"bf16": 700.0}
