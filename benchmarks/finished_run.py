"""A finished run as a search problem: its own tables, and losses measured by the model.

The run's artifacts are reloaded, not made again; a stage whose inputs have changed since (another version of a kernel)
is computed anew and says so on stderr. Measured losses are remembered in RUN/search_benchmark.sqlite, so nothing is
measured twice, whichever method asks, and a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune import decide, smooth, tables
from autotune.config import RunConfig
from autotune.errors import InputError
from autotune.kernels.allocator import keep_large_blocks
from autotune.models import LOOK_SHARES, Models
from autotune.run import RunFolder
from autotune.search.codec import decode_evaluation, encode_evaluation
from autotune.search.problem import Evaluate, Evaluation, Genotype, Problem
from autotune.search.study import Outer
from autotune.session import Session, open_session
from autotune.store import Memo, digest, locked

MEMO = "search_benchmark.sqlite"


@dataclass(frozen=True)
class FinishedRun:
    problem: Problem
    evaluate: Evaluate
    looks: int
    outer: Outer
    about: dict[str, Any]  # what any result made from it has to say


@contextmanager
def finished_run(run: Path, tokens: int) -> Iterator[FinishedRun]:
    """Hold the run's folder and open it as a problem whose losses are measured on `tokens` of its search documents.

    Raises:
        InputError: `config.missing`, `config.schema`, `bench.unfinished`, `bench.nothing_to_search`.
        BusyError: `store.locked`.
    """
    stored = RunConfig.load(run / "config.yaml").model_dump()
    config = RunConfig.of(**stored | {"out": str(run), "search_tokens": tokens})
    folder = RunFolder(run)
    needed = {"score", "calibration"} if config.target == "auto" else {"score"}
    if config.latency_only or needed - folder.records().keys():
        raise InputError("bench.unfinished", f"{run} has not all its tables.", "Run `autotune search` on it first.")
    with locked(run):
        keep_large_blocks()
        session = open_session(folder, config, _Reporter())
        space = tables.build_space(session)
        table = tables.profile(session, space)
        space = tables.prune_space(session, space, table)
        models = Models(session, space, table)
        session, _ = smooth.smooth(session, space, models)
        models.database = tables.compress(session, space, models)
        losses = tables.loss_table(session, space, models)
        if session.local:  # what the run calibrated: a scheme that it dropped was never run in the whole model
            space = tables.prune_losses(session, space, table, losses)
        calibration = tables.calibrate_latency(session, space, table, models)
        problem = decide.build_problem(session, space, table, losses, calibration)
        if not any(
            option.latency_us < group.options[0].latency_us for group in problem.groups for option in group.options
        ):
            hint = "Choose a larger model or another workload."
            raise InputError("bench.nothing_to_search", f"{run} has nothing that is faster than dense.", hint)
        memo = Memo(run / MEMO)
        try:
            outer = decide.outer_choices(problem)
            evaluate = _evaluate(session, problem, models, memo)
            yield FinishedRun(problem, evaluate, len(LOOK_SHARES), outer, _about(session, problem))
        finally:
            memo.close()


def _evaluate(session: Session, problem: Problem, models: Models, memo: Memo) -> Evaluate:
    assert models.database is not None
    config = session.config
    key: list[Any] = [session.documents.digest, config.search_tokens, config.search_length, session.spec.model_hash]
    key.append(sorted(models.database.entries.values()))

    def evaluate(genotype: Genotype, look: int) -> Evaluation:
        chosen = decide.configuration(problem, genotype)
        name = digest([key, chosen, look])
        value = memo.get(name)
        if value is None:
            value = encode_evaluation(models.teacher.measure(chosen, look))
            memo.put(name, value)
        return decode_evaluation(value)

    return evaluate


def _about(session: Session, problem: Problem) -> dict[str, Any]:
    documents = session.search_documents
    return {
        "model": session.spec.name,
        "model_sha256": session.spec.model_hash,
        "target": session.target.name,
        "latency": "measured" if session.local else "estimated",
        "workload": str(session.workload),
        "documents": session.documents.name,
        "search_documents": len(documents),
        "search_tokens": sum(map(len, documents)),
        "groups": len(problem.groups),
        "schemes": sorted({option.scheme for group in problem.groups for option in group.options}),
    }


class _Reporter:
    """Names every stage that is computed, once."""

    def __init__(self) -> None:
        self._said = {"open", "load"}

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage not in self._said:
            self._said.add(stage)
            print(f"{stage}: its inputs have changed since the run, computing it anew", file=sys.stderr, flush=True)
