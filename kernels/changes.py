"""A count of changes to models in this process: what was worked out for a model's groups holds as long as it stays."""

from __future__ import annotations

_count = 0


def note() -> None:
    """Something was changed that others may have worked with: a group's kernels, a norm's weight, a cache's format."""
    global _count
    _count += 1


def count() -> int:
    return _count
