"""Native kernels, compiled on first use by the system's C++ compiler for this very CPU, and kept per user.

The library's name holds a hash of the sources, the compiler, its flags and the CPU's features, so nothing stale is ever
loaded; it is moved into place when complete, so two processes may build at once. It is linked to the OpenMP runtime
that torch has loaded: two runtimes in one process would keep two pools of spinning threads.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import struct
import subprocess
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from autotune.errors import DeviceError
from autotune.store import digest, user_folder
from autotune.targets.detect import compiler, detect_cpu

FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-march=native", "-w")
_COMPILE_SECONDS = 120
_prepared: dict[str, Path] = {}  # what `prepare` found, so that nothing is hashed twice


def sources(name: str) -> list[Path]:
    """What a library is made of: NAME.cpp, its parts NAME.PART.cpp, and every header beside them."""
    return [FOLDER / f"{name}.cpp", *sorted(FOLDER.glob(f"{name}.*.cpp")), *sorted(FOLDER.glob("*.h"))]


def libraries() -> list[str]:
    """All that this CPU uses, the one that compiles longest first."""
    found = {path.name.partition(".")[0] for path in FOLDER.glob("*.cpp")}
    features = detect_cpu().features
    usable = (name for name in found if is_used(name, features))
    return sorted(usable, key=lambda name: (name != "integer", name))


def is_used(name: str, features: Collection[str]) -> bool:
    """Whether a CPU with these features has the instructions that the library is for, and nothing better."""
    if name.startswith("amx"):
        return "amx_tile" in features
    return name != "flash" or ("avx512_bf16" in features and "amx_bf16" not in features)


def prepare() -> None:
    """Compile what this machine has none of yet, side by side: one after the other they take twice as long. A library
    that cannot be built is left to whoever asks for it."""

    def quietly(name: str) -> None:
        with suppress(DeviceError):
            _prepared[name] = build(name)

    made_by()  # asks the compiler who it is: once, not in every thread
    with ThreadPoolExecutor() as pool:
        list(pool.map(quietly, libraries()))


@cache
def library(name: str) -> ctypes.CDLL:
    """The compiled NAME.cpp, built if this machine has none yet.

    Raises:
        DeviceError: `kernel.compiler` when there is no compiler or it fails, with its first error.
    """
    path = _prepared.get(name) or build(name)
    try:
        _check_whole(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise DeviceError("kernel.compiler", f"{path} does not load: {error}.", "Delete it and try again.") from error


@cache
def available(name: str) -> bool:
    """Whether the library can be built and loaded here."""
    try:
        library(name)
    except DeviceError:
        return False
    return True


def build(name: str, flags: tuple[str, ...] = _FLAGS) -> Path:
    """Compile unless the same sources, compiler, flags and CPU already have been; returns the library's path."""
    found = compiler()
    if found is None:
        hint = "Install one (for example g++), or set CXX; kernels of torch are used meanwhile."
        raise DeviceError("kernel.compiler", "there is no C++ compiler on this machine.", hint)
    command = shlex.split(found)
    openmp = openmp_runtime()
    contents = [path.read_text(encoding="utf-8") for path in sources(name)]
    key = digest([contents, made_by(flags), _cpu_flags(), str(openmp)])
    folder = user_folder() / "kernels"
    target = folder / f"{name}-{key[:24]}.so"
    if not target.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                parts = [path for path in sources(name) if path.suffix == ".cpp"]
                made = _compile(command, flags, parts, Path(scratch), openmp)
                os.replace(made, target)
        except OSError as error:
            hint = "Set AUTOTUNE_HOME to a folder that can be written."
            raise DeviceError("kernel.compiler", f"no library can be kept in {folder}: {error}.", hint) from error
    return target


def made_by(flags: tuple[str, ...] = _FLAGS) -> list[str]:
    """The compiler's version and all of its options; empty where there is none."""
    found = compiler()
    return [] if found is None else [_version(found), *shlex.split(found)[1:], *flags]


def openmp_runtime() -> Path | None:
    """The OpenMP library in this process, which torch brought; None when it cannot be seen (not Linux)."""
    import torch  # noqa: F401 - loads it

    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    loaded = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "/" in line}
    known = ("libgomp", "libiomp5", "libomp")
    return next((Path(path) for path in sorted(loaded) if Path(path).name.startswith(known)), None)


def _compile(command: list[str], flags: tuple[str, ...], parts: list[Path], folder: Path, openmp: Path | None) -> Path:
    """Side by side, then linked."""
    library, objects = folder / "made.so", [folder / f"{part.stem}.o" for part in parts]

    def one(part: Path, made: Path) -> None:
        _run([*command, *flags, "-c", str(part), "-o", str(made)])

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, parts, objects))
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    runtime = [str(openmp)] if openmp else ["-fopenmp"]
    _run([*command, *sanitizers, "-shared", *map(str, objects), "-o", str(library), *runtime])
    return library


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError("kernel.compiler", f"{shlex.join(command)}: {error}.", "Set CXX to a compiler.") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error:" in line), done.stderr.strip()[:200])
        raise DeviceError("kernel.compiler", f"{command[0]} failed: {first}", "Set CXX to another compiler.")


def _check_whole(path: Path) -> None:
    """Mapping a library that was cut short ends the process (SIGBUS); an ELF file's section headers are its end."""
    with open(path, "rb") as file:
        header = file.read(64)
    if len(header) == 64 and header.startswith(b"\x7fELF\x02\x01"):
        start, (size, count) = struct.unpack_from("<Q", header, 0x28)[0], struct.unpack_from("<HH", header, 0x3A)
        if path.stat().st_size < start + size * count:
            raise OSError("the file is cut short")


@cache
def _version(command: str) -> str:
    """Empty where it does not say; compiling will then."""
    call = [*shlex.split(command), "--version"]
    try:
        return subprocess.run(call, capture_output=True, text=True, errors="replace", timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cpu_flags() -> str:
    """What `-march=native` depends on; a home folder may be shared by machines of different kinds."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return ""
    lines = info.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
