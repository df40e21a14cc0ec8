"""Runs the whole loop in children that can be killed: `python faked_run.py SETTINGS.json`.

Everything is imported once; every run is a fork of that state, so a run takes as long as its stages do and a kill hits
them rather than the imports. Latencies are arithmetic (see `tiny.faked`): the same tables for every run. Reads one
line a command, `FOLDER SECONDS`: run in FOLDER and SIGKILL it after so many seconds ("-": let it end). Answers each
with its exit status (-9: killed) and how long it took.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import optuna  # noqa: F401
import pytest
import tiny
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401 - found lazily otherwise, in every run again

import autotune.runtime
import autotune.search.run
import autotune.tune
from autotune.config import RunConfig


def run(values: dict[str, object], folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        autotune.tune.tune(RunConfig.of(**(values | {"out": folder})), until="apply")


def fork_and_kill(values: dict[str, object], folder: str, seconds: float | None) -> tuple[int, float]:
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            run(values, folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    poll = select.poll()
    poll.register(os.pidfd_open(child), select.POLLIN)
    if not poll.poll(None if seconds is None else seconds * 1000):
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, time.monotonic() - start


def main() -> None:
    values = json.loads(Path(sys.argv[1]).read_text())
    for line in sys.stdin:
        folder, seconds = line.split()
        status, took = fork_and_kill(values, folder, None if seconds == "-" else float(seconds))
        print(status, took, flush=True)


if __name__ == "__main__":
    main()
