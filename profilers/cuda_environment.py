"""What a measurement on a CUDA device depends on besides the kernel: the card, its driver, and the libraries.

Clocks in the fingerprint are the highest the card may reach; those it ran at while something was timed are noted with
the row (`cuda_timer.Watch`). cuSPARSELt is named with its version because 0.8.0 is slow on H100 (its release notes).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from autotune.targets import cuda_driver

_PACKAGES = (
    "torch",
    "triton",
    "nvidia-cublas",
    "nvidia-cublas-cu12",
    "nvidia-cusparselt-cu13",
    "nvidia-cusparselt-cu12",
)


def fingerprint() -> dict[str, Any]:
    """Device, driver and libraries; without a device, the libraries alone."""
    device = cuda_driver.first_device()
    if device is None:
        return {"device": "none", **libraries()}
    return {
        "device": device.name,
        "compute_capability": device.compute_capability,
        "sms": device.sms,
        "memory_bytes": device.memory_bytes,
        "sm_mhz": device.sm_mhz,
        "memory_mhz": device.memory_mhz,
        "driver": device.driver,
        **libraries(),
    }


def libraries() -> dict[str, str]:
    """Versions of torch, its CUDA, cuBLAS, cuSPARSELt and Triton; "none" for what is not there."""
    import torch
    from torch.backends import cusparselt

    found = {name.removeprefix("nvidia-"): _version(name) for name in _PACKAGES}
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": found["triton"],
        "cublas": _either(found["cublas"], found["cublas-cu12"]),
        "cusparselt": _either(found["cusparselt-cu13"], found["cusparselt-cu12"], str(cusparselt.version() or "none")),
    }


def _either(*versions: str) -> str:
    return next((text for text in versions if text != "none"), "none")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
