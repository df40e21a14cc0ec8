"""What does a compression method cost the model? One method and format everywhere, on held-out documents, paired.

    python benchmarks/compression.py [MODEL ...] [--tokens 40000] [--calibration 16384] [--methods joint,wanda,...]
                                     [--formats int4-g128,2:4,...] [--keep-head] [--peers auto-round,...]
                                     [--data FILE] [--json FILE]

MODEL is a folder (default: the demo model and the demonstration mixture of experts). Formats are six by default; any of
the product's schemes can be named. All layer groups are compressed the same way, every expert by itself, from the dense
model's inputs on the calibration documents, three quarters of which weights are fitted to; the rest of the model stays
as it is, and activations are left alone. Losses are measured in fp32 on certification documents, against the dense
model.

joint             this project's: 2:4 mask by ADMM, weights by least squares, one sweep that rounds
prune-then-gptq   SparseGPT's mask and update, then GPTQ on what is left
gptq-then-prune   GPTQ, then Wanda's mask on its result
gptq              the product's for large models: Wanda's mask, one sweep that makes up for it and rounds
signround         joint's mask and weights, then sign-gradient rounding
wanda             Wanda's mask, then rounding to nearest with clipped scales
hwpq              HWPQ's mask, then the same rounding
magnitude         the largest weights, then the same rounding
shipped           joint, then compressed again for its own inputs as finalists are, the better of the two on the search
                  documents (`compression_shipped.py`); by default only beside peers

`--peers` adds other packages where they are installed, each in the formats it has (`compression_peers.py`): auto-round,
modelopt-sparsegpt, modelopt-awq. They leave the output matrix dense: `--keep-head` does so for all. They get the same
calibration documents, all of them, and models without experts only.

Written by `--json` (a list, one object a model):
    model, documents, tokens, calibration_tokens, dense_perplexity    what was measured on
    hardly_reached      weights of experts that calibration hardly reached, compressed for all tokens of their layer
    rows        one per method and format:
        method, format
        kl_nats, dnll_nats      mean over tokens {mean, low, high}: 95% over documents
        perplexity              of the compressed model
        over_joint              KL of this method minus that of joint, {mean, low, high}, paired by document; null for
                                joint itself and where joint was not asked for
        over_shipped            the same over what ships
        layer_error             mean over groups, and experts, of the outputs' squared relative error on documents set
                                aside
        seconds                 compressing all groups in this format alone
        taken                   of what ships, whether it was compressed again, or is joint's; else null
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from compression_peers import PEERS, missing
from compression_rivals import RIVALS, valued
from compression_shipped import scheme_of, shipped
from torch import nn

from autotune import documents as texts
from autotune.certify import bound
from autotune.compress.calibrate import InputStatistics, input_statistics
from autotune.compress.database import stacked_weight
from autotune.compress.methods import METHODS
from autotune.kernels.allocator import keep_large_blocks
from autotune.model import load_model, load_tokenizer, open_model
from autotune.reference_model import ReferenceModel
from autotune.search.problem import Evaluation
from autotune.search_space.groups import LayerGroup, ModelSpec
from autotune.search_space.schemes import MORE, SCHEMES, NumberFormat, Scheme
from autotune.teacher import Teacher

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO, MIXTURE = EXAMPLES / "demo_model", EXAMPLES / "demo_moe"
FORMATS = {
    "int8": Scheme("int8", NumberFormat("int", 8)),
    "int4-g128": Scheme("int4-g128", NumberFormat("int", 4, 128)),
    "int3-g128": Scheme("int3-g128", NumberFormat("int", 3, 128)),
    "2:4": Scheme("2:4", NumberFormat("float", 16), None, "2:4"),
    "2:4+int8": Scheme("2:4+int8", NumberFormat("int", 8), None, "2:4"),
    "2:4+int4-g128": Scheme("2:4+int4-g128", NumberFormat("int", 4, 128), None, "2:4"),
}
EVERY = FORMATS | {item.name: item for item in (*SCHEMES, *MORE) if not item.is_dense}
_OWN = ("gptq", "signround", "wanda", "hwpq", "magnitude")
ALL = {"joint": METHODS["joint"], **RIVALS, **{name: METHODS[name] for name in _OWN}}
SHIPPED = "shipped"


class Stitched:
    """The dense model, or one whose weights were replaced, those of each part of a group (see `LayerGroup.parts`); what
    `Teacher` measures."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self.model = model
        self.spec = spec
        self.parts = [part for group in spec.groups for part in group.parts]
        for member in (member for part in self.parts for member in part.members):
            module: Any = model.get_submodule(member.module)  # a tied head is the embedding too, which stays as it is
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        self.dense = {part.name: stacked_weight(model, part) for part in self.parts}
        self.weights: dict[str, torch.Tensor] = {}  # of the configuration that is not dense
        self._is_dense = True

    def select(self, configuration: Mapping[str, str]) -> None:
        if self._is_dense is not (not configuration):
            for part in self.parts:
                self._write(part, (self.weights if configuration else self.dense)[part.name])
            self._is_dense = not configuration

    def _write(self, group: LayerGroup, weight: torch.Tensor) -> None:
        parts = weight.split([member.out_features for member in group.members])
        for member, part in zip(group.members, parts, strict=True):
            module: Any = self.model.get_submodule(member.module)
            module.weight.data.copy_(part.t() if member.transposed else part)

    def prepare(self, configurations: Sequence[Mapping[str, str]], documents: Sequence[torch.Tensor]) -> None:
        """Nothing to do: all of it is in memory."""

    @torch.inference_mode()
    def outputs(self, document: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.model(document.unsqueeze(0)).logits[0])


def from_peer(
    stitched: Stitched, name: str, form: str, model: nn.Module, tokenizer: Any, documents: Sequence[torch.Tensor]
) -> float:
    """Fill `stitched.weights` with what another package makes of a model, which it may spoil; returns seconds."""
    start = time.perf_counter()
    made = PEERS[name][1][form](model, tokenizer, documents)
    seconds = time.perf_counter() - start
    for part in stitched.parts:
        stitched.weights[part.name] = torch.cat([made[member.module] for member in part.members])
    return seconds


def layer_error(stitched: Stitched, statistics: Mapping[str, InputStatistics]) -> float:
    errors = []
    for part in stitched.parts:
        dense, inputs = stitched.dense[part.name], statistics[part.name]
        change = stitched.weights[part.name] - dense
        errors.append((inputs.output_power(change) or 0.0) / (inputs.output_power(dense) or 1.0))
    return sum(errors) / len(errors)


def compressed(
    stitched: Stitched, method: str, item: Scheme, statistics: Mapping[str, InputStatistics]
) -> tuple[float, float]:
    """Fill `stitched.weights`; returns (mean layer error, seconds)."""
    seconds = 0.0
    for part in stitched.parts:
        dense, inputs = stitched.dense[part.name], statistics[part.name]
        start = time.perf_counter()
        weight = valued(ALL[method](dense, inputs, [item])[0], item)
        seconds += time.perf_counter() - start
        stitched.weights[part.name] = weight
    return layer_error(stitched, statistics), seconds


def interval(values: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
    """Mean over tokens with its 95% interval over documents."""
    found = bound(np.asarray(values), np.asarray(tokens), 0.025, int(sum(tokens)))  # on either side
    return {"mean": found.mean, "low": found.lower, "high": found.upper}


class Found(NamedTuple):
    """What a method made of the model in one format."""

    method: str
    evaluation: Evaluation
    layer_error: float
    seconds: float
    taken: bool | None = None


def rows_of(name: str, found: Sequence[Found], dense: float) -> list[dict[str, Any]]:
    """Of a format, differences paired by document."""
    by_method = {item.method: item.evaluation for item in found}

    def over(item: Found, other: str) -> dict[str, float] | None:
        if other not in by_method or item.method == other:
            return None
        pairs = zip(item.evaluation.kl, by_method[other].kl, strict=True)
        return interval([a - b for a, b in pairs], item.evaluation.tokens)

    return [
        {
            "method": item.method,
            "format": name,
            "kl_nats": interval(item.evaluation.kl, item.evaluation.tokens),
            "dnll_nats": (loss := interval(item.evaluation.dnll, item.evaluation.tokens)),
            "perplexity": dense * math.exp(min(loss["mean"], 100.0)),
            "over_joint": over(item, "joint"),
            "over_shipped": over(item, SHIPPED),
            "layer_error": item.layer_error,
            "seconds": item.seconds,
            "taken": item.taken,
        }
        for item in found
    ]


class Comparison:
    """One model, compressed by one method after the other and measured on the same documents."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.opened, self.tokenizer = open_model(str(folder)), load_tokenizer(folder)
        self.source = texts.read(arguments.data, self.tokenizer, self.opened.vocabulary, self.opened.positions)
        length = texts.MAX_DOCUMENT_TOKENS
        self.calibration = texts.take(self.source.calibration, arguments.calibration, length)
        self.held_out = texts.take(self.source.certification, arguments.tokens, length)
        model, spec = load_model(self.opened, torch.float32), self.opened.spec
        self.groups = tuple(group for group in spec.groups if not (arguments.keep_head and group.role == "lm_head"))
        self.statistics = input_statistics(model, self.groups, self.calibration)
        self.stitched = Stitched(model, replace(spec, groups=self.groups))
        self.teacher = Teacher(cast(ReferenceModel, self.stitched), self.held_out, (1.0,))

    def run(self, method: str, name: str) -> Found | None:
        """A method, a peer or what ships; None where it has not this format, or not for this model."""
        if method == SHIPPED:
            return self._shipped(name)
        if method in ALL:
            error, seconds = compressed(self.stitched, method, EVERY[name], self.statistics)
            return self._found(method, name, error, seconds)
        if name not in PEERS[method][1] or any(group.experts > 1 for group in self.groups):
            return None
        copy = load_model(self.opened, torch.float32)
        seconds = from_peer(self.stitched, method, name, copy, self.tokenizer, self.calibration)
        return self._found(method, name, layer_error(self.stitched, self.statistics), seconds)

    def _shipped(self, name: str) -> Found | None:
        item = scheme_of(EVERY[name])
        made = None if item is None else shipped(self.opened, item, self.groups, self.calibration, self.source)
        if made is None:
            return None
        self.stitched.weights |= made.weights
        error = layer_error(self.stitched, self.statistics)
        return self._found(SHIPPED, name, error, made.seconds, made.taken)

    def _found(self, method: str, name: str, error: float, seconds: float, taken: bool | None = None) -> Found:
        found = self.teacher.measure({"all": f"{method} {name}"})  # it remembers what it measured last
        self.stitched.select({})
        return Found(method, found, error, seconds, taken)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    item = Comparison(folder, arguments)
    dense, rows = item.teacher.perplexity(), []
    methods = list(dict.fromkeys([*arguments.methods, *([SHIPPED] if arguments.peers else []), *arguments.peers]))
    for name in arguments.formats:
        found: list[Found] = []
        for method in methods:
            if (made := item.run(method, name)) is not None:
                found.append(made)
                print(line(rows_of(name, found, dense)[-1]), flush=True)
        rows += rows_of(name, found, dense)
    return {
        "model": item.opened.spec.name,
        "documents": item.source.name,
        "tokens": sum(map(len, item.held_out)),
        "calibration_tokens": sum(map(len, item.calibration)),
        "dense_perplexity": dense,
        "hardly_reached": sum(bool(entry.note) for entry in item.statistics.values()),
        "rows": rows,
    }


def line(item: Mapping[str, Any]) -> str:
    kl = item["kl_nats"]
    text = f"{item['format']:14} {item['method']:16} KL {kl['mean']:.5f} ({kl['low']:.5f} to {kl['high']:.5f})"
    text += f"  perplexity {item['perplexity']:8.2f}  layer error {item['layer_error']:.5f}  {item['seconds']:5.1f} s"
    for name in ("joint", SHIPPED):
        if (apart := item[f"over_{name}"]) is not None:
            text += f"  over {name} {apart['mean']:+.5f} ({apart['low']:+.5f} to {apart['high']:+.5f})"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, default=[DEMO, MIXTURE], help="model folders")
    parser.add_argument("--tokens", type=int, default=40_000, help="held-out tokens to measure on")
    parser.add_argument("--calibration", type=int, default=16_384, help="calibration tokens")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(ALL))
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS))
    parser.add_argument("--keep-head", action="store_true", help="leave the output matrix dense")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=[], help="other packages")
    parser.add_argument("--data", type=Path, help="text or JSONL; default: the bundled text")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.peers and not arguments.keep_head:
        parser.error("peers leave the output matrix dense: give --keep-head")
    for given, known in ((arguments.methods, (*ALL, SHIPPED)), (arguments.formats, EVERY), (arguments.peers, PEERS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if absent := {PEERS[name][0] for name in arguments.peers if missing(name)}:
        parser.error(f"not installed: {', '.join(sorted(absent))} (see compression_peers.py)")
    keep_large_blocks()
    values = []
    for folder in arguments.models:
        values.append(value := measure(folder, arguments))
        print(f"{value['model']}, {value['documents']}, {value['tokens']:,} held-out tokens", end="")
        print(f", dense perplexity {value['dense_perplexity']:.3f}, {value['hardly_reached']} experts hardly reached")
    if arguments.json:
        arguments.json.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
