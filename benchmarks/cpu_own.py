"""The project's own table of kernels as an engine (see `peers.py`): every CPU kernel of every scheme that fits.

A few rows are multiplied by all copies in one native call, as a decode step does with a model's layers where the kernel
is native; anything else is called from Python, one copy at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from peers import MANY_ROWS, Case, Failures, Loaded, made_input, made_weight

from autotune.kernels.checks import gate
from autotune.kernels.cpu import decoder
from autotune.kernels.spec import KERNELS, GroupWeight, KernelModule, Packed, kernel
from autotune.kernels.spec import load as load_kernel
from autotune.profilers import environment
from autotune.search_space.coverage import KernelSpec
from autotune.search_space.groups import LayerGroup, Linear
from autotune.search_space.rules import legality
from autotune.search_space.schemes import SCHEMES
from autotune.targets import detect

READ = "read"  # kernel and scheme of the candidate that only reads


@dataclass(frozen=True)
class _Ready:
    spec: KernelSpec
    module: KernelModule
    scheme: str
    copies: tuple[Packed, ...]
    passed: frozenset[int]  # the rows on which its output was right


class Engine:
    package = "autotune"

    def __init__(self, threads: int) -> None:
        environment.pin(threads)
        self.version = f"torch {version('torch')}"
        self.target = detect.detect()
        self._key: tuple[Any, ...] = ()  # of what is kept, and whether its copies are enough for a cold case
        self._cold = False
        self._ready: list[_Ready] = []

    def running(self) -> AbstractContextManager[object]:
        return torch.inference_mode()

    def load(self, case: Case, at: Callable[[str], None], failed: Failures) -> list[Loaded]:
        key = (case.n, case.k, case.all_m, case.barred)
        if key != self._key or (case.cold and not self._cold):
            self._ready.clear()
            self._ready.extend(self._pack(case, at, failed))
            self._key, self._cold = key, case.cold
        x = made_input(case).bfloat16()  # (m, k)
        loaded = [self._loaded(item, case, x) for item in self._ready if case.m in item.passed]
        return [*loaded, _read(case)] if loaded else []

    def _loaded(self, item: _Ready, case: Case, x: torch.Tensor) -> Loaded:
        read_bytes = item.copies[0].bytes / item.spec.copies  # of a second layout, each call reads one
        copies = item.copies[: case.copies(read_bytes)]  # those of a cold case are enough for a hot one
        native = getattr(item.module, "native", None)  # of kernels on tiles, another kernel: the one for few rows
        if native is None or case.m >= MANY_ROWS or "amx" in item.spec.name:
            calls = [partial(item.module.run, packed, x) for packed in copies]
            return Loaded(item.spec.name, item.scheme, read_bytes, calls)
        graphs = case.graphs(read_bytes)
        y, threads = x.new_empty(case.m, case.n), torch.get_num_threads()
        products = [decoder.native_product(native(packed), case.n) for packed in copies]
        turns = [[products[i % len(products)] for i in numbers] for numbers in graphs]  # the last may begin again
        chains = [decoder.multiply(turn, x, y, threads) for turn in turns]
        return Loaded(item.spec.name, item.scheme, read_bytes, chains, len(graphs[0]))

    def _pack(self, case: Case, at: Callable[[str], None], failed: Failures) -> Iterator[_Ready]:
        few = replace(case, m=1)  # as many copies as any number of rows needs
        for scheme, names in self._fitting(case):
            weight = made_weight(scheme, case)
            for name in names:
                at(f"{name} {scheme}")
                spec = kernel(name)
                try:
                    module = load_kernel(spec)
                    first = module.pack(_clone(weight), torch.bfloat16)
                    passed = _passed(spec, weight, first, case, failed)
                    count = few.copies(first.bytes / spec.copies) if passed else 1
                    more = [module.pack(_clone(weight), torch.bfloat16) for _ in range(count - 1)]
                    yield _Ready(spec, module, scheme, (first, *more), passed)
                except Exception as error:  # whatever a kernel raises is its own failure
                    failed.add(name, scheme, error)

    def _fitting(self, case: Case) -> Iterator[tuple[str, list[str]]]:
        """(scheme, kernels) that this machine can run on this shape."""
        group = LayerGroup("layer", "layer", None, (Linear("layer", "layer", case.n, case.k, False),))
        for scheme in SCHEMES:
            found = legality(scheme, group, "bf16", self.target, KERNELS, local=True)
            names = [name for name in found.kernels if case.wants(name, scheme.name)]
            if names:
                yield scheme.name, names


def _read(case: Case) -> Loaded:
    """What reading takes: the dense weights' bytes, as many copies in turn, and nothing else done with them."""
    size = case.n * case.k * 2
    calls = [torch.ones(size // 4).amin for _ in range(case.copies(size))]
    return Loaded(READ, READ, float(size), calls)


def _passed(spec: KernelSpec, weight: GroupWeight, packed: Packed, case: Case, failed: Failures) -> frozenset[int]:
    passed = set()
    for rows in case.all_m:
        try:
            gate(spec, weight, packed, rows)
            passed.add(rows)
        except Exception as error:
            failed.add(spec.name, weight.scheme, error)
    return frozenset(passed)


def _clone(weight: GroupWeight) -> GroupWeight:
    """Memory of its own: a kernel may keep what it is given."""
    parts = {name: getattr(weight, name) for name in ("dense", "codes", "scales")}
    return replace(weight, **{name: part.clone() for name, part in parts.items() if part is not None})
