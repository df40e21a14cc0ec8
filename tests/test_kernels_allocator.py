"""Freed blocks stay with the process, until it is asked to give them back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from autotune.kernels.allocator import give_back

CODE = """
from pathlib import Path
import torch
from autotune.kernels.allocator import give_back, keep_large_blocks

def resident():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line).split()[1])

kept, why = keep_large_blocks()
assert kept, why
blocks = [torch.ones(2**22) for _ in range(16)]  # 16 MiB each
above = torch.ones(2**20)  # in use, so that the heap's end cannot move
full = resident()
del blocks
freed = resident()
give_back()
print(full - freed, freed - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep blocks")
def test_freed_memory_is_kept_and_given_back_when_asked():
    made = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    at_once, when_asked = map(int, made.stdout.split())  # KiB
    assert at_once < 64 * 1024
    assert when_asked > 192 * 1024


def test_giving_back_nothing_does_nothing():
    give_back()
    give_back()
