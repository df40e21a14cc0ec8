"""One colour and one short label per scheme, for every picture, page and cell.

Hue says the family (blue int8, orange int4, red int4 with int8 activations, green fp8, purple 2:4, grey dense),
lightness the member, so that families stay apart under the common colour blindnesses and members in grey print. Schemes
that are searched only when named take their places on a ramp.
"""

from __future__ import annotations

import colorsys

INK = "#1f2430"
MUTED = "#6b7280"
GRID = "#e3e6eb"
CHOSEN = "#c8102e"
OTHER = "#aab0ba"
KEPT = "#dfe2e7"  # bytes that no scheme touches

COLOURS: dict[str, str] = {
    "fp32": "#9aa1ac",
    "bf16": "#bcc1ca",
    "w8a8-int8": "#2f6db5",
    "w8a16-int8": "#7db3e8",
    "w4a16-int4-g32": "#f7cf78",
    "w4a16-int4-g64": "#ee9b33",
    "w4a16-int4-g128": "#b95a0a",
    "w4a8-int4-g32": "#f6b3a6",
    "w4a8-int4-g64": "#e0705a",
    "w4a8-int4-g128": "#9c2f1f",
    "w8a8-fp8": "#1b9e88",
    "2:4": "#c0a5dd",
    "2:4+w8a8-int8": "#6f4fa5",
    "2:4+w8a16-int8": "#e6dcf2",
    "2:4+w8a8-fp8": "#d772b2",
    "2:4+w4a16-int4-g128": "#7a1f4b",
    "2:4+w4a8-int4-g64": "#9a86b8",
    "2:4+w4a8-int4-g128": "#3f2a63",
}


def _ramp(hue: float, *names: str) -> dict[str, str]:
    """Names -> shades of a hue, light to dark, without the middle where neither ink nor white is easy to read."""
    shades = {}
    for place, name in enumerate(names):
        share = place / max(1, len(names) - 1)
        lightness = 0.86 - 0.32 * share if share < 0.6 else 0.52 - 0.32 * share
        channels = colorsys.hls_to_rgb(hue, lightness, 0.55)
        shades[name] = "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
    return shades


def _grouped(bits: int, *kinds: str) -> list[str]:
    return [f"w{bits}a16-int{bits}-g{size}{kind}" for size in (32, 64, 128) for kind in kinds]


COLOURS |= _ramp(0.55, *_grouped(8, "", "-asym")) | _ramp(0.13, *_grouped(4, "-asym"))
COLOURS |= _ramp(0.25, *_grouped(3, "", "-asym")) | _ramp(0.03, *_grouped(2, "", "-asym"))
COLOURS |= _ramp(0.44, "w8a16-fp8", "w8a8-fp8-tensor", "w8a8-fp8-128x128")
COLOURS |= _ramp(0.9, "w4a16-nf4-g64", "w4a16-mxfp4", "w4a16-nvfp4")
COLOURS |= _ramp(0.68, "4:8", "4:8+w8a16-int8", "4:8+w4a16-int4-g128")
COLOURS |= _ramp(0.8, "50%", "50%+w8a16-int8", "50%+w4a16-int4-g128")
UNKNOWN = "#4a5160"  # a scheme from outside this version

_SHORT = (
    ("w8a8-int8", "int8"),
    ("w8a16-int8", "int8-w"),
    ("w8a8-fp8", "fp8"),
    ("w8a16-fp8", "fp8-w"),
    ("w4a16-", ""),
    ("w3a16-", ""),
    ("w2a16-", ""),
    ("w4a8-int4", "int4a8"),
    ("2:4+", "2:4 "),
    ("4:8+", "4:8 "),
    ("50%+", "50% "),
)

# (fraction of the most saved, colour) and the colour of a group that became slower
SAVED = ((0.0, "#f3f6f5"), (0.25, "#b9dccf"), (0.5, "#5fb39a"), (0.75, "#1b7f6b"), (1.0, "#0b4f44"))
SLOWER = "#f4c9c4"


def colour(scheme: str) -> str:
    return COLOURS.get(scheme, UNKNOWN)


def short(scheme: str) -> str:
    """A label that fits a cell: `w4a16-int4-g64` -> `int4-g64`; int8-w quantizes weights only."""
    for long, brief in _SHORT:
        scheme = scheme.replace(long, brief)
    return scheme


def text_on(background: str) -> str:
    """Ink or white, whichever contrasts more with a "#rrggbb" background (WCAG relative luminance)."""
    light = luminance(background)
    on_white, on_ink = 1.05 / (light + 0.05), (light + 0.05) / (luminance(INK) + 0.05)
    return "#ffffff" if on_white > on_ink else INK


def luminance(value: str) -> float:
    channels = [int(value[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ordered(schemes: set[str]) -> list[str]:
    """Schemes in the palette's order, unknown ones last: the order of every legend."""
    order = list(COLOURS)
    return sorted(schemes, key=lambda name: (order.index(name) if name in order else len(order), name))
