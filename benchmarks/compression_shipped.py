"""What ships of the joint sweep, for `compression.py`: one format everywhere, compressed again as a finalist is.

The database's weights are made for the dense model's inputs. A finalist is then compressed once more, block by block,
for the inputs its own compressed layers give (`autotune.compress.sequential`), on as many calibration tokens as the
product takes for that, and keeps these weights if they lose less on the search documents.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from autotune import documents as texts
from autotune.compress import database
from autotune.compress.database import WeightDatabase
from autotune.compress.sequential import Recompression, Settings, own_entries
from autotune.documents import Documents
from autotune.kernels.reference import dequantize
from autotune.kernels.spec import KERNELS
from autotune.model import OpenModel, load_model
from autotune.recompress import TOKENS
from autotune.reference_model import ReferenceModel
from autotune.search_space import space
from autotune.search_space.groups import LayerGroup
from autotune.search_space.schemes import MORE, SCHEMES, Scheme
from autotune.targets.detect import detect_cpu
from autotune.teacher import Teacher

METHOD = "joint"
SEARCHED, SEARCH_LENGTH = 8_192, 256  # tokens of the search documents, as `tune` takes by default


@dataclass(frozen=True)
class Shipped:
    """`weights`: part of a group -> (out, in) fp32. `taken`: whether they are those made again. `seconds`: of both."""

    weights: dict[str, torch.Tensor]
    taken: bool
    seconds: float


def scheme_of(item: Scheme) -> Scheme | None:
    """The product's scheme with these weights that leaves activations alone, if there is one."""
    same = (s for s in (*SCHEMES, *MORE) if (s.sparsity, s.weight, s.activation) == (item.sparsity, item.weight, None))
    return next(same, None)


def shipped(
    opened: OpenModel,
    item: Scheme,
    groups: Sequence[LayerGroup],
    calibration: Sequence[torch.Tensor],
    source: Documents,
) -> Shipped | None:
    """Of the scheme in all these groups; None where blocks of the architecture cannot be run one by one.

    Args:
        item: one that `scheme_of` gave.
    """
    dense = load_model(opened, torch.float32)
    legal = space.build(opened.spec, detect_cpu(), KERNELS, True, (opened.spec.dtype, item.name))
    usable = {entry.group for entry in legal.usable() if entry.scheme == item.name}
    chosen = {g.name: item.name if g in groups and g.name in usable else legal.dense for g in opened.spec.groups}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        made = database.build(dense, opened.spec, legal, calibration, Path(folder), METHOD)
        model = ReferenceModel(dense, opened.spec, made)
        few = texts.take(calibration, TOKENS, texts.MAX_DOCUMENT_TOKENS)
        renewed = Recompression(model, made, few, Settings(METHOD))
        if not renewed.possible():
            return None
        own = own_entries(made, renewed.run({item.name: chosen})[item.name], chosen)
        seconds = time.perf_counter() - start
        teacher = Teacher(model, texts.take(source.search, SEARCHED, SEARCH_LENGTH), (1.0,))
        before, after = (teacher.measure(names).kl_nats for names in (chosen, own))
        taken = after < before
        return Shipped(_weights(model, made, groups, own if taken else chosen), taken, seconds)


def _weights(
    model: ReferenceModel, made: WeightDatabase, groups: Sequence[LayerGroup], names: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for group in groups:
        entry = names[group.name]
        dense = (group.name, entry) not in made.entries
        weight = model.dense_weight(group) if dense else dequantize(made.load(group, entry))
        parts = weight.split([part.out_features for part in group.parts])
        found |= {part.name: one for part, one in zip(group.parts, parts, strict=True)}
    return found
