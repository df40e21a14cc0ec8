"""This machine as a Target: a CUDA device if there is one, else the CPU, and what of it this process may use.

Standard library only; the CUDA driver is asked through `cuda_driver`. Features are read from the CPU (`/proc/cpuinfo`
on Linux, `sysctl` on macOS), never assumed from its name. Cores and memory respect affinity and container limits
(cgroup v1 and v2). Ceilings are class figures, marked `datasheet`, until `profilers.probe` measures them. Bytes of a
cache level are those all its instances hold together.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from autotune.errors import DeviceError
from autotune.targets import cuda_driver, target
from autotune.targets.cuda_driver import CudaDevice
from autotune.targets.target import Ceilings, Target

ROOT = Path("/")

# What kernels may ask for -> what the CPU calls it: Linux x86 flags and Arm features, macOS sysctl names.
_FEATURES = {
    "avx2": ("avx2",),
    "fma": ("fma",),
    "f16c": ("f16c",),
    "avx512f": ("avx512f",),
    "avx512bw": ("avx512bw",),
    "avx512vl": ("avx512vl",),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
    "avx512_fp16": ("avx512_fp16",),
    "avx512_vbmi": ("avx512vbmi", "avx512_vbmi"),
    "avx512_vbmi2": ("avx512_vbmi2",),
    "avx_vnni": ("avx_vnni",),
    "avx_vnni_int8": ("avx_vnni_int8",),
    "amx_tile": ("amx_tile",),
    "amx_bf16": ("amx_bf16",),
    "amx_int8": ("amx_int8",),
    "amx_fp16": ("amx_fp16",),
    "neon": ("asimd", "hw.optional.neon", "hw.optional.AdvSIMD"),
    "dotprod": ("asimddp", "hw.optional.arm.FEAT_DotProd"),
    "i8mm": ("i8mm", "hw.optional.arm.FEAT_I8MM"),
    "bf16": ("bf16", "hw.optional.arm.FEAT_BF16"),
    "fp16": ("asimdhp", "hw.optional.arm.FEAT_FP16"),
    "sve": ("sve",),
    "sve2": ("sve2",),
    "sme": ("sme", "hw.optional.arm.FEAT_SME"),
}
_ARM_MAKERS = {
    "0x41": "Arm",
    "0x42": "Broadcom",
    "0x46": "Fujitsu",
    "0x48": "HiSilicon",
    "0x61": "Apple",
    "0xc0": "Ampere",
}
_ARM_PARTS = {
    ("0x41", "0xd0c"): "Neoverse N1",
    ("0x41", "0xd40"): "Neoverse V1",
    ("0x41", "0xd49"): "Neoverse N2",
    ("0x41", "0xd4f"): "Neoverse V2",
    ("0x41", "0xd84"): "Neoverse V3",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd42"): "Cortex-A78AE",
}


@dataclass(frozen=True)
class _Cpu:
    model: str
    features: tuple[str, ...]
    cores: int
    caches: dict[str, int]
    memory_bytes: int


def detect(root: Path = ROOT) -> Target:
    """The device autotune would use here: the accelerator if there is one, else the CPU. `root` is for tests."""
    return detect_gpu() or detect_cpu(root)


def detect_gpu() -> Target | None:
    """The CUDA device of this process with the ceilings of its shipped profile, or of its class; None without one."""
    device = cuda_driver.first_device()
    return None if device is None or device.compute_capability < 7.5 else cuda_target(device)


def cuda_target(device: CudaDevice) -> Target:
    known = _profile_of(device)
    note = f"Found on this machine, driver {device.driver}. Ceilings are those of "
    return Target(
        name=cuda_name(device.name),
        device="cuda",
        model=device.name,
        features=(*cuda_features(device.compute_capability), *_compilers()),
        cores=device.sms,
        memory_bytes=device.memory_bytes,
        last_cache_bytes=device.l2_bytes,
        ceilings=known.ceilings if known else cuda_ceilings(device),
        compute_capability=device.compute_capability,
        notes=note + (f"{known.name}.yaml until measured." if known else "its class until measured."),
        caches={"L2": device.l2_bytes},
    )


def _compilers() -> tuple[str, ...]:
    """What of CUDA kernels' compilers is installed: Triton, and NVIDIA's own."""
    return (*(("triton",) if find_spec("triton") else ()), *(("nvcc",) if nvcc() else ()))


def nvcc() -> str | None:
    """NVIDIA's compiler (feature `nvcc`): on the path, or where `CUDA_HOME` or the usual folder has it."""
    homes = (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda")
    known = (shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes if home)
    return shutil.which("nvcc") or next((found for found in known if found), None)


def cuda_name(model: str) -> str:
    """What a detected CUDA device of this vendor's name is called as a target."""
    return f"cuda-{_slug(model)}"


def cuda_features(capability: float) -> tuple[str, ...]:
    """What kernels may ask for, by compute capability (CUDA programming guide): bf16 and 2:4 from 8.0, fp8 from 8.9."""
    from_capability = {"fp16": 7.5, "int8": 7.5, "cuda_graphs": 7.5, "bf16": 8.0, "sparse24": 8.0, "fp8": 8.9}
    return tuple(name for name, least in from_capability.items() if capability >= least)


def cuda_ceilings(device: CudaDevice) -> Ceilings:
    """What a device of this class does by its clocks, buses and multiprocessors; a stand-in until measured."""
    capability = device.compute_capability
    # Dense bf16 (fp16 before 8.0) operations a cycle and multiprocessor, from NVIDIA's architecture papers.
    dense = {7: 1024, 8: 2048, 9: 4096, 10: 8192, 12: 1024}.get(int(capability), 1024)
    if capability in (8.6, 8.7, 8.9):
        dense = 1024
    clock = (device.sm_mhz or 1500) * 1e-6 * device.sms  # a rate of one operation a cycle, in tera-operations/s
    rates = {"fp32": 256 * clock, "fp16": dense * clock, "bf16": dense * clock, "int8": 2 * dense * clock}
    if capability >= 8.9:
        rates["fp8"] = 2 * dense * clock
    memory = 2 * device.memory_mhz * device.bus_bits / 8e3 or 300.0  # GB/s; two transfers a clock
    l2 = max(device.l2_bytes, 2**20)
    return Ceilings(((l2 // 2, 1.5 * memory), (4 * l2, memory)), rates, launch_us=5.0)


def _profile_of(device: CudaDevice) -> Target | None:
    """The shipped profile whose vendor's name is this one's."""
    for name in target.names():
        item = target.load(name)
        if item.device == "cuda" and item.model == device.name:
            return item
    return None


def detect_cpu(root: Path = ROOT) -> Target:
    """Raises DeviceError `target.detect` where neither Linux nor macOS answers."""
    if sys.platform == "darwin" and root == ROOT:
        cpu = _macos()
    elif (root / "proc/cpuinfo").is_file():
        cpu = _linux(root)
    else:
        hint = "Name a target instead, for example x86-generic."
        raise DeviceError("target.detect", f"this platform ({sys.platform}) is not understood.", hint)
    last_cache = cpu.caches[max(cpu.caches)] if cpu.caches else 0  # "L3" over "L2" over "L1d"
    return Target(
        name=f"cpu-{_slug(cpu.model)}",
        device="cpu",
        model=cpu.model,
        features=(*cpu.features, "cxx") if root == ROOT and compiler() else cpu.features,
        cores=cpu.cores,
        memory_bytes=cpu.memory_bytes,
        last_cache_bytes=last_cache,
        ceilings=class_ceilings(cpu.features, cpu.cores, last_cache),
        notes="Found on this machine. Ceilings are those of its class until measured.",
        caches=cpu.caches,
    )


def compiler() -> str | None:
    """The C++ compiler for native kernels (feature `cxx`): `CXX` where it is set, else the first installed."""
    named = os.environ.get("CXX", "").strip()  # blank counts as not set, as for make
    if named:
        try:
            return named if shutil.which(shlex.split(named)[0]) else None
        except ValueError:  # a quotation that does not end
            return None
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def class_ceilings(features: tuple[str, ...], cores: int, last_cache_bytes: int) -> Ceilings:
    """What cores with these features do at 2.5 GHz, and memory shared by many cores; a stand-in, not a claim."""
    clock_ghz = 2.5
    fp32 = 64.0 if "avx512f" in features else 32.0 if "avx2" in features else 16.0  # operations a cycle and core
    bf16 = 1024.0 if "amx_bf16" in features else 2 * fp32 if {"avx512_bf16", "bf16"} & set(features) else fp32
    has_dot = {"avx512_vnni", "avx_vnni", "dotprod"} & set(features)
    int8 = 2048.0 if "amx_int8" in features else 4 * fp32 if has_dot else fp32
    rates = {"fp32": fp32, "bf16": bf16, "int8": int8}
    memory, cache = 10.0 * min(cores, 40), 30.0 * cores  # GB/s
    return Ceilings(
        read_gb_per_s=((max(last_cache_bytes, 1), max(memory, cache)), (4 * max(last_cache_bytes, 1), memory)),
        tera_ops={name: per_cycle * clock_ghz * cores / 1e3 for name, per_cycle in rates.items()},
        launch_us=5.0,
    )


# ---- Linux


def _linux(root: Path) -> _Cpu:
    info = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    usable = _usable_cpus(root)
    memory = int(_match(r"MemTotal:\s+(\d+)", (root / "proc/meminfo").read_text()) or 0) * 1024
    return _Cpu(
        model=_linux_model(info),
        features=_features(set((_match(r"^(?:flags|Features)\s*:\s*(.*)$", info) or "").split())),
        cores=_cores(root, usable),
        caches=_caches(root, usable),
        memory_bytes=min([memory, *_memory_limits(root)]),
    )


def _linux_model(info: str) -> str:
    """The vendor's name; Arm Linux gives numbers instead."""
    if name := _match(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info):
        return name.strip()
    maker, part = _match(r"^CPU implementer\s*:\s*(\S+)", info), _match(r"^CPU part\s*:\s*(\S+)", info)
    if maker and part:
        return f"{_ARM_MAKERS.get(maker, maker)} {_ARM_PARTS.get((maker, part), part)}"
    return platform.machine() or "unknown CPU"


def _usable_cpus(root: Path) -> list[int]:
    """Logical CPUs this process may run on."""
    if root == ROOT and hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return _cpu_list((root / "sys/devices/system/cpu/online").read_text())


def _cores(root: Path, usable: list[int]) -> int:
    """Physical cores among the usable CPUs, at least one, no more than the container's quota allows."""
    siblings = set()
    for cpu in usable:
        file = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        siblings.add(file.read_text().strip() if file.is_file() else str(cpu))
    return max(1, min(len(siblings), *[math.floor(quota) or 1 for quota in _quotas(root)], len(usable)))


def _quotas(root: Path) -> list[float]:
    """CPUs worth of time the container may use, from every cgroup that sets a limit."""
    quotas = []
    for folder in _cgroups(root):
        if (file := folder / "cpu.max").is_file():
            quota, _, period = file.read_text().strip().partition(" ")
        elif (file := folder / "cpu.cfs_quota_us").is_file():
            quota, period = file.read_text().strip(), (folder / "cpu.cfs_period_us").read_text().strip()
        else:
            continue
        if quota not in ("max", "-1") and int(period or 100_000) > 0:
            quotas.append(int(quota) / int(period or 100_000))
    return quotas


def _memory_limits(root: Path) -> list[int]:
    files = [folder / name for folder in _cgroups(root) for name in ("memory.max", "memory.limit_in_bytes")]
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return [int(text) for text in texts if text.isdigit()]


def _cgroups(root: Path) -> list[Path]:
    """Folders of every cgroup this process is in, up to the root: a limit of a parent holds too."""
    base, folders = root / "sys/fs/cgroup", []
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        for top in (base, base / controllers, base / "unified") if controllers else (base, base / "unified"):
            here = top / path.lstrip("/")
            folders += [folder for folder in (here, *here.parents) if folder.is_relative_to(top)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _caches(root: Path, usable: list[int]) -> dict[str, int]:
    """ "L1d", "L2", "L3" -> bytes, each shared instance counted once."""
    seen: dict[tuple[str, str], int] = {}
    for cpu in usable:
        for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
            kind, level = (index / "type").read_text().strip(), (index / "level").read_text().strip()
            if kind == "Instruction" or not (index / "size").is_file():
                continue
            name = f"L{level}d" if kind == "Data" else f"L{level}"
            shared = (index / "shared_cpu_list").read_text().strip()
            seen[name, shared] = _size((index / "size").read_text().strip())
    caches: dict[str, int] = {}
    for (name, _), size in seen.items():
        caches[name] = caches.get(name, 0) + size
    return dict(sorted(caches.items()))


# ---- macOS


def _macos() -> _Cpu:
    text = subprocess.run(["sysctl", "-a"], capture_output=True, text=True, check=False, timeout=20).stdout
    values = dict(re.findall(r"^([\w.]+): (.*)$", text, re.MULTILINE))
    words = {name for name, value in values.items() if name.startswith("hw.optional") and value == "1"}
    words |= set(
        f"{values.get('machdep.cpu.features', '')} {values.get('machdep.cpu.leaf7_features', '')}".lower().split()
    )
    level = "hw.perflevel0." if "hw.perflevel0.physicalcpu" in values else "hw."  # performance cores, where they differ
    caches = {"L1d": f"{level}l1dcachesize", "L2": f"{level}l2cachesize", "L3": "hw.l3cachesize"}
    return _Cpu(
        model=values.get("machdep.cpu.brand_string", platform.machine()),
        features=_features(words),
        cores=int(values.get(f"{level}physicalcpu", os.cpu_count() or 1)),
        caches={name: int(values[key]) for name, key in caches.items() if int(values.get(key, 0))},
        memory_bytes=int(values.get("hw.memsize", 0)),
    )


# ---- shared


def _features(words: set[str]) -> tuple[str, ...]:
    return tuple(name for name, spellings in _FEATURES.items() if words & set(spellings))


def _slug(model: str) -> str:
    """ "Intel(R) Xeon(R) 6975P-C @ 2.0GHz" -> "intel-xeon-6975p-c"."""
    text = re.sub(r"\((?:r|tm|c)\)|@.*$|\b(?:cpu|processor|\d+-core)\b", " ", model.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "unknown"


def _match(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1) if found else None


def _size(text: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def _cpu_list(text: str) -> list[int]:
    """ "0-2,5" -> [0, 1, 2, 5]."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus
