"""Measure what rounding the demonstration model's weights to integers costs.

Contract
    python examples/demo_model/sensitivity.py FOLDER [--split search]
prints, for several weight formats, the perplexity of the split's evaluation documents relative
to the unrounded model and the mean Kullback-Leibler divergence from it, in nats a token. The
weights of every linear layer and of the output head are rounded to the nearest of 2^bits
levels with one symmetric scale a row or a group of columns; the tied input embedding is not.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch
from corpus import read_documents
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

DOCUMENTS = Path(__file__).parents[2] / "autotune" / "data" / "stdlib_documents.jsonl.gz"
TOKENS = 1000
FORMATS = {
    "int8, one scale a row": (8, 0),
    "int4, groups of 32": (4, 32),
    "int4, groups of 64": (4, 64),
    "int4, groups of 128": (4, 128),
    "int4, one scale a row": (4, 0),
    "int3, groups of 128": (3, 128),
}


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Return the weight rounded to the nearest level; group 0 stands for the whole row."""
    parts = weight.reshape(weight.shape[0], -1, group or weight.shape[1])
    top = 2 ** (bits - 1) - 1
    scale = parts.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8) / top
    levels: Tensor = torch.round(parts / scale).clamp(-top - 1, top)
    return torch.reshape(levels * scale, weight.shape)


def rounded_model(model: LlamaForCausalLM, bits: int, group: int) -> LlamaForCausalLM:
    """Return a copy of the model whose linear weights are rounded; its output head is untied."""
    other = copy.deepcopy(model)
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    for module in other.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data, bits, group)
    return other


@torch.inference_mode()
def log_probabilities(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Return the log-probabilities of every next token, in float32."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def compare(model: LlamaForCausalLM, others: dict[str, LlamaForCausalLM], documents: list[Tensor]) -> None:
    """Print the perplexities and divergences of the other models on the documents."""
    loss, count = 0.0, 0
    losses, divergences = dict.fromkeys(others, 0.0), dict.fromkeys(others, 0.0)
    for tokens in documents:
        reference, target = log_probabilities(model, tokens), tokens[0, 1:]
        count += len(target)
        loss += float(cross_entropy(reference, target, reduction="sum"))
        for name, other in others.items():
            found = log_probabilities(other, tokens)
            losses[name] += float(cross_entropy(found, target, reduction="sum"))
            divergences[name] += float((reference.exp() * (reference - found)).sum())
    print(f"{len(documents)} documents, {count} predicted tokens, perplexity {math.exp(loss / count):.3f}")
    for name in others:
        change = 100 * math.expm1((losses[name] - loss) / count)
        print(f"| {name} | {change:+.2f} % | {divergences[name] / count:.5f} |")


def main() -> None:
    """Print the cost of each weight format."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="search")
    arguments = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.folder)
    texts = [document.text for document in read_documents(DOCUMENTS) if document.split == arguments.split]
    documents = [torch.tensor([tokenizer(text)["input_ids"][:TOKENS]]) for text in texts]
    compare(model, {name: rounded_model(model, *form) for name, form in FORMATS.items()}, documents)


if __name__ == "__main__":
    main()
