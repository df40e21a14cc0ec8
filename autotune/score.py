"""The loss table: for every (layer group, scheme) the estimated loss, in nats a token, if only that group changes.

Fisher Gram diagonal by sequence sums. Per document, labels are sampled from the dense model's own softmax and
sum_t log p(label_t) is differentiated; with g the gradient at a group's output and dY what the scheme changes there,

    KL  ~  1/2 E[(sum over positions of <g, dY>)^2]

because score terms are martingale differences, so cross-token terms vanish in expectation: this keeps the correlation
of errors across tokens that elementwise (g dY)^2 scores lose. dY includes activation quantization. Since
sum_t <g_t, W' x'_t> = <G^T X', W'>, one (out, in) product a document serves every weight-only scheme.

Encoders: Gaussian probes u in place of labels give E[(sum <g, dY>)^2] = squared error of the output embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from autotune.kernels.reference import quantize_activations
from autotune.reference_model import ReferenceModel
from autotune.search_space.groups import LayerGroup
from autotune.search_space.schemes import scheme
from autotune.search_space.space import SearchSpace
from autotune.teacher import Teacher


@dataclass(frozen=True)
class LossRow:
    """`loss_nats` with its 95% interval over documents. For encoders the unit is relative squared error."""

    group: str
    scheme: str
    loss_nats: float
    low_nats: float
    high_nats: float
    method: str  # "fisher" or "one-at-a-time"


@dataclass(frozen=True)
class LossTable:
    rows: tuple[LossRow, ...]

    def of(self, group: str, name: str) -> float:
        return self._index()[group, name].loss_nats

    def _index(self) -> dict[tuple[str, str], LossRow]:
        return {(row.group, row.scheme): row for row in self.rows}

    def to_csv(self) -> str:
        return str(pd.DataFrame([vars(row) for row in self.rows]).to_csv(index=False))

    @classmethod
    def from_csv(cls, text: str) -> LossTable:
        import io

        frame = pd.read_csv(io.StringIO(text), float_precision="round_trip")
        return cls(tuple(LossRow(**row) for row in frame.to_dict("records")))


def score(
    model: ReferenceModel,
    space: SearchSpace,
    documents: Sequence[torch.Tensor],
    draws: int = 2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LossTable:
    """Fisher estimate for every usable compressed entry of the space.

    Args:
        documents: token ids, each (positions,); 96 of 256 tokens give about 10% relative error.
        draws: label draws a document.
    """
    schemes = {g.name: [e.scheme for e in space.schemes(g.name) if e.scheme != space.dense] for g in model.spec.groups}
    generator = torch.Generator().manual_seed(seed)
    squares: dict[tuple[str, str], list[float]] = {(g, s): [] for g, names in schemes.items() for s in names}
    weights: list[float] = []
    model.select({})
    with _Taps(model) as taps:
        for number, document in enumerate(documents):
            weights.append(_backward(model, document, taps, draws, generator))
            for group in model.spec.groups:
                for name, value in _sums(model, group, schemes[group.name], taps).items():
                    squares[group.name, name].append(value)
            if progress:
                progress(number + 1, len(documents))
    half = 1.0 if model.spec.task == "encoder" else 0.5
    rows = [_row(key, np.asarray(value) * half, np.asarray(weights), "fisher") for key, value in squares.items()]
    return LossTable(tuple(rows))


def one_at_a_time(
    teacher: Teacher, space: SearchSpace, progress: Callable[[int, int], None] | None = None
) -> LossTable:
    """The slower alternative: measured KL with one group changed, a forward pass for every entry."""
    rows = []
    entries = [entry for entry in space.usable() if entry.scheme != space.dense]
    for number, entry in enumerate(entries):
        result = teacher.measure({entry.group: entry.scheme})
        key = (entry.group, entry.scheme)
        rows.append(_row(key, np.asarray(result.kl), np.asarray(result.tokens), "one-at-a-time"))
        if progress:
            progress(number + 1, len(entries))
    return LossTable(tuple(rows))


class _Taps:
    """While active, keeps each group's input and the gradients at its members' outputs of the last forward pass."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        self.inputs: dict[str, torch.Tensor] = {}  # group -> (tokens, in_features)
        self.outputs: dict[str, list[torch.Tensor]] = {}  # group -> members' outputs, kept for autograd
        self.gradients: dict[str, list[torch.Tensor]] = {}  # group -> one (tokens, out_features) a draw
        self._handles: list[Any] = []

    def __enter__(self) -> _Taps:
        embedding = self.model.model.get_input_embeddings()  # type: ignore[operator]
        # Parameters are frozen; the graph starts at the embeddings.
        self._handles.append(embedding.register_forward_hook(lambda _, __, out: out.detach().requires_grad_()))
        for group in self.model.spec.groups:
            for index, layer in enumerate(self.model.layers[group.name]):
                self._handles.append(layer.register_forward_hook(self._record(group.name, index)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, name: str, index: int) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if index == 0:
                self.inputs[name] = args[0].detach().flatten(0, -2)
                self.outputs[name] = []
            self.outputs[name].append(output)

        return hook


def _backward(
    model: ReferenceModel, document: torch.Tensor, taps: _Taps, draws: int, generator: torch.Generator
) -> float:
    """Fill `taps` for one document; returns what its loss is divided by: scored tokens, or the output's norm."""
    with torch.enable_grad():
        output = model.model(document.unsqueeze(0))
        names = [group.name for group in model.spec.groups]
        flat = [tensor for name in names for tensor in taps.outputs[name]]
        taps.gradients = {name: [] for name in names}
        for draw in range(draws):
            objective, weight = _objective(model, output, generator)
            grads = torch.autograd.grad(objective, flat, retain_graph=draw + 1 < draws)
            rest = iter(grads)
            for name in names:
                parts = [next(rest).flatten(0, -2) for _ in taps.outputs[name]]
                taps.gradients[name].append(torch.cat(parts, -1) if len(parts) > 1 else parts[0])
    taps.outputs.clear()
    return weight


def _objective(model: ReferenceModel, output: Any, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    if model.spec.task == "encoder":
        hidden = output.last_hidden_state
        probe = torch.randn(hidden.shape, generator=generator).to(hidden.dtype)
        return (hidden * probe).sum(), float(hidden.detach().square().sum())
    logits = output.logits[0, :-1].float()  # (scored tokens, vocabulary)
    with torch.no_grad():
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    return logits.log_softmax(-1).gather(1, labels).sum(), float(len(labels))


def _sums(model: ReferenceModel, group: LayerGroup, names: Sequence[str], taps: _Taps) -> dict[str, float]:
    """Scheme -> mean over draws of (sum over positions of <g, dY>)^2."""
    x, gradients = taps.inputs[group.name], taps.gradients[group.name]
    formats = {name: scheme(name).activation for name in names}
    plain = _products(gradients, x)  # (draws, out * in)
    values: dict[str, torch.Tensor] = {}
    for form in dict.fromkeys(formats.values()):
        # <P', W'> - <P, W> in two small terms rather than one difference of large ones.
        products, base = plain, torch.zeros(len(plain))
        if form is not None:
            products = _products(gradients, quantize_activations(x, form))
            base = (products - plain) @ model.dense_weight(group).view(-1)
        for name in (name for name in names if formats[name] == form):
            values[name] = base + products @ model.change(group, name).view(-1)
    return {name: float(value.double().square().mean()) for name, value in values.items()}


def _products(gradients: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """G^T X of every draw, flattened: (draws, out_features * in_features)."""
    out = torch.empty(len(gradients), gradients[0].shape[1], x.shape[1])
    for draw, gradient in enumerate(gradients):
        torch.mm(gradient.t(), x, out=out[draw])
    return out.view(len(gradients), -1)


def _row(key: tuple[str, str], sums: np.ndarray, weights: np.ndarray, method: str) -> LossRow:
    """Ratio estimate sum(sums)/sum(weights) with a 95% interval over documents."""
    ratio = sums.sum() / weights.sum()
    residual = sums - ratio * weights
    count = len(sums)
    spread = np.sqrt((residual**2).sum() * count / max(1, count - 1)) / weights.sum()
    low, high = max(0.0, ratio - 1.96 * spread), ratio + 1.96 * spread
    return LossRow(*key, float(ratio), float(low), float(high), method)
