"""Runs in a process of its own, where `second_device` is installed: the same work on the CPU and on the second device.

`second_child.py SCENARIO ...` prints a JSON object of what each scenario found. Attention is torch's plain one on both,
native sweeps are left out on the CPU, and products are those of one library: what remains is the same arithmetic, and
has to give the same bits.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import second_device
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune import score as whole_score
from autotune import streamed_score
from autotune.certify import certify
from autotune.compress import database, methods, rounding, smoothing, sweep
from autotune.compress.database import WeightDatabase, stacked_weight
from autotune.compress.sequential import Recompression, Settings, own_entries
from autotune.folding import sites
from autotune.kernels import products
from autotune.kernels.cpu import sweep as native
from autotune.model import OpenModel, load_mixed, load_model, open_model
from autotune.recover import training
from autotune.recover.distill import Distillation, Recipe
from autotune.recover.quantizer import Master
from autotune.recover.student import Student
from autotune.recover.texts import Sequences
from autotune.reference_model import ReferenceModel
from autotune.search_space.schemes import MORE, SCHEMES, scheme
from autotune.streamed_reference import StreamedReference
from autotune.streaming import Streamed
from autotune.teacher import Teacher

SECOND = second_device.install()
CPU = torch.device("cpu")
HOME = Path(tempfile.mkdtemp())
COMPRESSED = [item.name for item in (*SCHEMES, *MORE) if not item.is_dense]
FEW = ["w8a8-int8", "w4a16-int4-g64-asym", "w4a16-nf4-g64", "w4a16-mxfp4", "w4a16-nvfp4", "2:4+w8a8-fp8", "4:8"]
NAME = "2:4+w8a8-int8"


@cache
def opened(kind: str, **changes: int) -> OpenModel:
    """Layers that have something to say: compressing them costs whole nats."""
    folder = HOME / f"{kind}-{len(list(HOME.iterdir()))}"
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    return open_model(str(tiny.make_model(kind.partition("-")[0], folder, dtype, initializer_range=0.2, **changes)))


def dense(item: OpenModel, mixed: bool, device: torch.device) -> torch.nn.Module:
    return (load_mixed(item) if mixed else load_model(item, torch.float32)).to(device)


def documents(device: torch.device, count: int = 5) -> list[torch.Tensor]:
    return [document.to(device) for document in tiny.tokens(count, 40)]


def unlike(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two values, with tensors and what holds tensors in them, differ."""
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu()) else [path]
    if isinstance(one, dict):
        keys = [path] if one.keys() != other.keys() else []
        return keys + [bad for key in one for bad in unlike(one[key], other.get(key), f"{path}/{key}")]
    if isinstance(one, list | tuple):
        places = [path] if len(one) != len(other) else []
        return places + [
            bad for n, pair in enumerate(zip(one, other, strict=False)) for bad in unlike(*pair, f"{path}/{n}")
        ]
    return [] if one == other else [path]


def both(work: Callable[[torch.device], Any]) -> list[str]:
    """Where what the second device gives differs from what the CPU gives."""
    return unlike(work(CPU), work(SECOND))


def bytes_of(made: WeightDatabase) -> dict[str, bytes]:
    return {f"{group} {name}": (made.folder / file).read_bytes().hex() for (group, name), file in made.entries.items()}


def folder_of(*parts: object) -> Path:
    return HOME / "-".join(str(part).replace(":", "") for part in parts)


# ---- the device itself


def rules() -> dict[str, Any]:
    """What is refused, and by what; what is not."""
    x = torch.randn(4, 8)
    y, first = x.to(SECOND), torch.tensor([0, 2])
    drawn = torch.Generator(SECOND).manual_seed(0)
    tried: dict[str, Callable[[], Any]] = {
        "add": lambda: x + y,
        "product": lambda: x @ y.t(),
        "cat": lambda: torch.cat([x, y]),
        "written": lambda: x.add_(y),
        "number written": lambda: x[0, 0].add_(y[0, 0]),
        "indices of another": lambda: x[first.to(SECOND)],
        "lookup": lambda: torch.nn.functional.embedding(first, y),
        "mask": lambda: y.masked_fill(x > 0, 0.0),
        "integers": lambda: y.int() @ y.int().t(),
        "generator": lambda: torch.randn(3, device=SECOND, generator=torch.Generator()),
        "numpy": lambda: y.numpy(),
        "native": lambda: native.sweep([native.Rows(y, y, None, None, 8, -7.0, 7.0, 0)], y, first),
        "number": lambda: y + x[0, 0],
        "indices": lambda: y[first],
        "copies": lambda: [x.copy_(y), y.copy_(x)],
        "draws": lambda: torch.randn(3, device=SECOND, generator=drawn),
    }
    found = {}
    for name, call in tried.items():
        try:
            call()
            found[name] = ""
        except (RuntimeError, TypeError, native.ctypes.ArgumentError) as error:
            found[name] = type(error).__name__
    return found


# ---- training


def distillation(device: torch.device, kind: str, name: str = NAME, **changes: Any) -> Distillation:
    item = opened(kind)
    model = dense(item, kind.endswith("bf16"), device)
    masters = {
        g.name: Master(tiny.rounded(stacked_weight(model, g).cpu(), None, scheme(name)), device)
        for g in item.spec.groups
    }
    ids = torch.stack(tiny.tokens(24, 32))
    recipe = Recipe(**({"steps": 6, "batch_tokens": 256, "rate": 0.03, "block_share": 0.3} | changes))
    return Distillation(Student(model, item.spec, masters), Sequences("made up", "0", ids[4:], ids[:4]), recipe)


def state(item: Distillation) -> dict[str, Any]:
    codes = {name: vars(group.master.codes()) for name, group in item.student.groups.items()}
    return {"tensors": item.tensors(), "codes": codes}


def trained(device: torch.device, kind: str, folder: Path | None = None, stop: int = 0) -> dict[str, Any]:
    """The state after a whole training, or where it was stopped."""
    item, calls = distillation(device, kind), iter(range(100))
    folder = folder or folder_of("trained", kind, device)
    made = training.train(item, folder, "same", lambda *_: None, lambda: stop > 0 and next(calls) >= stop)
    return state(item) | {"curve": [(mark.steps, mark.check_nats) for mark in made.marks]}


def train(kinds: tuple[str, ...] = ("llama",)) -> dict[str, Any]:
    return {kind: both(lambda device, kind=kind: trained(device, kind)) for kind in kinds}


def train_all() -> dict[str, Any]:
    found = train(("llama-bf16", "gpt2", "bert", "moe"))

    def under(device: torch.device, name: str) -> dict[str, Any]:
        item = distillation(device, "llama", name)
        return {"losses": [item.step() for _ in range(2)], **state(item)}

    small = [name for name in COMPRESSED if "128" not in name]  # the tiny model has 64 inputs
    return found | {name: both(lambda device, name=name: under(device, name)) for name in small}


def resume() -> dict[str, Any]:
    """Stopped after three steps on one device, a training goes on on the other."""
    whole = trained(CPU, "llama")
    found = {}
    for first, second in ((SECOND, CPU), (CPU, SECOND)):
        folder = folder_of("resumed", first, second)
        trained(first, "llama", folder, stop=3)
        found[f"{first}, {second}"] = unlike(whole["tensors"], trained(second, "llama", folder)["tensors"])
    return found


def waits() -> dict[str, Any]:
    """Of a step block by block, of one end to end, and of a forward pass, of which each step has two."""
    item = distillation(SECOND, "llama", steps=100, block_share=0.5)
    early = second_device.waits(item.step)
    item.done = 60
    ids = item.sequences.check.to(SECOND)
    alone = second_device.waits(lambda: item.student.outputs(ids))
    return {"by block": early, "end to end": second_device.waits(item.step), "forward": alone}


# ---- compression


def built(device: torch.device, kind: str, method: str, names: list[str]) -> dict[str, str]:
    item = opened(kind, num_hidden_layers=1)
    space, folder = tiny.space_of(item.spec, names), folder_of(kind, method, device)
    return bytes_of(database.build(dense(item, False, device), item.spec, space, documents(device), folder, method))


def compress() -> dict[str, Any]:
    return {"auto": both(lambda device: built(device, "llama", methods.AUTO, FEW))}


def compress_all() -> dict[str, Any]:
    names = [*methods.METHODS, methods.AUTO]
    found = {name: both(lambda device, name=name: built(device, "llama", name, COMPRESSED)) for name in names}
    return found | {"experts": both(lambda device: built(device, "moe", methods.AUTO, COMPRESSED))}


def renewed(device: torch.device) -> dict[str, Any]:
    """A configuration compressed again for its own inputs."""
    item, folder = opened("llama"), folder_of("sequential", device)
    space = tiny.space_of(item.spec, ["w4a8-int4-g64", "2:4"])
    made = database.build(dense(item, False, CPU), item.spec, space, documents(CPU), folder, "wanda")
    model = ReferenceModel(dense(item, False, device), item.spec, made)
    work = Recompression(model, made, documents(device), Settings())
    assert work.possible()
    chosen = {group.name: "w4a8-int4-g64" if group.layer == 0 else "2:4" for group in item.spec.groups}
    files = work.run({"it": chosen})["it"]
    model.select(own_entries(made, files, chosen))
    codes = {group: (folder / file).read_bytes().hex() for group, file in files.items()}
    return {"files": codes, "outputs": model.outputs(documents(device)[0])}


def smoothed(device: torch.device) -> dict[str, Any]:
    """Where scales may go, and those that are chosen."""
    item = opened("llama")
    model, schemes = dense(item, False, device), [scheme("w8a8-int8"), scheme("w4a16-int4-g64"), scheme("w4a16-mxfp4")]
    places = sites(model, item.spec.groups, documents(device)[0], False)
    groups = dict.fromkeys((group.name for group in item.spec.groups), schemes)
    chosen = smoothing.choose(model, item.spec.groups, places, groups, documents(device), "awq")
    return {"sites": places, "choices": chosen, "some": bool(places) or "no site was found"}


def again() -> dict[str, Any]:
    return {"sequential": both(renewed), "smoothing": both(smoothed)}


# ---- losses


def lost(device: torch.device, kind: str, mixed: bool, streamed: bool, few: bool) -> dict[str, Any]:
    """Loss table, measured losses of both looks, and a certificate."""
    item = opened(kind)
    names = ["w8a8-int8", "2:4+w4a8-int4-g64"] if few else FEW
    space, texts = tiny.space_of(item.spec, names), documents(device, 3)
    folder = folder_of("losses", kind)
    made = database.build(dense(item, mixed, CPU), item.spec, space, documents(CPU, 3), folder, "wanda")
    model: ReferenceModel
    if streamed:
        stream = Streamed(item, torch.bfloat16 if mixed else torch.float32, mixed, device)
        own = database.build(stream, item.spec, space, texts, folder_of("streamed", kind, device), "wanda")
        model = StreamedReference(stream, item.spec, made)
        table = streamed_score.score(model, space, texts, 2, 3)
    else:
        model = ReferenceModel(dense(item, mixed, device), item.spec, made)
        table, own = whole_score.score(model, space, texts, 2, 3), made
    teacher = Teacher(model, texts, (0.5, 1.0))
    plan = {group.name: "w8a8-int8" for group in item.spec.groups}
    looks = [teacher.measure(plan, look) for look in (0, 1)]
    certificate = certify(model, [plan], texts, 1.0, "made up")
    floor = teacher.floor() if mixed else 0.0
    return {"table": table, "looks": looks, "certificate": certificate, "floor": floor, "entries": bytes_of(own)}


def losses(kinds: tuple[tuple[str, bool], ...] = (("llama-bf16", True),), few: bool = True) -> dict[str, Any]:
    """The model held whole on the CPU against both ways on the second device."""
    found = {}
    for kind, mixed in kinds:
        expected = lost(CPU, kind, mixed, False, few)
        for streamed in (False, True):
            found[f"{kind}, streamed: {streamed}"] = unlike(expected, lost(SECOND, kind, mixed, streamed, few))
    return found


def losses_all() -> dict[str, Any]:
    return losses((("llama", False), ("gpt2", False), ("bert", False), ("moe", False)), False)


# ---- the whole loop


def whole() -> dict[str, Any]:
    """Tuned, saved, loaded; and recovered: a scheme everywhere, or what a search with training's prices finds."""
    from second_loop import loop  # with pytest and the report's libraries

    everywhere = {"tokens": 24 * 128, "point": f"uniform {NAME}"}
    searched = {"tokens": 160 * 128, "point": "searched"}
    asked: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "llama": ("llama", everywhere, {}),
        "experts": ("moe", everywhere, {}),
        "streamed": ("llama", {}, {"streaming": True, "recompress": False}),
        "searched": ("llama", searched, {"schemes": ("w8a8-int8", NAME), "max_loss": 0.35}),
    }
    found = {}
    for name, (kind, recovered, changes) in asked.items():
        work = partial(loop, name=name, kind=kind, recovered=recovered, **changes)
        found[name] = both(lambda device, work=work: work(device, folder_of("loop", device)))
    return found


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    call.__name__: call
    for call in (rules, train, train_all, resume, waits, compress, compress_all, again, losses, losses_all, whole)
}


@contextmanager
def same_arithmetic() -> Iterator[None]:
    """Meanwhile the CPU computes as the second device does."""
    rounding.native.available = sweep.native.available = products.differs = lambda: False
    with sdpa_kernel(SDPBackend.MATH):
        yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    with same_arithmetic():
        print(json.dumps({name: SCENARIOS[name]() for name in sys.argv[1:]}))
