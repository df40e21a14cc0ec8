"""A run's settings, checked once at the edge and written resolved to `config.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autotune.errors import InputError, UsageError, did_you_mean
from autotune.store import write_text


class RunConfig(BaseModel):
    """What `autotune tune` was asked for. Sizes are bytes, losses are fractions (0.01 = 1%)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    out: str
    max_loss: float | None = Field(default=0.01, gt=0, le=10)
    max_memory_bytes: int | None = Field(default=None, gt=0)
    min_speedup: float | None = Field(default=None, gt=0)
    target: str = "auto"
    workload: str = "chat"
    data: str | None = None
    dtype: str | None = Field(default=None, pattern="^(bf16|fp32)$")
    schemes: tuple[str, ...] | None = (
        None  # None: all of `schemes.SCHEMES` that are legal; "default" among names is them
    )
    seed: int = 0
    trials: int = Field(default=40, ge=0)
    minutes: float | None = Field(default=None, gt=0)
    fast: bool = False
    kv_cache: str = Field(default="bf16", pattern="^(bf16|int8|fp8|auto)$")  # bf16: as the model is run; auto: searched
    compression: str = "auto"  # a method of `compress.methods`; not given, `fast` takes one without a Hessian
    recompress: bool = True  # finalists, for the inputs they really get; not given, not where no Hessian is taken
    smoothing: str = "auto"  # of inputs, before compression: off, awq, smoothquant, or either where it helps
    latency_only: bool = False
    streaming: bool | None = None  # compress and measure losses block by block from disk; None: where memory is short

    # How much is measured. The defaults fit models of up to 30M parameters; where a larger one is tuned and a size was
    # not given, `samples.resolve` takes less.
    rounds: int = Field(default=20, ge=20)  # interleaved rounds a latency
    calibration_tokens: int = Field(default=16_384, ge=64)
    score_tokens: int = Field(default=16_384, ge=64)
    score_length: int = Field(default=256, ge=8)
    score_draws: int = Field(default=2, ge=1)
    search_tokens: int = Field(default=8_192, ge=64)
    search_length: int = Field(default=256, ge=8)
    certify_tokens: int = Field(default=200_000, ge=64)
    finalists: int = Field(default=4, ge=1, le=5)
    measured_points: int = Field(default=8, ge=1)  # end to end, besides uniform schemes

    @model_validator(mode="after")
    def _has_a_budget(self) -> RunConfig:
        if self.max_loss is None and not self.latency_only:
            raise ValueError("max_loss is needed, unless latency_only is set")
        return self

    @classmethod
    def of(cls, **values: Any) -> RunConfig:
        """Raises InputError `config.schema` naming the key."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "settings"
            hint = did_you_mean(key, cls.model_fields) if first["type"] == "extra_forbidden" else ""
            raise InputError("config.schema", f"{key}: {first['msg']}.", hint) from error

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        """Raises InputError `config.missing`, `config.syntax`, `config.schema`."""
        if not path.is_file():
            hint = "Give the folder of a run made by `autotune tune`."
            raise InputError("config.missing", f"{path} does not exist.", hint)
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
            raise InputError("config.syntax", f"{path}: {error}.") from error
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise InputError("config.syntax", f"{path}: expected a mapping of names.")
        return cls.of(**value)

    def save(self, path: Path) -> None:
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def parse_loss(text: str) -> float:
    """ "1%" or "0.01" -> 0.01. Raises UsageError `config.max_loss`."""
    try:
        value = float(text.rstrip("% ")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value <= 10:
        raise UsageError("config.max_loss", f"{text!r} is not a loss.", "Write a percentage such as 1%.")
    return value


def parse_bytes(text: str) -> int:
    """ "4GiB", "800MB" or "123" -> bytes. Raises UsageError `config.max_memory`."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BGKMIbgkmi ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        value = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value <= 0:
        raise UsageError("config.max_memory", f"{text!r} is not a size.", "Write for example 4GiB or 800MB.")
    return value
