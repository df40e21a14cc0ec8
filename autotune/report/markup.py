"""HTML that cannot be injected into: text is escaped unless it is `Html`, and only `tag` and `join` make `Html`.

Names, prompts and reasons come from checkpoints and command lines, so no caller has to remember to escape them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = {"meta", "br", "hr"}


class Html(str):
    """Markup that is safe to write as it is."""

    __slots__ = ()


def escape(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def join(parts: Iterable[object], separator: str = "") -> Html:
    return Html(separator.join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """One element; attribute `class_` is written `class`, `data_x` is `data-x`, None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def script_json(text: str) -> str:
    """JSON that cannot end the script element it is in."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
