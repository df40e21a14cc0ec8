"""What the CUDA driver says about a device, and what it is doing now: `libcuda` and `libnvidia-ml`, through ctypes.

No torch: this answers in milliseconds, before anything heavy is imported, and never raises. A library that is missing
or refuses gives None. Device 0 is the first that `CUDA_VISIBLE_DEVICES` lets this process see; NVML ignores that
variable, so it is asked by the device's address on the PCI bus. Nothing here changes a setting of the card.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Attributes of cuDeviceGetAttribute, from cuda.h.
_SMS, _CLOCK_KHZ, _MEMORY_KHZ, _BUS_BITS, _L2_BYTES, _MAJOR, _MINOR = 16, 13, 36, 37, 38, 75, 76
_SM_CLOCK, _MEMORY_CLOCK = 1, 2  # nvmlClockType_t
_TEMPERATURE_GPU = 0
# nvmlClocksEventReasons: bits that slow a card down; idle (1) and set clocks (2) are not among them.
_SLOWED = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True)
class CudaDevice:
    """Clocks are the highest the card may reach, in MHz; 0 for what the driver hides."""

    name: str
    compute_capability: float
    sms: int
    memory_bytes: int
    l2_bytes: int
    sm_mhz: int
    memory_mhz: int
    bus_bits: int
    driver: str


@dataclass(frozen=True)
class CudaState:
    """What the card does at this moment; -1 where it does not say."""

    sm_mhz: int
    memory_mhz: int
    temperature_c: int
    power_w: float
    slowed_by: tuple[str, ...]  # empty: nothing holds the clock down


def first_device() -> CudaDevice | None:
    """Device 0 of this process; None where there is none."""
    library = _cuda()
    if library is None:
        return None
    handle = ctypes.c_int()
    if library.cuDeviceGet(ctypes.byref(handle), 0):
        return None
    name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
    if library.cuDeviceGetName(name, 256, handle) or library.cuDeviceTotalMem_v2(ctypes.byref(total), handle):
        return None

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        return 0 if library.cuDeviceGetAttribute(ctypes.byref(value), number, handle) else value.value

    return CudaDevice(
        name=name.value.decode(errors="replace"),
        compute_capability=round(attribute(_MAJOR) + attribute(_MINOR) / 10, 1),
        sms=attribute(_SMS),
        memory_bytes=total.value,
        l2_bytes=attribute(_L2_BYTES),
        sm_mhz=attribute(_CLOCK_KHZ) // 1000,
        memory_mhz=attribute(_MEMORY_KHZ) // 1000,
        bus_bits=attribute(_BUS_BITS),
        driver=driver_version(),
    )


def driver_version() -> str:
    """Of the NVIDIA driver, such as "580.159.04"; "unknown" where the library does not say."""
    library, text = _nvml(), ctypes.create_string_buffer(96)
    if library is None or library.nvmlSystemGetDriverVersion(text, 96):
        return "unknown"
    return text.value.decode(errors="replace")


def state() -> CudaState | None:
    """Clocks, temperature, power and what slows device 0 down; None without NVML."""
    library, handle = _nvml(), _nvml_handle()
    if library is None or handle is None:
        return None
    number, reasons = ctypes.c_uint(), ctypes.c_ulonglong()

    def read(function: str, *arguments: int) -> int:
        failed = getattr(library, function)(handle, *arguments, ctypes.byref(number))
        return -1 if failed else number.value

    asked = library.nvmlDeviceGetCurrentClocksThrottleReasons(handle, ctypes.byref(reasons))
    bits = 0 if asked else reasons.value
    milliwatts = read("nvmlDeviceGetPowerUsage")
    return CudaState(
        sm_mhz=read("nvmlDeviceGetClockInfo", _SM_CLOCK),
        memory_mhz=read("nvmlDeviceGetClockInfo", _MEMORY_CLOCK),
        temperature_c=read("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
        power_w=milliwatts / 1000 if milliwatts >= 0 else -1.0,
        slowed_by=tuple(name for bit, name in _SLOWED.items() if bits & bit),
    )


@cache
def _cuda() -> Any:
    """libcuda, initialized, with at least one device; else None."""
    library, count = _open("libcuda.so.1"), ctypes.c_int()
    if library is None or library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return None
    return library if count.value else None


@cache
def _nvml() -> Any:
    library = _open("libnvidia-ml.so.1")
    return None if library is None or library.nvmlInit_v2() else library


@cache
def _nvml_handle() -> Any:
    """NVML's handle of device 0, found by its PCI address."""
    library, cuda = _nvml(), _cuda()
    if library is None or cuda is None:
        return None
    device, address, handle = ctypes.c_int(), ctypes.create_string_buffer(64), ctypes.c_void_p()
    if cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetPCIBusId(address, 64, device):
        return None
    return None if library.nvmlDeviceGetHandleByPciBusId_v2(address, ctypes.byref(handle)) else handle


def _open(name: str) -> Any:
    """The library from the loader's path, or from where container runtimes mount the driver."""
    for path in (name, *(str(Path(folder) / name) for folder in ("/usr/local/nvidia/lib64", "/usr/lib/wsl/lib"))):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None
