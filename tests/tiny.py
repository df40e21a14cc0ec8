"""Small models, tables and runs that tests share: random weights from a seed, latencies from arithmetic.

Imported by tests (`conftest.py` puts this folder on the path) and by `faked_run.py`, which is its own process.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import torch

from autotune.compress import methods
from autotune.compress.calibrate import InputStatistics
from autotune.kernels.spec import KERNELS, GroupWeight
from autotune.profilers.jobs import needed
from autotune.profilers.memory import packed_weight_bytes
from autotune.profilers.table import LatencyTable
from autotune.search_space.schemes import MORE, Scheme, scheme
from autotune.search_space.space import SearchSpace, build
from autotune.search_space.workload import parse
from autotune.targets import detect
from autotune.targets.target import Ceilings, Target

WORKLOAD = parse("1,8,4")
CACHE_SAVES_MS = {None: 0.0, "int8": 0.02, "fp8": 0.01}
CEILINGS = Ceilings(((2**25, 100.0), (2**27, 20.0)), {"fp32": 0.3, "bf16": 0.6, "int8": 1.2}, 5.0)


def make_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> Path:
    """Save a seeded random transformers model; without a tokenizer, so bytes stand in for tokens."""
    import transformers

    torch.manual_seed(seed)
    if kind == "llama":
        values = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        values |= {"num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 256}
        values |= {"tie_word_embeddings": False, "eos_token_id": None, "bos_token_id": None}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(values | changes)))
    elif kind == "moe":
        values = {"hidden_size": 64, "moe_intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        values |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 256}
        values |= {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "tie_word_embeddings": False}
        values |= {"eos_token_id": None, "bos_token_id": None, "initializer_range": 0.1}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**(values | changes)))
    elif kind == "gpt2":
        values = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 256, "n_positions": 256}
        values |= {"eos_token_id": None, "bos_token_id": None}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(values | changes)))
    elif kind == "bert":
        values = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
        values |= {"vocab_size": 256, "max_position_embeddings": 1024}
        model = transformers.BertModel(transformers.BertConfig(**(values | changes)))
    else:
        raise ValueError(kind)
    model.to(dtype).save_pretrained(folder)
    return folder


def write_documents(path: Path, count: int = 24, length: int = 48, seed: int = 0) -> Path:
    """A JSONL file of random printable text with stated splits: a quarter, a quarter, a half."""
    generator = np.random.default_rng(seed)
    splits = ("calibration", "search", "certification", "certification")
    rows = []
    for number in range(count):
        text = bytes(generator.integers(97, 123, length).tolist()).decode()
        rows.append(json.dumps({"text": text, "split": splits[number % 4]}))
    path.write_text("\n".join(rows))
    return path


def tokens(count: int, length: int = 24, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator) for _ in range(count)]


def rounded(weight: torch.Tensor, moment: torch.Tensor | None, item: Scheme) -> GroupWeight:
    """One group (out, in) under a scheme, rounded to nearest after Wanda's mask."""
    moment = torch.ones(weight.shape[1]) if moment is None else moment
    return methods.METHODS["wanda"](weight, InputStatistics(moment), [item])[0]


def here() -> Target:
    """This machine's features with made-up ceilings: nothing is measured."""
    found = detect.detect()
    return Target("here", "cpu", "this machine", found.features, found.cores, 2**34, 2**25, CEILINGS)


def space_of(spec, schemes=None, target=None) -> SearchSpace:
    return build(spec, target or here(), KERNELS, True, schemes)


def fake_profile(spec, space, target, workload, *_args, **_options) -> LatencyTable:
    """A measured-looking table: time grows with the bits of the weights; a thousandth tells kernels apart."""
    names = sorted(kernel.name for kernel in KERNELS)
    rows = []
    for job in needed(spec, space, target, workload, KERNELS, "runs"):
        size = packed_weight_bytes(job.scheme, job.shape, job.dtype)
        slow = 20.0 if job.kernel.memory_only else 1.0
        median = slow * (1.0 + size / 1000.0) * (1 + 0.2 * (job.rows > 1)) * (1 + 0.001 * names.index(job.kernel.name))
        rows.append(job.row((median, median * 0.99, median * 1.01), "measured", size, 20))
    return LatencyTable(target.name, "fake", tuple(rows))


def fake_measure(model, configurations, workload, seconds=20.0, progress=None):
    """End-to-end times by arithmetic: a constant, less where the cache is coded, plus the bits every group holds."""
    from autotune.kernels.kv_formats import format_of
    from autotune.verify import EndToEnd, Interval, Run

    runs = []
    for name, configuration in configurations.items():
        bits = 0.0
        for group in model.spec.groups:
            item = configuration.get(group.name, model.spec.dtype)
            slow = 20.0 if item in {other.name for other in MORE} else 1.0
            bits += 0.0 if item == "zeros" else slow * group.weights * scheme(item).bits_per_weight
        total = 0.05 - CACHE_SAVES_MS[format_of(configuration)] + bits / 1e6
        same = Interval(total, total, total)
        names = {phase.name for phase in workload.phases}
        phases = {phase: (total / len(names),) * 7 for phase in sorted(names)}
        runs.append(Run(name, same, same, same, phases))
    return EndToEnd(tuple(runs), "")


@contextlib.contextmanager
def faked(monkeypatch):
    """A run of the whole loop that measures nothing: the machine is `here()`, its latencies are arithmetic."""
    from autotune import latency_model, session, verify
    from autotune.profilers import latency

    monkeypatch.setattr(session, "resolve_target", lambda name: (here(), True))
    monkeypatch.setattr(latency, "profile", fake_profile)
    monkeypatch.setattr(verify, "measure", fake_measure)
    monkeypatch.setattr(latency_model, "measure", fake_measure)
    yield


def settings(model: Path, out: Path, data: Path, **changes: object) -> dict[str, object]:
    """Arguments of `RunConfig.of` for a run of seconds."""
    values: dict[str, object] = {"model": str(model), "out": str(out), "data": str(data), "workload": "1,8,4"}
    values |= {"max_loss": 0.5, "trials": 10, "calibration_tokens": 200, "score_tokens": 200, "score_length": 48}
    values |= {"score_draws": 1, "search_tokens": 200, "search_length": 48, "certify_tokens": 600, "finalists": 2}
    return values | {"measured_points": 3} | changes


def trainable(folder: Path) -> dict[str, object]:
    """Settings of a run in `folder`, whose model and documents are made here, and beside them text to train on."""
    make_model("llama", folder / "model", initializer_range=0.2, num_hidden_layers=1)
    write_documents(folder / "data.jsonl", 16, 200)
    letters = np.random.default_rng(7).integers(97, 123, 6000)
    (folder / "more.txt").write_text(bytes(letters.tolist()).decode())
    return settings(folder / "model", folder / "run", folder / "data.jsonl", trials=4)
