"""Writes a checkpoint with random weights for a model's config.json, so that its shape can be run without its weights.

    python benchmarks/make_random.py benchmarks/shapes/qwen3-0.6b-vocab32k FOLDER [--seed 0]

FOLDER gets config.json and model.safetensors: matrices from a normal distribution with deviation 0.02, gains of norms
one, biases zero, all bf16. Equal seeds give equal bytes. Tensors are made and written in pieces, so that memory stays
under 200 MiB above the libraries' own whatever the size of the model. There is no tokenizer: bytes stand in for tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

DEVIATION = 0.02
PIECE_ELEMENTS = 2**23


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every parameter that a checkpoint holds, in the model's order; a tied output matrix is the embedding's."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    auto = AutoModelForCausalLM if "CausalLM" in str(config.architectures) else AutoModel
    with torch.device("meta"):
        model = auto.from_config(config)
    output = model.get_output_embeddings() if config.tie_word_embeddings else None
    tied = () if output is None else tuple(f"{name}." for name, module in model.named_modules() if module is output)
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not tied or not name.startswith(tied)
    }


def pieces(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[bytes]:
    """One tensor's bytes in bf16."""
    left = math.prod(shape)
    while left:
        values = torch.empty(min(left, PIECE_ELEMENTS))
        left -= values.numel()
        if len(shape) >= 2:
            values.normal_(0.0, DEVIATION, generator=generator)
        else:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        yield values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def make(shape: Path, folder: Path, seed: int) -> int:
    """Write the folder, complete or not at all; returns the number of parameters."""
    wanted = shapes(shape)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        shutil.copyfile(shape / "config.json", made / "config.json")
        with open(made / "model.safetensors", "wb") as file:
            file.write(_header(wanted))
            generator = torch.Generator().manual_seed(seed)
            for name, size in wanted.items():
                for piece in pieces(name, size, generator):
                    file.write(piece)
        os.replace(made, folder)  # fails when the folder exists and is not empty
    return sum(map(math.prod, wanted.values()))


def _header(wanted: dict[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in wanted.items():
        end = position + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def main() -> None:
    parser = argparse.ArgumentParser(description="Write random weights for a config.json.")
    parser.add_argument("shape", type=Path, help="a folder with config.json")
    parser.add_argument("folder", type=Path, help="the model folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    count = make(arguments.shape, arguments.folder, arguments.seed)
    print(f"{arguments.folder}: {count:,} random parameters, bf16")


if __name__ == "__main__":
    main()
