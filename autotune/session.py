"""One run's fixed inputs: model, target, workload, documents and budget, opened on first use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from autotune import documents as documents_module
from autotune import samples
from autotune.blocks import find_blocks
from autotune.certify import expected_error
from autotune.compress import methods, smoothing
from autotune.config import RunConfig
from autotune.documents import MAX_DOCUMENT_TOKENS, Documents, take
from autotune.errors import InputError, UsageError
from autotune.model import OpenModel, load_mixed, load_model, load_tokenizer, open_model
from autotune.place import CPU, Place, place_of
from autotune.profilers.probe import probe
from autotune.run import Reporter, RunFolder
from autotune.search_space import workload as workload_module
from autotune.search_space.groups import ModelSpec
from autotune.search_space.workload import Workload
from autotune.store import Memo, user_folder
from autotune.streaming import Streamed
from autotune.targets import detect, target
from autotune.targets.target import Target

MEMORY_SHARE = 0.9  # of the device's that one stage may take
SAFETY = 2.5  # standard errors between the search's limit and the budget, because a knapsack fills its budget


class Progress(Protocol):
    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class Session:
    folder: RunFolder
    config: RunConfig
    opened: OpenModel
    target: Target
    local: bool  # the target is this machine, so its kernels can be run
    workload: Workload
    report: Reporter

    @property
    def spec(self) -> ModelSpec:
        return self.opened.spec

    @property
    def encoder(self) -> bool:
        return self.spec.task == "encoder"

    @property
    def large(self) -> bool:
        """Whether models are too large to be kept side by side. It follows from the model alone, not from the machine:
        arithmetic depends on it, and a resumed run must not change that."""
        return samples.parameters(self.spec) > samples.LARGE

    @property
    def arithmetic(self) -> str:
        """What losses are measured in: "fp32", or "bf16" products for large models that are run in bf16 anyway."""
        return "bf16" if self.large and self.spec.dtype == "bf16" else "fp32"

    @cached_property
    def place(self) -> Place:
        """Where models and documents are; for a target elsewhere, losses are measured on the CPU."""
        return place_of(self.target) if self.local else CPU

    @cached_property
    def streams(self) -> bool:
        """Whether compression and losses take the model block by block from disk: where the settings ask for it, or
        memory is too small for the weights and what scoring keeps beside them. It changes nothing in the results.

        Raises:
            InputError: `model.streaming` where it is asked for and the model cannot be visited block by block.
        """
        wanted = self.config.streaming
        if wanted is False or self.opened.checkpoint is None:
            return False
        if wanted is None and samples.loss_bytes(self.spec, self.arithmetic) <= MEMORY_SHARE * self.place.memory_bytes:
            return False
        try:
            find_blocks(self.opened)
        except InputError as error:
            if wanted:
                raise
            self.report("load", 0, 1, f"held whole, though memory is short: {error.message}")
            return False
        return True

    @cached_property
    def documents(self) -> Documents:
        path = Path(self.config.data) if self.config.data else None
        return documents_module.read(
            path, load_tokenizer(self.opened.folder), self.opened.vocabulary, self.opened.positions
        )

    @property
    def calibration_documents(self) -> list[torch.Tensor]:
        return self._taken(self.documents.calibration, self.config.calibration_tokens, MAX_DOCUMENT_TOKENS)

    @property
    def score_documents(self) -> list[torch.Tensor]:
        return self._taken(self.documents.search, self.config.score_tokens, self.config.score_length)

    @property
    def search_documents(self) -> list[torch.Tensor]:
        return self._taken(self.documents.search, self.config.search_tokens, self.config.search_length)

    @property
    def certification_documents(self) -> list[torch.Tensor]:
        return self._taken(self.documents.certification, self.config.certify_tokens, MAX_DOCUMENT_TOKENS)

    def _taken(self, documents: Sequence[torch.Tensor], tokens: int, length: int) -> list[torch.Tensor]:
        return self.place.put(take(documents, tokens, length))

    @property
    def limit(self) -> float:
        """Loss the budget allows: nats, or relative squared error for encoders; infinite without loss."""
        if self.config.latency_only or self.config.max_loss is None:
            return math.inf
        return self.config.max_loss if self.encoder else math.log1p(self.config.max_loss)

    @property
    def search_limit(self) -> float:
        """The search aims lower, by the error that certification will have."""
        if math.isinf(self.limit):
            return self.limit
        if self.encoder:
            return 0.9 * self.limit
        tokens = sum(len(document) - 1 for document in self.certification_documents)
        return max(0.2 * self.limit, self.limit - SAFETY * expected_error(self.limit, tokens))

    def progress(self, stage: str) -> Progress:
        """The reporter with its stage filled in."""

        def step(done: int, total: int, note: str = "") -> None:
            self.report(stage, done, total, note)

        return step

    def reference(self) -> torch.nn.Module:
        """The dense model in `arithmetic`, for calibration and losses."""
        self.report("load", 0, 1)
        model = load_mixed(self.opened) if self.arithmetic == "bf16" else load_model(self.opened, torch.float32)
        model.to(self.place.device)
        self.report("load", 1, 1)
        return model

    def streamed(self) -> Streamed:
        """The same, of which a block at a time is in memory."""
        mixed = self.arithmetic == "bf16"
        return Streamed(self.opened, torch.bfloat16 if mixed else torch.float32, mixed, self.place.device)

    def with_model(self, opened: OpenModel) -> Session:
        """The same run on the same model, opened otherwise; what was read is not read again."""
        other = replace(self, opened=opened)
        vars(other).update({name: value for name, value in vars(self).items() if name in ("place", "documents")})
        return other


def open_session(folder: RunFolder, config: RunConfig, report: Reporter) -> Session:
    """Open the model's description, resolve target, workload and sample sizes; no weight is allocated."""
    report("open", 0, 1)
    workload = workload_module.parse(config.workload)
    chosen, local = resolve_target(config.target)
    opened = open_model(config.model, config.dtype, config.latency_only)
    _check_length(workload, opened.positions)
    report("open", 1, 1)
    methods.check(config.compression)
    smoothing.check(config.smoothing)
    config = samples.resolve(config, opened.spec)
    return Session(folder, config, opened, chosen, local, workload, report)


def resolve_target(name: str) -> tuple[Target, bool]:
    """A profile by name or file, or this machine ("auto", or "cpu" beside an accelerator) with ceilings measured once
    and remembered."""
    if name not in ("auto", "cpu"):
        return target.load(name), False
    memo = Memo(user_folder() / "measurements.sqlite")
    try:
        return probe(detect.detect() if name == "auto" else detect.detect_cpu(), memo), True
    finally:
        memo.close()


def _check_length(workload: Workload, positions: int) -> None:
    for request in workload.requests:
        if request.prompt + request.generated > positions:
            what = f"{request.prompt} prompt and {request.generated} generated tokens exceed its {positions} positions"
            raise UsageError("workload.too_long", f"the model cannot run this workload: {what}.", "Shorten it.")
