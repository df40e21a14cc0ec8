"""How the loss table is corrected: multipliers by role, depth and scheme class, and a power.

    corrected[g, k] = loss[g, k] * exp(features[g, k] . theta) * (loss[g, k] / pivot) ** (power - 1)

theta = 0 and power = 1 leave the table as it is. `fit` learns theta, the power and, with a tighter prior, a multiplier
per group and per (group, option) from measured genotypes: log KL is modelled as

    intercept + (1 + slope) * log(sum of the corrected losses)

by Gauss-Newton with Gaussian priors around the table (ridge), solved in the space of the measurements, which are few.
Sums are numpy's own, never BLAS: its last bits depend on the number of threads, and a search must replay exactly.
Losses are in nats; the prior widths are logs of factors. It ranks candidates, it does not certify them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autotune.search.knapsack import Floats
from autotune.search.problem import Genotype, Problem
from autotune.search_space.schemes import CACHE, scheme

MAX_FEATURES = 15  # with power, latency target and outer choices the study stays within 20 parameters
LAYERS_PER_KNOT = 3
MAX_KNOTS = 4
FLOOR_NATS = 1e-9  # a measured KL of zero has no logarithm
NOISE = 0.05  # of log KL, one standard deviation
WIDTH_FEATURE, WIDTH_POWER, WIDTH_GROUP, WIDTH_OPTION = 0.5, 0.2, 0.2, 0.2
WIDTH_INTERCEPT, WIDTH_SLOPE = 0.5, 0.15
STEPS = 5


@dataclass(frozen=True)
class Features:
    """The loss table and what describes its entries. Options a group does not have are infinite."""

    names: tuple[str, ...]
    values: Floats  # (groups, options, features)
    loss: Floats  # (groups, options)
    log_loss: Floats  # log(loss / pivot); 0 where the loss is 0

    def corrected(self, theta: Floats, power: float) -> Floats:
        exponent: Floats = np.einsum("gof,f->go", self.values, theta) + (power - 1.0) * self.log_loss
        return self.loss * np.exp(exponent)


def features(problem: Problem) -> Features:
    """Roles, depth knots and scheme classes, each only if there are several; the rarest roles share a factor of 1."""
    loss = loss_table(problem)
    known = np.isfinite(loss) & (loss > 0)
    pivot = float(np.median(loss[known])) if known.any() else 1.0
    log_loss = np.where(known, np.log(np.where(known, loss, pivot) / pivot), 0.0)
    depth = _depth_columns(problem)
    classes = _class_columns(problem, loss.shape[1])
    roles = _role_columns(problem, max(0, MAX_FEATURES - len(depth) - len(classes)))
    columns = {**roles, **depth, **classes}
    values = np.zeros((*loss.shape, len(columns)))
    for index, column in enumerate(columns.values()):
        values[:, :, index] = column
    return Features(tuple(columns), values, loss, log_loss)


def loss_table(problem: Problem) -> Floats:
    return _table(problem, [[max(option.loss_nats, 0.0) for option in group.options] for group in problem.groups])


def latency_table(problem: Problem) -> Floats:
    return _table(problem, [[option.latency_us for option in group.options] for group in problem.groups])


def byte_table(problem: Problem) -> Floats:
    return _table(problem, [[float(option.weight_bytes) for option in group.options] for group in problem.groups])


@dataclass(frozen=True)
class Fit:
    """What the measurements say about the table. `losses` is the corrected table, in nats of measured KL."""

    table: Features
    weights: Floats  # posterior mean: features, power, groups, options, intercept, slope
    widths: Floats  # prior standard deviations
    jacobian: Floats  # (measurements, weights)
    target: Floats  # linearized observations

    @property
    def losses(self) -> Floats:
        return _losses(self.table, self.weights)

    def draw(self, random: np.random.Generator) -> Floats:
        """One table from the posterior (Matheron's rule: a prior draw, corrected by what was observed)."""
        prior = random.normal(size=len(self.widths)) * self.widths
        noise = random.normal(size=len(self.target)) * NOISE
        surprise = self.target - noise - _product(self.jacobian, prior)
        return _losses(self.table, prior + _gain(self.jacobian, self.widths, surprise))

    def kl_nats(self, genotype: Genotype) -> float:
        """Predicted KL of a whole genotype."""
        total = float(self.losses[np.arange(len(genotype)), genotype].sum())
        if total <= 0:
            return 0.0
        return float(np.exp(self.weights[-2] + (1 + self.weights[-1]) * np.log(total)))


def fit(table: Features, genotypes: list[Genotype], kl_nats: list[float]) -> Fit:
    """Learn from whole genotypes and their measured KL. Those without loss in the table say nothing and are skipped."""
    chosen = np.array(genotypes, np.int64).reshape(len(genotypes), len(table.loss))  # (measurements, groups)
    rows = np.arange(len(table.loss))
    useful = table.loss[rows, chosen].sum(axis=1) > 0
    chosen = chosen[useful]
    observed = np.log(np.maximum(np.array(kl_nats, float)[useful], FLOOR_NATS))
    widths = _widths(table)
    weights = np.zeros(len(widths))
    jacobian, target = np.zeros((0, len(widths))), np.zeros(0)
    for _ in range(STEPS if len(chosen) else 0):
        predicted, jacobian = _predict(table, chosen, weights)
        target = observed - predicted + _product(jacobian, weights)
        weights = _gain(jacobian, widths, target)
    return Fit(table, weights, widths, jacobian, target)


def _predict(table: Features, chosen: NDArray[np.int64], weights: Floats) -> tuple[Floats, Floats]:
    """Log KL of each genotype under the weights, and its derivatives."""
    rows = np.arange(len(table.loss))
    parts = _losses(table, weights)[rows, chosen]  # (measurements, groups)
    total = parts.sum(axis=1)
    share = parts / total[:, None]
    slope = 1 + weights[-1]
    option = np.zeros((len(chosen), *table.loss.shape))
    option[np.arange(len(chosen))[:, None], rows, chosen] = share
    columns = [
        np.einsum("ng,ngf->nf", share, table.values[rows, chosen]) * slope,
        (share * table.log_loss[rows, chosen]).sum(axis=1, keepdims=True) * slope,
        share * slope,
        option.reshape(len(chosen), -1) * slope,
        np.ones((len(chosen), 1)),
        np.log(total)[:, None],
    ]
    return weights[-2] + slope * np.log(total), np.concatenate(columns, axis=1)


def _losses(table: Features, weights: Floats) -> Floats:
    groups, options, count = table.values.shape
    theta, power = weights[:count], 1.0 + float(weights[count])
    group = weights[count + 1 : count + 1 + groups]
    option = weights[count + 1 + groups : -2].reshape(groups, options)
    return table.corrected(theta, power) * np.exp(group[:, None] + option)


def _widths(table: Features) -> Floats:
    groups, options, count = table.values.shape
    blocks = [(count, WIDTH_FEATURE), (1, WIDTH_POWER), (groups, WIDTH_GROUP), (groups * options, WIDTH_OPTION)]
    blocks += [(1, WIDTH_INTERCEPT), (1, WIDTH_SLOPE)]
    return np.concatenate([np.full(size, width) for size, width in blocks])


def _gain(jacobian: Floats, widths: Floats, target: Floats) -> Floats:
    """Ridge in the space of the measurements: S J' (J S J' + noise^2)^-1 target."""
    scaled = jacobian * widths**2
    kernel = np.einsum("if,jf->ij", scaled, jacobian) + NOISE**2 * np.eye(len(jacobian))
    return _product(scaled.T, _solve_positive(kernel, target))


def _solve_positive(matrix: Floats, right: Floats) -> Floats:
    """Solve matrix x = right for a positive definite matrix, by Cholesky."""
    lower = np.zeros_like(matrix)
    for j in range(len(matrix)):
        column = matrix[j:, j] - (lower[j:, :j] * lower[j, :j]).sum(axis=1)
        lower[j:, j] = column / np.sqrt(column[0])
    x = np.array(right, float)
    for j in range(len(matrix)):
        x[j] = (x[j] - (lower[j, :j] * x[:j]).sum()) / lower[j, j]
    for j in reversed(range(len(matrix))):
        x[j] = (x[j] - (lower[j + 1 :, j] * x[j + 1 :]).sum()) / lower[j, j]
    return x


def _product(matrix: Floats, vector: Floats) -> Floats:
    product: Floats = np.einsum("if,f->i", matrix, vector)
    return product


def _role_columns(problem: Problem, room: int) -> dict[str, Floats]:
    roles = [group.role for group in problem.groups]
    names = sorted(set(roles), key=lambda role: (-roles.count(role), role))
    if len(names) < 2:
        return {}
    return {f"role {name}": _column([role == name for role in roles]) for name in names[:room]}


def _depth_columns(problem: Problem) -> dict[str, Floats]:
    """Hat functions over relative depth: a linear spline through the knots."""
    layers = [group.layer for group in problem.groups if group.layer is not None]
    count = max(layers, default=0) + 1
    knots = min(MAX_KNOTS, count // LAYERS_PER_KNOT + 1)
    if knots < 3:
        return {}
    columns = {}
    for knot in range(knots):
        heights = [
            0.0 if group.layer is None else max(0.0, 1 - abs(group.layer / (count - 1) * (knots - 1) - knot))
            for group in problem.groups
        ]
        columns[f"depth {knot}"] = _column(heights)
    return columns


def _class_columns(problem: Problem, width: int) -> dict[str, Floats]:
    labels = [[scheme_class(option.scheme) for option in group.options] for group in problem.groups]
    names = sorted({label for row in labels for label in row if label})
    if len(names) < 2:
        return {}
    columns = {}
    for name in names:
        rows = [[float(label == name) for label in row] + [0.0] * (width - len(row)) for row in labels]
        columns[f"class {name}"] = np.array(rows)
    return columns


def scheme_class(name: str) -> str:
    """Weight bits, quantized activations, sparsity; empty for the dense schemes."""
    if name.startswith(CACHE):  # its role tells it apart
        return ""
    found = scheme(name)
    if found.is_dense:
        return ""
    activations = "" if found.activation is None else f"a{found.activation.bits}"
    sparsity = "" if found.sparsity == "dense" else f"{found.sparsity} "
    return f"{sparsity}w{found.weight.bits}{activations}"


def _column(values: list[float] | list[bool]) -> Floats:
    return np.array(values, float)[:, None]


def _table(problem: Problem, rows: list[list[float]]) -> Floats:
    table = np.full((len(rows), max((len(row) for row in rows), default=1)), np.inf)
    for group, row in enumerate(rows):
        table[group, : len(row)] = row
    return table
