"""An engine's own process (see `peers.py`): answers lines of JSON on stdin, until stdin ends.

    python peers_child.py ENGINE THREADS

{"do": "about"} -> {"package", "version", "threads"}; {"do": "load", "case"} -> {"candidates", "failed"}; {"do":
"sample", "name", "settle_s"} -> {"seconds"}, of as many calls as the load said; other questions are the engine's own.
Lines {"at": NAME} before an answer say what it is at. Only the answer's calls are timed: threads are woken and caches
filled before.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from peers import ENGINES, Case, Failures, Loaded

Say = Callable[[dict[str, Any]], None]
LONG_CALL_S = 0.010  # beyond, fetching the weights from memory is lost in the call
REFRESH_S = 0.005  # most time spent on filling the cache before a sample


class KernelEngine(Protocol):
    """What a module of `peers.ENGINES` offers under the name `Engine`, made with the number of threads."""

    package: str
    version: str

    def running(self) -> AbstractContextManager[object]:
        """Held around loading and timing."""
        ...

    def load(self, case: Case, at: Callable[[str], None], failed: Failures) -> list[Loaded]:
        """Every wanted candidate whose output has been checked; `at` is told a name before it is touched."""
        ...


class Timed:
    """A candidate and how many calls make a sample."""

    def __init__(self, loaded: Loaded, cold: bool, sample_s: float) -> None:
        self.loaded, self.sample_s = loaded, sample_s
        self.turns = itertools.cycle(loaded.calls)
        self.pass_calls = 1 if cold else len(loaded.calls)
        self.count = 0

    def calibrate(self) -> int:
        """Calls a sample needs to last `sample_s`."""
        next(self.turns)()
        self.count = 1
        while (elapsed := self._run()) < self.sample_s and self.count < 2**20:
            factor = self.sample_s / elapsed if elapsed > 0 else 16.0
            self.count = math.ceil(self.count * min(16.0, max(1.1, 1.1 * factor)))
        self.call_s = elapsed / self.count
        return self.count

    def sample(self, settle_s: float) -> float:
        if settle_s:
            time.sleep(settle_s)
        if self.call_s < LONG_CALL_S:
            end = time.perf_counter() + REFRESH_S
            for _ in range(self.pass_calls):
                next(self.turns)()
                if time.perf_counter() > end:
                    break
        return self._run()

    def _run(self) -> float:
        turns, count = self.turns, range(self.count)
        start = time.perf_counter()
        for _ in count:
            next(turns)()
        return time.perf_counter() - start


class KernelServer:
    """Loading and sampling, the same for every engine of kernels."""

    def __init__(self, engine: KernelEngine, say: Say) -> None:
        self.engine, self.say = engine, say
        self.timed: dict[str, Timed] = {}

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.engine.running():
            if request["do"] == "sample":
                return {"seconds": self.timed[request["name"]].sample(request["settle_s"])}
            return self._load(Case.from_json(request["case"]))

    def _load(self, case: Case) -> dict[str, Any]:
        failed = Failures()
        self.timed.clear()
        gc.enable()
        loaded = self.engine.load(case, lambda name: self.say({"at": name}), failed)
        for item in loaded:
            self.say({"at": item.name})
            timed = Timed(item, case.cold, case.sample_s)
            try:
                timed.calibrate()
            except Exception as error:  # whatever a kernel raises is its own failure
                failed.add(item.kernel, item.scheme, error)
                continue
            self.timed[item.name] = timed
        gc.collect()
        gc.disable()
        return {"candidates": [_described(timed) for timed in self.timed.values()], "failed": failed}


def _described(timed: Timed) -> dict[str, Any]:
    item = timed.loaded
    copies = item.nodes * len(item.calls)
    return {
        "name": item.name,
        "kernel": item.kernel,
        "scheme": item.scheme,
        "packed_bytes": item.packed_bytes,
        "working_set_bytes": item.packed_bytes * copies,
        "multiplications": timed.count * item.nodes,  # of a sample
        "note": item.note,
    }


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print where they like

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    module = importlib.import_module(ENGINES[name][0])
    engine = module.Engine(threads)
    handler = engine if hasattr(engine, "handle") else KernelServer(engine, say)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "about":
            say({"package": engine.package, "version": engine.version, "threads": threads})
        else:
            say(handler.handle(request))


if __name__ == "__main__":
    main()
