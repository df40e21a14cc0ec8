"""One layer's attention of one new token on this machine, by the KV cache's format and length.

python benchmarks/kv_cache.py benchmarks/shapes/qwen3-0.6b-vocab32k --positions 544,4096
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autotune import runtime
from autotune.attention_cost import attention_of
from autotune.compress.database import stacked_weight
from autotune.kernels.kv_formats import FORMATS
from autotune.kernels.linear import FusedGroup, alternative, install
from autotune.kernels.spec import GroupWeight, kernel
from autotune.kernels.spec import load as load_kernel
from autotune.kv_cache import keep_as
from autotune.model import load_model, open_model, read_config
from autotune.profilers.attention import Heads, attention_us
from autotune.session import resolve_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder with a config.json")
    parser.add_argument("--positions", default="544,4096")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="timed decode steps of the whole model, a format")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = attention_of(read_config(arguments.model), causal=True)
    if isinstance(found, str):
        parser.error(f"its attention cannot be described: {found}")
    heads = Heads(found.heads, found.key_heads, found.width)
    last_cache = resolve_target("cpu")[0].last_cache_bytes
    print(f"{heads}, {len(found.windows)} layers, batch {arguments.batch}, {arguments.threads} threads")
    print(f"last cache {last_cache / 2**20:.0f} MiB")
    for positions in map(int, arguments.positions.split(",")):
        rows = attention_us(heads, (None, *FORMATS), positions, arguments.batch, last_cache)
        for name, (median, low, high) in rows.items():
            size = heads.layer_bytes(name, positions, arguments.batch)
            print(
                f"{positions:6,} positions {name or 'bf16':5} {median:8.1f} us a layer ({low:.1f} to {high:.1f}), "
                f"{size / 2**20:6.2f} MiB, {size / median / 1e3:5.1f} GB/s, {rows[None][0] / median:.2f}x"
            )
    if arguments.steps:
        model = _model(arguments.model)
        for positions in map(int, arguments.positions.split(",")):
            _print_steps(model, heads, positions, arguments.batch, arguments.steps)


def _model(folder: Path) -> nn.Module:
    """Random weights, every layer group on the native bf16 kernel."""
    opened = open_model(str(folder), "bf16", latency_only=True)
    model, item = load_model(opened), kernel("cpu.bf16")
    for group in opened.spec.groups:
        dense = stacked_weight(model, group).to(torch.bfloat16)
        fused = FusedGroup(group.in_features, [member.out_features for member in group.members])
        packed = load_kernel(item).pack(GroupWeight("bf16", dense=dense), torch.bfloat16)
        fused.add("bf16", alternative(item, packed))
        install(model, [member.module for member in group.members], fused)
    runtime.quicken(model)
    return model.eval()


@torch.inference_mode()
def _print_steps(model: nn.Module, heads: Heads, positions: int, batch: int, steps: int) -> None:
    from transformers import DynamicCache

    shape, token = (batch, heads.key_heads, positions, heads.width), torch.ones(batch, 1, dtype=torch.int64)
    caches = {}
    for name in (None, *FORMATS):
        cache = caches[name] = DynamicCache(config=model.config)
        keep_as(model, name)
        for layer in cache.layers:
            layer.update(torch.randn(shape).to(heads.dtype), torch.randn(shape).to(heads.dtype))
        for _ in range(3):  # coded, tried both ways, and one to warm up
            model(token, past_key_values=cache, use_cache=True)
    times: dict[str | None, list[float]] = {name: [] for name in caches}
    for _ in range(steps):
        for name, cache in caches.items():
            keep_as(model, name)
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            times[name].append((time.perf_counter() - start) * 1e3)
    for name, values in times.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        paired = float(np.median(np.asarray(times[None]) / np.asarray(values)))
        print(
            f"{positions:6,} positions {name or 'bf16':5} decode step {median:7.2f} ms ({low:.2f} to {high:.2f}), "
            f"{paired:.3f}x"
        )


if __name__ == "__main__":
    main()
