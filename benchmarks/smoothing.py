"""What do AWQ's and SmoothQuant's scales gain, folded into the operators before, with loud input channels and without?

    python benchmarks/smoothing.py [MODEL] [--schemes w8a8-int8,...] [--modes off,awq,smoothquant,auto] [--factor 30]
                                   [--methods joint,wanda] [--tokens 10000] [--calibration 16384] [--json FILE]

MODEL is a folder (default: the demo model). It is measured as it is, and made loud: of every norm that one layer group
alone reads, and of every `up_proj` before a `down_proj`, one output in 64 is multiplied by `--factor` and the weights
that read it are divided by it. Both are the same function but for the rounding of bf16 weights, whose KL is printed.
Every scheme is put everywhere it is legal, activations quantized as it says; losses are measured in fp32 on
certification documents, against the dense model that was compressed.

Written by `--json` (a list), one object a model, method, mode and scheme:
    model ("as it is" or "loud"), method, mode, scheme
    folded      of how many layer groups inputs were scaled
    kl_nats     mean over tokens
    seconds     finding the scales
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from autotune import documents as texts
from autotune.compress import database, smoothing
from autotune.folding import fold, sites
from autotune.kernels.allocator import keep_large_blocks
from autotune.kernels.spec import KERNELS
from autotune.model import load_model, load_tokenizer, open_model
from autotune.reference_model import ReferenceModel
from autotune.search_space import space
from autotune.search_space.schemes import scheme
from autotune.targets.detect import detect_cpu
from autotune.teacher import Teacher

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
SCHEMES = ("w8a8-int8", "w8a16-int8", "w4a16-int4-g128", "w4a8-int4-g64")


def make_loud(source: Path, folder: Path, factor: float) -> Path:
    """A copy of a Llama-like model of one file with loud channels in norms and MLPs."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    opened = open_model(str(source))
    model = load_model(opened)
    document = torch.arange(16) % opened.vocabulary
    for site in sites(model, opened.spec.groups, document, opened.spec.tied_embeddings):
        if site.repeat > 1 or site.source.endswith("v_proj"):
            continue
        gain = tensors[f"{site.source}.weight"]  # (outputs,) of a norm, (outputs, in) of a layer
        every = torch.ones(len(gain))
        every[5::64] = factor
        tensors[f"{site.source}.weight"] = (gain.float() * every.view(-1, *[1] * (gain.ndim - 1))).to(gain.dtype)
        for reader in site.readers:
            weight = tensors[f"{reader}.weight"]
            tensors[f"{reader}.weight"] = (weight.float() / every).to(weight.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def measure(kind: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    opened, tokenizer = open_model(str(folder)), load_tokenizer(folder)
    source = texts.read(None, tokenizer, opened.vocabulary, opened.positions)
    calibration = texts.take(source.calibration, arguments.calibration, texts.MAX_DOCUMENT_TOKENS)
    held_out = texts.take(source.certification, arguments.tokens, texts.MAX_DOCUMENT_TOKENS)
    few = texts.take(source.calibration, 4_096, texts.MAX_DOCUMENT_TOKENS)
    legal = space.build(opened.spec, detect_cpu(), KERNELS, True, (opened.spec.dtype, *arguments.schemes))
    usable = {group.name: [scheme(e.scheme) for e in legal.schemes(group.name)] for group in opened.spec.groups}
    rows = []
    for mode in arguments.modes:
        model = load_model(opened, torch.float32)
        start = time.perf_counter()
        found = []
        if mode != smoothing.OFF:
            places = sites(model, opened.spec.groups, few[0], opened.spec.tied_embeddings)
            found = smoothing.choose(model, opened.spec.groups, places, usable, few, mode)
        seconds = time.perf_counter() - start
        folded = replace(opened, folds=tuple(choice.fold for choice in found))
        fold(model, folded.folds)
        for choice in found:
            print(f"  {choice.fold.site.group}: {choice.kind}, {choice.left:.0%} of the error left", flush=True)
        for method in arguments.methods:
            with tempfile.TemporaryDirectory() as place:
                made = database.build(model, opened.spec, legal, calibration, Path(place), method, folded=folded.folded)
                reference = ReferenceModel(load_model(folded, torch.float32), opened.spec, made)
                teacher = Teacher(reference, held_out, (1.0,))
                for name in arguments.schemes:
                    chosen = {g.name: name for g in opened.spec.groups if (g.name, name) in made.entries}
                    kl = teacher.measure(chosen).kl_nats
                    about = {"model": kind, "method": method, "mode": mode, "scheme": name, "folded": len(found)}
                    rows.append(about | {"kl_nats": kl, "seconds": seconds})
                    print(f"{kind:10} {method:6} {mode:12} {name:16} {len(found)} folded, KL {kl:.5f}", flush=True)
    return rows


def dense_apart(one: Path, other: Path) -> float:
    """KL of one dense model from another, in fp32, on 2,000 tokens."""
    opened, tokenizer = open_model(str(one)), load_tokenizer(one)
    source = texts.read(None, tokenizer, opened.vocabulary, opened.positions)
    models = [load_model(open_model(str(folder)), torch.float32) for folder in (one, other)]
    total = count = 0.0
    with torch.inference_mode():
        for document in texts.take(source.search, 2_000, 256):
            p, q = (model(document.unsqueeze(0)).logits[0].log_softmax(-1) for model in models)
            total += float((p.exp() * (p - q)).sum())
            count += len(document)
    return total / count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=DEMO, help="model folder")
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(SCHEMES))
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(smoothing.MODES))
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["joint", "wanda"])
    parser.add_argument("--factor", type=float, default=30.0)
    parser.add_argument("--tokens", type=int, default=10_000, help="held-out tokens to measure on")
    parser.add_argument("--calibration", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    keep_large_blocks()
    with tempfile.TemporaryDirectory() as place:
        loud = make_loud(arguments.model, Path(place) / "loud", arguments.factor)
        print(f"dense, loud from as it is: KL {dense_apart(arguments.model, loud):.1e}")
        rows = measure("as it is", arguments.model, arguments) + measure("loud", loud, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
