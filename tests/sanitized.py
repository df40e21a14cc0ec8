"""C++ programs of the tests (`NAME_harness.cpp`), which include a native source, run under sanitizers."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from native import AVX2, FEATURES

from autotune.kernels.cpu import build
from autotune.targets.detect import compiler

_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{build.FOLDER}")
_SECONDS = 120


def run(harness: str, instructions: Sequence[str], folder: Path) -> None:
    """The program, compiled into the folder, ends well and prints that nothing is wrong: 0."""
    if instructions is AVX2 and "avx2" not in FEATURES:
        pytest.skip("this CPU lacks avx2")
    program, source = folder / "harness", Path(__file__).with_name(f"{harness}_harness.cpp")
    command = [*shlex.split(compiler() or "c++"), *_FLAGS, *instructions, str(source), "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    if made.returncode and "sanitize" in made.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert made.returncode == 0, made.stderr
    environment = {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=_SECONDS, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr
