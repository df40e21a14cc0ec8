"""Text of the demonstration model: the Python standard library, split by source file.

Contract
    build_corpus() -> Corpus(training, documents)
        `training`   texts of every kept source that is not held out;
        `documents`  one excerpt of about 4.6 KB from each held-out source, in one of the
                     splits "calibration", "search" and "certification".
    write_documents(documents, path) / read_documents(path)
        the documents as gzip-compressed JSON lines; the same input gives the same bytes.

Everything is a function of the interpreter that runs it: sources are found in the standard
library's own folder, and each choice is made by a hash of the source's relative name.
No line block of a held-out source (five consecutive non-blank lines) occurs in the training text.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXCERPT_BYTES = 4600
SHORTEST_HELD_OUT = 3400
LONGEST_HELD_OUT = 45_000  # longer sources stay in training; documentation has no such limit
SHINGLE_LINES = 5
QUOTAS = {
    "calibration": {"library": 21, "test": 24, "documentation": 3},
    "search": {"library": 28, "test": 32, "documentation": 4},
    "certification": {"library": 91, "test": 100, "documentation": 9},
}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "ensurepip", "data"}
SKIPPED_FILES = re.compile(r"_sysconfigdata|pydoc_data/topics|/(bad|badsyntax)_|(^|/)this\.py$|config-3")


@dataclass(frozen=True)
class Source:
    """One source: its name relative to the standard library, its kind and its text."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Document:
    """One evaluation document: an excerpt of a held-out source."""

    id: str
    split: str
    text: str


@dataclass(frozen=True)
class Corpus:
    training: list[str]
    documents: list[Document]


def kind_of(name: str) -> str:
    """Return "test" for a test source and "library" for any other Python source."""
    parts = name.lower().split("/")
    return "test" if any("test" in part for part in parts[:-1]) or "test" in parts[-1] else "library"


def is_junk(text: str) -> bool:
    """Tell whether a text is mostly data: long lines, number tables, escapes or rare characters."""
    lines = text.splitlines()
    if len(text) < 200 or max(map(len, lines), default=0) > 600:
        return True
    dense = sum(character.isdigit() or character == "\\" for character in text)
    foreign = sum(ord(character) > 127 for character in text)
    return dense > 0.15 * len(text) or foreign > 0.02 * len(text)


def python_sources(root: Path) -> Iterator[Source]:
    """Yield the Python files of the standard library."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS & set(name.split("/")[:-1]) or SKIPPED_FILES.search(name):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield Source("Lib/" + name, kind_of(name), text.replace("\r\n", "\n"))


def documentation_sources(root: Path) -> Iterator[Source]:
    """Yield the help topics of pydoc and the long plain-text notes beside the library."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Source(f"Lib/pydoc_data/topics/{name}", "documentation", text)
    for path in sorted(root.glob("idlelib/*.txt")):
        text = path.read_bytes().decode("utf-8", errors="replace")
        yield Source(f"Lib/idlelib/{path.name}", "documentation", text)


def read_sources() -> list[Source]:
    """Read every source that is text worth learning from, once each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    kept: dict[str, Source] = {}
    for source in [*python_sources(root), *documentation_sources(root)]:
        if not is_junk(source.text):
            kept.setdefault(hashlib.sha256(source.text.encode()).hexdigest(), source)
    return list(kept.values())


def hash_rank(source: Source) -> str:
    return hashlib.sha256(source.name.encode()).hexdigest()


def shingles(text: str) -> list[tuple[int, list[int]]]:
    """Return (hash, line numbers) of every run of consecutive non-blank lines of the text."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines()) if line.strip()]
    runs = [lines[start : start + SHINGLE_LINES] for start in range(len(lines) - SHINGLE_LINES + 1)]
    return [(hash("\n".join(line for _, line in run)), [number for number, _ in run]) for run in runs]


def shared_lines(text: str, seen: set[int]) -> set[int]:
    """Return the numbers of the lines that belong to a shingle already seen."""
    return {number for value, numbers in shingles(text) if value in seen for number in numbers}


def shared_fraction(text: str, seen: set[int]) -> float:
    return len(shared_lines(text, seen)) / max(1, len(text.splitlines()))


def may_be_held_out(source: Source) -> bool:
    size = len(source.text.encode())
    return size >= SHORTEST_HELD_OUT and (source.kind == "documentation" or size <= LONGEST_HELD_OUT)


def choose_held_out(sources: list[Source]) -> tuple[list[tuple[str, Source]], set[int]]:
    """Choose (split, source) pairs by hash rank; also return the shingles of the chosen sources."""
    places = {
        kind: [split for split, quota in QUOTAS.items() for _ in range(quota[kind])]
        for kind in ("library", "test", "documentation")
    }
    for kind, splits in places.items():
        random.Random(kind).shuffle(splits)
    chosen: list[tuple[str, Source]] = []
    seen: set[int] = set()
    for source in sorted(filter(may_be_held_out, sources), key=hash_rank):
        if places[source.kind] and shared_fraction(source.text, seen) < 0.1:
            chosen.append((places[source.kind].pop(), source))
            seen.update(value for value, _ in shingles(source.text))
    missing = {kind: len(splits) for kind, splits in places.items() if splits}
    if missing:
        raise RuntimeError(f"too few sources for the evaluation documents: {missing}")
    return chosen, seen


def training_text(source: Source, held_out: set[int]) -> str | None:
    """Return the source's text without any line block of held-out text; None for a near-duplicate."""
    shared = shared_lines(source.text, held_out)
    lines = source.text.splitlines()
    if len(shared) > 0.3 * len(lines):
        return None
    return "\n".join(line for number, line in enumerate(lines) if number not in shared) + "\n"


def excerpt(source: Source) -> str:
    """Cut about EXCERPT_BYTES of whole lines, from a line drawn by the source's hash."""
    lines = source.text.splitlines(keepends=True)
    tails = [0]
    for line in reversed(lines):
        tails.append(tails[-1] + len(line.encode()))
    after = list(reversed(tails))  # after[i]: bytes from line i to the end
    starts = [number for number in range(len(lines)) if after[number] >= EXCERPT_BYTES] or [0]
    start = starts[int(hash_rank(source), 16) % len(starts)]
    taken: list[str] = []
    size = 0
    for line in lines[start:]:
        if size >= EXCERPT_BYTES:
            break
        taken.append(line)
        size += len(line.encode())
    return "".join(taken)


def build_corpus() -> Corpus:
    """Read the standard library and split it by source file."""
    sources = read_sources()
    chosen, shingles_held_out = choose_held_out(sources)
    names = {source.name for _, source in chosen}
    texts = (training_text(source, shingles_held_out) for source in sources if source.name not in names)
    documents = [Document(source.name, split, excerpt(source)) for split, source in chosen]
    order = list(QUOTAS)
    documents.sort(key=lambda document: (order.index(document.split), document.id))
    return Corpus([text for text in texts if text], documents)


def write_documents(documents: list[Document], path: Path) -> None:
    """Write the documents as gzip-compressed JSON lines, byte for byte reproducible."""
    lines = [json.dumps(vars(document)) + "\n" for document in documents]
    path.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))


def read_documents(path: Path) -> list[Document]:
    """Read documents that write_documents wrote."""
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    return [Document(**json.loads(line)) for line in lines if line]


def main() -> None:
    """Write the evaluation documents and print the counts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path, help="for example autotune/data/stdlib_documents.jsonl.gz")
    output: Path = parser.parse_args().output
    corpus = build_corpus()
    write_documents(corpus.documents, output)
    size = sum(len(text.encode()) for text in corpus.training)
    print(f"training: {len(corpus.training)} texts, {size:,} bytes")
    for split in QUOTAS:
        texts = [document.text for document in corpus.documents if document.split == split]
        print(f"{split}: {len(texts)} documents, {sum(len(text.encode()) for text in texts):,} bytes")
    print(f"{output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
