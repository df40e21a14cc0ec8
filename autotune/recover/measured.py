"""The loss of a model that is being trained, on the search documents, which training never sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from autotune.models import LOOK_SHARES
from autotune.recover.student import Student
from autotune.reference_model import ReferenceModel
from autotune.search.problem import Evaluation
from autotune.search_space.groups import ModelSpec
from autotune.session import Session
from autotune.teacher import Teacher


class Bench:
    """One dense model that students take turns with, and its outputs on the search documents, made once.

    To `Teacher` it is what `ReferenceModel` is: dense, or as the student stands.
    """

    def __init__(self, session: Session, device: torch.device) -> None:
        self.spec: ModelSpec = session.spec
        self.dense: nn.Module = session.reference().to(device)
        self._student = Student(self.dense, self.spec, {})
        self._is_dense = True
        documents = [document.to(device) for document in session.search_documents]
        self._teacher = Teacher(cast(ReferenceModel, self), documents, LOOK_SHARES)
        self._count = 0

    def loss(self, student: Student) -> Evaluation:
        """Of a student made from `dense`, as its masters are now."""
        self._student = student
        self._count += 1  # the teacher remembers the last configuration by its name
        return self._teacher.measure({"student": str(self._count)})

    def prepare(self, configurations: Sequence[Mapping[str, str]], documents: Sequence[torch.Tensor]) -> None:
        """Nothing to do: all of it is in memory."""

    def select(self, configuration: Mapping[str, str]) -> None:
        self._is_dense = not configuration

    @torch.no_grad()
    def outputs(self, document: torch.Tensor) -> torch.Tensor:
        """(positions, vocabulary or width)"""
        if self._is_dense:
            with self._student.teaching():
                return self._student.outputs(document.unsqueeze(0))[0]
        found = self._student.outputs(document.unsqueeze(0))[0]
        self._student.collect()
        return found
