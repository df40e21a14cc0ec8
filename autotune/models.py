"""A run's models, loaded on first use: a resumed run that finds its tables loads no weights before it must.

Two hold weights: the dense one that losses are measured on, and the runnable one with every scheme's packed weights. Of
a large model both are in memory only where there is plenty; else each is loaded again when its turn comes, which took
30 to 40 seconds for 13 schemes of 470M weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import nn

from autotune import samples
from autotune.compress.database import WeightDatabase
from autotune.kernels.allocator import give_back
from autotune.profilers.latency import LatencyTable
from autotune.profilers.memory import weight_bytes
from autotune.reference_model import ReferenceModel
from autotune.search_space.schemes import scheme
from autotune.search_space.space import SearchSpace
from autotune.session import MEMORY_SHARE, Session
from autotune.streamed_reference import reference_of
from autotune.streaming import Streamed
from autotune.switchable import SwitchableModel, switchable
from autotune.teacher import Teacher

LOOK_SHARES = (0.25, 1.0)  # of the search documents, what each look of a race sees


class Models:
    """`database` is set by the compress stage before anything that needs it is asked for."""

    def __init__(self, session: Session, space: SearchSpace, table: LatencyTable) -> None:
        self.session = session
        self.space = space
        self.table = table
        self.database: WeightDatabase | None = None

    def done_with_losses(self) -> None:
        """Until the next stage that measures some: let go of a large model's dense weights."""
        self._let_go("teacher", "reference", "dense")

    def done_with_kernels(self) -> None:
        """Until the next stage that runs some: let go of a large model's packed weights, if memory is short. The
        next one packs them again."""
        losses = 2 * samples.parameters(self.session.spec) * (2 if self.session.arithmetic == "bf16" else 4) + 2**30
        if self.session.place.available_bytes < 2 * losses:
            self._let_go("runnable")

    def _let_go(self, *names: str) -> None:
        if self.session.large:
            for name in names:
                self.__dict__.pop(name, None)
            give_back()
            self.session.place.make_room()

    @cached_property
    def weights(self) -> WeightDatabase | None:
        """The database, and beside its entries those of single configurations under names of their own, as they are
        made."""
        return None if self.database is None else WeightDatabase(self.database.folder, dict(self.database.entries))

    def add_own(self, entries: Mapping[tuple[str, str], str]) -> None:
        """(group, `own_name`) -> file: also for models that exist already."""
        if self.weights is not None:
            self.weights.entries.update(entries)
            if "runnable" in self.__dict__ and self.runnable is not None:
                self.runnable.add_own(self.weights)

    @cached_property
    def dense(self) -> nn.Module | Streamed:
        """The dense model in the session's arithmetic; `reference` takes it over."""
        return self.session.streamed() if self.session.streams else self.session.reference()

    @cached_property
    def reference(self) -> ReferenceModel:
        """Reference twins of every scheme, for losses."""
        assert self.weights is not None
        return reference_of(self.dense, self.session.spec, self.weights)

    @cached_property
    def teacher(self) -> Teacher:
        """Measured losses on the search documents."""
        return Teacher(self.reference, self.session.search_documents, LOOK_SHARES)

    @property
    def runs(self) -> bool:
        """Whether the whole model can be run on its kernels: here, and with all its packed weights in memory."""
        session = self.session
        if not session.local or not session.streams:
            return session.local
        entries = [(scheme(entry.scheme), session.spec.group(entry.group)) for entry in self.space.usable()]
        packed = sum(weight_bytes(item, group, session.spec.dtype) for item, group in entries)
        return session.spec.dense_bytes + packed <= MEMORY_SHARE * session.place.memory_bytes

    @cached_property
    def runnable(self) -> SwitchableModel | None:
        """The real model on its kernels; None where it cannot be run."""
        session = self.session
        if not self.runs:
            return None
        session.report("pack", 0, 1)
        cache = session.target.last_cache_bytes
        progress = session.progress("pack")
        weights, place = self.weights, session.place
        return switchable(session.opened, self.space, self.table, session.workload, weights, cache, progress, place)
