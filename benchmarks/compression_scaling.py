"""What compression costs as models grow: held whole against block by block, formats swept together against one by one,
and the mode without a Hessian against the one with it.

    python benchmarks/compression_scaling.py [--blocks 4,8,16] [--width 1024] [--methods wanda,joint] [--json FILE]

Models are random Llamas of one width, written to a temporary folder in bf16. Each is compressed in a process of its
own, once held whole in fp32 and once streamed (`autotune.streaming`): seconds without imports, and the process's peak
resident memory beside what it was before weights were read (files mapped into memory count while they are mapped). All
database entries have to be the same bytes. Groups of one block of that width are then compressed in this process:
`together` is all formats of the default search space in one call, `apart` a call a format, with equal codes; `plain` is
a sweep a format, its factor included, by torch's operators, as where nothing can be compiled.
HWPQ's metric (arXiv 2501.16376) and SparseGPT's pruning are timed on the same groups, and what calibration costs each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from compression_rivals import sparsegpt
from make_random import make

from autotune.compress import database, hwpq, methods
from autotune.compress.calibrate import InputStatistics
from autotune.compress.curvature import sweep_factor
from autotune.compress.rounding import find_grid
from autotune.compress.sweep import Start, sweep
from autotune.kernels.allocator import keep_large_blocks
from autotune.kernels.cpu import sweep as native_sweep
from autotune.kernels.patterns import choose
from autotune.kernels.spec import KERNELS
from autotune.model import load_model, open_model
from autotune.search_space import space as space_module
from autotune.search_space.schemes import SCHEMES, Scheme
from autotune.streaming import Streamed
from autotune.targets import detect

SOME = ("w8a8-int8", "w4a16-int4-g128", "2:4+w4a16-int4-g128")
VOCABULARY, TOKENS_A_DOCUMENT = 2048, 256
MODES = ("whole", "streamed")
EACH = [item for item in SCHEMES if not item.is_dense and (item.weight.kind == "int" or item.weight.bits == 16)]
TOGETHER = list({(item.sparsity, item.weight): item for item in reversed(EACH)}.values())  # of equal weights one


def config(width: int, blocks: int) -> dict[str, Any]:
    inner = max(128, width * 11 // 4 // 128 * 128)
    heads = max(4, width // 64)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2 * TOKENS_A_DOCUMENT,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def documents(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS_A_DOCUMENT, tokens)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for _ in range(tokens // length)]


def compress(folder: Path, out: Path, mode: str, method: str, schemes: Sequence[str], tokens: int) -> dict[str, Any]:
    """In a process of its own."""
    keep_large_blocks()
    opened, texts = open_model(str(folder)), documents(tokens)
    space = space_module.build(opened.spec, detect.detect_cpu(), KERNELS, True, tuple(schemes))
    before = peak()
    start = time.perf_counter()
    model = Streamed(opened, torch.float32) if mode == "streamed" else load_model(opened, torch.float32)
    made = database.build(model, opened.spec, space, texts, out, method)
    seconds = time.perf_counter() - start
    entries = [[*key, hashlib.sha256((out / name).read_bytes()).hexdigest()] for key, name in made.entries.items()]
    digest = hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()
    return {"seconds": seconds, "peak_bytes": peak(), "before_bytes": before, "entries": len(entries), "digest": digest}


def peak() -> int:
    """Most bytes that were ever resident in this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def scaling(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory(prefix="scaling-") as text:
            home = Path(text)
            shape = home / "shape"
            shape.mkdir()
            (shape / "config.json").write_text(json.dumps(config(arguments.width, blocks)))
            parameters = make(shape, home / "model", 0)
            for method in arguments.methods:
                found = {mode: child(home, mode, method, arguments) for mode in MODES}
                same = len({item["digest"] for item in found.values()}) == 1
                row = {"blocks": blocks, "parameters": parameters, "method": method, "same_bytes": same} | found
                rows.append(row)
                print(scaling_line(row), flush=True)
    return rows


def child(home: Path, mode: str, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    out = home / f"{mode}-{method}"
    call = [str(home / "model"), str(out), mode, method, ",".join(arguments.schemes), str(arguments.tokens)]
    command = [sys.executable, __file__, "--child", *call]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(process.stderr)
    return json.loads(process.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def scaling_line(row: dict[str, Any]) -> str:
    text = f"{row['blocks']:3} blocks {row['parameters'] / 1e6:6.1f}M {row['method']:8}"
    for mode in MODES:
        item = row[mode]
        more = (item["peak_bytes"] - item["before_bytes"]) / 2**20
        text += f"  {mode} {item['seconds']:6.1f} s, peak {item['peak_bytes'] / 2**20:5.0f} MiB (+{more:.0f})"
    return f"{text}  entries {'the same bytes' if row['same_bytes'] else 'DIFFER'}"


def seen(inputs: int, tokens: int) -> InputStatistics:
    """Of inputs that follow some others, as a model's do."""
    generator = torch.Generator().manual_seed(inputs)
    followed = torch.randn(inputs // 8, inputs, generator=generator)
    x = torch.randn(tokens, inputs // 8, generator=generator) @ followed
    x = (x + torch.randn(tokens, inputs, generator=generator)) * (torch.rand(inputs, generator=generator) + 0.1)
    hessian = x.t() @ x / tokens
    return InputStatistics(hessian.diagonal(), hessian, hessian, tokens)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result), the faster of two."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        made = call()
        best = min(best, time.perf_counter() - start)
    return best, made


def starts(weight: torch.Tensor, inputs: InputStatistics) -> list[Start]:
    made = []
    for item in TOGETHER:
        if item.weight.bits >= 16:
            continue
        keep = None if item.sparsity == "dense" else choose(hwpq.score(weight, inputs.moment), item)
        begun = weight if keep is None else weight * keep
        made.append(Start(item.weight, begun, find_grid(begun, inputs.moment, item.weight, keep), keep))
    return made


def group_rows(width: int, tokens: int) -> list[dict[str, Any]]:
    inner = config(width, 1)["intermediate_size"]
    rows = []
    for role, (out, size) in {
        "qkv": (width * 3 // 2, width),
        "gate_up": (2 * inner, width),
        "down": (width, inner),
    }.items():
        generator = torch.Generator().manual_seed(1)
        weight, inputs = torch.randn(out, size, generator=generator) * 0.02, seen(size, tokens)
        row: dict[str, Any] = {"group": role, "out": out, "in": size} | sweeps(weight, inputs) | modes(weight, inputs)
        rows.append(row)
        print(group_line(row), flush=True)
    return rows


def sweeps(weight: torch.Tensor, inputs: InputStatistics) -> dict[str, Any]:
    """Seconds of one sweep and of one a format, without and with the Hessian's factor, and of the whole method."""
    begun = starts(weight, inputs)
    factor_s, factor = timed(lambda: sweep_factor(inputs.hessian))
    stacked_s, stacked = timed(lambda: sweep(begun, factor))
    apart_s, apart = timed(lambda: [sweep([start], factor)[0] for start in begun])
    with patch.object(native_sweep, "available", lambda: False):
        plain_s, _ = timed(lambda: [sweep([start], sweep_factor(inputs.hessian)) for start in begun])
    joint_s, joint = timed(lambda: methods.joint(weight, inputs, TOGETHER))
    singly_s, singly = timed(lambda: [methods.joint(weight, inputs, [item])[0] for item in TOGETHER])
    same = all(torch.equal(a, b) for a, b in zip(stacked, apart, strict=True)) and all(
        _equal(a.codes, b.codes) and _equal(a.dense, b.dense) for a, b in zip(joint, singly, strict=True)
    )
    return {
        "formats": [item.name for item in TOGETHER],
        "swept": len(begun),
        "factor_s": factor_s,
        "sweep_together_s": stacked_s,
        "sweep_apart_s": apart_s,
        "sweep_and_factor_ratio": (apart_s + len(begun) * factor_s) / (stacked_s + factor_s),
        "sweep_plain_s": plain_s,
        "joint_together_s": joint_s,
        "joint_apart_s": singly_s,
        "same_codes": same,
    }


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one.float(), other.float())


def modes(weight: torch.Tensor, inputs: InputStatistics) -> dict[str, Any]:
    """Seconds of pruning to 2:4 and of the whole method for every format, without a Hessian and with one."""
    pruned: Scheme = next(item for item in SCHEMES if item.name == "2:4")
    x = torch.randn(512, weight.shape[1])
    total, sums = torch.zeros(2 * weight.shape[1:]), torch.zeros(weight.shape[1])
    return {
        "hwpq_mask_s": timed(lambda: weight * hwpq.mask_24(weight, inputs.moment))[0],
        "sparsegpt_s": timed(lambda: sparsegpt(weight, inputs.hessian))[0],
        "hwpq_24_s": timed(lambda: methods.METHODS["hwpq"](weight, inputs, [pruned]))[0],
        "joint_24_s": timed(lambda: methods.METHODS["joint"](weight, inputs, [pruned]))[0],
        "hwpq_all_s": timed(lambda: methods.METHODS["hwpq"](weight, inputs, TOGETHER))[0],
        "joint_all_s": timed(lambda: methods.METHODS["joint"](weight, inputs, TOGETHER))[0],
        "hessian_1k_tokens_s": 2 * timed(lambda: total.addmm_(x.t(), x))[0],
        "means_1k_tokens_s": 2 * timed(lambda: sums.add_(x.square().sum(0)))[0],
    }


def group_line(row: dict[str, Any]) -> str:
    text = f"{row['group']:8} {row['out']:5} x {row['in']:<5} {row['swept']} formats:"
    text += f" sweep {row['sweep_together_s']:.3f} s, apart {row['sweep_apart_s']:.3f} s"
    text += (
        f" ({row['sweep_apart_s'] / row['sweep_together_s']:.1f}x, with factors {row['sweep_and_factor_ratio']:.1f}x),"
    )
    together_s = row["sweep_together_s"] + row["factor_s"]
    text += f" plain {row['sweep_plain_s']:.3f} s ({row['sweep_plain_s'] / together_s:.1f}x with factors);"
    text += f" joint {row['joint_together_s']:.2f} s, apart {row['joint_apart_s']:.2f} s"
    text += (
        f" ({row['joint_apart_s'] / row['joint_together_s']:.1f}x); codes {'equal' if row['same_codes'] else 'DIFFER'}"
    )
    text += (
        f"\n         2:4: HWPQ's mask {row['hwpq_mask_s'] * 1e3:.1f} ms, SparseGPT {row['sparsegpt_s'] * 1e3:.0f} ms"
    )
    text += f" ({row['sparsegpt_s'] / row['hwpq_mask_s']:.0f}x), joint {row['joint_24_s'] * 1e3:.0f} ms;"
    text += f" all formats: HWPQ {row['hwpq_all_s']:.2f} s, joint {row['joint_all_s']:.2f} s"
    text += f" ({row['joint_all_s'] / row['hwpq_all_s']:.1f}x)"
    text += f"; 1,024 tokens: Hessian {row['hessian_1k_tokens_s'] * 1e3:.0f} ms"
    return f"{text}, means {row['means_1k_tokens_s'] * 1e3:.1f} ms"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--child"]:
        folder, out, mode, method, schemes, tokens = words[1:]
        print(json.dumps(compress(Path(folder), Path(out), mode, method, schemes.split(","), int(tokens))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    numbers: Callable[[str], list[int]] = lambda text: [int(part) for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--blocks", type=numbers, default=[4, 8, 16], help="sizes of the models, in blocks")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["wanda"])
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(SOME))
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens")
    parser.add_argument("--no-groups", action="store_true", help="models only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    keep_large_blocks()
    value = {"width": arguments.width, "tokens": arguments.tokens, "schemes": arguments.schemes}
    value["models"] = scaling(arguments)
    value["groups"] = [] if arguments.no_groups else group_rows(arguments.width, arguments.tokens)
    if arguments.json:
        arguments.json.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
