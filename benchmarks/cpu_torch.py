"""Where we run something else than torch's first choice on a CPU: attention of prompts in bf16, and fp32 products.

    python benchmarks/cpu_torch.py [--rounds 15] [--json FILE]

Both ways take turns in one process; figures are medians. Attention is of 16 query heads on 8 of width 128, and of 12
heads of width 64; torch is given keys and values with the heads repeated already. "on K kept" is a text that goes on,
whose mask our side compares in every call. Products are x W^T. Where this CPU has no use for ours a table says so and
its rows are left out. Rows written by `--json` (a list):
    what               "attention" or "product"
    case               sizes
    ours_ms, torch_ms  medians
    ratio              median of torch's time over ours, paired by round
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autotune.attention import attention
from autotune.kernels import products
from autotune.kernels.allocator import keep_large_blocks
from autotune.kernels.cpu import flash
from autotune.store import write_json
from autotune.targets.detect import detect_cpu

ATTENTION = (  # new tokens, kept before them, heads, key heads, width
    *((tokens, 0, 16, 8, 128) for tokens in (16, 128, 512, 2048)),
    (512, 0, 12, 12, 64),
    (512, 512, 16, 8, 128),
    (128, 1920, 16, 8, 128),
    (32, 512, 16, 8, 128),
)
PRODUCTS = (  # rows, inputs, outputs
    *((rows, 512, 512) for rows in (1, 4, 16, 64, 256)),
    (256, 512, 4096),
    (4096, 512, 1408),
    (2048, 2048, 2048),
)
Pair = tuple[str, Callable[[], object], Callable[[], object]]  # case, ours, torch's


def attentions() -> Iterator[Pair]:
    host = nn.Module()
    for tokens, kept, heads, key_heads, width in ATTENTION:
        shapes = ((heads, tokens), (key_heads, kept + tokens), (key_heads, kept + tokens))
        query, key, value = (torch.randn(1, *shape, width).bfloat16() for shape in shapes)
        wide = [item.repeat_interleave(heads // key_heads, 1) for item in (key, value)]
        mask = torch.ones(1, 1, tokens, kept + tokens, dtype=torch.bool).tril_(kept) if kept else None
        case = f"{tokens} tokens" + (f" on {kept} kept" if kept else "") + f", {heads} heads on {key_heads} of {width}"
        ours = partial(attention, host, query, key, value, mask)
        yield case, ours, partial(F.scaled_dot_product_attention, query, *wide, attn_mask=mask, is_causal=mask is None)


def fp32_products() -> Iterator[Pair]:
    for rows, inputs, outputs in PRODUCTS:
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        yield f"{rows} x {inputs} x {outputs}", partial(products.linear, x, weight), partial(F.linear, x, weight)


def measure(what: str, pair: Pair, rounds: int) -> dict[str, Any]:
    case, *ways = pair
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):  # the first two are warm-up
        for way, taken in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            if number > 1:
                taken.append(1e3 * (time.perf_counter() - start))
    ours, torchs = map(statistics.median, times)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return {"what": what, "case": case, "ours_ms": ours, "torch_ms": torchs, "ratio": ratio}


@torch.inference_mode()
def run(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for what, used, pairs in (
        ("attention", flash.available(), attentions),
        ("product", products.differs(), fp32_products),
    ):
        print(f"{what:50} {'ours, ms':>10} {'torch, ms':>10}" if used else f"{what}: torch's is left here")
        for pair in pairs() if used else ():
            row = measure(what, pair, rounds)
            rows.append(row)
            print(f"  {row['case']:48} {row['ours_ms']:10.3f} {row['torch_ms']:10.3f} {row['ratio']:6.2f}x", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_large_blocks()
    torch.manual_seed(0)
    torch.set_num_threads(detect_cpu().cores)
    rows = run(arguments.rounds)
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
