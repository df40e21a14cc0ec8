"""Runs Triton kernels in the interpreter: in a process of its own, because Triton decides when kernels are defined."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def interpreted(asked: list[tuple[str, list[list[int]], str]]) -> dict[str, Any]:
    """Of (kernel, shapes, configurations) each what `triton_child.check` says, in order under "kernels"; and
    "activations"."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "triton_child.py"), json.dumps(asked)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert process.returncode == 0, process.stderr
    found: dict[str, Any] = json.loads(process.stdout)
    return found
