"""Train a demonstration model on the Python standard library, on a CPU, in at most about an hour.

Contract
    python examples/demo_model/train.py --out examples/demo_model --work demo_model_work
    python examples/demo_model/train.py --architecture qwen3_moe --tokenizer examples/demo_model \
        --out examples/demo_moe --work demo_moe_work
splits the running interpreter's standard library by source file (corpus.py), trains a
tokenizer (or takes that of another folder) and the model on the training part, and writes to
--out a transformers model folder: config.json, generation_config.json, model.safetensors
(bfloat16), the tokenizer's files and training_log.csv. It ends by printing the perplexity of
each evaluation split, and of a mixture of experts which share of the tokens each expert took.

The recipe is seeded: Muon for the weight matrices, AdamW for embedding, norms and routers, a
short warm-up, a constant rate, then a linear decay to zero. Sequences hold 512 tokens at
first and 1,024 in the last part, at the same number of tokens a step. The run ends after a
number of steps or of minutes, whichever comes first; the schedule follows the larger share of
the two, so a slow machine takes fewer steps and still decays to zero. --work keeps the
checkpoint, from which the same command continues.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import shutil
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import QUOTAS, build_corpus
from muon import Muon
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 1024
EVALUATION_TOKENS = 1000
TOKENS_PER_STEP = 8192
MICRO_BATCH_TOKENS = 2048
SAVE_MINUTES = 4
# A newline keeps the indentation that follows it; a word may take one leading space or sign.
WORDS = r"(?:\r?\n)+[ \t]*|[^\r\n\w]?[^\W\d]+| ?\d{1,3}| ?[^\s\w]+|[ \t]+|\s"
BALANCE = 0.05  # weight of the loss that spreads tokens over experts
LOG_COLUMNS = ("step", "tokens", "train_loss", "lr", "seconds")


@dataclass(frozen=True)
class Recipe:
    """The training run's numbers."""

    steps: int
    minutes: float
    warmup: int = 20
    decay_share: float = 0.5  # share of the run, at its end, in which the rate falls to zero
    long_share: float = 0.3  # share of the run, at its end, with 1,024-token sequences
    matrix_rate: float = 0.02
    other_rate: float = 0.003
    weight_decay: float = 0.01
    seed: int = 20261121

    def progress(self, step: int, seconds: float) -> float:
        """Return the share of the run that is over; one or more at its end."""
        return max(step / self.steps, seconds / (60 * self.minutes))

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate relative to its peak."""
        return min(1.0, (step + 1) / self.warmup, (1 - progress) / self.decay_share)

    def sequence(self, progress: float) -> int:
        """Return the sequence length."""
        return 512 if progress < 1 - self.long_share else CONTEXT


def new_model(architecture: str, end_of_text: int, seed: int) -> PreTrainedModel:
    """Return the untrained model: 13.77 million parameters ("llama"), or 5.84 million ("qwen3_moe")."""
    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "head_dim": 64,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }
    if architecture == "llama":
        config = LlamaConfig(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=12, **shared
        )
        return LlamaForCausalLM(config)
    mixture = Qwen3MoeConfig(
        hidden_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE,
        **shared,
    )
    mixture._experts_implementation = "grouped_mm"  # twice as fast as a loop over experts
    return Qwen3MoeForCausalLM(mixture)


def new_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose words suit indented code."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def packed_tokens(texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> Tensor:
    """Return all texts, shuffled, as one stream of tokens; each follows an end-of-text token."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    encoded = tokenizer.backend_tokenizer.encode_batch([texts[index] for index in order])
    stream = [token for text in encoded for token in (tokenizer.eos_token_id, *text.ids)]
    return torch.tensor(stream, dtype=torch.long)


class Batches:
    """Random access to the batches of the run, so that it can continue at any step."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self.texts, self.tokenizer, self.recipe = texts, tokenizer, recipe
        self.epoch, self.stream = 0, packed_tokens(texts, tokenizer, recipe.seed)

    def batch(self, step: int, length: int) -> Tensor:
        """Return the step's sequences, each one token longer than `length`.

        The stream is cut into blocks of CONTEXT tokens, drawn in a shuffled order.
        """
        blocks = (len(self.stream) - 1) // CONTEXT
        per_step = TOKENS_PER_STEP // CONTEXT
        epoch, index = divmod(step, blocks // per_step)
        if epoch != self.epoch:
            self.epoch = epoch
            self.stream = packed_tokens(self.texts, self.tokenizer, self.recipe.seed + epoch)
        order = list(range(blocks))
        random.Random(self.recipe.seed - epoch).shuffle(order)
        drawn = order[index * per_step : (index + 1) * per_step]
        starts = [CONTEXT * block + offset for block in drawn for offset in range(0, CONTEXT, length)]
        return torch.stack([self.stream[start : start + length + 1] for start in starts])


def loss_of(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """Return the mean cross-entropy of every token of the sequences but the first."""
    logits = model(input_ids=sequences[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


def balanced_loss_of(model: PreTrainedModel, sequences: Tensor) -> tuple[Tensor, float]:
    """Return what is minimised, and of it the cross-entropy alone."""
    if not hasattr(model.config, "router_aux_loss_coef"):
        loss = loss_of(model, sequences)
        return loss, float(loss.detach())
    output = model(input_ids=sequences[:, :-1], use_cache=False, output_router_logits=True)
    loss = cross_entropy(output.logits.flatten(0, 1).float(), sequences[:, 1:].flatten())
    uneven = [unevenness(logits.float(), model.config.num_experts_per_tok) for logits in output.router_logits]
    return loss + model.config.router_aux_loss_coef * torch.stack(uneven).mean(), float(loss.detach())


def unevenness(logits: Tensor, choices: int) -> Tensor:
    """Return the loss of one layer's router (tokens, experts) that spreads tokens over experts: 1 where they are even
    (arXiv 2101.03961, equation 4). transformers' own takes all layers at once, which lets each neglect some experts.
    """
    experts = logits.shape[1]
    share = logits.topk(choices, -1).indices.flatten().bincount(minlength=experts) / (choices * len(logits))
    return experts * (share * logits.softmax(-1).mean(0)).sum()


def optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, each expert's its own, and AdamW for embedding, norms and routers."""
    matrices = [p for name, p in model.model.layers.named_parameters() if p.ndim >= 2 and ".mlp.gate." not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=recipe.matrix_rate, decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_step(model: PreTrainedModel, steppers: list[torch.optim.Optimizer], batch: Tensor) -> float:
    """Take one optimizer step and return the batch's loss."""
    parts = torch.split(batch, max(1, MICRO_BATCH_TOKENS // (batch.shape[1] - 1)))
    total = 0.0
    for part in parts:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, entropy = balanced_loss_of(model, part)
        (loss / len(parts)).backward()  # type: ignore[no-untyped-call]
        total += entropy / len(parts)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
        stepper.zero_grad()
    return total


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Return the perplexity of the texts in float32, each cut to EVALUATION_TOKENS tokens."""
    total, count = 0.0, 0
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=EVALUATION_TOKENS, return_tensors="pt")
        predicted = tokens["input_ids"].shape[1] - 1
        total += float(loss_of(model, tokens["input_ids"])) * predicted
        count += predicted
    return math.exp(total / count)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Any], folder: Path) -> None:
    """Write the model in bfloat16, its tokenizer and the log as a transformers folder."""
    copy = deepcopy(model)
    copy.bfloat16().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    with (folder / "training_log.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([LOG_COLUMNS, *rows])


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that the path holds a whole one at all times."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def run(
    recipe: Recipe,
    architecture: str,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    work: Path,
    slice_minutes: float,
) -> bool:
    """Train to the recipe's end, continuing from the checkpoint in `work` if there is one; returns whether it is
    reached, or only the end of this slice."""
    checkpoint = work / "checkpoint.pt"
    state: dict[str, Any] = torch.load(checkpoint) if checkpoint.exists() else {"step": 0, "rows": []}
    model = new_model(architecture, tokenizer.eos_token_id, recipe.seed)
    steppers = optimizers(model, recipe)
    if state["step"]:
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
    batches, rows = Batches(texts, tokenizer, recipe), state["rows"]
    print(f"{len(batches.stream):,} training tokens; step {state['step']} of {recipe.steps}", flush=True)
    saved_at = started = time.monotonic()
    began = saved_at - state.get("seconds", 0.0)
    step, progress = state["step"], recipe.progress(state["step"], state.get("seconds", 0.0))
    over = False
    while progress < 1 and not over:
        rate = recipe.rate(step, progress)
        for stepper, peak in zip(steppers, (recipe.matrix_rate, recipe.other_rate), strict=True):
            stepper.param_groups[0]["lr"] = peak * rate
        loss = train_step(model, steppers, batches.batch(step, recipe.sequence(progress)))
        step, now = step + 1, time.monotonic()
        progress, over = recipe.progress(step, now - began), now - started > 60 * slice_minutes
        if step % 10 == 1 or progress >= 1:
            rate_now = f"{recipe.matrix_rate * rate:.6f}"
            rows.append((step, step * TOKENS_PER_STEP, f"{loss:.4f}", rate_now, round(now - began)))
            print(*rows[-1], flush=True)
        if progress >= 1 or over or now - saved_at > 60 * SAVE_MINUTES:
            saved_at = now
            moments = [stepper.state_dict() for stepper in steppers]
            state = {"model": model.state_dict(), "optimizers": moments}
            save_checkpoint(state | {"step": step, "rows": rows, "seconds": now - began}, checkpoint)
            save(model, tokenizer, rows, work / "model")
    return progress >= 1


@torch.no_grad()
def expert_shares(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[float]]:
    """Return for every layer the share of (token, choice) pairs that each expert takes; nothing without experts."""
    counts: Tensor | int = 0
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=EVALUATION_TOKENS, return_tensors="pt")
        logits = model(tokens["input_ids"], use_cache=False, output_router_logits=True).router_logits
        taken = torch.stack([layer.topk(model.config.num_experts_per_tok, -1).indices.flatten() for layer in logits])
        counts = counts + torch.stack([row.bincount(minlength=model.config.num_experts) for row in taken])
    assert isinstance(counts, Tensor)
    return [[round(float(share), 3) for share in row / row.sum()] for row in counts]


def main() -> None:
    """Train a demonstration model and print its perplexity on each evaluation split."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--work", type=Path, default=Path("demo_model_work"), help="for checkpoints")
    parser.add_argument("--architecture", choices=("llama", "qwen3_moe"), default="llama")
    parser.add_argument("--tokenizer", type=Path, help="take this folder's tokenizer instead of training one")
    parser.add_argument("--steps", type=int, default=450, help="at most this many steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most this long")
    parser.add_argument(
        "--slice-minutes",
        type=float,
        default=math.inf,
        help="stop after this long; the same command continues",
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    corpus, given = build_corpus(), arguments.tokenizer
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given) if given else new_tokenizer(corpus.training)
    recipe = Recipe(arguments.steps, arguments.minutes)
    slice_minutes = arguments.slice_minutes
    if not run(recipe, arguments.architecture, tokenizer, corpus.training, arguments.work, slice_minutes):
        print("not done: the same command continues")
        return
    shutil.copytree(arguments.work / "model", arguments.out, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    for split in QUOTAS:
        texts = [document.text for document in corpus.documents if document.split == split]
        print(f"{split}: perplexity {perplexity(model, tokenizer, texts):.3f}, {len(texts)} documents", flush=True)
    if hasattr(model.config, "num_experts"):
        texts = [document.text for document in corpus.documents if document.split == "search"]
        print(f"shares of each layer's experts: {expert_shares(model, tokenizer, texts)}")


if __name__ == "__main__":
    main()
