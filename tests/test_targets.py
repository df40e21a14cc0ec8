"""Detection on made-up machines, on this one, and the shipped profiles."""

import subprocess
import sys

import pytest

from autotune.errors import InputError
from autotune.targets import detect, target

X86 = """model name\t: Intel(R) Xeon(R) 6975P-C @ 2.0GHz
flags\t\t: fpu avx2 fma avx512f avx512_vnni amx_tile amx_int8 amx_bf16
"""
ARM = "CPU implementer\t: 0x41\nCPU part\t: 0xd4f\nFeatures\t: fp asimd asimdhp asimddp sve i8mm bf16\n"


@pytest.fixture
def machine(tmp_path):
    """Four CPUs on two hyperthreaded cores: 32 KiB L1d and 2 MiB L2 a core, one L3 of 480 MiB."""

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return tmp_path

    write("proc/cpuinfo", X86)
    write("proc/meminfo", "MemTotal:       33554432 kB\n")
    write("sys/devices/system/cpu/online", "0-3\n")
    for cpu in range(4):
        siblings = f"{cpu % 2},{cpu % 2 + 2}"
        base = f"sys/devices/system/cpu/cpu{cpu}"
        write(f"{base}/topology/thread_siblings_list", siblings)
        levels = [(1, "Data", "32K", siblings), (1, "Instruction", "32K", siblings)]
        levels += [(2, "Unified", "2048K", siblings), (3, "Unified", "491520K", "0-3")]
        for index, (level, kind, size, shared) in enumerate(levels):
            for name, text in (("level", str(level)), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
                write(f"{base}/cache/index{index}/{name}", text)
    return write


def test_an_x86_with_amx(machine):
    found = detect.detect_cpu(machine("proc/self/cgroup", "0::/\n"))
    assert found.name == "cpu-intel-xeon-6975p-c" and found.cores == 2
    assert {"avx512_vnni", "amx_int8", "amx_bf16"} <= set(found.features)
    assert found.caches == {"L1d": 2 * 32 * 2**10, "L2": 2 * 2 * 2**20, "L3": 480 * 2**20}
    assert found.last_cache_bytes == 480 * 2**20 and found.memory_bytes == 32 * 2**30
    assert found.ceilings.source == "datasheet" and found.ceilings.tera_ops["int8"] > found.ceilings.tera_ops["fp32"]


def test_an_arm_is_named_by_its_numbers(machine):
    found = detect.detect_cpu(machine("proc/cpuinfo", ARM))
    assert found.model == "Arm Neoverse V2" and found.name == "cpu-arm-neoverse-v2"
    assert set(found.features) == {"neon", "dotprod", "i8mm", "bf16", "fp16", "sve"}


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/box\n", "cpu.max": "100000 100000", "memory.max": "1073741824"},
        {
            "proc/self/cgroup": "3:cpu:/box\n4:memory:/box\n",
            "cpu/box/cpu.cfs_quota_us": "150000",
            "cpu/box/cpu.cfs_period_us": "100000",
            "memory/box/memory.limit_in_bytes": "1073741824",
        },
    ],
)
def test_container_limits_hold(machine, files):
    """A limit of the outer group binds the inner one; cgroup v2 and v1."""
    for name, text in files.items():
        root = machine(name if name.startswith("proc") else f"sys/fs/cgroup/{name}", text)
    (root / "sys/fs/cgroup/box").mkdir(exist_ok=True)
    found = detect.detect_cpu(root)
    assert found.cores == 1 and found.memory_bytes == 2**30


def test_no_limit_is_no_limit(machine):
    machine("sys/fs/cgroup/cpu.max", "max 100000")
    machine("sys/fs/cgroup/memory.max", "max")
    found = detect.detect_cpu(machine("proc/self/cgroup", "0::/\n"))
    assert found.cores == 2 and found.memory_bytes == 32 * 2**30


def test_this_machine():
    found = detect.detect()
    assert found.cores >= 1 and found.memory_bytes > 2**28 and found.features
    assert target.Target.from_json(found.to_json()) == found


@pytest.mark.parametrize("name", target.names())
def test_shipped_profiles_load_and_are_sane(name):
    found = target.load(name)
    assert found.name == name and found.notes and found.ceilings.source == "datasheet"
    sizes, rates = zip(*found.ceilings.read_gb_per_s, strict=True)
    assert list(sizes) == sorted(sizes) and list(rates) == sorted(rates, reverse=True)
    assert {"fp32", "bf16"} <= set(found.ceilings.tera_ops)
    assert found.device == "mps" or ("int8" in found.ceilings.tera_ops and found.ceilings.launch_us > 0)
    assert target.Target.from_json(found.to_json()) == found


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_hopper(name):
    found = target.load(name)
    assert found.compute_capability == 9.0 and {"sparse24", "fp8"} <= set(found.features)
    assert found.ceilings.tera_ops["bf16"] == 989.0 and found.ceilings.tera_ops["fp8"] == 1979.0


@pytest.mark.parametrize(("name", "watts"), [("rtx4090-laptop", 150), ("rtx4070-laptop", 115)])
def test_a_laptop_says_at_what_power_its_rates_hold(name, watts):
    """Half of desktop Ada's rates a clock and SM would be wrong, and so would a profile without its limit."""
    found = target.load(name)
    assert f"{watts} W" in found.notes and "check them" in found.notes
    rates = found.ceilings.tera_ops
    assert rates["bf16"] == pytest.approx(2 * rates["fp32"], 0.01) == pytest.approx(rates["int8"] / 4, 0.01)


def test_nothing_can_be_searched_where_no_kernel_runs():
    from autotune.kernels.spec import KERNELS
    from autotune.search_space.groups import LayerGroup, Linear
    from autotune.search_space.rules import legality
    from autotune.search_space.schemes import SCHEMES

    found = target.load("m4-max-gpu")
    group = LayerGroup("g", "o", None, (Linear("g", "g", 128, 128, False),))
    answers = [legality(item, group, "bf16", found, KERNELS, local=False) for item in SCHEMES]
    assert {answer.status for answer in answers} == {"illegal"}
    assert all("no mps kernel" in answer.reason for answer in answers)


def test_the_shipped_names():
    assert {"arm-generic", "h100", "h200", "x86-generic"} <= set(target.names())
    with pytest.raises(InputError, match="h100"):
        target.load("h10")


def test_targets_need_no_torch():
    code = "import sys; from autotune.targets import detect; detect.detect(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
