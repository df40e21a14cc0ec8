"""llama.cpp as an engine (see `peers.py`): whole models of Qwen3's architecture with random weights, from a GGUF file.

The file is written here, with the quantizers of the `gguf` package: every matrix in one format, embedding and output
included, as our uniform configurations have it (llama.cpp's own tool would keep the output at 6 bits under Q4_0). A
random piece is quantized and repeated: values do not decide speed.

Questions: {"do": "load", "name", "config", "kind", "folder", "context"} -> {"weight_bytes"}; {"do": "request", "name",
"prompt", "steps"} -> {"prefill_s", "decode_s"}: one prompt whose last logits are asked for, then the median of single
steps, the first one not counted; {"do": "logits", "name", "ids"} -> {"logits"} of the last position.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

PIECE_WEIGHTS = 2**20
DEVIATION = 0.02
Weights = Callable[[str], np.ndarray]  # name in the checkpoint -> values, fp32


class Engine:
    package = "llama-cpp-python"

    def __init__(self, threads: int) -> None:
        self.version = llama_cpp.__version__
        self._threads = threads
        self._models: dict[str, tuple[Any, Any]] = {}  # (model, context)
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["name"]
        if request["do"] == "load":
            config = json.loads(request["config"])
            path = Path(request["folder"]) / f"{name}.gguf"
            size = write(config, path, request["kind"])
            self.open(name, path, request["context"])
            path.unlink()
            return {"weight_bytes": size}
        if request["do"] == "logits":
            return {"logits": self.logits(name, request["ids"])}
        prefill_s, decode_s = self.time_request(name, request["prompt"], request["steps"])
        return {"prefill_s": prefill_s, "decode_s": decode_s}

    def open(self, name: str, path: Path, context: int) -> None:
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = self._threads
        self._models[name] = (model, llama_cpp.llama_init_from_model(model, options))

    def time_request(self, name: str, prompt: int, steps: int) -> tuple[float, float]:
        context = self._models[name][1]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        prefill_s = self._decode(context, [number % 97 for number in range(prompt)])
        times = sorted([self._decode(context, [number % 97]) for number in range(steps and steps + 1)][1:])
        return prefill_s, times[len(times) // 2] if times else 0.0

    def logits(self, name: str, ids: list[int]) -> list[float]:
        model, context = self._models[name]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        self._decode(context, ids)
        count = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        found = llama_cpp.llama_get_logits_ith(context, -1)
        return [float(found[place]) for place in range(count)]

    @staticmethod
    def _decode(context: Any, ids: list[int]) -> float:
        """Seconds of one pass, until the last position's logits are there."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        start = time.perf_counter()
        code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        llama_cpp.llama_get_logits_ith(context, -1)
        elapsed = time.perf_counter() - start
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return elapsed


def write(config: dict[str, Any], path: Path, kind: str, weights: Weights | None = None) -> int:
    """A GGUF file of a qwen3 config; returns the bytes of its matrices. `kind`: "Q4_0", "Q8_0", "BF16", "F32"."""
    if config["model_type"] != "qwen3":
        raise ValueError(f"only qwen3 is written as GGUF, not {config['model_type']}")
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    quantized, generator = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    size = 0
    for name, source, shape in tensors(config):
        if len(shape) == 1:
            values = np.ones(shape, np.float32) if weights is None else weights(source)
            writer.add_tensor(name, values)
            continue
        data = _random(shape, quantized, generator) if weights is None else _quantized(weights(source), quantized)
        size += data.nbytes
        writer.add_tensor(name, data, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name in the file, name in a checkpoint, shape) of every tensor; a tied output matrix is the embedding's."""
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, shared = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    yield "token_embd.weight", "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "output_norm.weight", "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "output.weight", "lm_head.weight", (config["vocab_size"], hidden)
    layer = (
        ("attn_norm", "input_layernorm", (hidden,)),
        ("attn_q", "self_attn.q_proj", (heads, hidden)),
        ("attn_q_norm", "self_attn.q_norm", (size,)),
        ("attn_k", "self_attn.k_proj", (shared, hidden)),
        ("attn_k_norm", "self_attn.k_norm", (size,)),
        ("attn_v", "self_attn.v_proj", (shared, hidden)),
        ("attn_output", "self_attn.o_proj", (hidden, heads)),
        ("ffn_norm", "post_attention_layernorm", (hidden,)),
        ("ffn_gate", "mlp.gate_proj", (inner, hidden)),
        ("ffn_up", "mlp.up_proj", (inner, hidden)),
        ("ffn_down", "mlp.down_proj", (hidden, inner)),
    )
    for number in range(config["num_hidden_layers"]):
        for name, source, shape in layer:
            yield f"blk.{number}.{name}.weight", f"model.layers.{number}.{source}.weight", shape


def _random(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, generator: np.random.Generator) -> np.ndarray:
    rows = min(shape[0], -(-PIECE_WEIGHTS // shape[1]))
    piece = _quantized(generator.normal(0.0, DEVIATION, (rows, shape[1])).astype(np.float32), kind)
    return np.resize(piece, (shape[0], *piece.shape[1:]))


def _quantized(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    return np.asarray(gguf.quants.quantize(values, kind))
