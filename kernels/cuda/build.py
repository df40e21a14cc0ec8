"""CUDA C++ kernels, compiled on first use by nvcc for the card that is here, and kept per user.

The library's name holds a hash of the sources, the compiler and the card's generation, so nothing stale is ever loaded;
it is moved into place when complete, so two processes may build at once.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from autotune.errors import DeviceError
from autotune.store import digest, user_folder
from autotune.targets.detect import nvcc

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17")
_COMPILE_SECONDS = 240


@cache
def library(name: str) -> ctypes.CDLL:
    """The compiled NAME.cu, built if this machine has none yet.

    Raises:
        DeviceError: `kernel.compiler` when there is no nvcc or it fails, with its first error.
    """
    path = build(name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise DeviceError("kernel.compiler", f"{path} does not load: {error}.", "Delete it and try again.") from error


def build(name: str) -> Path:
    """Compile unless the same sources, compiler and generation already have been; returns the library's path."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    generation = f"sm_{major}{minor}"
    sources = [path.read_text(encoding="utf-8") for path in (FOLDER / f"{name}.cu", *sorted(FOLDER.glob("*.h")))]
    folder = user_folder() / "kernels"
    target = folder / f"{name}-{digest([sources, made_by(), generation])[:24]}.so"
    if not target.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / "made.so"
                compiled(name, made, f"-arch={generation}", "-shared", "-Xcompiler=-fPIC")
                os.replace(made, target)
        except OSError as error:
            hint = "Set AUTOTUNE_HOME to a folder that can be written."
            raise DeviceError("kernel.compiler", f"no library can be kept in {folder}: {error}.", hint) from error
    return target


def compiled(name: str, out: Path, *flags: str) -> str:
    """Run nvcc on NAME.cu; returns what it said.

    Raises:
        DeviceError: `kernel.compiler`.
    """
    command = [_found(), *FLAGS, *flags, str(FOLDER / f"{name}.cu"), "-o", str(out)]
    hint = "nvcc 12.5 or later is needed, and a C++ compiler that it takes; other kernels are used meanwhile."
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError("kernel.compiler", f"{shlex.join(command)}: {error}.", hint) from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise DeviceError("kernel.compiler", f"nvcc failed: {first}", hint)
    return done.stdout + done.stderr


@cache
def made_by() -> tuple[str, ...]:
    """The compiler's version and its options; empty where there is none."""
    found = nvcc()
    if found is None:
        return ()
    done = subprocess.run([found, "--version"], capture_output=True, text=True, errors="replace")
    return (done.stdout.strip(), *FLAGS)


def _found() -> str:
    found = nvcc()
    if found is None:
        hint = "Install CUDA's toolkit, or set CUDA_HOME; other kernels are used meanwhile."
        raise DeviceError("kernel.compiler", "there is no nvcc on this machine.", hint)
    return found
