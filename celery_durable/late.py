"""Rooms that a process which only declares tasks doesn't need: each is imported when something of it is first used.

A worker imports all of them before it forks (``worker.py``), so that nothing is imported in the midst of a body. The
imports for type checkers, which stand beside each use, are also those by which ``make lint`` checks the floors.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class _Late:
    """A module of this package that isn't there yet, or is: who uses it needn't know."""

    def __init__(self, name: str) -> None:
        self._module = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._module), name)


def late(name: str) -> Any:
    """Return what stands for a module of this package until something of it is used, and afterwards."""
    return _Late(f"{__package__}.{name}")
