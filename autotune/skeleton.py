"""A model's architecture without weights: parameters on the meta device, buffers as construction makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from autotune.experts import split_experts
from autotune.search_space.groups import Task


def skeleton(folder: Path, task: Task, dtype: torch.dtype) -> nn.Module:
    """Of a model folder's config; rotary tables and other buffers are real, experts are layers of their own."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModel
    with _parameters_on_meta():
        model = auto.from_config(config, dtype=dtype)
    split_experts(model)
    return model  # type: ignore[no-any-return]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
