"""How much is measured, where the settings do not say: a function of the model's parameter count and nothing else.

The numbers in `RunConfig` fit models of up to 30M parameters. Above that the tokens shrink as the model grows, so that
the work stays about the same, down to floors below which a number would mean little; from there on a run takes longer
in proportion to the model. Measured speed never enters: a resumed run must measure what the first one did.
"""

from __future__ import annotations

from autotune.compress import methods
from autotune.config import RunConfig
from autotune.search_space.groups import ModelSpec

FULL = 30_000_000  # parameters up to which nothing is reduced
LARGE = 250_000_000  # above: fp32 weights alone take 1 GB, so models are not kept side by side (see `models`)
# Setting -> (least, in steps of). Two finalists are the fastest and a safe one; 16 documents score a group to 25%.
FLOORS = {
    "calibration_tokens": (2_048, 256),
    "score_tokens": (2_048, 256),
    "score_length": (128, 64),
    "score_draws": (1, 1),
    "search_tokens": (1_536, 256),
    "certify_tokens": (20_000, 1_000),
    "trials": (6, 1),
    "finalists": (2, 1),
}


def parameters(spec: ModelSpec) -> int:
    """How many the model has; a tied output matrix counts once."""
    return spec.dense_bytes // (2 if spec.dtype == "bf16" else 4)


def loss_bytes(spec: ModelSpec, arithmetic: str) -> int:
    """What measuring losses takes with the dense model in memory: its weights, about 2.5 times as much that scoring
    keeps of a batch of documents, and the rest."""
    return 7 * parameters(spec) * (2 if arithmetic == "bf16" else 4) // 2 + 2**30


def sized(name: str, count: int) -> int:
    """A setting's default for a model of `count` parameters."""
    default = int(RunConfig.model_fields[name].default)
    if count <= FULL:
        return default
    least, step = FLOORS[name]
    return min(default, max(least, default * FULL // count // step * step))


def resolve(config: RunConfig, spec: ModelSpec) -> RunConfig:
    """The settings with every size that was not given filled in, as they are written to config.yaml."""
    missing = [name for name in FLOORS if name not in config.model_fields_set]
    chosen: dict[str, object] = {name: sized(name, parameters(spec)) for name in missing}
    if "compression" not in config.model_fields_set:
        sized_for = methods.QUICK if parameters(spec) > LARGE else methods.AUTO
        chosen["compression"] = methods.FAST if config.fast else sized_for
    if "recompress" not in config.model_fields_set:
        method = str(chosen.get("compression", config.compression))
        chosen["recompress"] = methods.takes_hessian(method) and method != methods.QUICK
    return config.model_copy(update=chosen)


def reduced(config: RunConfig, spec: ModelSpec) -> str:
    """What resolved settings measure less of because of the model's size, in words; empty where nothing is."""
    if config.latency_only:
        return ""
    unused = {"trials"} if config.fast or config.minutes is not None else set()
    count = parameters(spec)
    less = []
    for name in (name for name in FLOORS if name not in unused):
        value, default = getattr(config, name), int(RunConfig.model_fields[name].default)
        if value == sized(name, count) < default:
            less.append(f"{name} {value:,} (of {default:,})")
    if count > LARGE and config.compression == methods.QUICK:
        less.append(
            f"compression {methods.QUICK} ({methods.AUTO} is better where weights are sparse, and minutes longer)"
        )
    if not less:
        return ""
    return f"samples are reduced for the size of the model, {count / 1e6:,.0f}M parameters: {', '.join(less)}"
