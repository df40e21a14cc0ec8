"""Text for calibration, search and certification: whole documents, never the same one in two of them.

Sources: a JSONL file ({"text": ..., optional "split", "id"} a line), a text file (documents are separated by a line
holding only "---", else cut at blank lines into pieces of about 4,000 characters), a folder of .txt files (one document
each), or the bundled text. Without stated splits, documents are dealt out by the hash of their text: half to
certification, a quarter to each of the others, so the same file always splits the same way.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from autotune.errors import InputError
from autotune.store import digest

SPLITS = ("calibration", "search", "certification")
BUNDLED = "bundled text, not your task"
MAX_DOCUMENT_TOKENS = 1000


@dataclass(frozen=True)
class Documents:
    """Token ids by split, each document at most `MAX_DOCUMENT_TOKENS` long. `name` is what reports call the source."""

    name: str
    digest: str
    tokens: str  # what a token is: the tokenizer's class, or bytes where the model has no tokenizer
    calibration: tuple[torch.Tensor, ...]  # each (positions,) int64
    search: tuple[torch.Tensor, ...]
    certification: tuple[torch.Tensor, ...]


def read(path: Path | None, tokenizer: Any | None, vocabulary: int, longest: int = MAX_DOCUMENT_TOKENS) -> Documents:
    """Read and tokenize; documents are cut to `longest` tokens (what the model's positions allow), at most 1,000.

    Raises:
        InputError: `data.missing`, `data.syntax`, `data.too_few`.
    """
    found = _bundled() if path is None else rows(path)
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text, split in _deduplicated(found):
        texts[split or _deal(text)].append(text)
    length = min(longest, MAX_DOCUMENT_TOKENS)
    ids = {split: tuple(encode(text, tokenizer, vocabulary, length) for text in texts[split]) for split in SPLITS}
    kept = {split: tuple(item for item in ids[split] if len(item) >= 2) for split in SPLITS}
    for split in SPLITS:
        if len(kept[split]) < 2:
            hint = "Give at least 12 documents, or name their splits; certification wants 150 or more."
            raise InputError("data.too_few", f"{path}: {len(kept[split])} documents for {split}.", hint)
    name = BUNDLED if path is None else path.name
    unit = type(tokenizer).__name__ if tokenizer is not None else "bytes: the model folder has no tokenizer"
    return Documents(name, digest([[split, texts[split]] for split in SPLITS]), unit, **kept)


def take(documents: Iterable[torch.Tensor], tokens: int, length: int) -> list[torch.Tensor]:
    """Documents cut to `length` tokens, as many as needed to hold about `tokens` of them."""
    chosen: list[torch.Tensor] = []
    total = 0
    for document in documents:
        if total >= tokens:
            break
        chosen.append(document[:length])
        total += len(chosen[-1])
    return chosen


def _bundled() -> list[tuple[str, str | None]]:
    data = (resources.files("autotune.data") / "stdlib_documents.jsonl.gz").read_bytes()
    return _jsonl(gzip.decompress(data).decode(), "bundled text")


def rows(path: Path) -> list[tuple[str, str | None]]:
    """(text, split stated for it) of every document of a file or folder, none left out.

    Raises:
        InputError: `data.missing`, `data.syntax`.
    """
    if path.is_dir():
        return [(_text(file), None) for file in sorted(path.glob("*.txt"))]
    if not path.is_file():
        raise InputError("data.missing", f"{path} does not exist.", "Give --data a .jsonl or .txt file, or a folder.")
    text = _text(path)
    return _jsonl(text, str(path)) if path.suffix == ".jsonl" else [(item, None) for item in _pieces(text)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError("data.syntax", f"{path} is not UTF-8 text: {error}.", "Convert it to UTF-8.") from error


def _jsonl(text: str, where: str) -> list[tuple[str, str | None]]:
    rows: list[tuple[str, str | None]] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028 and its like
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            split = row.get("split")
            rows.append((row["text"], split))
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            raise InputError("data.syntax", f"{where}, line {number}: {error!r}.", 'Write {"text": "..."}.') from error
        if split not in (None, *SPLITS) or not isinstance(row["text"], str):
            raise InputError("data.syntax", f"{where}, line {number}: split {split!r}.", f"Use one of {SPLITS}.")
    return rows


def _pieces(text: str, characters: int = 4000) -> list[str]:
    if "\n---\n" in text:
        return [piece for piece in text.split("\n---\n") if piece.strip()]
    pieces, current = [], ""
    for paragraph in text.split("\n\n"):
        current += paragraph + "\n\n"
        if len(current) >= characters:
            pieces.append(current)
            current = ""
    return [*pieces, current] if current.strip() else pieces


def _deduplicated(rows: Iterable[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """The first of equal texts only: a document in two splits would certify what was searched."""
    return list({text: (text, split) for text, split in reversed(list(rows))}.values())[::-1]


def _deal(text: str) -> str:
    quarter = hashlib.sha256(text.encode()).digest()[0] % 4
    return ("calibration", "search", "certification", "certification")[quarter]


def encode(text: str, tokenizer: Any | None, vocabulary: int, length: int | None = None) -> torch.Tensor:
    """Token ids (positions,) of a text, of its first `length` tokens; bytes stand in where there is no tokenizer."""
    if tokenizer is None:
        ids = [byte % vocabulary for byte in text.encode()]
    else:
        cut = {"truncation": True, "max_length": length} if length else {"verbose": False}
        ids = tokenizer(text, add_special_tokens=True, **cut)["input_ids"]
    return torch.tensor(ids[:length], dtype=torch.long)
