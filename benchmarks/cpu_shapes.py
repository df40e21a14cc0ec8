"""Layers of real models as (outputs, inputs), from the `config.json` of each; q/k/v and gate/up are fused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FOLDER = Path(__file__).parent
_CONFIGS = {
    "llama-3.1-8b": FOLDER / "shapes" / "llama-3.1-8b",
    "qwen3-0.6b": FOLDER / "shapes" / "qwen3-0.6b",
    "demo": FOLDER.parent / "examples" / "demo_model",
}
_WITHOUT_HEAD = {"llama-3.1-8b"}  # a gigabyte in bf16, and one layer of 225


def _groups(folder: Path) -> dict[str, tuple[int, int]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads, shared = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        "qkv": (heads + 2 * shared, hidden),
        "o": (hidden, heads),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "up": (inner, hidden),
        "lm_head": (config["vocab_size"], hidden),
    }


def _shapes() -> dict[str, tuple[int, int]]:
    found = {}
    for model, folder in _CONFIGS.items():
        for role, shape in _groups(folder).items():
            if (role == "up" and model != "llama-3.1-8b") or (role == "lm_head" and model in _WITHOUT_HEAD):
                continue
            found[f"{model}.{role}"] = shape
    return found


SHAPES = _shapes()


def chosen(names: list[str]) -> dict[str, tuple[int, int]]:
    """Shapes by full name, by first part ("demo"), or as "NxK"."""
    found: dict[str, tuple[int, int]] = {}
    for name in names:
        n, _, k = name.partition("x")
        if n.isdigit() and k.isdigit():
            found[name] = (int(n), int(k))
            continue
        matching = {key: shape for key, shape in SHAPES.items() if key == name or key.startswith(f"{name}.")}
        if not matching:
            raise argparse.ArgumentTypeError(f"{name!r} is no shape; there are {', '.join(SHAPES)}, and NxK")
        found |= matching
    return found
