"""Linear layers of real models as (outputs, inputs), q/k/v and gate/up fused, and odd ones for correctness."""

from __future__ import annotations

Shape = tuple[int, int]  # outputs, inputs


def _model(hidden: int, inner: int, heads: int, shared: int) -> dict[str, Shape]:
    """`heads` and `shared`: widths of the query heads and of the key (or value) heads together."""
    return {
        "qkv": (heads + 2 * shared, hidden),
        "o": (hidden, heads),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


# From the config.json of each.
MODELS = {
    "llama-3.1-8b": _model(4096, 14336, 4096, 1024),
    "llama-3.2-1b": _model(2048, 8192, 2048, 512),
    "llama-3.1-70b": _model(8192, 28672, 8192, 1024),
    "qwen2.5-7b": _model(3584, 18944, 3584, 512),
    "qwen3-0.6b": _model(1024, 3072, 2048, 1024),
    "mistral-nemo-12b": _model(5120, 14336, 4096, 1024),
}
SHAPES: dict[str, Shape] = {
    f"{model}.{role}": shape for model, roles in MODELS.items() for role, shape in roles.items()
}
LARGE = ("8192x8192", "28672x8192")  # decode targets are stated for these
# Least sizes, odd multiples of them, and tiles that do not divide: 16 shapes, so that 40 are checked in all.
ODD: tuple[Shape, ...] = (
    (16, 128),
    (32, 128),
    (48, 384),
    (80, 640),
    (96, 256),
    (160, 1152),
    (208, 384),
    (272, 2176),
    (336, 896),
    (512, 128),
    (528, 4224),
    (1040, 1152),
    (1056, 3456),
    (2064, 640),
    (4112, 896),
    (128, 16512),
)


def named(text: str) -> dict[str, Shape]:
    """Shapes by full name, by model, or as "NxK", comma-separated.

    Raises:
        ValueError: naming what is known.
    """
    found: dict[str, Shape] = {}
    for name in text.split(","):
        outputs, _, inputs = name.partition("x")
        if outputs.isdigit() and inputs.isdigit():
            found[name] = (int(outputs), int(inputs))
            continue
        matching = {key: shape for key, shape in SHAPES.items() if key == name or key.startswith(f"{name}.")}
        if not matching:
            raise ValueError(f"{name!r} is no shape; there are {', '.join(SHAPES)}, and NxK")
        found |= matching
    return found
