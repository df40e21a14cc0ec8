"""What does training after compression win back? One scheme everywhere, before and after, the dense model beside it.

    python benchmarks/recovery.py [MODEL] [--scheme 2:4+w8a8-int8] [--minutes 10 | --tokens N] [--data FILE]
                                  [--documents 60] [--marks 10] [--threads 2] [--json FILE]

MODEL is a folder (default: the demo model). Every layer group that can take the scheme is compressed by `--compression`
(default: auto, as `tune` does it) and then recovered as `autotune recover` does it. Without --data the demo model is
recovered on the text it was trained on, the standard library of the Python that runs this (examples/demo_model), and
any other model on the calibration documents of the bundled text. Documents that share 64 consecutive tokens with those
of search or certification are left out of it. Losses are measured in fp32 on certification documents, none of which
anything here has seen; intervals are over documents, differences paired by document.

The control is the dense model given the same tokens in the same order, the same loss and the same optimizer: what it
gains or loses is not recovery's doing. It starts from the dense weights, rounds nothing and prunes nothing. Its loss
being the distance to itself, it has nothing to learn, and should stay where it is: recovery pulls towards the dense
model alone, the text only says where.

Exit code 1 where more than a third of the one-shot loss is left.

Written by `--json` (one object):
    model, scheme, data, threads, load_before, load_after       what was run, and the machine's load average
    documents, tokens             certification documents and their tokens
    left_out_documents, unique_tokens    of the training text: overlapping documents left out, tokens it has
    train_tokens, train_seconds, wall_seconds, tokens_per_second
                                  seen; training alone; with marks, checkpoints and the reading of the text
    dense_perplexity
    rows        one per state: "one-shot", "recovered", "dense, trained as long"
        state
        kl_nats, dnll_nats        mean over tokens {mean, low, high}
        perplexity
        seconds                   of training
    gain        one-shot minus recovered: kl_nats, dnll_nats {mean, low, high}, paired by document
    kept_kl, kept_dnll            share of the one-shot loss that is left
    curve       one per mark: steps, tokens, seconds, check_nats (KL on sequences set aside), train_nats
    control_curve                 the same of the control
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from compression import Stitched, interval

from autotune import documents as texts_module
from autotune.certify import bound
from autotune.compress import methods
from autotune.compress.calibrate import input_statistics
from autotune.compress.database import stacked_weight
from autotune.documents import Documents
from autotune.kernels.allocator import keep_large_blocks
from autotune.kernels.reference import dequantize, quantize_activations
from autotune.kernels.spec import GroupWeight
from autotune.model import OpenModel, load_mixed, load_model, load_tokenizer, open_model
from autotune.recover import texts, training
from autotune.recover.distill import BATCH_TOKENS, BLOCK_SHARE, RATE, Distillation, Recipe
from autotune.recover.quantizer import Master
from autotune.recover.student import Student
from autotune.recover.texts import Sequences
from autotune.recover.training import Trained
from autotune.reference_model import ReferenceModel
from autotune.search.problem import Evaluation
from autotune.search_space.groups import LayerGroup
from autotune.search_space.schemes import Scheme, scheme
from autotune.teacher import Teacher

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
CALIBRATION_TOKENS = 16_384
FLOOR = 1 / 3  # of the one-shot loss, that may be left


def training_text(opened: OpenModel, run: Documents, data: Path | None, seed: int) -> Sequences:
    """Token sequences disjoint from search and certification."""
    length = min(texts.LENGTH, opened.positions)
    tokenizer = load_tokenizer(opened.folder)
    if data is not None:
        return texts.read(data, tokenizer, opened.vocabulary, run, length, seed)
    if opened.folder.resolve() != DEMO:
        return texts.from_documents("calibration documents", run.calibration, texts.held_out(run), length, seed)
    sys.path.insert(0, str(DEMO))
    from corpus import build_corpus

    sys.path.remove(str(DEMO))
    ids = [texts_module.encode(text, tokenizer, opened.vocabulary) for text in build_corpus().training]
    return texts.from_documents("the demo model's training text", ids, texts.held_out(run), length, seed)


def compressed(
    opened: OpenModel, item: Scheme, documents: Sequence[torch.Tensor], method: str
) -> dict[str, GroupWeight]:
    """Every group that can take the scheme; others stay dense."""
    model = load_model(opened, torch.float32)
    size = item.weight.group_size or 1
    groups = [group for group in opened.spec.groups if group.in_features % math.lcm(size, item.block or 1) == 0]
    statistics = input_statistics(model, groups, documents, methods.takes_hessian(method))
    made = {}
    for group in groups:
        dense = stacked_weight(model, group)
        made[group.name] = methods.compress(method, dense, statistics.pop(group.name), [item])[0].weight
    return made


def dense_master(opened: OpenModel, groups: Sequence[LayerGroup]) -> dict[str, Master]:
    """The control's masters: dense weights, nothing rounded or pruned."""
    model = load_model(opened, torch.float32)
    return {g.name: Master(GroupWeight("fp32", dense=stacked_weight(model, g))) for g in groups}


class Measured:
    """Weights put into the dense fp32 model, activations quantized as the scheme says, against the dense model."""

    def __init__(self, opened: OpenModel, documents: Sequence[torch.Tensor]) -> None:
        self.model = load_model(opened, torch.float32)
        self.stitched = Stitched(self.model, opened.spec)
        self.teacher = Teacher(cast(ReferenceModel, self.stitched), documents, (1.0,))
        self.dense_perplexity = self.teacher.perplexity()

    def loss(self, state: str, weights: Mapping[str, torch.Tensor], item: Scheme | None) -> Evaluation:
        """`state` names the weights: of one name the teacher measures one set only."""
        self.stitched.weights = {**self.stitched.dense, **weights}
        hooks = []
        if item is not None and item.activation is not None:
            number = item.activation
            members = [m for g in self.stitched.spec.groups if g.name in weights for m in g.members]

            def quantize(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                dense = self.stitched._is_dense
                return inputs if dense else (quantize_activations(inputs[0], number), *inputs[1:])

            hooks = [self.model.get_submodule(m.module).register_forward_pre_hook(quantize) for m in members]
        try:
            return self.teacher.measure({"all": state})
        finally:
            self.stitched.select({})
            for hook in hooks:
                hook.remove()


def train(
    opened: OpenModel,
    masters: Mapping[str, Master],
    sequences: Sequences,
    recipe: Recipe,
    marks: int,
    minutes: float | None = None,
    keep_best: bool = True,
) -> tuple[Distillation, Trained]:
    dense = load_mixed(opened) if opened.spec.dtype == "bf16" else load_model(opened, torch.float32)
    item = Distillation(Student(dense, opened.spec, masters), sequences, recipe)
    if minutes is not None:
        item.recipe = replace(item.recipe, steps=training.steps_for_minutes(item, minutes))
    every = max(1, item.recipe.steps // marks)
    with tempfile.TemporaryDirectory() as folder:
        found = training.train(item, Path(folder) / "checkpoint", "", _show, mark_every=every, keep_best=keep_best)
    print(file=sys.stderr)
    return item, found


def _show(done: int, total: int, note: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} {note}    ", end="", file=sys.stderr, flush=True)


def row(state: str, found: Evaluation, dense: float, seconds: float) -> dict[str, Any]:
    loss = interval(found.dnll, found.tokens)
    return {
        "state": state,
        "kl_nats": interval(found.kl, found.tokens),
        "dnll_nats": loss,
        "perplexity": dense * math.exp(min(loss["mean"], 100.0)),
        "seconds": seconds,
    }


def paired(before: Sequence[float], after: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
    apart = np.asarray(before) - np.asarray(after)
    found = bound(apart, np.asarray(tokens), 0.025, int(sum(tokens)))
    return {"mean": found.mean, "low": found.lower, "high": found.upper}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    opened, item = open_model(str(arguments.model)), scheme(arguments.scheme)
    load_before = os.getloadavg()[0]
    run = texts_module.read(None, load_tokenizer(opened.folder), opened.vocabulary, opened.positions)
    sequences = training_text(opened, run, arguments.data, arguments.seed)
    calibration = texts_module.take(run.calibration, CALIBRATION_TOKENS, texts_module.MAX_DOCUMENT_TOKENS)
    codes = compressed(opened, item, calibration, arguments.compression)
    measured = Measured(opened, list(run.certification[: arguments.documents]))
    dense = measured.dense_perplexity
    before = measured.loss("one-shot", {name: dequantize(weight) for name, weight in codes.items()}, item)
    rows = [row("one-shot", before, dense, 0.0)]
    print(line(rows[-1]), flush=True)

    start = time.monotonic()
    masters = {name: Master(weight) for name, weight in codes.items()}
    recipe = Recipe(0, arguments.seed, arguments.batch, arguments.rate, arguments.block_share)
    if arguments.tokens is not None:
        length = sequences.train.shape[1]
        recipe = replace(recipe, steps=max(1, arguments.tokens // (max(1, arguments.batch // length) * length)))
    minutes = None if arguments.tokens is not None else arguments.minutes
    distillation, trained = train(opened, masters, sequences, recipe, arguments.marks, minutes)
    wall = time.monotonic() - start
    recipe = distillation.recipe
    weights = {name: dequantize(group.master.codes()) for name, group in distillation.student.groups.items()}
    after = measured.loss("recovered", weights, item)
    rows.append(row("recovered", after, dense, trained.seconds))
    print(line(rows[-1]), flush=True)
    del distillation

    control: tuple[Any, ...] = ()
    if not arguments.no_control:
        groups = [group for group in opened.spec.groups if group.name in codes]
        other, control = train(
            opened, dense_master(opened, groups), sequences, recipe, arguments.marks, keep_best=False
        )
        same = {name: group.master.weight for name, group in other.student.groups.items()}
        rows.append(row("dense, trained as long", measured.loss("control", same, None), dense, control.seconds))
        print(line(rows[-1]), flush=True)
    return {
        "model": opened.spec.name,
        "scheme": item.name,
        "data": sequences.name,
        "threads": torch.get_num_threads(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "documents": len(before.tokens),
        "tokens": int(sum(before.tokens)),
        "left_out_documents": sequences.left_out,
        "unique_tokens": sequences.tokens,
        "train_tokens": trained.marks[-1].tokens,
        "train_seconds": trained.seconds,
        "wall_seconds": wall,
        "tokens_per_second": trained.marks[-1].tokens / trained.seconds,
        "dense_perplexity": dense,
        "rows": rows,
        "gain": {
            "kl_nats": paired(before.kl, after.kl, before.tokens),
            "dnll_nats": paired(before.dnll, after.dnll, before.tokens),
        },
        "kept_kl": after.kl_nats / before.kl_nats,
        "kept_dnll": after.dnll_nats / before.dnll_nats,
        "curve": [asdict(mark) for mark in trained.marks],
        "control_curve": [asdict(mark) for mark in control.marks] if control else [],
    }


def line(item: Mapping[str, Any]) -> str:
    kl, loss = item["kl_nats"], item["dnll_nats"]
    text = f"{item['state']:22} KL {kl['mean']:.5f} ({kl['low']:.5f} to {kl['high']:.5f})"
    text += f"  rise of the NLL {loss['mean']:+.5f} ({loss['low']:+.5f} to {loss['high']:+.5f})"
    return f"{text}  perplexity {item['perplexity']:.3f}  {item['seconds']:.0f} s"


def table(value: Mapping[str, Any]) -> str:
    tokens, rate = value["train_tokens"], value["tokens_per_second"]
    first = (
        f"{tokens:,} tokens of {value['data']} ({value['unique_tokens']:,} in all) in {value['wall_seconds']:.0f} s, "
    )
    first += f"{value['train_seconds']:.0f} of them training: {rate:,.0f} tokens/s on {value['threads']} threads"
    lines = [first]
    lines.append(f"left of the one-shot loss: KL {value['kept_kl']:.1%}, NLL {value['kept_dnll']:.1%}")
    gain = value["gain"]["kl_nats"]
    lines.append(f"gained, paired by document: {gain['mean']:.5f} nats of KL ({gain['low']:.5f} to {gain['high']:.5f})")
    lines.append("   tokens   seconds   KL on sequences set aside")
    lines += [f"{m['tokens']:>9,} {m['seconds']:>9.0f}   {m['check_nats']:.5f}" for m in value["curve"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=DEMO, help="a model folder")
    parser.add_argument("--scheme", default="2:4+w8a8-int8")
    parser.add_argument("--minutes", type=float, default=10.0, help="wall minutes of recovery")
    parser.add_argument("--tokens", type=int, help="instead of minutes")
    parser.add_argument("--data", type=Path, help="text, JSONL or folder to train on")
    parser.add_argument("--documents", type=int, default=60, help="certification documents to measure on")
    parser.add_argument("--marks", type=int, default=training.MARKS, help="points of the curve")
    parser.add_argument("--compression", default=methods.AUTO, help="a method, or auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=RATE, help="relative to a group's weights")
    parser.add_argument("--batch", type=int, default=BATCH_TOKENS, help="tokens of an optimizer step")
    parser.add_argument("--block-share", type=float, default=BLOCK_SHARE, help="of the steps, block by block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-control", action="store_true", help="leave the dense model out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    keep_large_blocks()
    torch.set_num_threads(arguments.threads)
    value = measure(arguments)
    print(table(value))
    if arguments.json:
        arguments.json.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return 0 if value["kept_kl"] <= FLOOR else 1


if __name__ == "__main__":
    raise SystemExit(main())
