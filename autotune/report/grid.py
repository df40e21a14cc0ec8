"""Where every layer group sits in the layer x projection grid: one row a block, one column a role.

Groups outside of blocks (lm_head) get a row of their own under the blocks, as wide as the grid. Two groups of one role
in one block (the experts of a layer) get neighbouring columns, numbered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    row: int
    column: int
    span: int  # columns covered
    label: str  # short and unique, e.g. "3.gate_up" or "lm_head"
    group: dict[str, Any]


@dataclass(frozen=True)
class Grid:
    rows: tuple[str, ...]  # "0", "1", ..., "lm_head"
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]  # in the order of the groups
    blocks: int  # rows that are blocks; the rest hold one group each


def grid(groups: Sequence[dict[str, Any]]) -> Grid:
    layers = sorted({group["layer"] for group in groups if group["layer"] is not None})
    rows = [str(layer) for layer in layers]
    names = _numbered(groups)
    columns = _in_role_order(groups, names)
    cells = []
    for group, name in zip(groups, names, strict=True):
        if group["layer"] is None:
            rows.append(name)
            cells.append(Cell(len(rows) - 1, 0, len(columns), name, group))
        else:
            row = layers.index(group["layer"])
            cells.append(Cell(row, columns.index(name), 1, f"{group['layer']}.{name}", group))
    return Grid(tuple(rows), tuple(columns), tuple(cells), len(layers))


def _numbered(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Role names, the second of a kind in its block "down 2"."""
    seen: dict[tuple[Any, str], int] = {}
    names = []
    for group in groups:
        key = (group["layer"], group["role"])
        seen[key] = seen.get(key, 0) + 1
        names.append(group["role"] if seen[key] == 1 else f"{group['role']} {seen[key]}")
    return names


def _in_role_order(groups: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Columns: roles in the order the model has them, numbered ones together. One column where there are no blocks."""
    roles = list(dict.fromkeys(group["role"] for group in groups))
    inside = {
        name: (roles.index(group["role"]), len(name), name)
        for group, name in zip(groups, names, strict=True)
        if group["layer"] is not None
    }
    return sorted(inside, key=lambda name: inside[name]) or ["group"]
