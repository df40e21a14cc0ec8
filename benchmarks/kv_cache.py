"""One layer's attention of one new token on this machine, by the KV cache's format and length.

python benchmarks/kv_cache.py benchmarks/shapes/qwen3-0.6b-vocab32k --positions 544,4096
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from autotune.attention_cost import attention_of
from autotune.kernels.kv_formats import FORMATS
from autotune.model import read_config
from autotune.profilers.attention import Heads, attention_us
from autotune.session import resolve_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder with a config.json")
    parser.add_argument("--positions", default="544,4096")
    parser.add_argument("--batch", type=int, default=1)
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


if __name__ == "__main__":
    main()
