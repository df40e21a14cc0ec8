"""Every error autotune raises on purpose.

    AutotuneError                 exit 1
    ├── UsageError                exit 2    a flag or argument that makes no sense
    ├── InputError                exit 3    a file, model, plan, target or scheme that cannot be used
    ├── InfeasibleError           exit 4    no configuration meets the budget; carries the nearest one
    ├── DeviceError               exit 5    the device is missing, too small or misbehaves
    ├── VerificationError         exit 6    nothing passed certification, or a result broke its promise
    └── BusyError                 exit 75   another run holds the folder; try again later

Each carries a stable `code` such as `model.pickle`, a message that says what and where, and `hint`: what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutotuneError(Exception):
    """Base class. `code` is stable across versions; `hint` is one sentence on what to do next."""

    exit_code = 1

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.code}: {self.message}"
        return f"{text} {self.hint}" if self.hint else text


class UsageError(AutotuneError):
    exit_code = 2


class InputError(AutotuneError):
    exit_code = 3


class InfeasibleError(AutotuneError):
    exit_code = 4


class DeviceError(AutotuneError):
    exit_code = 5


class VerificationError(AutotuneError):
    exit_code = 6


class BusyError(AutotuneError):
    exit_code = 75


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the closest known words, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(name) for name in close)}?"
    return f"Known: {', '.join(names)}."
