"""Train the demonstration model on the Python standard library, on a CPU, in about an hour.

Contract
    python examples/demo_model/train.py --out examples/demo_model --work demo_model_work
splits the running interpreter's standard library by source file (corpus.py), trains a
tokenizer and the model on the training part, and writes to --out a transformers model folder:
config.json, generation_config.json, model.safetensors (bfloat16), the tokenizer's files and
training_log.csv. It ends by printing the perplexity of each evaluation split.

The recipe is seeded: Muon for the weight matrices, AdamW for the embedding and the norms, a
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import QUOTAS, build_corpus
from muon import Muon
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 1024
EVALUATION_TOKENS = 1000
TOKENS_PER_STEP = 8192
MICRO_BATCH_TOKENS = 2048
# A newline keeps the indentation that follows it; a word may take one leading space or sign.
WORDS = r"(?:\r?\n)+[ \t]*|[^\r\n\w]?[^\W\d]+| ?\d{1,3}| ?[^\s\w]+|[ \t]+|\s"
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


def new_model(end_of_text: int, seed: int) -> LlamaForCausalLM:
    """Return the untrained model: 13.77 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return LlamaForCausalLM(config)


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


def loss_of(model: LlamaForCausalLM, sequences: Tensor) -> Tensor:
    """Return the mean cross-entropy of every token of the sequences but the first."""
    logits = model(input_ids=sequences[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=recipe.matrix_rate, decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_step(model: LlamaForCausalLM, steppers: list[torch.optim.Optimizer], batch: Tensor) -> float:
    """Take one optimizer step and return the batch's loss."""
    parts = torch.split(batch, max(1, MICRO_BATCH_TOKENS // (batch.shape[1] - 1)))
    total = 0.0
    for part in parts:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, part) / len(parts)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
        stepper.zero_grad()
    return total


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Return the perplexity of the texts in float32, each cut to EVALUATION_TOKENS tokens."""
    total, count = 0.0, 0
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=EVALUATION_TOKENS, return_tensors="pt")
        predicted = tokens["input_ids"].shape[1] - 1
        total += float(loss_of(model, tokens["input_ids"])) * predicted
        count += predicted
    return math.exp(total / count)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Any], folder: Path) -> None:
    """Write the model in bfloat16, its tokenizer and the log as a transformers folder."""
    copy = new_model(tokenizer.eos_token_id, seed=0)
    copy.load_state_dict(model.state_dict())
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


def run(recipe: Recipe, texts: list[str], work: Path, save_minutes: float) -> None:
    """Train to the recipe's end, continuing from the checkpoint in `work` if there is one."""
    checkpoint = work / "checkpoint.pt"
    state: dict[str, Any] = torch.load(checkpoint) if checkpoint.exists() else {"step": 0, "rows": []}
    tokenizer = new_tokenizer(texts)
    model = new_model(tokenizer.eos_token_id, recipe.seed)
    steppers = optimizers(model, recipe)
    if state["step"]:
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
    batches, rows = Batches(texts, tokenizer, recipe), state["rows"]
    print(f"{len(batches.stream):,} training tokens; step {state['step']} of {recipe.steps}", flush=True)
    saved_at = time.monotonic()
    began = saved_at - state.get("seconds", 0.0)
    step, progress = state["step"], recipe.progress(state["step"], state.get("seconds", 0.0))
    while progress < 1:
        rate = recipe.rate(step, progress)
        for stepper, peak in zip(steppers, (recipe.matrix_rate, recipe.other_rate), strict=True):
            stepper.param_groups[0]["lr"] = peak * rate
        loss = train_step(model, steppers, batches.batch(step, recipe.sequence(progress)))
        step, now = step + 1, time.monotonic()
        progress = recipe.progress(step, now - began)
        if step % 10 == 1 or progress >= 1:
            rate_now = f"{recipe.matrix_rate * rate:.6f}"
            rows.append((step, step * TOKENS_PER_STEP, f"{loss:.4f}", rate_now, round(now - began)))
            print(*rows[-1], flush=True)
        if progress >= 1 or now - saved_at > 60 * save_minutes:
            saved_at = now
            moments = [stepper.state_dict() for stepper in steppers]
            state = {"model": model.state_dict(), "optimizers": moments}
            save_checkpoint(state | {"step": step, "rows": rows, "seconds": now - began}, checkpoint)
            save(model, tokenizer, rows, work / "model")


def main() -> None:
    """Train the demonstration model and print its perplexity on each evaluation split."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--work", type=Path, default=Path("demo_model_work"), help="for checkpoints")
    parser.add_argument("--steps", type=int, default=450, help="at most this many steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most this long")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus()
    run(Recipe(arguments.steps, arguments.minutes), corpus.training, arguments.work, save_minutes=4)
    shutil.copytree(arguments.work / "model", arguments.out, dirs_exist_ok=True)
    model = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.out)
    for split in QUOTAS:
        texts = [document.text for document in corpus.documents if document.split == split]
        print(f"{split}: perplexity {perplexity(model, tokenizer, texts):.3f}, {len(texts)} documents")


if __name__ == "__main__":
    main()
