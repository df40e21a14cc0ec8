"""What runs on a card besides kernels, on a second device that is the CPU's memory under another name.

See `second_device`. Everything has to give the CPU's bits there; a tensor on the wrong device is refused, as by a card.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import second_device

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(bool(second_device.available()), reason=second_device.available())


def in_a_child(*scenarios: str) -> dict[str, Any]:
    """Of each what `second_child` found: there the device is torch's for the rest of the process."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "second_child.py"), *scenarios],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert process.returncode == 0, process.stderr
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found():
    return in_a_child("rules", "train", "resume", "waits", "compress", "again", "losses")


def test_the_device_refuses_what_a_card_refuses(found):
    allowed = {"number", "indices", "copies", "draws"}
    assert {name for name, refused in found["rules"].items() if not refused} == allowed
    kinds = {"numpy": "TypeError", "native": "TypeError"}  # no address is given to native code
    assert {name: found["rules"][name] for name in kinds} == kinds


@pytest.mark.parametrize("scenario", ["train", "resume", "compress", "again", "losses"])
def test_it_gives_the_bits_of_the_cpu(found, scenario):
    assert found[scenario]
    assert {name: unlike for name, unlike in found[scenario].items() if unlike} == {}


def test_a_step_of_training_waits_once(found):
    """For its loss; each of its two forward passes waits in transformers, which looks for packed sequences."""
    forward = found["waits"]["forward"]
    assert sum(forward.values()) <= 1
    for name in ("by block", "end to end"):
        assert sum(found["waits"][name].values()) == 1 + 2 * sum(forward.values())


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["train_all", "compress_all", "losses_all", "whole"])
def test_all_of_it_gives_the_bits_of_the_cpu(scenario):
    """Architectures, formats, methods; and the loop from tuning to a searched recovery."""
    found = in_a_child(scenario)[scenario]
    assert found
    assert {name: unlike for name, unlike in found.items() if unlike} == {}
