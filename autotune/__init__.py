"""autotune: hardware-aware search for model compression.

Given a model, a device and an accuracy budget, find layer by layer the sparsity pattern and bit-width that are fastest
on that device, prove that the result stays inside the budget, and hand it over to the tools that will run it.

`import autotune` is light: torch is loaded only when `apply` or `load` is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["Plan", "__version__", "apply", "load"]

# A checkout whose folder links were lost (some archives and file systems drop them) still finds the mapped folders.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and not (_ROOT / "autotune" / "kernels").is_dir():
    __path__.append(str(_ROOT))

_LAZY = {"Plan": "autotune.plan", "apply": "autotune.runtime", "load": "autotune.runtime"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'autotune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
