"""The whole loop on the second device: tuned for an H100's profile, recovered, loaded; latencies are arithmetic.

CUDA kernels do not run there. In their place are the reference's products on weights that are put on the device as
kernels put them there, so that everything around kernels is what a card would see.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_device
import tiny
import torch

import autotune
from autotune import runtime, session, switchable
from autotune.config import RunConfig
from autotune.kernels import bank, linear, operator
from autotune.kernels.reference import reference_linear
from autotune.kernels.spec import Form, GroupWeight, Packed
from autotune.models import Models
from autotune.passes import StaticRequest
from autotune.place import Place
from autotune.plan import Plan
from autotune.profilers.cuda_timer import rehearsed
from autotune.recover import run as recover_run
from autotune.recover.job import Options
from autotune.result import Result
from autotune.targets import target
from autotune.tune import tune

_PARTS = ("dense", "codes", "scales", "zeros", "bias")
_USERS = ((switchable, "load_kernel"), (runtime, "load_kernel"), (linear, "load"), (operator, "load"), (bank, "load"))


def loop(
    device: torch.device, home: Path, name: str, kind: str, recovered: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    """What is decided, measured and written in a folder of that name; `recovered`: options of a recovery, where there
    is to be one."""
    home = home / name
    home.mkdir(parents=True)
    model = tiny.make_model(kind, home / "model", torch.bfloat16, initializer_range=0.2)
    data, run = tiny.write_documents(home / "data.jsonl", 16, 200), home / "run"
    with _on(device):
        settings: dict[str, Any] = {"schemes": ("w8a8-int8", "w4a16-int4-g32", "2:4+w8a8-int8"), "trials": 4}
        made = tune(RunConfig.of(**tiny.settings(model, run, data, **(settings | changes))))
        assert made.plan is not None and made.losses is not None
        found = {"plan": made.plan.digest(), "losses": made.losses.to_csv(), "outputs": _outputs(run, device)}
        found |= _passes(made, device)
        return found | (_recovered(run, device, recovered) if recovered else {})


def _passes(made: Result, device: torch.device) -> dict[str, Any]:
    """What a graph would hold of the plan's model, and what these passes wait for, which no graph can."""
    models = Models(made.session, made.space, made.table)
    models.database = made.database
    assert models.runnable is not None and made.plan is not None
    models.runnable.select(made.plan.configuration)
    request = StaticRequest(models.runnable.model, 2, 7, 16, device)
    with torch.inference_mode():
        outputs = [request.prefill(), request.decode(), request.decode()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers asks
            waits = second_device.waits(lambda: (request.prefill(), request.decode()))
    return {"passes": outputs, "waits": dict(waits)}


def _recovered(run: Path, device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    text = run.parent / "more.txt"
    text.write_bytes(bytes(np.random.default_rng(7).integers(97, 123, 6000).tolist()))
    value = recover_run.recover(run, Options(data=text, **({"rate": 0.03, "batch_tokens": 128} | options)))
    for mark in value["curve"]:
        del mark["seconds"]
    for name in ("seconds", "key"):  # the clock, and what names the device
        del value[name]
    folder = run / "recovered"
    codes = sorted(path.name for path in (folder / "weights").iterdir())  # names are hashes
    plan = Plan.load(folder / "plan.json").digest()
    return {"recovery": value, "codes": codes, "recovered": plan, "recovered outputs": _outputs(folder, device)}


def _outputs(folder: Path, device: torch.device) -> torch.Tensor:
    """Of what was saved, of a prompt and of tokens after it."""
    model = autotune.load(folder)
    ids = torch.arange(97, 117, device=device).view(1, -1)
    continued = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    return torch.cat([model(ids).logits.flatten(), continued.flatten()])


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Meanwhile this machine is an H100 whose memory is the device."""
    profile = target.load("h100")
    with pytest.MonkeyPatch.context() as patch, tiny.faked(patch):
        patch.setattr(session, "resolve_target", lambda name: (profile, True))
        patch.setattr(session, "place_of", lambda item: Place(device, rehearsed()))
        patch.setattr(runtime, "device_of", lambda kernels: device)
        patch.setattr(runtime, "quicken", lambda model: None)  # on a CPU alone
        patch.setattr(recover_run, "device_of", lambda name: device)
        patch.setattr("autotune.recover.texts.LENGTH", 32)
        for user, name in _USERS:
            patch.setattr(user, name, lambda spec: _kernel(device))
        yield


def _kernel(device: torch.device) -> types.SimpleNamespace:
    """A kernel's module."""

    def pack(weight: GroupWeight, dtype: torch.dtype) -> Packed:
        parts = {name: None if (part := getattr(weight, name)) is None else part.to(device) for name in _PARTS}
        held = GroupWeight(weight.scheme, **parts)
        codes = held.dense if held.codes is None else held.codes
        assert codes is not None
        return Packed(codes.shape[0], codes.shape[1], dtype, codes.nbytes, held)

    def tensors(packed: Packed) -> tuple[torch.Tensor | None, ...]:
        return tuple(getattr(packed.data, name) for name in _PARTS)

    def bind(held: tuple[torch.Tensor | None, ...], form: Form) -> Packed:
        return form.packed(GroupWeight(form.scheme, **dict(zip(_PARTS, held, strict=True))))

    def run(packed: Packed, x: torch.Tensor) -> torch.Tensor:
        return reference_linear(packed.data, x)

    return types.SimpleNamespace(pack=pack, tensors=tensors, bind=bind, run=run)
