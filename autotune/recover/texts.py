"""Token sequences to recover on, never of a document that search or certification sees.

A document that shares 64 consecutive tokens with one of those is left out whole, equal or not: near-copies would let a
certificate speak of what was trained on. The rest is shuffled, joined, and cut into sequences of one length; the first
few are set aside, and states of the training are compared on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autotune import documents as documents_module
from autotune.documents import Documents
from autotune.errors import InputError
from autotune.store import digest

LENGTH = 256  # positions of a sequence, fewer where the model takes fewer
SHARED = 64  # consecutive tokens in common that make two documents one; a power of two
CHECK_TOKENS = 4_096  # set aside, of few sequences an eighth
FEWEST = 8  # sequences
_MULTIPLIER = 6364136223846793005  # of a rolling hash modulo 2^64 (Knuth's MMIX generator)


@dataclass(frozen=True)
class Sequences:
    """`train` (count, length) and `check` (few, length) token ids; `left_out`: documents that overlap held-out ones."""

    name: str
    digest: str
    train: torch.Tensor
    check: torch.Tensor
    left_out: int = 0

    @property
    def tokens(self) -> int:
        return self.train.numel()

    def batch(self, first: int, count: int, seed: int) -> torch.Tensor:
        """(count, length): sequences `first` and following of an endless order, shuffled anew every epoch.

        It depends on its arguments alone, so training goes on anywhere.
        """
        chosen: list[torch.Tensor] = []
        while len(chosen) < count:
            epoch, place = divmod(first + len(chosen), len(self.train))
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            chosen += list(self.train[order[place : place + count - len(chosen)]])
        return torch.stack(chosen)


def from_documents(
    name: str, documents: Sequence[torch.Tensor], held_out: Sequence[torch.Tensor], length: int, seed: int
) -> Sequences:
    """Sequences of `length` tokens from documents (positions,) that share nothing with the held-out ones.

    Raises:
        InputError: `recover.too_few` when they do not fill eight sequences.
    """
    seen = torch.cat([_hashes(document.cpu()) for document in held_out]).unique()
    here = [document.cpu() for document in documents]
    kept = [document for document in here if not _among(_hashes(document), seen)]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)).tolist()
    stream = torch.cat([kept[place] for place in order]) if kept else torch.empty(0, dtype=torch.long)
    rows = stream[: len(stream) // length * length].view(-1, length)
    check = max(1, min(CHECK_TOKENS // length, len(rows) // FEWEST))
    if len(rows) < FEWEST:
        what = f"{name}: {len(stream):,} tokens to train on, after leaving out {len(documents) - len(kept)} documents"
        hint = f"Give --data a text of at least {FEWEST * length:,} tokens that search and certification do not use."
        raise InputError("recover.too_few", f"{what} that search or certification uses.", hint)
    return Sequences(name, digest(rows.numpy().tobytes()), rows[check:], rows[:check], len(documents) - len(kept))


def read(
    path: Path, tokenizer: Any | None, vocabulary: int, run: Documents, length: int = LENGTH, seed: int = 0
) -> Sequences:
    """Whole documents of a text or JSONL file, or of a folder, without those of the run's search and certification.

    Raises:
        InputError: `data.missing`, `data.syntax`, `recover.too_few`.
    """
    texts = list(dict.fromkeys(text for text, _ in documents_module.rows(path)))
    ids = [documents_module.encode(text, tokenizer, vocabulary) for text in texts]
    return from_documents(path.name, ids, held_out(run), length, seed)


def held_out(run: Documents) -> list[torch.Tensor]:
    """What must not be trained on."""
    return [*run.search, *run.certification]


def _among(values: torch.Tensor, known: torch.Tensor) -> bool:
    """Whether any of the values is one of the rising `known`."""
    places = torch.searchsorted(known, values).clamp_(max=len(known) - 1)
    return bool((known[places] == values).any())


def _hashes(document: torch.Tensor) -> torch.Tensor:
    """One number for every `SHARED` consecutive tokens, equal where these are; of a shorter document, one for all."""
    if len(document) < SHARED:
        document = torch.cat([document, torch.full((SHARED - len(document),), -1)])
    value, width, factor = document + 1, 1, _MULTIPLIER
    while width < SHARED:  # a run of 2n tokens from two runs of n
        value = value[:-width] * _signed(factor) + value[width:]
        factor = factor * factor % 2**64
        width *= 2
    return value


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return number - 2**64 if number >= 2**63 else number
