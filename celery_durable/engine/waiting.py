"""How a step waits: for statements, for its body, for its next try.

A step is written once, as a coroutine. In a thread nothing of it ever waits for an event loop, so that running it
to its end is one plain call; on the loop the same code gives way to others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from ..exceptions import Suspended
from ..store import StepRecord
from ..store.rows import Wakers
from .context import LONGEST_BLIND, Attempt, RunningStep
from .limits import Limit
from .retry import Ended

T = TypeVar("T")

NOTHING = Wakers()


class StepCall(Protocol):
    """What a place needs of a step to run its body."""

    attempt: Attempt
    spec: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def step(self) -> RunningStep:
        """What the body sees of itself."""

    @property
    def limit(self) -> Limit:
        """What interrupts the body."""

    @property
    def hard_limit(self) -> float | None:
        """Seconds after which the process is killed."""

    def call_here(self, body: Callable[..., Any]) -> Ended:
        """Call a body in the calling thread."""

    def ended_by(self, error: BaseException) -> Ended:
        """Return how a try ended by what is no Exception."""


class Waiting(Protocol):
    """What a step needs of the place that it runs in."""

    async def run(self, statement: Callable[[], T]) -> T:
        """Make a statement."""

    async def call(self, step: StepCall, body: Callable[..., Any]) -> Ended:
        """Run a body once."""

    async def save(self, attempt: Attempt, record: StepRecord) -> bool:
        """Record an outcome the fast way; False: that has to be done the slow way."""

    async def pause(self, attempt: Attempt, seconds: float) -> None:
        """Wait in place, but not longer than the run is well."""

    async def park(self, attempt: Attempt, reason: str, seconds: float | None, wakers: Wakers = NOTHING) -> None:
        """Wait without a worker, if nothing else goes on in this attempt, for so long or until something comes."""


class InThread:
    """The calling thread does everything, one after the other."""

    async def run(self, statement: Callable[[], T]) -> T:
        """Make a statement."""
        return statement()

    async def call(self, step: StepCall, body: Callable[..., Any]) -> Ended:
        """Run a body once."""
        return step.call_here(body)

    async def save(self, attempt: Attempt, record: StepRecord) -> bool:
        """Record an outcome the fast way."""
        return attempt.save([record])

    async def pause(self, attempt: Attempt, seconds: float) -> None:
        """Sleep; a shutdown or a cancellation is seen within a second."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, LONGEST_BLIND))
            if attempt.is_stale:
                attempt.look()

    async def park(self, attempt: Attempt, reason: str, seconds: float | None, wakers: Wakers = NOTHING) -> None:
        """Give the worker back."""
        raise attempt.unwind(Suspended(reason, seconds, wakers))


def complete(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits for an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    raise AssertionError("a step in a thread has waited for an event loop")


def must_find_out(attempt: Attempt) -> bool:
    """Tell whether steps that run at once must run one at a time, because one of them may have crashed twice.

    After a single crash that isn't so: most have other reasons. A try that was written before its body was cut short
    by one, or is an error's.
    """
    unsettled = (step for step in list(attempt.history.values()) if step.ok is None)
    return attempt.after_crash and (attempt.crashes > 1 or any(step.tries for step in unsettled))


IN_THREAD = InThread()
