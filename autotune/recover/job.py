"""What a recovery trains: options, device, text, and the compressed groups of one configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autotune import samples
from autotune.compress.database import WeightDatabase
from autotune.errors import InputError, UsageError
from autotune.kernels.allocator import give_back
from autotune.model import load_tokenizer
from autotune.place import Place, cuda_device
from autotune.recover import texts
from autotune.recover.distill import BATCH_TOKENS, BLOCK_SHARE, RATE, Distillation, Recipe
from autotune.recover.quantizer import Master
from autotune.recover.student import Student
from autotune.recover.texts import Sequences
from autotune.result import Result
from autotune.session import Session
from autotune.store import digest, read_json, write_json

SEARCHED = "searched"  # as `--point` takes it: the search once more, with what training wins back (`searched.py`)
TOKENS = 1_000_000  # where nothing is said
_STATE_BYTES = 16  # of a trained weight: master, sum of gradients, two moments
VERSION = "recover/2"  # part of every key; change it whenever the codes would change


@dataclass(frozen=True)
class Options:
    """`minutes` or `tokens`; `data`: a text, JSONL or folder; `point`: see `candidates.find`, or `SEARCHED`."""

    minutes: float | None = None
    tokens: int | None = None
    data: Path | None = None
    point: str | None = None
    seed: int = 0
    device: str = "auto"
    rate: float = RATE
    block_share: float = BLOCK_SHARE
    batch_tokens: int = BATCH_TOKENS

    @property
    def recipe(self) -> Recipe:
        """Without its steps."""
        return Recipe(0, self.seed, self.batch_tokens, self.rate, self.block_share)


@dataclass(frozen=True)
class Job:
    """A configuration of a run, the codes it starts from, and the text."""

    result: Result  # with every scheme that has weights
    name: str
    chosen: dict[str, str]
    database: WeightDatabase
    sequences: Sequences

    @property
    def session(self) -> Session:
        return self.result.session

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(name for name, scheme in self.chosen.items() if scheme != self.session.spec.dtype)

    @property
    def key(self) -> str:
        """Of everything but the budget that decides the codes."""
        files = [self.database.entries[name, self.chosen[name]] for name in self.groups]
        return digest(
            [VERSION, self.session.spec.model_hash, self.chosen, files, self.sequences.name, self.sequences.digest]
        )

    def distillation(self, recipe: Recipe, device: torch.device, model: nn.Module | None = None) -> Distillation:
        """`model`: the dense one on the device, where there is one; the student gives it back.

        Raises:
            InputError: `recover.memory`.
        """
        spec = self.session.spec
        self._check_memory(device, model is None)
        masters = {
            group.name: Master(self.database.load(group, self.chosen[group.name]), device)
            for group in spec.groups
            if group.name in self.groups
        }
        dense = self.session.reference().to(device) if model is None else model
        return Distillation(Student(dense, spec, masters), self.sequences, recipe)

    def _check_memory(self, device: torch.device, loads: bool) -> None:
        """Refuses what cannot fit whatever the activations take, before anything is loaded."""
        spec = self.session.spec
        item = 2 if self.session.arithmetic == "bf16" else 4
        trained = sum(group.weights for group in spec.groups if group.name in self.groups)
        # Besides its state there are what is multiplied and its gradient.
        needed = trained * (_STATE_BYTES + 2 * item) + (samples.parameters(spec) * item if loads else 0)
        give_back()  # freed memory that the process keeps would not count as free
        free = Place(device).available_bytes
        if 0 < free < needed:
            what = f"training {trained / 1e6:,.0f}M weights takes {_gib(needed)} and more, and {_gib(free)} are free."
            hint = "Take a --point that compresses less, another --device, or a machine with more memory."
            raise InputError("recover.memory", what, hint)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def device_of(name: str) -> torch.device:
    """Raises UsageError `recover.device`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UsageError("recover.device", f"there is no device {name!r} here.", "Use --device cpu.")
    return cuda_device() if name == "cuda" else torch.device("cpu")


def sequences_of(session: Session, options: Options) -> Sequences:
    """What is trained on: the text given, or the run's calibration documents.

    Raises:
        InputError: `recover.too_few`, `data.*`.
    """
    length = min(texts.LENGTH, session.opened.positions)
    if options.data is None:
        documents = session.documents
        source = f"{documents.name}, calibration documents"
        return texts.from_documents(source, documents.calibration, texts.held_out(documents), length, options.seed)
    tokenizer, vocabulary = load_tokenizer(session.opened.folder), session.opened.vocabulary
    return texts.read(options.data, tokenizer, vocabulary, session.documents, length, options.seed)


def budget(options: Options, sequences: Sequences, folder: Path, key: str, fitting: Callable[[float], int]) -> int:
    """Steps of training. Minutes become steps once, by the clock, written down before they are acted on: a resumed
    recovery does the same.

    Args:
        key: of what is trained; fitting: how many of its steps fit into minutes.
    """
    if options.minutes is None:
        length = sequences.train.shape[1]
        return max(1, (options.tokens or TOKENS) // (max(1, options.batch_tokens // length) * length))
    file = folder / "budget.json"
    key = digest([key, repr(options.recipe), options.minutes, torch.get_num_threads()])
    if file.is_file() and read_json(file, "recover").get("key") == key:
        return int(read_json(file, "recover")["steps"])
    steps = fitting(options.minutes)
    write_json(file, {"key": key, "minutes": options.minutes, "steps": steps})
    return steps
