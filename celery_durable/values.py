"""What is different each time, kept so that every replay sees the same: ``now``, ``uuid4``, ``random``."""

from __future__ import annotations

import random as randomness
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, TypeVar

from .callables import Callables
from .engine.context import current_attempt
from .engine.step import StepSpec

T = TypeVar("T")


def now() -> datetime:
    """Return the time, in UTC by the database's clock; in a workflow the same on every replay."""
    return datetime.fromisoformat(_kept("now", _now))


def uuid4() -> uuid.UUID:
    """Return a random UUID; in a workflow the same on every replay."""
    return uuid.UUID(_kept("uuid4", lambda: str(uuid.uuid4())))


def random() -> float:
    """Return a random number from 0 to 1; in a workflow the same on every replay."""
    return _kept("random", randomness.random)


def _now() -> str:
    attempt = current_attempt()
    moment = None if attempt is None else attempt.now()
    return (moment or datetime.now(timezone.utc)).astimezone(timezone.utc).isoformat()


def _kept(name: str, make: Callable[[], T]) -> T:
    value: Any = Callables(StepSpec(f"durable.{name}"), make, make).call((), {})
    return value
