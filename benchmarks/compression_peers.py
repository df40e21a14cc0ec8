"""Other packages' compression of the same model from the same calibration tokens, for `compression.py`: optional.

auto-round (Intel)          W4 and W3 in groups of 128, symmetric, 200 iterations of sign gradient descent a block
modelopt (NVIDIA)           SparseGPT at 2:4 ("sparsegpt"), AWQ at 4 bits in groups of 128 ("awq_lite")

Both are asked for weights only and give them back dequantized, so they are judged by the same code as the methods here.
Both leave the output matrix alone by default, and here: compare with `--keep-head`. They need packages of their own,
which need not be installed where autotune is (give their folder in PYTHONPATH; torch stays the pinned one):

    pip install --no-deps --target PEERS auto-round nvidia-modelopt accelerate datasets ...   # what they import
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

Weights = dict[str, torch.Tensor]  # module -> (out, in) fp32
Peer = Callable[[nn.Module, Any, Sequence[torch.Tensor]], Weights]
ITERATIONS = 200


def auto_round(bits: int) -> Peer:
    def compress(model: nn.Module, tokenizer: Any, documents: Sequence[torch.Tensor]) -> Weights:
        from auto_round import AutoRound

        length = min(512, min(map(len, documents)))
        pieces = [document[start : start + length] for document in documents for start in _starts(document, length)]
        samples = [{"input_ids": piece.unsqueeze(0), "attention_mask": torch.ones(1, length)} for piece in pieces]
        tuned = AutoRound(
            model,
            tokenizer,
            scheme={"bits": bits, "group_size": 128, "sym": True, "data_type": "int", "act_bits": 16},
            dataset=samples,
            seqlen=length,
            nsamples=len(samples),
            iters=ITERATIONS,
            device_map="cpu",
            enable_torch_compile=False,
        )
        found, _ = tuned.quantize()
        return _weights(found)

    return compress


def sparsegpt(model: nn.Module, tokenizer: Any, documents: Sequence[torch.Tensor]) -> Weights:
    import modelopt.torch.sparsity as sparsity

    batches = [{"input_ids": document.unsqueeze(0)} for document in documents]
    config = {"data_loader": batches, "collect_func": lambda batch: batch}
    return _weights(sparsity.export(sparsity.sparsify(model, "sparsegpt", config=config)))


def awq(model: nn.Module, tokenizer: Any, documents: Sequence[torch.Tensor]) -> Weights:
    import modelopt.torch.quantization as quantization

    def run(quantized: nn.Module) -> None:
        for document in documents:
            quantized(document.unsqueeze(0))

    found = quantization.quantize(model, quantization.INT4_AWQ_CFG, run)
    weights = {}
    for name, module in found.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is None or not quantizer.is_enabled:
            continue
        weight = quantizer(module.weight.detach()).float()
        scale = getattr(module.input_quantizer, "pre_quant_scale", None)  # what inputs are multiplied by
        weights[name] = weight if scale is None else weight * scale.float()
    return weights


# name -> (package, format -> how)
PEERS: dict[str, tuple[str, dict[str, Peer]]] = {
    "auto-round": ("auto_round", {"int4-g128": auto_round(4), "int3-g128": auto_round(3)}),
    "modelopt-sparsegpt": ("modelopt", {"2:4": sparsegpt}),
    "modelopt-awq": ("modelopt", {"int4-g128": awq}),
}


def missing(name: str) -> str:
    """The package that a peer lacks here; empty when it can run."""
    package = PEERS[name][0]
    return "" if find_spec(package) else package


def _starts(document: torch.Tensor, length: int) -> range:
    return range(0, len(document) - length + 1, length)


def _weights(model: nn.Module) -> Weights:
    return {
        name: module.weight.detach().float() for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
