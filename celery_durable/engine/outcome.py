"""How an attempt can end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .. import states
from ..serialization import Payload
from ..store.rows import Wakers


@dataclass(frozen=True, slots=True)
class Completed:
    """The function returned."""

    value: Any
    payload: Payload
    state: str = states.SUCCESS

    @property
    def ending(self) -> str:
        """What is told of the attempt's end."""
        return self.state


@dataclass(frozen=True, slots=True)
class Failed:
    """The function raised, or can't be replayed (state DEAD)."""

    error: Exception
    payload: Payload
    state: str = states.FAILURE

    @property
    def ending(self) -> str:
        """What is told of the attempt's end."""
        return self.state


@dataclass(frozen=True, slots=True)
class Waiting:
    """The workflow waits without a worker."""

    ending: ClassVar[str] = "suspended"
    reason: str
    seconds: float | None
    wakers: Wakers


@dataclass(frozen=True, slots=True)
class Retried:
    """Celery's own retry of the whole workflow; ``request`` is what its tracer raises."""

    ending: ClassVar[str] = "retried"
    request: Exception
    seconds: float


@dataclass(frozen=True, slots=True)
class Leaving:
    """The worker shuts down; the workflow is handed over."""

    ending: ClassVar[str] = "handed over"


@dataclass(frozen=True, slots=True)
class Stopped:
    """The workflow was cancelled under this attempt."""

    ending: ClassVar[str] = states.CANCELLED


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another worker has the workflow; nothing of this attempt counts any more."""

    ending: ClassVar[str] = "fenced"


Outcome = Completed | Failed | Waiting | Retried | Leaving | Stopped | Superseded
