"""Target profiles: what a device is, what it can do, and its ceilings; one YAML file each.

Ceilings are datasheet figures (`ceilings_source: datasheet`) until `profilers.probe` replaces them by measured ones.
Bandwidths are GB/s = 1e9 bytes a second, rates TFLOP/s or TOP/s with a multiply-add counted as two.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from autotune.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Ceilings:
    """`read_gb_per_s`: (working set in bytes, best read bandwidth), rising in bytes; `tera_ops`: format -> rate."""

    read_gb_per_s: tuple[tuple[int, float], ...]
    tera_ops: dict[str, float]  # keys: "fp32", "bf16", "int8", "fp8"
    launch_us: float  # fixed cost of one kernel call; 0: not known
    source: Literal["datasheet", "measured"] = "datasheet"
    busy: bool = False  # measured while others used the machine: too low to judge a kernel by

    def bandwidth(self, working_set_bytes: float) -> float:
        """GB/s at a working set: the smallest measured one that is not smaller, else the largest."""
        for size, rate in self.read_gb_per_s:
            if working_set_bytes <= size:
                return rate
        return self.read_gb_per_s[-1][1]


@dataclass(frozen=True)
class Target:
    name: str
    device: Literal["cpu", "cuda", "mps"]  # no kernel here runs on mps: such profiles are for `advise`
    model: str  # the vendor's name for it
    features: tuple[str, ...]  # "avx512_vnni", "amx_int8", "neon", "sparse24", "fp8", ...
    cores: int  # physical cores, or SMs
    memory_bytes: int
    last_cache_bytes: int
    ceilings: Ceilings
    compute_capability: float | None = None
    notes: str = ""
    caches: dict[str, int] = field(default_factory=dict)  # "L1d", "L2", "L3" -> bytes a level holds in all

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str = "target") -> Target:
        """Raises InputError `target.schema` for unknown, missing or mistyped keys."""
        known = {item.name for item in fields(cls)}
        for key in value:
            if key not in known:
                raise InputError("target.schema", f"{where}: unknown key {key!r}.", did_you_mean(key, known))
        try:
            ceilings = dict(value["ceilings"])
            curve = tuple((int(size), float(rate)) for size, rate in ceilings.pop("read_gb_per_s"))
            rest = {key: item for key, item in value.items() if key not in ("ceilings", "features")}
            return cls(**rest, features=tuple(value["features"]), ceilings=Ceilings(curve, **ceilings))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("target.schema", f"{where}: {error!r}.", "Compare it with a file of targets/.") from error


def names() -> tuple[str, ...]:
    """The shipped profiles."""
    folder = resources.files("autotune.targets")
    return tuple(sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml")))


def load(name: str) -> Target:
    """A shipped profile by name, or a YAML file by path.

    Raises:
        InputError: `target.unknown` with the closest names, `target.schema` for a malformed file.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError("target.unknown", f"{name} does not exist.", "Check the path.")
        text = path.read_text(encoding="utf-8")
    elif name in names():
        text = (resources.files("autotune.targets") / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise InputError("target.unknown", f"there is no target {name!r}.", did_you_mean(name, (*names(), "auto")))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError("target.schema", f"{name}: {error}.") from error
    if not isinstance(value, dict):
        raise InputError("target.schema", f"{name}: expected a mapping.")
    return Target.from_json(value, name)
