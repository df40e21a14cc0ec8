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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from autotune.kernels.products import linear, matmul
from autotune.kernels.reference import quantize_activations
from autotune.place import at_a_time
from autotune.reference_model import ReferenceModel
from autotune.search_space.groups import LayerGroup
from autotune.search_space.schemes import NumberFormat, scheme
from autotune.search_space.space import SearchSpace
from autotune.teacher import Teacher

BATCH_BYTES = 2**28  # inputs and gradients of a batch of documents; more where the model itself needs more
_PRODUCTS = 2**22  # numbers of G^T X at a time, over documents, draws and some rows: they are summed while in cache


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

    Documents are taken in batches whose inputs and gradients need about 2.5 times the memory of the model's weights, so
    that each (group, scheme) is dequantized once a batch; batches change nothing in the result but its rounding.

    Args:
        documents: token ids, each (positions,); 96 of 256 tokens give about 10% relative error.
        draws: label draws a document.
    """
    sums, objective = Sums(model, space), Objective(model, draws, seed)
    room = max(BATCH_BYTES, 5 * model.weight_bytes // 2)
    model.select({})
    batch: list[Tap] = []
    with Taps(model, model.spec.groups, embeddings=True) as taps:
        for number, document in enumerate(documents):
            with torch.enable_grad():
                output = model.model(document.unsqueeze(0))
                sums.weights.append(objective.weight(output))
                tap, _ = taps.backward(objective.ends(output), [None] * draws)
            batch.append(tap)
            if sum(item.bytes for item in batch) < room and number + 1 < len(documents):
                continue
            sums.add(model.spec.groups, batch)
            batch.clear()
            if progress:
                progress(number + 1, len(documents))
    return sums.table()


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


@dataclass(frozen=True)
class Tap:
    """What one document leaves behind, in the dtype of the model's weights."""

    inputs: dict[str, torch.Tensor]  # part of a group -> (tokens, in_features); absent: an expert that got no token
    gradients: dict[str, list[torch.Tensor]]  # the same -> one (tokens, out_features) a draw

    @property
    def bytes(self) -> int:
        gradients = sum(tensor.nbytes for tensors in self.gradients.values() for tensor in tensors)
        return gradients + sum(tensor.nbytes for tensor in self.inputs.values())


class Taps:
    """While active, keeps the input of each group (of each expert, where it has such) and its members' outputs of the
    last forward pass."""

    def __init__(self, model: ReferenceModel, groups: Sequence[LayerGroup], embeddings: bool) -> None:
        """`embeddings`: the graph starts there, as parameters are frozen; else at whatever the pass is given."""
        self.model = model
        self.groups, self.embeddings = groups, embeddings
        self.inputs: dict[str, torch.Tensor] = {}  # part of a group -> (tokens, in_features)
        self.outputs: dict[str, list[torch.Tensor]] = {}  # the same -> members' outputs, kept for autograd
        self._handles: list[Any] = []

    def __enter__(self) -> Taps:
        if self.embeddings:
            embedding = self.model.model.get_input_embeddings()  # type: ignore[operator]
            self._handles.append(embedding.register_forward_hook(lambda _, __, out: out.detach().requires_grad_()))
        for group in self.groups:
            size = len(group.parts[0].members)
            for index, layer in enumerate(self.model.layers[group.name]):
                record = self._record(group.parts[index // size].name, index % size)
                self._handles.append(layer.register_forward_hook(record))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def backward(
        self, ends: Iterable[torch.Tensor], above: Sequence[torch.Tensor | None], entry: torch.Tensor | None = None
    ) -> tuple[Tap, list[torch.Tensor]]:
        """What the last pass leaves behind, and the gradients at its `entry`, one a draw.

        Args:
            ends: of each draw, what is differentiated; above: the gradient there, None where it is a number.
        """
        gradients: dict[str, list[torch.Tensor]] = {name: [] for name in self.outputs}
        flat = [tensor for name in gradients for tensor in self.outputs[name]]
        sources = flat if entry is None else [*flat, entry]
        below = []
        for draw, (end, given) in enumerate(zip(ends, above, strict=True)):
            rest = iter(torch.autograd.grad(end, sources, given, retain_graph=draw + 1 < len(above)))
            for name, made in gradients.items():
                parts = [next(rest).flatten(0, -2).to(self.model.dtype) for _ in self.outputs[name]]
                made.append(torch.cat(parts, -1) if len(parts) > 1 else parts[0])
            below += list(rest)
        tap = Tap(dict(self.inputs), gradients)
        self.inputs.clear()
        self.outputs.clear()
        return tap, below

    def _record(self, name: str, index: int) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if index == 0:
                self.inputs[name] = args[0].detach().flatten(0, -2).to(self.model.dtype)
                self.outputs[name] = []
            self.outputs[name].append(output)

        return hook


class Objective:
    """What is differentiated: log-likelihoods of drawn labels, or products with drawn probes."""

    def __init__(self, model: ReferenceModel, draws: int, seed: int) -> None:
        self.encoder, self.draws = model.spec.task == "encoder", draws
        self._generator = torch.Generator(model.device).manual_seed(seed)

    def weight(self, output: Any) -> float:
        """What the document's loss is divided by: scored tokens, or the output's squared norm."""
        if self.encoder:
            return float(output.last_hidden_state.detach().square().sum())
        return float(output.logits.shape[1] - 1)

    def ends(self, output: Any) -> Iterator[torch.Tensor]:
        """One a draw, each made when it is asked for."""
        for _ in range(self.draws):
            if self.encoder:
                hidden = output.last_hidden_state
                probe = torch.randn(hidden.shape, generator=self._generator, device=hidden.device)
                yield (hidden * probe.to(hidden.dtype)).sum()
                continue
            logits = output.logits[0, :-1].float()  # (scored tokens, vocabulary)
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(-1), 1, generator=self._generator)
            yield logits.log_softmax(-1).gather(1, labels).sum()


class Sums:
    """Of every usable compressed entry of a space the squared sums, document by document.

    `weights`: of every document what its loss is divided by.
    """

    def __init__(self, model: ReferenceModel, space: SearchSpace) -> None:
        self.model = model
        self.weights: list[float] = []
        self._schemes = {
            group.name: [entry.scheme for entry in space.schemes(group.name) if entry.scheme != space.dense]
            for group in model.spec.groups
        }
        self._squares: dict[tuple[str, str], list[float]] = {
            (group, name): [] for group, names in self._schemes.items() for name in names
        }

    def add(self, groups: Sequence[LayerGroup], batch: Sequence[Tap]) -> None:
        for group in groups:
            for name, values in group_sums(self.model, group, self._schemes[group.name], batch).items():
                self._squares[group.name, name] += values

    def table(self) -> LossTable:
        half = 1.0 if self.model.spec.task == "encoder" else 0.5
        weights = np.asarray(self.weights)
        return LossTable(
            tuple(_row(key, np.asarray(value) * half, weights, "fisher") for key, value in self._squares.items())
        )


def group_sums(
    model: ReferenceModel, group: LayerGroup, names: Sequence[str], batch: Sequence[Tap]
) -> dict[str, list[float]]:
    """Scheme -> for every document the mean over draws of (sum over positions of <g, dY>)^2.

    With P = G^T X and D = G^T (X' - X) that sum is <P, W' - W> + <D, W'>: small terms only, no difference of large
    ones.
    """
    if not names:
        return {}
    items = [scheme(name) for name in names]
    stored = {(item.sparsity, item.weight): item.name for item in items}  # schemes with equal weights share a product
    column = {key: number for number, key in enumerate(stored)}
    draws = len(next(iter(batch[0].gradients.values())))
    sums = {name: torch.zeros(len(batch), draws, dtype=torch.float64, device=model.device) for name in names}
    for expert, part in enumerate(group.parts):
        seen = [number for number, tap in enumerate(batch) if part.name in tap.inputs]  # documents
        inputs = [batch[number].inputs[part.name] for number in seen]  # each (tokens, in)
        moved = {form: [_moved(x, form) for x in inputs] for item in items if (form := item.activation) is not None}
        above = group.rows(expert).start
        step = max(1, at_a_time(model.device, _PRODUCTS, 2**27) // (max(1, len(seen)) * draws * group.in_features))
        for start in range(0, part.out_features if seen else 0, step):
            own = slice(start, min(start + step, part.out_features))
            rows = slice(above + own.start, above + own.stop)
            changes = torch.stack([model.change(group, name, rows).view(-1) for name in stored.values()])
            gradients = [[gradient[:, own] for gradient in batch[number].gradients[part.name]] for number in seen]
            plain = linear(_products(gradients, inputs), changes)  # (documents * draws, stored)
            both = torch.cat([changes, model.dense_weight(group, rows).view(1, -1)]) if moved else changes
            extra = {form: linear(_products(gradients, x), both) for form, x in moved.items()}
            for item in items:
                at = column[item.sparsity, item.weight]
                found = plain[:, at]
                if item.activation is not None:
                    found = found + extra[item.activation][:, -1] + extra[item.activation][:, at]
                sums[item.name][seen] += found.view(-1, draws)
    return {name: value.square().mean(1).tolist() for name, value in sums.items()}


def _moved(x: torch.Tensor, form: NumberFormat) -> torch.Tensor:
    """X' - X, taken before it is rounded to the dtype of x: there X' itself could not be told from X."""
    wide = x.float()
    return (quantize_activations(wide, form) - wide).to(x.dtype)


def _products(gradients: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """G^T X of every document and draw, flattened: (documents * draws, rows * in_features) fp32.

    Args:
        gradients: of every document, of every draw, each (tokens, rows); inputs: of every document (tokens, in).
    """
    pairs = [(gradient, x) for draws, x in zip(gradients, inputs, strict=True) for gradient in draws]
    gradient, x = pairs[0]
    products = torch.empty(len(pairs), gradient.shape[1] * x.shape[1], device=x.device)
    for product, (gradient, x) in zip(products, pairs, strict=True):
        product.copy_(matmul(gradient.t(), x).view(-1))
    return products


def _row(key: tuple[str, str], sums: np.ndarray, weights: np.ndarray, method: str) -> LossRow:
    """Ratio estimate sum(sums)/sum(weights) with a 95% interval over documents."""
    ratio = sums.sum() / weights.sum()
    residual = sums - ratio * weights
    count = len(sums)
    spread = np.sqrt((residual**2).sum() * count / max(1, count - 1)) / weights.sum()
    low, high = max(0.0, ratio - 1.96 * spread), ratio + 1.96 * spread
    return LossRow(*key, float(ratio), float(low), float(high), method)
