"""What is gained by compressing a configuration again on the inputs its own compressed layers give?

    python benchmarks/sequential.py [MODEL] [--schemes int4,...] [--tokens 20000] [--calibration 16384]
                                    [--keep-head]
                                    [--towards none,0.1,...] [--data FILE] [--json FILE]

MODEL is a folder (default: the demo model). Every scheme is put everywhere it is legal, once as the database has it,
from the dense model's inputs, and once for every `--towards`: compressed again block by block, aiming at the dense
layers' outputs with that much damping, or with `none` at the given weights' own; on as many calibration tokens as the
product takes for that. Activations are quantized as the scheme says. Losses are measured in fp32 on certification
documents, against the dense model.

Written by `--json` (a list), one object a scheme and way:
    scheme, way     "stitched" or the damping
    kl_nats         mean over tokens {mean, low, high}: 95% over documents
    less            KL of "stitched" minus this one's, {mean, low, high}, paired by document; null for "stitched" itself
    search_kl_nats  on the search documents, by which autotune takes the better one
    seconds         compressing the configuration again
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autotune import documents as texts
from autotune.certify import bound
from autotune.compress import database, sequential
from autotune.compress.sequential import Recompression, Settings
from autotune.kernels.allocator import keep_large_blocks
from autotune.kernels.spec import KERNELS
from autotune.model import load_model, load_tokenizer, open_model
from autotune.recompress import TOKENS
from autotune.reference_model import ReferenceModel
from autotune.search.problem import Evaluation
from autotune.search_space import space
from autotune.search_space.space import SearchSpace
from autotune.targets.detect import detect_cpu
from autotune.teacher import Teacher

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
SCHEMES = ("w8a8-int8", "w4a16-int4-g128", "w4a8-int4-g64", "w3a16-int3-g64", "2:4", "2:4+w4a8-int4-g128")


def interval(values: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
    """Mean over tokens with its 95% interval over documents."""
    found = bound(np.asarray(values), np.asarray(tokens), 0.025, int(sum(tokens)))
    return {"mean": found.mean, "low": found.lower, "high": found.upper}


def row(
    name: str, way: str, found: Evaluation, stitched: Evaluation | None, search: Evaluation, seconds: float
) -> dict[str, Any]:
    less = None
    if stitched is not None:
        less = interval([a - b for a, b in zip(stitched.kl, found.kl, strict=True)], found.tokens)
    kl = interval(found.kl, found.tokens)
    value = {"scheme": name, "way": way, "kl_nats": kl, "less": less}
    return value | {"search_kl_nats": search.kl_nats, "seconds": seconds}


def everywhere(legal: SearchSpace, name: str, groups: Sequence[str]) -> dict[str, str]:
    """The scheme wherever it is legal, dense elsewhere."""
    usable = {entry.group for entry in legal.usable() if entry.scheme == name}
    return {group: name if group in usable else legal.dense for group in groups}


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    opened, tokenizer = open_model(str(arguments.model)), load_tokenizer(arguments.model)
    source = texts.read(arguments.data, tokenizer, opened.vocabulary, opened.positions)
    calibration = texts.take(source.calibration, arguments.calibration, texts.MAX_DOCUMENT_TOKENS)
    few = texts.take(source.calibration, min(arguments.calibration, TOKENS), texts.MAX_DOCUMENT_TOKENS)
    held_out = texts.take(source.certification, arguments.tokens, texts.MAX_DOCUMENT_TOKENS)
    searched = texts.take(source.search, 8_192, 256)
    dense = load_model(opened, torch.float32)
    legal = space.build(opened.spec, detect_cpu(), KERNELS, True, (opened.spec.dtype, *arguments.schemes))
    made = database.build(dense, opened.spec, legal, calibration, folder)
    model = ReferenceModel(dense, opened.spec, made)
    teachers = [Teacher(model, documents, (1.0,)) for documents in (held_out, searched)]
    groups = [g.name for g in opened.spec.groups if not (arguments.keep_head and g.role == "lm_head")]
    rows = []
    for name in arguments.schemes:
        chosen = dict.fromkeys((g.name for g in opened.spec.groups), legal.dense) | everywhere(legal, name, groups)
        stitched, search = (teacher.measure(chosen) for teacher in teachers)
        rows.append(row(name, "stitched", stitched, None, search, 0.0))
        print(line(rows[-1]), flush=True)
        for way in arguments.towards:
            settings = Settings(towards=None if way == "none" else float(way))
            start = time.perf_counter()
            renewed = Recompression(model, made, few, settings)
            if not renewed.possible():
                raise SystemExit(f"{opened.spec.architecture} cannot be run block by block")
            files = renewed.run({name: chosen})[name]
            seconds = time.perf_counter() - start
            own = sequential.own_entries(made, files, chosen)
            found, search = (teacher.measure(own) for teacher in teachers)
            rows.append(row(name, way, found, stitched, search, seconds))
            print(line(rows[-1]), flush=True)
    return rows


def line(item: Mapping[str, Any]) -> str:
    kl, less = item["kl_nats"], item["less"]
    text = f"{item['scheme']:20} {item['way']:8} KL {kl['mean']:.5f} ({kl['low']:.5f} to {kl['high']:.5f})"
    text += f"  search {item['search_kl_nats']:.5f}  {item['seconds']:5.1f} s"
    if less is not None:
        text += f"  less by {less['mean']:+.5f} ({less['low']:+.5f} to {less['high']:+.5f})"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=DEMO, help="model folder")
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(SCHEMES))
    parser.add_argument("--tokens", type=int, default=20_000, help="held-out tokens to measure on")
    parser.add_argument("--calibration", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--keep-head", action="store_true", help="leave the output matrix dense")
    parser.add_argument("--towards", type=lambda text: text.split(","), default=["none", str(sequential.TOWARDS)])
    parser.add_argument("--data", type=Path, help="text or JSONL; default: the bundled text")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    keep_large_blocks()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
