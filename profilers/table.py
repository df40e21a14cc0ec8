"""The latency table: microseconds of every (kernel, member shapes, rows, residency) on one target, with spread.

One table belongs to one model, target and machine state (`fingerprint`). A row is one kernel called on one fused group
of linear layers; layers of equal shape share it. `status` says where the number comes from: `measured` here,
`estimated` from the roofline, or `failed`, with the reason and no number. Nothing in it is a sum over a whole model.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

from autotune.errors import InputError
from autotune.search_space.groups import LayerGroup
from autotune.search_space.workload import Phase, Workload
from autotune.store import digest, write_text

Status = Literal["measured", "estimated", "failed"]
Shape = tuple[tuple[int, ...], int, bool]  # members' out_features, in_features, bias
STREAM = "stream"  # how a residency beyond the last cache is written


@dataclass(frozen=True)
class LatencyRow:
    """`resident_bytes`: the weights the call rotated over, None when they stream from memory. Times: median and 95%."""

    kernel: str
    scheme: str
    members: tuple[int, ...]  # out_features of each layer of the group
    in_features: int
    bias: bool
    dtype: str
    rows: int
    resident_bytes: int | None
    median_us: float | None  # None only when failed
    low_us: float | None
    high_us: float | None
    rounds_timed: int
    status: Status
    noisy: bool
    reason: str
    packed_bytes: int

    @property
    def shape(self) -> Shape:
        return self.members, self.in_features, self.bias

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LatencyRow:
        return cls(**{**value, "members": tuple(value["members"])})


@dataclass(frozen=True)
class Choice:
    """The fastest kernel of a scheme for one group over a whole workload: one packed copy serves all phases.

    `latency_us` is per request, phase counts applied. Its interval adds up those of the phases: wide, not narrow.
    """

    kernel: str
    scheme: str
    latency_us: float
    low_us: float
    high_us: float
    packed_bytes: int
    status: Status
    noisy: bool
    phases_us: tuple[float, ...]  # one pass through the group in each phase of the workload: a call, or one an expert


@dataclass(frozen=True)
class LatencyTable:
    target: str
    fingerprint: str  # hash of the environment measured in, or of the target profile when estimated
    rows: tuple[LatencyRow, ...]

    def of(self, group: LayerGroup, scheme: str, phase: Phase) -> tuple[LatencyRow, ...]:
        """Every kernel's row for this group and scheme in this phase, failed ones included."""
        return self._index.get((shape_of(group), scheme, phase.rows(group)), ())

    def best(self, group: LayerGroup, scheme: str, workload: Workload) -> Choice | None:
        """The fastest kernel for the whole workload; None when no kernel has a time for every phase."""
        by_phase = [{row.kernel: row for row in self.of(group, scheme, phase)} for phase in workload.phases]
        choices = []
        for kernel in by_phase[0]:
            rows = [phase[kernel] for phase in by_phase if kernel in phase]
            if len(rows) == len(by_phase) and all(row.status != "failed" for row in rows):
                choices.append(_choice(rows, group, workload))
        return min(choices, key=lambda choice: (choice.latency_us, choice.kernel), default=None)

    def failures(self, group: LayerGroup, scheme: str, workload: Workload) -> tuple[str, ...]:
        """Why kernels of this scheme have no time: "kernel: reason", once each."""
        rows = [row for phase in workload.phases for row in self.of(group, scheme, phase) if row.status == "failed"]
        return tuple(dict.fromkeys(f"{row.kernel}: {row.reason}" for row in rows))

    @property
    def hash(self) -> str:
        return digest([self.target, self.fingerprint, [row.to_json() for row in self.rows]])

    def to_csv(self, path: Path) -> None:
        """One line a row, with the target and fingerprint repeated; reads back to an equal table."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["target", "fingerprint", *(item.name for item in fields(LatencyRow))])
        for row in self.rows:
            writer.writerow([self.target, self.fingerprint, *map(_cell, row.to_json().items())])
        write_text(path, text.getvalue())

    @classmethod
    def from_csv(cls, path: Path) -> LatencyTable:
        """Raises InputError `latency.missing` or `latency.syntax`."""
        try:
            lines = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
            rows = tuple(_row(line) for line in lines)
            return cls(lines[0]["target"], lines[0]["fingerprint"], rows)
        except FileNotFoundError as error:
            raise InputError("latency.missing", f"{path} does not exist.", "Run `autotune profile` first.") from error
        except (KeyError, ValueError, TypeError, IndexError, csv.Error) as error:
            hint = "Write it again with `autotune profile`."
            raise InputError("latency.syntax", f"{path} is not a latency table: {error!r}.", hint) from error

    @cached_property
    def _index(self) -> dict[tuple[Shape, str, int], tuple[LatencyRow, ...]]:
        index: dict[tuple[Shape, str, int], tuple[LatencyRow, ...]] = {}
        for row in self.rows:
            key = (row.shape, row.scheme, row.rows)
            index[key] = (*index.get(key, ()), row)
        return index


def shape_of(group: LayerGroup) -> Shape:
    """What the latency of one call of a group depends on, besides rows and dtype."""
    return tuple(member.out_features for member in group.parts[0].members), group.in_features, group.bias


def _choice(rows: list[LatencyRow], group: LayerGroup, workload: Workload) -> Choice:
    calls = [phase.calls(group) for phase in workload.phases]
    counts = [phase.count * each for phase, each in zip(workload.phases, calls, strict=True)]

    def total(values: Iterable[float | None]) -> float:
        return sum(count * (value or 0.0) for count, value in zip(counts, values, strict=True))

    return Choice(
        kernel=rows[0].kernel,
        scheme=rows[0].scheme,
        latency_us=total(row.median_us for row in rows),
        low_us=total(row.low_us for row in rows),
        high_us=total(row.high_us for row in rows),
        packed_bytes=max(row.packed_bytes for row in rows) * group.experts,
        status="estimated" if any(row.status == "estimated" for row in rows) else "measured",
        noisy=any(row.noisy for row in rows),
        phases_us=tuple(each * (row.median_us or 0.0) for each, row in zip(calls, rows, strict=True)),
    )


def _cell(item: tuple[str, Any]) -> str:
    name, value = item
    if name == "members":
        return "+".join(map(str, value))
    if value is None:
        return STREAM if name == "resident_bytes" else ""
    return repr(value) if isinstance(value, float) else str(value)


def _row(line: dict[str, str]) -> LatencyRow:
    def time_us(name: str) -> float | None:
        return float(line[name]) if line[name] else None

    if line["status"] not in get_args(Status):
        raise ValueError(f"status {line['status']!r}")
    return LatencyRow(
        kernel=line["kernel"],
        scheme=line["scheme"],
        members=tuple(int(part) for part in line["members"].split("+")),
        in_features=int(line["in_features"]),
        bias=_flag(line["bias"]),
        dtype=line["dtype"],
        rows=int(line["rows"]),
        resident_bytes=None if line["resident_bytes"] == STREAM else int(line["resident_bytes"]),
        median_us=time_us("median_us"),
        low_us=time_us("low_us"),
        high_us=time_us("high_us"),
        rounds_timed=int(line["rounds_timed"]),
        status=cast(Status, line["status"]),
        noisy=_flag(line["noisy"]),
        reason=line["reason"],
        packed_bytes=int(line["packed_bytes"]),
    )


def _flag(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(f"{text!r} is neither True nor False")
    return text == "True"
